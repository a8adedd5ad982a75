"""Tracking of runs in Weights & Biases; only this module imports wandb."""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, final, runtime_checkable

from annotated_types import MaxLen, MinLen, Predicate

from distill.app.console import say
from distill.app.provenance import commit
from distill.errors import ConfigError

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

_INIT_TIMEOUT_SECONDS = 30  # after which a run is tracked offline
_MAX_NAME_CHARACTERS, _MAX_TAG_CHARACTERS = 128, 64  # W&B's limits
_NOT_IN_PROJECT = "/\\#?%:"


def _is_project(name: str) -> bool:
    if refused := sorted(set(name) & set(_NOT_IN_PROJECT)):
        raise ValueError(f"W&B takes no {' '.join(_NOT_IN_PROJECT)} in a project, found {' '.join(refused)}")
    return True


# Checked with the rest of the configuration, before anything loads.
Name = Annotated[str, MinLen(1), MaxLen(_MAX_NAME_CHARACTERS)]
Project = Annotated[Name, Predicate(_is_project)]
Tag = Annotated[str, MinLen(1), MaxLen(_MAX_TAG_CHARACTERS)]


@runtime_checkable
class Tracking(Protocol):
    """Publishes the progress and results of a run. The run folder is complete without it."""

    def start(self, folder: Path, *, name: str, group: str | None, job_type: str, config: Mapping[str, Any]) -> None:
        """Start a tracked run."""
        ...

    def loggers(self) -> list[Logger]:
        """The loggers for Lightning's Trainer."""
        ...

    def summary(self, values: Mapping[str, Any]) -> None:
        """Record final values."""
        ...

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Record a table; all rows have the keys of the first."""
        ...

    def page(self, name: str, path: Path) -> None:
        """Record an HTML page."""
        ...

    def artifact(self, name: str, kind: str, folder: Path, metadata: Mapping[str, Any]) -> None:
        """Record a folder that the run wrote or read; nothing of it is copied."""
        ...

    def finish(self, exit_code: int) -> dict[str, str]:
        """End the run; return its mode, its location and, if it is offline, the command that uploads it."""
        ...


@final
class NoTracking:
    """Tracks nothing."""

    def start(self, folder: Path, *, name: str, group: str | None, job_type: str, config: Mapping[str, Any]) -> None:
        """Do nothing."""

    def loggers(self) -> list[Logger]:
        """No loggers."""
        return []

    def summary(self, values: Mapping[str, Any]) -> None:
        """Do nothing."""

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Do nothing."""

    def page(self, name: str, path: Path) -> None:
        """Do nothing."""

    def artifact(self, name: str, kind: str, folder: Path, metadata: Mapping[str, Any]) -> None:
        """Do nothing."""

    def finish(self, exit_code: int) -> dict[str, str]:
        """Do nothing."""
        return {"mode": "off", "where": "", "upload": ""}


