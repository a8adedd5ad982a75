"""Models of the Hugging Face hub in its local cache. Weights are downloaded only when they are needed.

The hub lists the files of a commit with the hash of each weight file, and its client keeps that list. So a model is
known by its weights before they are here.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from distill.app.files import Json
from distill.errors import ConfigError

_FILES = ["README.md", "*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
_WEIGHTS = "*.safetensors"
_COMMIT = re.compile(r"[0-9a-f]{40}")


def download(name: str, *, with_weights: bool) -> Path:
    """Return the folder of `owner/name` or `owner/name@revision`; raise ConfigError if it cannot be had.

    Without weights, only those are downloaded that the hub lists without a hash, which are small.
    """
    repository, _, revision = name.partition("@")
    try:
        folder = _snapshot(repository, revision or None, with_weights=with_weights)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"model {name!r} is not a local folder, and could not be downloaded from the hub ({_reason(error)}). "
            "Use a local folder or the default, or check the id and the network."
        ) from None
    if not with_weights and not weight_hashes(folder):
        download_weights(folder)
    return folder


def download_weights(folder: Path) -> None:
    """Download the weights that a folder of the hub's cache lacks; do nothing in other folders."""
    repository = _repository(folder)
    if repository is None:
        return
    try:
        _snapshot(repository, folder.name, with_weights=True, cache=folder.parents[2])
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"the weights of {repository} are needed and could not be downloaded from the hub ({_reason(error)}). "
            "Check the network, or use a local folder"
        ) from None


def lacks_weights(folder: Path) -> bool:
    """Whether this is a folder of the hub's cache that lacks some of its weights."""
    return any(not (folder / name).exists() for name in weight_hashes(folder))


def weight_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each weight file of a folder of the hub's cache, here or not; empty if they are not known."""
    files = {name: file for name, file in _listed(folder).items() if name.endswith(_WEIGHTS[1:]) and "/" not in name}
    hashes = {name: str(file["lfs_sha256"]) for name, file in files.items() if file.get("lfs_sha256")}
    return hashes if len(hashes) == len(files) else {}


def _listed(folder: Path) -> dict[str, Json]:
    """The client's list of the files of a commit; empty if it kept none, as versions before 2.4, or in another form.

    It is read from its file, since `get_cached_repo_tree`, the public way, leaves out the hashes.
    """
    if _repository(folder) is None:
        return {}
    try:
        listing = json.loads((folder.parents[1] / "trees" / f"{folder.name}.json").read_text())
        return {name: dict(file) for name, file in listing["files"].items()}
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return {}


def _repository(folder: Path) -> str | None:
    """Id of the model in `models--<owner>--<name>/snapshots/<commit>`; None for any other folder."""
    parts = folder.parts[-3:]
    if len(parts) < 3 or parts[1] != "snapshots" or not _COMMIT.fullmatch(parts[2]):
        return None
    kind, *names = parts[0].split("--")
    return "/".join(names) if kind == "models" and names else None


def _snapshot(repository: str, revision: str | None, *, with_weights: bool, cache: Path | None = None) -> Path:
    ignored = None if with_weights else [_WEIGHTS]
    folder = snapshot_download(
        repository, revision=revision, cache_dir=cache, allow_patterns=_FILES, ignore_patterns=ignored
    )
    return Path(folder)


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
