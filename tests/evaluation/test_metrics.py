"""What is measured of a model beside its answers."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from distill.app.machine import extra_bytes, median_milliseconds
from distill.evaluation.metrics import wilson_interval

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process its highest memory")


def many_small_blocks() -> None:
    kept = [torch.ones(1000) for _ in range(20_000)]  # 80 MB
    del kept


def test_memory_that_was_freed_before_counts_when_it_is_taken_again() -> None:
    many_small_blocks()
    found = extra_bytes(many_small_blocks)
    assert found is not None
    assert 70e6 < found < 160e6
    nothing = extra_bytes(lambda: None)
    assert nothing is not None
    assert nothing < 20e6


def test_times_are_taken_in_turn_and_the_first_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.parametrize(("right", "number"), [(0, 7), (1, 1), (17, 200), (24_000, 25_000)])
def test_the_ends_of_the_wilson_interval_are_those_at_which_the_score_test_is_just_passed(
    right: int, number: int
) -> None:
    low, high = wilson_interval(right, number)
    assert 0 <= low < high <= 1
    for end, is_at_the_edge in ((low, right == 0), (high, right == number)):
        score = abs(right / number - end) / math.sqrt(end * (1 - end) / number) if 0 < end < 1 else None
        assert score is None if is_at_the_edge else score == pytest.approx(1.959964, abs=1e-6)
