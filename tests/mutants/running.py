"""Run mutants side by side, each in a process of its own and one of a few copies of the repository."""

from __future__ import annotations

import functools
import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from tests.mutants.drawing import Mutant

COPIED = ("distill", "conf", "tests", "benchmarks", "scripts", "docs", "pyproject.toml", "README.md")
_MARGIN_SECONDS, _TIMES = 60.0, 3.0  # a mutant has this much more processor time than the tests without one
_WAITING_TIMES = 10.0  # a mutant whose tests wait, or a busy machine, has so many times its processor time by the clock
_FIRST_TIME = 1_000_000_000
Outcome = Literal["killed", "survived", "timeout"]


@dataclass(frozen=True)
class Result:
    """What the tests made of a mutant."""

    mutant: Mutant
    outcome: Outcome
    seconds: float
    diff: str


@dataclass(frozen=True)
class Job:
    """A process of tests that runs; `limit` is in seconds of the clock."""

    pid: int
    started: float
    limit: float
    copy: Path
    mutant: Mutant | None


class Copies:
    """Copies of the repository, in which one module at a time is changed; the repository may change meanwhile."""

    def __init__(self, root: Path, folder: Path, number: int, paths: Sequence[str]) -> None:
        """Copy the repository anew; `paths` are the modules that will be changed."""
        self._time = _FIRST_TIME
        self.free = [folder / f"copy-{index}" for index in range(number)]
        for copy in self.free:
            shutil.rmtree(copy, ignore_errors=True)
            for name in COPIED:
                _copy(root / name, copy / name)
        self.sources = {path: (self.free[0] / path).read_text() for path in paths}

    def write(self, copy: Path, path: str, source: str) -> None:
        """Write a module with a time of its own: bytecode is found by time and size, and a mutant has its size."""
        (copy / path).write_text(source)
        self._time += 1
        os.utime(copy / path, (self._time, self._time))


def _copy(source: Path, to: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, to, ignore=shutil.ignore_patterns("__pycache__", "*.pyc", ".hypothesis"))
    else:
        shutil.copy(source, to)


def import_libraries() -> None:
    """Import what takes seconds, so that each process of tests has it when it is forked."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    import lightning
    import pyarrow.parquet
    import scipy.stats
    import transformers.models.llama.modeling_llama  # noqa: F401

    assert lightning
    assert pyarrow.parquet
    assert scipy.stats
    assert not [name for name in sys.modules if name.partition(".")[0] == "distill"]  # each copy has its own


def suite_of(copy: Path, path: str) -> list[str]:
    """The test files of a module's package; the one that bears its name is run first."""
    parts = Path(path).parts
    names = {f"test_{Path(path).stem}.py", f"test_{parts[1]}.py"}
    files = sorted((copy / "tests" / parts[1]).rglob("test_*.py"))
    return [str(file.relative_to(copy)) for file in sorted(files, key=lambda file: file.name not in names)]


def start(copy: Path, path: str, limit: float, mutant: Mutant | None) -> Job:
    """Fork a process that runs the tests of a module, with a limit in seconds of processor time."""
    work = functools.partial(_run_tests, copy, path, limit)
    return Job(forked(work), time.monotonic(), _WAITING_TIMES * limit, copy, mutant)


def forked(work: Callable[[], int]) -> int:
    """Do this work in a process and process group of its own, which ends with the code that it returns; its id."""
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        with suppress(ProcessLookupError, PermissionError):  # it has ended, or has done so itself
            os.setpgid(pid, pid)
        return pid
    code = 70
    try:
        os.setpgid(0, 0)
        code = work()
    except BaseException:  # noqa: BLE001  a forked process never returns into the code of its parent
        traceback.print_exc()
    os._exit(code)


def _run_tests(copy: Path, path: str, limit: float) -> int:
    import pytest

    resource.setrlimit(resource.RLIMIT_CPU, (int(limit), int(limit)))
    log = os.open(copy / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(copy)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("tests", "benchmarks")]:
        del sys.modules[name]
    sys.path[:] = [str(copy), *(entry for entry in sys.path if entry not in ("", str(Path(__file__).parents[2])))]
    os.environ["PYTHONPATH"] = str(copy)
    options = ["-x", "-q", "--no-header", "-p", "no:cacheprovider", f"--basetemp={copy / 'tmp'}"]
    options += ["-W", "ignore:Module already imported so cannot be rewritten"]  # by `import_libraries`
    return int(pytest.main([*options, *suite_of(copy, path)]))


def ended(jobs: Sequence[Job]) -> tuple[Job, int | None]:
    """Wait for the first of these processes; its exit code, None if it exceeded its limit."""
    while True:
        for job in jobs:
            pid, status = os.waitpid(job.pid, os.WNOHANG)
            if not pid and time.monotonic() - job.started < job.limit:
                continue
            _kill(job, reap=not pid)
            return job, os.waitstatus_to_exitcode(status) if pid else None
        time.sleep(0.05)


def _kill(job: Job, *, reap: bool) -> None:
    """End what the tests have started, too."""
    with suppress(ProcessLookupError):
        os.killpg(job.pid, signal.SIGKILL)
    if reap:
        os.waitpid(job.pid, 0)


def seconds_without_mutant(copies: Copies, paths: Sequence[str]) -> dict[str, float]:
    """How long the tests of each package take; RuntimeError where they fail without any mutant."""
    by_package = {Path(path).parts[1]: path for path in paths}
    seconds: dict[str, float] = {}
    for package, path in by_package.items():
        job = start(copies.free[0], path, 1800.0, None)
        _, code = ended([job])
        if code != 0:
            log = (copies.free[0] / "log.txt").read_text()[-3000:]
            raise RuntimeError(f"the tests of {package} fail without a mutant (exit code {code}):\n{log}")
        seconds[package] = time.monotonic() - job.started
    return seconds


def run(copies: Copies, mutants: Sequence[Mutant], seconds: dict[str, float]) -> Iterator[Result]:
    """Run the mutants, as many at a time as there are copies; results come as they are ready."""
    waiting, jobs = [*mutants], list[Job]()
    while waiting or jobs:
        while waiting and copies.free:
            mutant, copy = waiting.pop(0), copies.free.pop()
            copies.write(copy, mutant.path, mutant.source(copies.sources[mutant.path]))
            limit = _MARGIN_SECONDS + _TIMES * seconds[Path(mutant.path).parts[1]]
            jobs.append(start(copy, mutant.path, limit, mutant))
        job, code = ended(jobs)
        jobs.remove(job)
        assert job.mutant
        original = copies.sources[job.mutant.path]
        copies.write(job.copy, job.mutant.path, original)
        copies.free.append(job.copy)
        is_late = code is None or code in (-signal.SIGXCPU, -signal.SIGKILL)
        outcome: Outcome = "timeout" if is_late else "survived" if code == 0 else "killed"
        yield Result(job.mutant, outcome, round(time.monotonic() - job.started, 1), job.mutant.diff(original))


def read_results(path: Path) -> dict[tuple[str, str], Result]:
    """Earlier results, by the mutant and its change: those of a line that was edited since are not found."""
    lines = path.read_text().split("\n") if path.is_file() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    results = [replace(Result(**row), mutant=Mutant(**row["mutant"])) for row in rows]
    return {(result.mutant.name, result.diff): result for result in results}


def append(path: Path, result: Result) -> None:
    """Keep a result."""
    with path.open("a") as file:
        file.write(json.dumps(asdict(result)) + "\n")
