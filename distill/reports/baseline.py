"""The command that trains the missing baseline: a student on labels alone or, without any, on the teacher's answers."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from distill.reports.arms import BASELINE_LOSSES
from distill.reports.runs import Run

PROGRAM = ("python", "-m", "distill.train")
MULTIRUN = ("-m", "--multirun")
RUN_FOLDER = re.compile(r"(hydra\.(?:run|sweep)\.dir)=(.*)")


def baseline_command(runs: Sequence[Run]) -> str:
    """Return a shell command that repeats the runs of one arm with all their settings, but as a baseline."""
    command = runs[-1].facts.get("command") if runs else None
    parts = [str(part) for part in command[1:]] if isinstance(command, list) else []
    (loss,) = BASELINE_LOSSES[not runs or runs[-1].has_labels]
    # The losses are replaced; a setting of another loss would have no place in the configuration.
    of_losses = re.compile(rf"[+~]*loss(@[^=]*)?(=|$)|[+~]*loss\.(?!{loss}\.)")
    overrides = [_elsewhere(part) for part in parts if not of_losses.match(part)]
    seeds = list(dict.fromkeys(run.seed for run in runs))
    if len(seeds) > 1 and not set(MULTIRUN) & set(overrides):
        overrides = ["-m", *(part for part in overrides if not part.startswith("seed=")), f"seed={','.join(seeds)}"]
    flags = [part for part in overrides if part in MULTIRUN]
    return shlex.join([*PROGRAM, *flags, f"loss=[{loss}]", *(part for part in overrides if part not in MULTIRUN)])


def _elsewhere(override: str) -> str:
    """Return an override that names the run's folder with a folder beside it, so that the run stays as it is."""
    return RUN_FOLDER.sub(lambda parts: f"{parts[1]}={parts[2].rstrip('/')}-baseline", override)
