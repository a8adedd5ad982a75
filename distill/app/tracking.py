"""Runs in Weights & Biases, and progress on the screen. The one importer of wandb."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, final, runtime_checkable

from distill.app.console import say
from distill.app.provenance import commit
from distill.errors import ConfigError

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

_PATIENCE_SECONDS = 30  # to reach W&B; a run does not wait longer for being watched
_MOST_OF_A_NAME = 128  # characters, by W&B's rule


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
        import wandb  # takes a second, and only a run that W&B tracks needs it

        home = folder / "wandb"
        home.mkdir(parents=True, exist_ok=True)
        for variable in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_ARTIFACT_DIR"):
            os.environ.setdefault(variable, str(home))
        os.environ.setdefault("WANDB_SILENT", "true")  # the setting below does not reach what artifacts print
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
                git_commit=commit(),
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
        from lightning.pytorch.loggers import WandbLogger

        return [WandbLogger(experiment=self._run)]

    def summary(self, values: Mapping[str, Any]) -> None:
        """Final values, under the names of the config."""
        self._run.summary.update(dict(values))

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """A table of plain values."""
        if rows:
            import wandb

            columns: list[str | int] = [*rows[0]]
            data = [[row[str(column)] for column in columns] for row in rows]
            self._run.log({name: wandb.Table(columns=columns, data=data, allow_mixed_types=True)})

    def page(self, name: str, path: Path) -> None:
        """The page whole, with its plots."""
        import wandb

        self._run.log({name: wandb.Html(path.read_text(encoding="utf-8"), inject=False)})

    def artifact(self, name: str, kind: str, folder: Path, metadata: Mapping[str, Any]) -> None:
        """A reference to the folder's files; a cache is what the run used, a model what it made."""
        import wandb

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


def _run_id(home: Path) -> str:
    """The same for all parts of a run that broke off."""
    path = home / "run_id"
    if not path.is_file():
        path.write_text(uuid.uuid4().hex[:8])
    return path.read_text()


def artifact_name(name: str) -> str:
    """A name that W&B takes."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", name)[:_MOST_OF_A_NAME]
