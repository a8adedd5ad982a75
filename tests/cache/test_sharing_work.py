"""Several processes fill one cache: claims are respected, and no group is annotated twice."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig

from distill.annotation.annotation_job import open_annotation_job
from distill.annotation.fill import Part, fill
from distill.annotation.requests import group_requests
from distill.cache.claims import Claims
from distill.records import Annotation, Example, Request
from tests.cache.conftest import unsealed
from tests.conftest import CountingTeacher


@pytest.mark.parametrize("days", [-1, 1])
def test_a_wrong_system_clock_affects_no_claim(days: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = {name: getattr(time, name) for name in ("time", "time_ns")}
    for name, clock in clocks.items():
        ahead = days * 86_400 * (10**9 if name == "time_ns" else 1)
        monkeypatch.setattr(time, name, lambda clock=clock, ahead=ahead: clock() + ahead)
    for name, age in (("young", 5), ("old", 60)):
        (tmp_path / name).write_text(json.dumps({"host": "elsewhere", "pid": 2**22 + 1}))  # above the highest pid
        touched = clocks["time"]() - age
        os.utime(tmp_path / name, (touched, touched))
    claims = Claims(tmp_path, seconds=30.0)
    assert not claims.take("young")
    assert claims.take("old")


def test_the_claim_of_a_process_that_has_ended_is_taken_at_once(tmp_path: Path) -> None:
    for name, pid in (("ended", 2**22 + 1), ("running", os.getppid())):
        (tmp_path / name).write_text(json.dumps({"host": socket.gethostname(), "pid": pid}))
    claims = Claims(tmp_path, seconds=600.0)
    assert claims.take("ended")
    assert not claims.take("running")


class ObservedTeacher(CountingTeacher):
    """A teacher that calls a function before each batch."""

    def __init__(self, teacher: Any, before_call: Callable[[int], None]) -> None:
        super().__init__(teacher)
        self._before_call, self._calls = before_call, 0

    def annotate(self, requests: Sequence[Request]) -> list[Annotation]:
        self._calls += 1
        self._before_call(self._calls)
        return super().annotate(requests)


GROUPED = ("teacher.group_size=2", "teacher.batch_size=2")


def test_groups_annotated_by_another_process_meanwhile_are_skipped(configured: Callable[..., DictConfig]) -> None:
    job = open_annotation_job(configured(*GROUPED))
    groups = group_requests([job.prompts.request(example, "answer") for example in job.splits.train], 2)
    folder, annotated = job.store.folder, list[str]()

    def meanwhile(call: int) -> None:
        if call == 1:
            unclaimed = [group for group in groups if not (folder / "claims" / group.name).exists()]
            annotated.extend(group.name for group in unclaimed)
            other = open_annotation_job(configured(*GROUPED))
            fill(other, {"answer": [request.example for group in unclaimed for request in group.requests]})

    fill(replace(job, teacher=ObservedTeacher(job.teacher, meanwhile)), {"answer": job.splits.train})
    assert 0 < len(annotated) < len(groups)
    lines = [line for path in folder.glob("manifests/*/*") for line in unsealed(path.read_bytes()) if "shard" in line]
    assert len(lines) == len(groups) == 6
    assert len({line["keys"] for line in lines}) == 6


def test_a_group_annotated_just_before_its_claim_is_skipped(
    configured: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = open_annotation_job(configured(*GROUPED))
    last = group_requests([job.prompts.request(example, "answer") for example in job.splits.train], 2)[-1]
    take, annotated = Claims.take, list[str]()

    def annotate_then_take(self: Claims, name: str) -> bool:
        if name == last.name and not annotated:
            annotated.append(name)
            fill(open_annotation_job(configured(*GROUPED)), {"answer": [request.example for request in last.requests]})
        return take(self, name)

    monkeypatch.setattr(Claims, "take", annotate_then_take)
    fill(job, {"answer": job.splits.train})
    assert annotated
    manifests = job.store.folder.glob("manifests/*/*")
    lines = [line for path in manifests for line in unsealed(path.read_bytes()) if "shard" in line]
    assert len(lines) == len({line["keys"] for line in lines}) == 6
    assert not list(job.store.folder.glob("claims/[0-9a-f]*"))


def test_claims_are_released_after_each_group_and_on_errors(
    configured: Callable[..., DictConfig],
) -> None:
    job = open_annotation_job(configured(*GROUPED))
    num_claims: list[int] = []

    def count_claims(call: int) -> None:
        num_claims.append(len(list(job.store.folder.glob("claims/[0-9a-f]*"))))
        if call == 6:
            raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        fill(replace(job, teacher=ObservedTeacher(job.teacher, count_claims)), {"answer": job.splits.train})
    assert 1 <= min(num_claims) <= max(num_claims) <= 3  # of six groups, the current and prefetched ones
    assert not list(job.store.folder.glob("claims/[0-9a-f]*"))
    assert len(open_annotation_job(configured(*GROUPED)).store) == 10


@pytest.mark.slow
def test_a_part_does_not_depend_on_existing_records(configured: Callable[..., DictConfig]) -> None:
    job = open_annotation_job(configured())
    train = job.splits.train

    def annotated_ids(cache: str, part: int, *existing: Example) -> set[str]:
        job = open_annotation_job(configured(*GROUPED, f"cache.dir={configured().root}/{cache}{part}"))
        if existing:
            fill(job, {"answer": existing})
        fill(job, {"answer": train}, part=Part(part, 2))
        return {e.id for e in train if job.prompts.request(e, "answer").key in job.store}

    fresh = [annotated_ids("fresh", part) for part in (1, 2)]
    assert fresh[0] | fresh[1] == {example.id for example in train}
    assert not fresh[0] & fresh[1]
    assert annotated_ids("begun", 1, *train[:3]) == fresh[0] | {example.id for example in train[:3]}
