"""From a command line to an exit code: compose, run, and show a user's errors in one message."""

from __future__ import annotations

import errno
import importlib
import logging
import os
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from distill.app import preemption
from distill.app.config import CONF, check, register, renamed, run_dir
from distill.app.console import is_first_process, say, visible
from distill.app.help import help_text
from distill.app.overrides import check_command_line, check_processes
from distill.errors import ConfigError, DistillError, OutOfMemoryError, PreemptedError

_MOST_CHARACTERS = 10_000  # of a message
_IO_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)
Work = Callable[[DictConfig], float | None]


def command(name: str, work: Work) -> None:
    """Run `work` on the composed configuration `name`; tell a user's errors in one message, and exit."""
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(help_text(CONF, name))
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # in a log, each update of a bar would be text of its own
    for library in ("pytorch", "fabric"):  # Lightning sets the levels of its other loggers when it is imported
        logging.getLogger(f"lightning.{library}.utilities.rank_zero").setLevel(logging.WARNING)

    def job(config: DictConfig) -> float | None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            check_processes(config)
            say(f"{name}: run folder {run_dir()}; loading libraries takes a few seconds ...")
            config = renamed(config)
            _check(config)
            return work(config)

    register()
    if work.__module__ == "__main__":  # launchers send the job to other processes, where that is something else
        work = importlib.import_module(f"distill.{name}").main
    try:
        check_command_line(name, sys.argv[1:])
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)(_told(job))()
    except DistillError as error:
        sys.exit(tell(error))
    finally:
        preemption.ignore()


def _check(config: DictConfig) -> None:
    """Check the configuration; a run that never began leaves no folder behind."""
    try:
        check(config)
    except ConfigError:
        is_single = HydraConfig.get().mode == RunMode.RUN and is_first_process()
        if is_single and {path.name for path in run_dir().iterdir()} <= {".hydra"}:  # a resumed run has more
            shutil.rmtree(run_dir())
        raise


def _told(job: Work) -> Work:
    def told(config: DictConfig) -> float | None:
        try:
            return job(config)
        except (DistillError, KeyboardInterrupt, OSError, MemoryError) as error:
            # The next job of a sweep would be interrupted or asked to stop too.
            is_last = HydraConfig.get().mode == RunMode.RUN or isinstance(error, KeyboardInterrupt | PreemptedError)
            if not is_last or (isinstance(error, OSError) and error.errno not in _IO_ERRORS):
                raise  # sweeps.FailedJobs tells it, and the other jobs go on
            code = tell(error)
            preemption.ignore()  # here too: this may be a process that a launcher started
            sys.exit(code)

    return told


def tell(error: BaseException) -> int:
    """Say what ended a command or a job; return its exit code."""
    if isinstance(error, DistillError):
        print(f"\n{type(error).__name__}: {visible(str(error), _MOST_CHARACTERS)}", file=sys.stderr)
        return error.exit_code
    if isinstance(error, MemoryError):
        return tell(OutOfMemoryError("this machine's memory is full; make batches or the model smaller"))
    if isinstance(error, OSError) and error.errno in _IO_ERRORS:
        print(
            f"\n{error.strerror}: {error.filename or 'a file'}. Nothing that was finished is lost: free space "
            "or mend the permissions, then run the same command again.",
            file=sys.stderr,
        )
        return 4
    if isinstance(error, Exception):
        traceback.print_exception(error)
        return 1
    print("\nInterrupted. What was annotated or trained until now is kept.", file=sys.stderr)
    return 130
