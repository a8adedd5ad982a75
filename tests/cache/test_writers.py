"""Law 8 and half of law 12: a cache holds what was written, or says what is wrong with it."""

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
from tests.cache.conftest import annotation, key, opened
from tests.conftest import environment, shards


def fill_by_claims(folder: Path, num_groups: int, size: int = 4) -> None:
    """Make what is missing of groups 0, 1, ..., each of `size` records, as annotating does."""
    store = opened(folder)
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
    """Have this process killed just before it makes something durable for the n-th time, or just after."""
    calls = itertools.count()

    def dying(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*given: Any, **others: Any) -> Any:
            number = next(calls)
            if 2 * number == boundary:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*given, **others)
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
        setattr(owner, name, dying(getattr(owner, name)))


def in_another_process(task: Callable[[], None]) -> int:
    """Run `task` in a child; return its exit status as `subprocess` would."""
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
    """Fill a cache for each boundary, killed there and filled again; return how many boundaries there are.

    All work is done by children: a process that has used Arrow's threads may not fork.
    """
    broken = folder / "broken"

    def filling(where: Path, boundary: int | None = None) -> int:
        def task() -> None:
            if boundary is not None:
                die_at(boundary)
            fill_by_claims(where, num_groups)
            assert opened(where).check() == []

        return in_another_process(task)

    assert filling(folder / "unbroken") == 0
    wanted = shards(folder / "unbroken")
    for boundary in itertools.count(0, 2):  # just after one write is just before the next
        code = filling(broken, boundary)
        assert len(opened(broken)) % 4 == 0
        assert filling(broken) == 0
        assert shards(broken) == wanted, boundary
        assert not list((broken / "claims").glob("[0-9]*"))
        shutil.rmtree(broken)
        if code == 0:
            return boundary
        assert code == -signal.SIGKILL
    raise AssertionError("never reached")


def run_here(*arguments: str) -> str:
    """This file as a program: only a process without threads may fork."""
    line = [sys.executable, __file__, *arguments]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_killed_at_any_write_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    assert int(run_here("boundaries", str(tmp_path), "2")) > 40


def many_writers(folder: Path, num_writers: int, num_groups: int) -> None:
    """Have writers fill one cache at once; one of them is killed with a claim in its hands."""

    def killed() -> None:
        store = opened(folder)
        assert store.claims.take("7")
        os.kill(os.getpid(), signal.SIGKILL)

    (folder / "claims").mkdir(parents=True)
    assert in_another_process(killed) == -signal.SIGKILL
    children = []
    for _ in range(num_writers):
        child = os.fork()
        if child == 0:
            fill_by_claims(folder, num_groups)
            os._exit(0)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * num_writers


def test_many_writers_share_the_work_and_a_dead_one_leaves_its_own(tmp_path: Path) -> None:
    run_here("writers", str(tmp_path / "cache"), "4", "40")
    fill_by_claims(tmp_path / "alone", 40)
    assert shards(tmp_path / "cache") == shards(tmp_path / "alone")
    lines = [line for path in (tmp_path / "cache").glob("manifest-*") for line in path.read_bytes().splitlines()]
    assert len(lines) == 40  # no group was made twice
    assert len(list((tmp_path / "cache").glob("manifest-*"))) > 1


def test_a_claim_of_another_machine_is_respected_until_it_was_not_touched_for_long(tmp_path: Path) -> None:
    claims = Claims(tmp_path, seconds=30.0)
    (tmp_path / "group").write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    assert not claims.take("group")
    old = time.time() - 31
    os.utime(tmp_path / "group", (old, old))
    assert claims.take("group")
    assert not Claims(tmp_path, seconds=30.0).take("group")  # this process is alive
    claims.release("group")
    assert Claims(tmp_path, seconds=30.0).take("group")


def test_claims_are_kept_alive_while_they_are_held_and_given_up_after(tmp_path: Path) -> None:
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
