"""Memory and time, measured on this machine."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import psutil
import pytest
import torch

from distill.app.machine import extra_bytes, free_memory, median_milliseconds, timings

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process its highest memory")


def many_small_blocks() -> None:
    kept = [torch.ones(1000) for _ in range(20_000)]  # 80 MB
    del kept


def test_memory_freed_earlier_counts_when_allocated_again() -> None:
    many_small_blocks()
    found = extra_bytes(many_small_blocks)
    assert found is not None
    assert 70e6 < found < 160e6
    nothing = extra_bytes(lambda: None)
    assert nothing is not None
    assert nothing < 20e6


def test_memory_freed_before_the_end_counts() -> None:
    def one_mapping() -> None:
        with mmap.mmap(-1, 80_000_000) as block:
            block[::4096] = bytes(len(range(0, 80_000_000, 4096)))

    peak = extra_bytes(one_mapping)
    assert peak is not None
    assert 75e6 < peak < 120e6


def test_times_are_interleaved_and_the_first_is_discarded(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int]] = []
    clock = [0.0]
    seconds = {("a", 0): 9.0, ("a", 1): 1.0, ("a", 2): 3.0, ("b", 0): 0.0, ("b", 1): 5.0, ("b", 2): 5.0}

    def answer(name: str, question: int) -> None:
        seen.append((name, question))
        clock[0] += seconds[name, question]

    monkeypatch.setattr("distill.app.machine.time.perf_counter", lambda: clock[0])
    found = median_milliseconds({n: lambda q, n=n: answer(n, q) for n in "ab"}, range(3))
    assert seen == [(name, question) for question in range(3) for name in "ab"]
    assert found == {"a": 2000.0, "b": 5000.0}
    assert median_milliseconds({"a": lambda q: None}, []) == {"a": None}


def test_rounds_change_the_order_and_give_a_median_with_its_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int]] = []
    clock = [0.0]

    def answer(name: str, question: int) -> None:
        seen.append((name, question))
        clock[0] += {"a": (1.0, 3.0, 2.0), "b": (5.0, 5.0, 5.0)}[name][(len(seen) - 1) // 4]  # by round

    monkeypatch.setattr("distill.app.machine.time.perf_counter", lambda: clock[0])
    answering = {name: lambda question, name=name: answer(name, question) for name in "ab"}
    found = timings(answering, range(2), num_rounds=9, max_seconds=10.0)
    assert found == {"a": (2000.0, 1000.0, 3000.0), "b": (5000.0, 5000.0, 5000.0)}
    order = [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert seen == [*order, *(("b", 0), ("a", 0), ("b", 1), ("a", 1)), *order]  # three rounds, though 10 s are over


def test_a_fast_model_is_timed_in_all_rounds() -> None:
    count: list[str] = []
    timings({"it": count.append}, ["question"], num_rounds=7, max_seconds=60.0)
    assert len(count) == 7


def test_free_memory_is_the_minimum_over_all_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group = tmp_path / "sys/fs/cgroup/jobs/mine"
    group.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    cpu = torch.device("cpu")
    sizes = dict.fromkeys(("MemFree", "Buffers", "Cached", "Active", "Inactive", "Shmem", "Slab"), 100)
    sizes |= {"MemTotal": 9000, "MemAvailable": 5000}
    (tmp_path / "proc/meminfo").write_text("".join(f"{name}: {size} kB\n" for name, size in sizes.items()))
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path / "proc"))
    assert free_memory(cpu, tmp_path) == 5000 * 1024
    (tmp_path / "proc/self/cgroup").write_text("0::/jobs/mine\n")
    for folder, limit in ((group, "max"), (group.parent, "2000000")):
        (folder / "memory.max").write_text(limit)
        (folder / "memory.current").write_text("900000")
        (folder / "memory.stat").write_text("anon 600000\nfile 300000\n")
    assert free_memory(cpu, tmp_path) == 2000000 - 900000 + 300000
    (group / "memory.max").write_text("1000000")
    assert free_memory(cpu, tmp_path) == 1000000 - 900000 + 300000
    assert free_memory(torch.device("meta"), tmp_path) is None
