"""Sweeps: a failed job does not stop the others, and all failures are listed at the end."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import yaml
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from distill.app import preemption
from distill.app.command import report_error
from distill.app.console import visible
from distill.app.files import FAILED, write_json
from distill.app.overrides import check_objective, check_searched
from distill.errors import ConfigError

_OPTUNA = "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper"


class FailedJobs(Callback):
    """Hydra's callback that records failed jobs, lets the sweep continue, and lists them at the end.

    Launchers pickle the callback for the processes of jobs, and nothing comes back: each failed job leaves a file in
    its folder.
    """

    def __init__(self) -> None:
        """Start without failures."""
        self._earlier: set[tuple[Path, int]] = set()

    def __reduce__(self) -> tuple[Callable[[], FailedJobs], tuple[()]]:
        """In the process that a launcher started, `_in_job_process` makes a new callback."""
        return _in_job_process, ()

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:  # noqa: ARG002
        """Create the run folder."""
        _create(config.hydra.run.dir)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:  # noqa: ARG002
        """Check what a search goes by, and create the sweep folder, in which it may store its study."""
        try:
            check_objective(config, config.hydra)
            check_searched(config)
        except ConfigError as error:
            sys.exit(report_error(error))
        _create(config.hydra.sweep.dir)
        self._earlier = _failures(config)
        _allow_failed_searches(config.hydra.sweeper._target_)

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:  # noqa: ARG002
        """Remove the record of an earlier failure of this job."""
        (Path(config.hydra.runtime.output_dir) / FAILED).unlink(missing_ok=True)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:  # noqa: ARG002
        """Print and record an error, and return None in its place: sweepers continue, Optuna counts a failed trial."""
        if config.hydra.mode != RunMode.MULTIRUN or job_return.status != JobStatus.FAILED:
            return
        error = job_return._return_value  # the public property raises it
        failure = {"job": config.hydra.job.num, "exit_code": report_error(error), "reason": _one_line(error)}
        failure["overrides"] = list(config.hydra.overrides.task)
        write_json(Path(config.hydra.runtime.output_dir) / FAILED, failure)
        job_return.return_value, job_return.status = None, JobStatus.COMPLETED

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:  # noqa: ARG002
        """List the jobs that failed in this sweep, and exit with their largest exit code."""
        failures = [json.loads(path.read_text()) for path, _ in _failures(config) - self._earlier]
        if failures:
            paths = list(Path(config.hydra.sweep.dir).rglob(".hydra/overrides.yaml"))
            overrides = [set(yaml.safe_load(path.read_text())) for path in paths]
            is_any_complete = not all((path.parent.parent / FAILED).is_file() for path in paths)
            print(_summary(failures, overrides, is_any_complete=is_any_complete), file=sys.stderr)
            sys.exit(max(failure["exit_code"] for failure in failures))


def _in_job_process() -> FailedJobs:
    """Make the callback, and record stop signals in this process too."""
    preemption.watch()
    return FailedJobs()


def _allow_failed_searches(target: str) -> None:
    """Let a search end without a best trial if all have failed, where Optuna's sweeper raises `ValueError`.

    Changes the class that Hydra has loaded: a subclass would need the optional plugin to be imported here.
    """
    if target != _OPTUNA:
        return
    sweeper: Any = Plugins.instance().class_name_to_class[_OPTUNA]
    sweep = sweeper.sweep

    @wraps(sweep)
    def sweep_or_nothing(self: Any, arguments: list[str]) -> None:
        try:
            sweep(self, arguments)
        except ValueError:
            jobs = [path.parent for path in Path(self.sweeper.sweep_dir).rglob(".hydra")]
            if not jobs or not all((job / FAILED).is_file() for job in jobs):
                raise

    sweeper.sweep = sweep_or_nothing


def _create(folder: str) -> None:
    """Create the folder of a run or a sweep; Hydra would end in a traceback if that is impossible."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        message = f"cannot create the folder {folder}: a file is in its place; set root=… or hydra.run.dir=…"
        sys.exit(report_error(ConfigError(message)))
    except OSError as error:
        sys.exit(report_error(error))


def _failures(config: DictConfig) -> set[tuple[Path, int]]:
    """The records of failed jobs, with the times at which they were written."""
    return {(path, path.stat().st_mtime_ns) for path in Path(config.hydra.sweep.dir).rglob(FAILED)}


def _summary(failures: Sequence[Mapping[str, Any]], overrides: Sequence[set[str]], *, is_any_complete: bool) -> str:
    """Two lines for each failed job: the overrides that not all jobs share, and the reason."""
    shared = set.intersection(*overrides) if len(overrides) > 1 else set()
    number = f"{len(failures)} {'job' if len(failures) == 1 else 'jobs'}"
    lines = [f"\n{number} failed; {'the others are complete' if is_any_complete else 'no job succeeded'}:"]
    for failure in sorted(failures, key=lambda failure: int(failure["job"])):
        own = " ".join(override for override in failure["overrides"] if override not in shared)
        lines += [f"  job {failure['job']}, exit code {failure['exit_code']}: {own}", f"    {failure['reason']}"]
    return "\n".join(lines)


def _one_line(error: BaseException) -> str:
    return visible(f"{type(error).__name__}: {' '.join(str(error).split())}", 300)
