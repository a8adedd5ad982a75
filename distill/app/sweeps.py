"""Sweeps: a job that fails stops no other, in whatever process it runs, and is listed at the end."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from distill.app import preemption
from distill.app.command import tell
from distill.app.console import visible
from distill.errors import ConfigError

FAILED = "failed.json"  # in the folder of a job that failed


class FailedJobs(Callback):
    """A job of a sweep that fails does not stop the others; all that failed are listed at the end.

    Launchers copy it into the processes of jobs, and no copy comes back: each job notes its failure in its folder.
    """

    def __init__(self) -> None:
        """Nothing failed yet."""
        self._old: set[tuple[Path, int]] = set()

    def __reduce__(self) -> tuple[Callable[[], FailedJobs], tuple[()]]:
        """A copy is made where a launcher started a process for jobs."""
        return _arrived, ()

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:  # noqa: ARG002
        """Make the folder."""
        _make(config.hydra.run.dir)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:  # noqa: ARG002
        """Make the folder, in which a search may keep its study."""
        _make(config.hydra.sweep.dir)
        self._old = _notes(config)

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:  # noqa: ARG002
        """What became of this job the last time counts no more."""
        (Path(config.hydra.runtime.output_dir) / FAILED).unlink(missing_ok=True)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:  # noqa: ARG002
        """Tell and note an error, and give None instead: a sweeper goes on, and Optuna counts the trial as failed."""
        if config.hydra.mode != RunMode.MULTIRUN or job_return.status != JobStatus.FAILED:
            return
        error = job_return._return_value  # the property raises it
        noted = {"job": config.hydra.job.num, "exit_code": tell(error), "reason": _line(error)}
        noted["overrides"] = list(config.hydra.overrides.task)
        (Path(config.hydra.runtime.output_dir) / FAILED).write_text(json.dumps(noted))
        job_return.return_value, job_return.status = None, JobStatus.COMPLETED

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:  # noqa: ARG002
        """List the jobs that failed since the start, and end with the largest of their exit codes."""
        failed = [json.loads(path.read_text()) for path, _ in _notes(config) - self._old]
        if failed:
            settings = Path(config.hydra.sweep.dir).rglob(".hydra/overrides.yaml")
            jobs = [set(yaml.safe_load(path.read_text())) for path in settings]
            print(_listed(failed, jobs), file=sys.stderr)
            sys.exit(max(job["exit_code"] for job in failed))


def _arrived() -> FailedJobs:
    """In the process of a job too, being asked to stop is noted and acted on between two steps."""
    preemption.watch()
    return FailedJobs()


def _make(folder: str) -> None:
    """Make a run's or a sweep's folder; Hydra itself would end in a traceback where that cannot be."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        told = f"{folder} cannot be made, since a file is in its place; name another: root=… or hydra.run.dir=…"
        sys.exit(tell(ConfigError(told)))
    except OSError as error:
        sys.exit(tell(error))


def _notes(config: DictConfig) -> set[tuple[Path, int]]:
    """Each job's note of its failure, and when it was made."""
    return {(path, path.stat().st_mtime_ns) for path in Path(config.hydra.sweep.dir).rglob(FAILED)}


def _listed(failed: Sequence[Mapping[str, Any]], jobs: Sequence[set[str]]) -> str:
    """A line for each failed job, with those of its settings that not all jobs share, and one for the reason."""
    shared = set.intersection(*jobs) if len(jobs) > 1 else set()
    lines = [f"\n{len(failed)} {'job' if len(failed) == 1 else 'jobs'} failed; the others are done:"]
    for job in sorted(failed, key=lambda job: int(job["job"])):
        own = " ".join(setting for setting in job["overrides"] if setting not in shared)
        lines += [f"  job {job['job']}, exit code {job['exit_code']}: {own}", f"    {job['reason']}"]
    return "\n".join(lines)


def _line(error: BaseException) -> str:
    return visible(f"{type(error).__name__}: {' '.join(str(error).split())}", 300)
