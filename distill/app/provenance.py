"""The origin of a run: command, start time, versions, commit, machine."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from distill import __version__

_REPOSITORY = Path(__file__).parents[2]


def provenance() -> dict[str, Any]:
    """The origin of a run: command, start time, versions, commit, machine."""
    import torch  # here, because `commit` is also called where torch is not loaded

    from distill.app.machine import gpu_name

    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": __version__,
        "commit": commit(),
        "is_dirty": bool(_git("status", "--porcelain")),
        "packages": {name: version(name) for name in ("torch", "lightning", "transformers", "wandb")},
        "device": gpu_name() or cpu,
    }


def commit() -> str | None:
    """The Git commit of this code; None if unknown."""
    return os.environ.get("DISTILL_COMMIT") or _git("rev-parse", "HEAD")


def _git(*arguments: str) -> str | None:
    if not (_REPOSITORY / ".git").exists() or shutil.which("git") is None:
        return None
    done = subprocess.run(["git", "-C", str(_REPOSITORY), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
