"""Runs in Weights & Biases, and progress on the screen. The one importer of wandb."""

from __future__ import annotations

import csv
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import uuid
import warnings
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Protocol, final, runtime_checkable

import lightning
import torch
import wandb
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

from distill import __version__
from distill.records import ConfigError, Group
from distill.runs import visible

_PATIENCE_SECONDS = 30  # to reach W&B; a run does not wait longer for being watched
_HERE = Path(__file__).parent.parent
_MOST_OF_A_NAME = 128  # characters, by W&B's rule
_MOST_CHARACTERS = 10_000  # of what is said at once


@runtime_checkable
class Tracking(Protocol):
    """Where a run is followed from elsewhere. The run folder holds everything without it."""

    def start(self, folder: Path, *, name: str, group: str | None, job_type: str, config: Mapping[str, Any]) -> None:
        """Begin a run of its own."""
        ...

    def loggers(self) -> list[Logger]:
        """What Lightning logs to."""
        ...

    def summary(self, values: Mapping[str, Any]) -> None:
        """Note final values."""
        ...

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Note a table; all rows have the keys of the first."""
        ...

    def page(self, name: str, path: Path) -> None:
        """Note a page of HTML."""
        ...

    def artifact(self, name: str, kind: str, folder: Path, metadata: Mapping[str, Any]) -> None:
        """Note a folder that the run made or used, by reference: nothing is copied."""
        ...

    def finish(self, exit_code: int) -> dict[str, str]:
        """End the run; return its mode, where it is and, for an offline run, the command that uploads it."""
        ...


@final
class NoTracking:
    """No tracking."""

    def start(self, folder: Path, *, name: str, group: str | None, job_type: str, config: Mapping[str, Any]) -> None:
        """Nothing to begin."""

    def loggers(self) -> list[Logger]:
        """None."""
        return []

    def summary(self, values: Mapping[str, Any]) -> None:
        """Not noted."""

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Not noted."""

    def page(self, name: str, path: Path) -> None:
        """Not noted."""

    def artifact(self, name: str, kind: str, folder: Path, metadata: Mapping[str, Any]) -> None:
        """Not noted."""

    def finish(self, exit_code: int) -> dict[str, str]:
        """Nothing to end."""
        return {"mode": "off", "where": "", "upload": ""}


@final
class WandbTracking:
    """A W&B run per training run; offline where no key is set, unless WANDB_MODE says otherwise."""

    def __init__(
        self,
        *,
        project: str,
        mode: Literal["auto", "online", "offline"],
        entity: str | None,
        group: str | None,
        tags: list[str],
    ) -> None:
        """`group` overrides the name of the sweep."""
        self._project, self._entity, self._group, self._tags = project, entity, group, tags
        self._mode = mode
        self._run: Any = None

    def start(self, folder: Path, *, name: str, group: str | None, job_type: str, config: Mapping[str, Any]) -> None:
        """Begin a W&B run that writes below `folder` alone."""
        home = folder / "wandb"
        home.mkdir(parents=True, exist_ok=True)
        for variable in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_ARTIFACT_DIR"):
            os.environ.setdefault(variable, str(home))
        begin = partial(
            wandb.init,
            project=self._project,
            entity=self._entity,
            dir=folder,
            id=_run_id(home),
            resume="allow",
            name=name,
            group=self._group or group,
            job_type=job_type,
            tags=self._tags,
            config=dict(config),
            reinit="finish_previous",
            settings=wandb.Settings(
                silent=True,
                console="off",
                x_disable_stats=True,
                init_timeout=_PATIENCE_SECONDS,
                disable_git=True,  # else the address of a repository is sent as it is, with a token in the user's place
                git_commit=_commit(),
            ),
        )
        try:
            self._run = begin(mode=self._chosen_mode())
        except wandb.errors.CommError as error:
            say(f"W&B cannot be reached ({error}); this run is tracked offline, and can be uploaded later")
            wandb.teardown()  # its service still holds the run that it could not begin
            self._run = begin(mode="offline")
        except wandb.Error as error:
            raise ConfigError(f"W&B could not start: {error}. Set tracking.mode=offline or tracking=off") from None
        # Parts of a run that broke off share this axis, whatever each counts for itself.
        self._run.define_metric("*", step_metric="trainer/global_step", step_sync=True)

    def loggers(self) -> list[Logger]:
        """The run, as Lightning's logger."""
        return [WandbLogger(experiment=self._run)]

    def summary(self, values: Mapping[str, Any]) -> None:
        """Final values, under the names of the config."""
        self._run.summary.update(dict(values))

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """A table of plain values."""
        if rows:
            columns: list[str | int] = [*rows[0]]
            data = [[row[str(column)] for column in columns] for row in rows]
            self._run.log({name: wandb.Table(columns=columns, data=data, allow_mixed_types=True)})

    def page(self, name: str, path: Path) -> None:
        """The page whole, with its plots."""
        self._run.log({name: wandb.Html(path.read_text(encoding="utf-8"), inject=False)})

    def artifact(self, name: str, kind: str, folder: Path, metadata: Mapping[str, Any]) -> None:
        """A reference to the folder's files; a cache is what the run used, a model what it made."""
        artifact = wandb.Artifact(artifact_name(name), kind, metadata=dict(metadata))
        artifact.add_reference(f"file://{folder.resolve()}", checksum=True)
        if kind == "cache" and not self._run.offline:
            # Offline, W&B cannot say that a run used something; then the cache is logged beside the model.
            self._run.use_artifact(artifact)
        else:
            self._run.log_artifact(artifact)

    def finish(self, exit_code: int) -> dict[str, str]:
        """End the run, whatever became of it."""
        if self._run is None:
            return {"mode": "off", "where": "", "upload": ""}
        run, self._run = self._run, None
        folder = str(Path(run.dir).parent)
        run.finish(exit_code=exit_code)
        if run.offline:
            return {"mode": "offline", "where": folder, "upload": f"wandb sync {folder}"}
        return {"mode": "online", "where": run.url, "upload": ""}

    def _chosen_mode(self) -> Literal["online", "offline", "disabled", "shared"]:
        asked = os.environ.get("WANDB_MODE")
        if asked in ("online", "offline", "disabled", "shared"):
            return asked  # type: ignore[return-value]
        if self._mode == "auto":
            return "online" if os.environ.get("WANDB_API_KEY") else "offline"
        return self._mode


