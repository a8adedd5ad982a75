"""Law 8 under attack: damaged files, hostile files, full disks and folders that vanish."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig

from distill.annotation.fill import Share, fill, open_source, plan
from distill.cache.claims import Claims
from distill.records import Annotation, Example, Request
from tests.cache.conftest import unsealed
from tests.conftest import CountingTeacher


@pytest.mark.parametrize("days", [-1, 1])
def test_the_clock_of_a_machine_that_is_wrong_kills_no_claim_and_keeps_none_alive(
    days: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clocks = {name: getattr(time, name) for name in ("time", "time_ns")}
    for name, clock in clocks.items():
        ahead = days * 86_400 * (10**9 if name == "time_ns" else 1)
        monkeypatch.setattr(time, name, lambda clock=clock, ahead=ahead: clock() + ahead)
    for name, age in (("young", 5), ("old", 60)):
        (tmp_path / name).write_text(json.dumps({"host": "elsewhere", "pid": 2**22 + 1}))  # no process here has it
        touched = clocks["time"]() - age
        os.utime(tmp_path / name, (touched, touched))
    claims = Claims(tmp_path, seconds=30.0)
    assert not claims.take("young")
    assert claims.take("old")


class Watching(CountingTeacher):
    """A teacher in whose presence something happens each time it is asked."""

    def __init__(self, teacher: Any, happens: Callable[[int], None]) -> None:
        super().__init__(teacher)
        self._happens, self._calls = happens, 0

    def annotate(self, requests: Sequence[Request]) -> list[Annotation]:
        self._calls += 1
        self._happens(self._calls)
        return super().annotate(requests)


GROUPED = ("teacher.group_size=2", "teacher.batch_size=2")


def test_what_another_process_makes_meanwhile_is_not_made_again(configured: Callable[..., DictConfig]) -> None:
    source = open_source(configured(*GROUPED))
    groups = plan([source.prompts.request(example, "answer") for example in source.splits.train], 2)
    folder, made = source.store.folder, list[str]()

    def meanwhile(call: int) -> None:
        if call == 1:
            free = [group for group in groups if not (folder / "claims" / group.name).exists()]
            made.extend(group.name for group in free)
            other = open_source(configured(*GROUPED))
            fill(other, {"answer": [request.example for group in free for request in group.requests]})

    fill(replace(source, teacher=Watching(source.teacher, meanwhile)), {"answer": source.splits.train})
    assert 0 < len(made) < len(groups)
    lines = [line for path in folder.glob("manifest-*") for line in unsealed(path.read_bytes()) if "shard" in line]
    assert len(lines) == len(groups) == 6
    assert len({line["keys"] for line in lines}) == 6


def test_what_another_process_made_just_before_a_claim_is_not_made_again(
    configured: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(configured(*GROUPED))
    last = plan([source.prompts.request(example, "answer") for example in source.splits.train], 2)[-1]
    take, just_before = Claims.take, list[str]()

    def taking(self: Claims, name: str) -> bool:
        if name == last.name and not just_before:
            just_before.append(name)
            fill(open_source(configured(*GROUPED)), {"answer": [request.example for request in last.requests]})
        return take(self, name)

    monkeypatch.setattr(Claims, "take", taking)
    fill(source, {"answer": source.splits.train})
    assert just_before
    manifests = source.store.folder.glob("manifest-*")
    lines = [line for path in manifests for line in unsealed(path.read_bytes()) if "shard" in line]
    assert len(lines) == len({line["keys"] for line in lines}) == 6
    assert not list(source.store.folder.glob("claims/[0-9a-f]*"))


def test_a_claim_is_given_up_as_soon_as_its_group_is_made_and_when_work_breaks_off(
    configured: Callable[..., DictConfig],
) -> None:
    source = open_source(configured(*GROUPED))
    claimed: list[int] = []

    def watched(call: int) -> None:
        claimed.append(len(list(source.store.folder.glob("claims/[0-9a-f]*"))))
        if call == 6:
            raise RuntimeError("broken off")

    with pytest.raises(RuntimeError, match="broken off"):
        fill(replace(source, teacher=Watching(source.teacher, watched)), {"answer": source.splits.train})
    assert 1 <= min(claimed) <= max(claimed) <= 3  # a few that are at work or next, of six
    assert not list(source.store.folder.glob("claims/[0-9a-f]*"))
    assert len(open_source(configured(*GROUPED)).store) == 10


@pytest.mark.slow
def test_a_share_is_the_same_whatever_is_there_already(configured: Callable[..., DictConfig]) -> None:
    source = open_source(configured())
    every = source.splits.train

    def made(cache: str, part: int, *there: Example) -> set[str]:
        source = open_source(configured(*GROUPED, f"cache.dir={configured().root}/{cache}{part}"))
        if there:
            fill(source, {"answer": there})
        fill(source, {"answer": every}, part=Share(part, 2))
        return {e.id for e in every if source.prompts.request(e, "answer").key in source.store}

    fresh = [made("fresh", part) for part in (1, 2)]
    assert fresh[0] | fresh[1] == {example.id for example in every}
    assert not fresh[0] & fresh[1]
    assert made("begun", 1, *every[:3]) == fresh[0] | {example.id for example in every[:3]}
