"""Recognise secrets by their names and formats, so that none is written to a file or a log."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

_WORDS = "key|token|secret|password|credential|apikey|passwd|passphrase|jwt"
_SECRET_NAME = re.compile(rf"(^|[._-])({_WORDS})s?$", re.IGNORECASE)
_COUNT_NAME = re.compile(r"(^|[._-])(max|min|num)_(\w+_)?tokens$", re.IGNORECASE)
_SECRET_FORMATS = (
    r"\bsk-(?=[\w-]*\d)[\w-]{20,}",  # OpenAI, Anthropic and others
    r"\bhf_[A-Za-z0-9]{16,}",
    r"\bwandb_v\d+_\w{16,}",
    # W&B. Git commits have the same format; model@commit and the folder of a downloaded model are allowed.
    r"(?<![0-9a-fA-F@/])[0-9a-f]{40}(?![0-9a-fA-F])",
    r"\b(AKIA|ASIA)[0-9A-Z]{16}\b",
    r"\bgh[a-z]_[A-Za-z0-9]{20,}",
    r"\bgithub_pat_\w{20,}",
    r"\bAIza[\w-]{30,}",
    r"\bxox[a-z]-[\w-]{10,}",
    r"-----BEGIN [A-Z ]*PRIVATE KEY",
    r"://[^/\s@]*:[^/\s@]+@",  # user:password@host
)
_SECRET_FORMAT = re.compile("|".join(_SECRET_FORMATS))
_ENVIRONMENT_VARIABLE = re.compile(r"\$\{\s*oc\.env\s*:\s*([^,}]*)")
_READABLE = re.compile(
    r"(DISTILL|SLURM)_\w+|(LOCAL_|NODE_)?RANK|WORLD_SIZE|CUDA_VISIBLE_DEVICES|HOME|HOSTNAME|LOGNAME|PWD|TMPDIR|USER"
)
READABLE = "DISTILL_…, SLURM_…, RANK, WORLD_SIZE, CUDA_VISIBLE_DEVICES, HOME, HOSTNAME, LOGNAME, PWD, TMPDIR, USER"
HIDDEN = "hidden"  # replaces a secret
REMEDY = (
    "configurations are logged, so they must not contain secrets; set an environment variable instead, such as "
    "OPENAI_API_KEY, HF_TOKEN, WANDB_API_KEY or AWS_SECRET_ACCESS_KEY"
)


def is_secret_name(name: str) -> bool:
    """Whether a key with this name holds a secret: api_key does; max_tokens_each and max_new_tokens do not."""
    return bool(_SECRET_NAME.search(name)) and not _COUNT_NAME.search(name)


def looks_secret(text: str) -> bool:
    """Whether a text contains what looks like a key of a known service, or a URL with a password."""
    return bool(_SECRET_FORMAT.search(text))


def is_readable(variable: str) -> bool:
    """Whether a configuration may read this environment variable."""
    return bool(_READABLE.fullmatch(variable)) and not is_secret_name(variable)


def strings(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """All strings in a nested value, each with its dotted path."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from strings(item, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list):
        for item in value:
            yield from strings(item, path)
    elif isinstance(value, str):
        yield path, value


def secret_problems(values: Iterable[tuple[str, str]]) -> list[str]:
    """A problem for each string of a configuration that is a secret or would read one; never quotes the secret."""
    problems = []
    for path, text in values:
        variables = [name.strip(" '\"") for name in _ENVIRONMENT_VARIABLE.findall(text)]
        unreadable = [name for name in variables if not is_readable(name)]
        problems += [f"{path}: a configuration may not read {name:.60}, only {READABLE}" for name in unreadable]
        if not unreadable and (looks_secret(text) or (text not in ("", HIDDEN) and is_secret_name(path))):
            problems.append(f"{path}: {REMEDY}")
    return list(dict.fromkeys(problems))
