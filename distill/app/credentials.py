"""Secrets, known by their names and by their forms, so that none is written down."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

_WORDS = "key|token|secret|password|credential|apikey|passwd|passphrase|jwt"
_NAME = re.compile(rf"(^|[._-])({_WORDS})s?$", re.IGNORECASE)
_FORMS = (
    r"\bsk-(?=[\w-]*\d)[\w-]{20,}",  # OpenAI, Anthropic and others
    r"\bhf_[A-Za-z0-9]{16,}",
    r"\bwandb_v\d+_\w{16,}",
    # W&B. Git's commits look so too: of those, model@commit and the folder of a downloaded model are let through.
    r"(?<![0-9a-fA-F@/])[0-9a-f]{40}(?![0-9a-fA-F])",
    r"\b(AKIA|ASIA)[0-9A-Z]{16}\b",
    r"\bgh[a-z]_[A-Za-z0-9]{20,}",
    r"\bgithub_pat_\w{20,}",
    r"\bAIza[\w-]{30,}",
    r"\bxox[a-z]-[\w-]{10,}",
    r"-----BEGIN [A-Z ]*PRIVATE KEY",
    r"://[^/\s@]*:[^/\s@]+@",  # user:password@host
)
_FORM = re.compile("|".join(_FORMS))
_ENVIRONMENT = re.compile(r"\$\{\s*oc\.env\s*:\s*([^,}]*)")
_READABLE = re.compile(
    r"(DISTILL|SLURM)_\w+|(LOCAL_|NODE_)?RANK|WORLD_SIZE|CUDA_VISIBLE_DEVICES|HOME|HOSTNAME|LOGNAME|PWD|TMPDIR|USER"
)
READABLE = "DISTILL_…, SLURM_…, RANK, WORLD_SIZE, CUDA_VISIBLE_DEVICES, HOME, HOSTNAME, LOGNAME, PWD, TMPDIR, USER"
HIDDEN = "hidden"  # what stands in the place of a secret
REMEDY = (
    "what is configured is logged, so it may hold no secret; use the environment, where OPENAI_API_KEY, HF_TOKEN, "
    "WANDB_API_KEY, AWS_SECRET_ACCESS_KEY and their like are found"
)


def is_secret_name(name: str) -> bool:
    """Whether what goes by this name is a secret: api_key is, max_tokens_each is not."""
    return bool(_NAME.search(name))


def looks_secret(text: str) -> bool:
    """Whether a text holds what looks like a key of a known service, or a URL with a password."""
    return bool(_FORM.search(text))


def is_readable(variable: str) -> bool:
    """Whether a configuration may read this variable of the environment."""
    return bool(_READABLE.fullmatch(variable)) and not is_secret_name(variable)


def texts(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a nested value, with its dotted path."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from texts(item, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list):
        for item in value:
            yield from texts(item, path)
    elif isinstance(value, str):
        yield path, value


def disclosures(found: Iterable[tuple[str, str]]) -> list[str]:
    """What is wrong with texts of a configuration that are secrets, or would read them; never the texts themselves."""
    problems = []
    for path, text in found:
        variables = [name.strip(" '\"") for name in _ENVIRONMENT.findall(text)]
        hidden = [name for name in variables if not is_readable(name)]
        problems += [f"{path}: a configuration may not read {name:.60}, only {READABLE}" for name in hidden]
        if not hidden and (looks_secret(text) or (text not in ("", HIDDEN) and is_secret_name(path))):
            problems.append(f"{path}: {REMEDY}")
    return list(dict.fromkeys(problems))
