"""What identifies a model: hashes of its weights and configuration, independent of paths and versions.

Hashing the weights of a large model takes minutes, so the hash of a file is kept and reused while the file has the same
path, size and time of change. The hub lists the hashes of its files, and a file in its cache is named after its hash:
neither is read at all.

Weights may be deleted once a cache is complete: a folder with its configuration unchanged and no weights left is the
model whose hashes were kept. The tokenizer is part of the prompts' fingerprint and is still compared.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from distill.app.console import say
from distill.app.files import Json, sha256, write_json
from distill.models import hub

_SHA256 = re.compile(r"[0-9a-f]{64}")
# A file that was changed a moment ago may change again within the resolution of the file system's clock.
_SETTLED_SECONDS = 2.0


def fingerprint(folder: Path, hashes: Path) -> dict[str, str]:
    """Return hashes of the weights and the configuration, which determine a model's output.

    `hashes` is the folder in which the hashes of files are kept.
    """
    kept_at = hashes / f"{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]}.json"
    config = _config_hash(folder)
    with _locked(kept_at.with_suffix(".lock")):
        files = _files(folder, config, kept_at)
    joined = "".join(files[name]["sha256"] for name in sorted(files))
    return {"weights": hashlib.sha256(joined.encode()).hexdigest(), "config": config}


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let one process hash a model while the others of this run wait for its hashes.

    On a file system without locks every process hashes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _files(folder: Path, config: str, kept_at: Path) -> dict[str, Json]:
    """Return the entries of the weights, and keep them."""
    kept = _read(kept_at)
    files = {name: _listed_entry(listed) for name, listed in hub.weight_hashes(folder).items()}
    if not files:
        weights = sorted(folder.glob("*.safetensors"))
        files = {file.name: _entry(file, kept["files"].get(file.name, {})) for file in weights}
    if not files and kept["files"] and kept["config"] == config:
        say(f"{folder} has no weights left; it is taken for the model whose hashes are in {kept_at}")
        files = kept["files"]
    present = {"folder": str(folder), "config": config, "files": files}
    if present != kept and all(_is_settled(entry) for entry in files.values()):
        write_json(kept_at, present)
    return files


def _entry(file: Path, kept: Mapping[str, object]) -> Json:
    """Return size, time of change and hash of a file, whose hash is computed unless it is known."""
    if file.is_symlink() and file.readlink().parent.name == "blobs" and _SHA256.fullmatch(file.readlink().name):
        return _listed_entry(file.readlink().name)
    status = file.stat()
    known = {"bytes": status.st_size, "changed_ns": status.st_mtime_ns}
    if known.items() <= kept.items():
        return dict(kept)
    return known | {"sha256": sha256(file)}


def _listed_entry(listed_sha256: str) -> Json:
    """Entry of a file that is not read: a commit of the hub never changes."""
    return {"bytes": 0, "changed_ns": 0, "sha256": listed_sha256}


def _is_settled(entry: Mapping[str, int]) -> bool:
    return time.time() - entry["changed_ns"] / 1e9 > _SETTLED_SECONDS


def _config_hash(folder: Path) -> str:
    settings = json.loads((folder / "config.json").read_text())
    for irrelevant_key in ("transformers_version", "_name_or_path"):
        settings.pop(irrelevant_key, None)
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> Json:
    """Return what was kept; nothing if the file is missing or damaged, so that the hashes are computed again."""
    try:
        kept = json.loads(path.read_text())
        is_valid = all(_SHA256.fullmatch(entry["sha256"]) for entry in kept["files"].values()) and "config" in kept
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        is_valid = False
    return kept if is_valid else {"config": None, "files": {}}