@final
class WandbTracking:
    """A W&B run for each training run. WANDB_MODE overrides the mode; `auto` is offline if no API key is set."""

    def __init__(
        self,
        *,
        project: Project,
        mode: Literal["auto", "online", "offline"],
        entity: Name | None,
        group: Name | None,
        tags: list[Tag],
    ) -> None:
        """Keep the settings; `group` overrides the name of the sweep."""
        self._project, self._entity, self._group, self._tags = project, entity, group, tags
        self._mode = mode
        self._run: Any = None

    def start(self, folder: Path, *, name: str, group: str | None, job_type: str, config: Mapping[str, Any]) -> None:
        """Start a W&B run that writes only below `folder`."""
        import wandb  # slow to import, and needed only by tracked runs
        from pydantic import ValidationError

        home = folder / "wandb"
        home.mkdir(parents=True, exist_ok=True)
        for variable in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_ARTIFACT_DIR"):
            os.environ.setdefault(variable, str(home))
        os.environ.setdefault("WANDB_SILENT", "true")  # artifacts print to the terminal despite `silent` below
        init = partial(
            wandb.init,
            project=self._project,
            entity=self._entity,
            dir=folder,
            id=_run_id(home),
            resume="allow",
            name=name[:_MAX_NAME_CHARACTERS],
            group=self._group or (group or "")[:_MAX_NAME_CHARACTERS] or None,
            job_type=job_type,
            tags=self._tags,
            config=dict(config),
            reinit="finish_previous",
        )
        try:
            init = partial(init, settings=_settings())
            self._run = init(mode=self._chosen_mode())
        except wandb.errors.CommError as error:
            say(f"cannot reach W&B ({error}); this run is tracked offline and can be uploaded later")
            wandb.teardown()  # its service still holds the run that failed to start
            self._run = init(mode="offline")
        except (wandb.Error, ValidationError) as error:  # the latter of WANDB_… variables, too
            message = " ".join(str(error).split())
            raise ConfigError(f"W&B failed to start: {message}. Set tracking.mode=offline or tracking=off") from None
        # The parts of a resumed run share this axis; W&B's own step starts again in each part.
        self._run.define_metric("*", step_metric="trainer/global_step", step_sync=True)

    def loggers(self) -> list[Logger]:
        """The W&B run as a Lightning logger."""
        from lightning.pytorch.loggers import WandbLogger

        return [WandbLogger(experiment=self._run)]

    def summary(self, values: Mapping[str, Any]) -> None:
        """Record final values in the summary of the run."""
        self._run.summary.update(dict(values))

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Record a table of numbers and strings."""
        if rows:
            import wandb

            columns: list[str | int] = [*rows[0]]
            data = [[row[str(column)] for column in columns] for row in rows]
            self._run.log({name: wandb.Table(columns=columns, data=data, allow_mixed_types=True)})

    def page(self, name: str, path: Path) -> None:
        """Record the page with its plots."""
        import wandb

        self._run.log({name: wandb.Html(path.read_text(encoding="utf-8"), inject=False)})

    def artifact(self, name: str, kind: str, folder: Path, metadata: Mapping[str, Any]) -> None:
        """Record a cache as an input of the run, a model as an output.

        A model's files are referenced with their checksums. Of a cache, which may be large and was verified when it
        was read, only `metadata` is recorded: its fingerprint and its number of records.
        """
        import wandb

        artifact = wandb.Artifact(artifact_name(name), kind, metadata=dict(metadata))
        if kind == "cache":
            with artifact.new_file("cache.json") as file:
                json.dump({"folder": str(folder), **metadata}, file, indent=1, default=str)
        else:
            for path in sorted(path for path in folder.resolve().rglob("*") if path.is_file()):
                # One reference per file: W&B prints its progress over a folder into the output of the run.
                artifact.add_reference(f"file://{path}", name=str(path.relative_to(folder.resolve())), checksum=True)
        if kind == "cache" and not self._run.offline:
            # An offline W&B run cannot have inputs; there the cache is logged as an output.
            self._run.use_artifact(artifact)
        else:
            self._run.log_artifact(artifact)

    def finish(self, exit_code: int) -> dict[str, str]:
        """End the run, whether it succeeded or failed."""
        if self._run is None:
            return {"mode": "off", "where": "", "upload": ""}
        run, self._run = self._run, None
        folder = str(Path(run.dir).parent)
        run.finish(exit_code=exit_code)
        if run.offline:
            return {"mode": "offline", "where": folder, "upload": f"wandb sync {folder}"}
        return {"mode": "online", "where": run.url, "upload": ""}

    def _chosen_mode(self) -> Literal["online", "offline", "disabled", "shared"]:
        mode = os.environ.get("WANDB_MODE")
        if mode in ("online", "offline", "disabled", "shared"):
            return mode  # type: ignore[return-value]
        if self._mode == "auto":
            return "online" if os.environ.get("WANDB_API_KEY") else "offline"
        return self._mode


def _settings() -> Any:
    import wandb

    return wandb.Settings(
        silent=True,
        console="off",
        x_disable_stats=True,
        init_timeout=_INIT_TIMEOUT_SECONDS,
        disable_git=True,  # W&B would upload the URL of the remote, which may contain a token
        git_commit=commit(),
    )


def _run_id(home: Path) -> str:
    """The W&B id of a run; a resumed run keeps it."""
    path = home / "run_id"
    if not path.is_file():
        path.write_text(uuid.uuid4().hex[:8])
    return path.read_text()


def artifact_name(name: str) -> str:
    """The name with characters that W&B does not accept replaced."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", name)[:_MAX_NAME_CHARACTERS]
