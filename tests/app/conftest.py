"""Makers that the tests of this folder share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any


def inspected(folder: str, *options: str) -> list[Any]:
    """What W&B's own reader finds in a run."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", *options, folder]
    environment = os.environ | {"WANDB_ERROR_REPORTING": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    return [json.loads(line) for line in ([done.stdout] if options else done.stdout.splitlines())]
