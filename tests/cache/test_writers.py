"""Law 12, resumed = unbroken: interrupted and concurrent writers end with the same bytes as a single one."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill.cache.claims import Claims
from tests.cache.conftest import annotation, key, open_store
from tests.conftest import environment, shards


def fill_with_claims(folder: Path, num_groups: int, size: int = 4) -> None:
    """Write what is missing of groups 0, 1, ... of `size` records, claiming each as the annotate command does."""
    store = open_store(folder)
    with store.writing() as writer:
        for group in range(num_groups):
            numbers = [n for n in range(group * size, (group + 1) * size) if key(n) not in store]
            if not numbers or not store.claims.take(str(group)):
                continue
            store.refresh()
            if key(numbers[0]) not in store:
                writer.add([annotation(n) for n in numbers])
                writer.flush()
            store.claims.release(str(group))


def die_at(boundary: int) -> None:
    """Kill this process just before (even `boundary`) or after (odd) one of its file operations."""
    calls = itertools.count()

    def killing(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **options: Any) -> Any:
            number = next(calls)
            if 2 * number == boundary:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*arguments, **options)
            if 2 * number + 1 == boundary:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return called

    for owner, name in (
        (os, "fsync"),
        (os, "open"),
        (Path, "replace"),
        (Path, "write_bytes"),
        (Path, "unlink"),
        (os, "link"),
    ):
        setattr(owner, name, killing(getattr(owner, name)))


def in_another_process(task: Callable[[], None]) -> int:
    """Run `task` in a child process; return its exit code as `subprocess` does."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            task()
            code = 0
        finally:
            if code:
                traceback.print_exc()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def kill_at_every_boundary(folder: Path, num_groups: int) -> int:
    """Fill a cache, killed at each boundary in turn, then filled again; return the number of boundaries.

    All work is done in child processes: a process that has used Arrow's threads must not fork.
    """
    interrupted = folder / "interrupted"

    def run_fill(path: Path, boundary: int | None = None) -> int:
        def task() -> None:
            if boundary is not None:
                die_at(boundary)
            fill_with_claims(path, num_groups)
            assert open_store(path).check() == []

        return in_another_process(task)

    assert run_fill(folder / "uninterrupted") == 0
    expected = shards(folder / "uninterrupted")
    for boundary in itertools.count(0, 2):  # after one operation is before the next
        code = run_fill(interrupted, boundary)
        assert len(open_store(interrupted)) % 4 == 0
        assert run_fill(interrupted) == 0
        assert shards(interrupted) == expected, boundary
        assert not list((interrupted / "claims").glob("[0-9]*"))
        shutil.rmtree(interrupted)
        if code == 0:
            return boundary
        assert code == -signal.SIGKILL
    raise AssertionError("never reached")


def run_this_file(*arguments: str) -> str:
    """Run this file as a program: only a process without threads may fork."""
    line = [sys.executable, __file__, *arguments]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_killed_at_any_write_filling_ends_with_the_same_bytes(tmp_path: Path) -> None:
    assert int(run_this_file("boundaries", str(tmp_path), "2")) > 40


def many_writers(folder: Path, num_writers: int, num_groups: int) -> None:
    """Fill one cache with several writers; another was killed while it held a claim."""

    def killed() -> None:
        store = open_store(folder)
        assert store.claims.take("7")
        os.kill(os.getpid(), signal.SIGKILL)

    (folder / "claims").mkdir(parents=True)
    assert in_another_process(killed) == -signal.SIGKILL
    children = []
    for _ in range(num_writers):
        child = os.fork()
        if child == 0:
            fill_with_claims(folder, num_groups)
            os._exit(0)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * num_writers


@pytest.mark.slow
def test_concurrent_writers_write_each_group_once_despite_a_stale_claim(tmp_path: Path) -> None:
    run_this_file("writers", str(tmp_path / "cache"), "4", "40")
    fill_with_claims(tmp_path / "single", 40)
    assert shards(tmp_path / "cache") == shards(tmp_path / "single")
    lines = [line for path in (tmp_path / "cache").glob("manifests/*/*") for line in path.read_bytes().splitlines()]
    assert len(lines) == 40  # no group was written twice
    assert len(list((tmp_path / "cache").glob("manifests/*/*"))) > 1


def test_a_claim_of_another_machine_is_respected_until_it_is_stale(tmp_path: Path) -> None:
    claims = Claims(tmp_path, seconds=30.0)
    (tmp_path / "group").write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    assert not claims.take("group")
    old = time.time() - 31
    os.utime(tmp_path / "group", (old, old))
    assert claims.take("group")
    assert not Claims(tmp_path, seconds=30.0).take("group")  # this process is alive
    claims.release("group")
    assert Claims(tmp_path, seconds=30.0).take("group")


def test_held_claims_are_kept_alive_and_released_at_the_end(tmp_path: Path) -> None:
    claims = Claims(tmp_path, seconds=0.2)
    with claims.held():
        claims.take("group")
        before = (tmp_path / "group").stat().st_mtime_ns
        time.sleep(0.5)
        assert (tmp_path / "group").stat().st_mtime_ns > before
        assert not Claims(tmp_path, seconds=0.2).take("group")
    assert not (tmp_path / "group").exists()


if __name__ == "__main__":
    if sys.argv[1] == "boundaries":
        print(kill_at_every_boundary(Path(sys.argv[2]), int(sys.argv[3])))
    else:
        many_writers(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