@final
class Curves(CSVLogger):
    """A run's `metrics.csv`. Where the run goes on from a checkpoint, the lines of the steps before it stay."""

    def __init__(self, folder: Path) -> None:
        """The folder is the run's, and holds other files."""
        super().__init__(folder, name="", version="")

    def go_on(self, num_steps: int) -> None:
        """Keep what was logged in the steps that are done."""
        path, rows = Path(self.log_dir) / "metrics.csv", list[dict[str, Any]]()
        if path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                rows = [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Experiment logs directory")
            self.experiment.metrics = [row for row in rows if int(row["step"]) < num_steps]  # in the place of the file


def _run_id(home: Path) -> str:
    """The same for all parts of a run that broke off."""
    path = home / "run_id"
    if not path.is_file():
        path.write_text(uuid.uuid4().hex[:8])
    return path.read_text()


def artifact_name(name: str) -> str:
    """A name that W&B takes."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", name)[:_MOST_OF_A_NAME]


def progress(unit: str, total: int) -> Callback:
    """A bar in a terminal, plain lines in a log."""
    return TQDMProgressBar() if sys.stderr.isatty() else ProgressLines(unit, total)


def is_first_process() -> bool:
    """Whether this one writes and speaks for all that train or annotate together."""
    return not any(int(os.environ.get(name) or 0) for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


def say(text: str) -> None:
    """A line for whoever watches; what a command gives goes to standard output, this does not."""
    if is_first_process():
        print(visible(text, _MOST_CHARACTERS), file=sys.stderr, flush=True)


@final
class ProgressLines(Callback):
    """A line every few seconds: how much is done, how fast, how long it will take."""

    def __init__(self, unit: str, total: int, every_seconds: float = 15) -> None:
        """`unit` is what is counted, in the plural."""
        self._unit, self._total, self._every = unit, total, every_seconds
        self._start = self._last = 0.0
        self._done = 0

    def on_predict_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._begin()

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._begin()

    def on_predict_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Group,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._done += len(batch.requests)
        self._line(self._total, {})

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._done = trainer.global_step
        self._line(self._total, {k: v for k, v in trainer.logged_metrics.items() if "train/" in k and "rate" not in k})

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        values = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        told = ", ".join(f"{name} {value:.3f}" for name, value in values.items())
        say(f"  step {trainer.global_step}: {told}")

    def _begin(self) -> None:
        self._start = self._last = time.monotonic()
        self._done = 0

    def _line(self, total: int, losses: Mapping[str, Any]) -> None:
        now = time.monotonic()
        if now - self._last < self._every and self._done < total:
            return
        self._last = now
        rate = self._done / max(1e-9, now - self._start)
        left = (total - self._done) / max(1e-9, rate)
        told = f"  {self._done} of {total} {self._unit}, {rate:.1f}/s, {left:.0f} s left"
        # Only here are the values read, for which the host waits for the device.
        say(", ".join([told, *(f"{name.removeprefix('train/')} {float(value):.3f}" for name, value in losses.items())]))


def provenance() -> dict[str, Any]:
    """What produces a run: command, time, versions, commit, machine."""
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": __version__,
        "commit": _commit(),
        "is_dirty": bool(_git("status", "--porcelain")),
        "packages": {name: version(name) for name in ("torch", "lightning", "transformers", "wandb")},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu,
    }


def _commit() -> str | None:
    return os.environ.get("DISTILL_COMMIT") or _git("rev-parse", "HEAD")


def _git(*arguments: str) -> str | None:
    if not (_HERE / ".git").exists() or shutil.which("git") is None:
        return None
    done = subprocess.run(["git", "-C", str(_HERE), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
