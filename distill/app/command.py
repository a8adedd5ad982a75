"""From a command line to an exit code.

A command composes its configuration, checks the overrides, prints its first line, imports the heavy libraries,
checks the whole configuration, and runs. Until the first line nothing beyond Hydra is imported.

Exit codes: 0 success, 1 unexpected error, 4 the disk is full or a file cannot be written, 130 interrupted from the
keyboard; `distill.errors` lists the others.
"""

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
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from distill.app import preemption
from distill.app.config import CONF, check, register, renamed, run_dir
from distill.app.console import is_first_process, say, visible
from distill.app.help import help_text
from distill.app.overrides import check_command_line, check_objective, check_processes
from distill.errors import CacheError, ConfigError, DistillError, OutOfMemoryError, PreemptedError

_MAX_MESSAGE_CHARACTERS = 10_000
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)
Work = Callable[[DictConfig], float | None]


def command(name: str, work: Work) -> None:
    """Run `work` on the configuration `name`, composed from the command line; exit with the code of an error."""
    if {"--help", "-h"} & set(sys.argv[1:]):
        _print_help(name)
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # in a log, each update of a bar would be text of its own
    for library in ("pytorch", "fabric"):  # Lightning sets the levels of its other loggers when it is imported
        logging.getLogger(f"lightning.{library}.utilities.rank_zero").setLevel(logging.WARNING)
    register()
    if work.__module__ == "__main__":  # launchers run the job in other processes, which have another __main__
        work = importlib.import_module(f"distill.{name}").main
    try:
        check_command_line(name, sys.argv[1:])
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)(_job(name, work))()
    except DistillError as error:
        sys.exit(report_error(error))
    finally:
        preemption.ignore()


def _print_help(name: str) -> None:
    try:
        print(help_text(CONF, name), flush=True)
    except BrokenPipeError:  # the reader, such as `head`, has what it needs: what Python still flushes goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _job(name: str, work: Work) -> Work:
    """The function that Hydra calls once per run, and once per job of a sweep."""

    def job(config: DictConfig) -> float | None:
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", module="lightning")
                return _run(name, work, config)
        except (DistillError, KeyboardInterrupt, OSError, MemoryError) as error:
            # An interrupt or a stop signal would end the next job of a sweep too.
            ends_all = HydraConfig.get().mode == RunMode.RUN or isinstance(error, KeyboardInterrupt | PreemptedError)
            if not ends_all or (isinstance(error, OSError) and error.errno not in _DISK_ERRORS):
                raise  # sweeps.FailedJobs reports it, and the other jobs run
            code = report_error(error)
            preemption.ignore()  # here too: a launcher may have started this process
            sys.exit(code)

    return job


def _run(name: str, work: Work, config: DictConfig) -> float | None:
    check_processes(config)
    check_objective(config, HydraConfig.get())
    say(f"{name}: run folder {run_dir()}; loading libraries takes a few seconds ...")
    config = renamed(config)
    try:
        check(config)
        return work(config)
    except (ConfigError, CacheError):
        _remove_if_unused(run_dir())
        raise


def _remove_if_unused(folder: Path) -> None:
    """Remove the folder of a run whose configuration was refused, unless an earlier run left files in it."""
    is_single_run = HydraConfig.get().mode == RunMode.RUN and is_first_process()
    if is_single_run and {path.name for path in folder.iterdir()} <= {".hydra"}:
        for handler in [h for h in logging.root.handlers if isinstance(h, logging.FileHandler)]:
            logging.root.removeHandler(handler)  # a later warning would be written into this folder
        shutil.rmtree(folder)


def report_error(error: BaseException) -> int:
    """Print what ended a command or a job; return its exit code."""
    if isinstance(error, DistillError):
        print(f"\n{type(error).__name__}: {visible(str(error), _MAX_MESSAGE_CHARACTERS)}", file=sys.stderr)
        return error.exit_code
    if isinstance(error, MemoryError):
        return report_error(OutOfMemoryError("this machine has no memory left; use a smaller batch or a smaller model"))
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        print(
            f"\n{error.strerror}: {error.filename or 'a file'}. All finished work is kept: free disk space or fix the "
            "permissions, then run the same command again.",
            file=sys.stderr,
        )
        return 4
    if isinstance(error, Exception):
        traceback.print_exception(error)
        return 1
    print("\nInterrupted. All annotations and checkpoints so far are kept.", file=sys.stderr)
    return 130
