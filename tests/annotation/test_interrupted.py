"""Law 12, resumed = unbroken, for each kind of work: an interrupted annotation goes on to the uninterrupted bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from distill.lessons.curriculum import Curriculum, Job, build_curriculum, prepare
from distill.records import Annotation, Request
from distill.teachers import Teacher
from tests.cases import KINDS, WAYS, case_overrides
from tests.conftest import CountingTeacher, compose, shards, tiny_overrides

SMALL = ("loss=[answer,kl,rationale]", "teacher.group_size=4", "teacher.batch_size=3", "teacher.num_rationales=6")


class Interrupted(CountingTeacher):
    """A teacher that is interrupted after some batches."""

    def __init__(self, teacher: Teacher, num_batches: int) -> None:
        super().__init__(teacher)
        self._remaining = num_batches

    def annotate(self, requests: Sequence[Request]) -> list[Annotation]:
        if not self._remaining:
            raise KeyboardInterrupt
        self._remaining -= 1
        return super().annotate(requests)


def interrupted(job: Job, num_batches: int) -> Job:
    source = job.annotation_job
    return replace(job, annotation_job=replace(source, teacher=Interrupted(source.teacher, num_batches)))


def shares_sequences(job: Job, curriculum: Curriculum) -> bool:
    return any(len(lesson.example_ids) > 1 for lesson in curriculum.train)


def has_further_answers(job: Job, curriculum: Curriculum) -> bool:
    targets = [target for lesson in curriculum.train for sequence in lesson.sequences for target in sequence.targets]
    ids = [target.example_id for target in targets if target.span == "answer"]
    return len(ids) > len(set(ids))


def has_chosen_positions(job: Job, curriculum: Curriculum) -> bool:
    return any(b'"mask"' in content for content in shards(job.annotation_job.store.folder).values())


def has_reasoned_answers(job: Job, curriculum: Curriculum) -> bool:
    spans = [[target.span for target in sequence.targets] for e in curriculum.train for sequence in e.sequences]
    return ["rationale", "answer"] in spans


TAKES: dict[str, Callable[[Job, Curriculum], bool]] = {
    "turns in one sequence": shares_sequences,
    "several answers": has_further_answers,
    "chosen positions": has_chosen_positions,
    "random positions": has_chosen_positions,
    "reasoned": has_reasoned_answers,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*KINDS, *WAYS])
def test_an_interrupted_annotation_ends_with_the_uninterrupted_bytes(
    name: str, tmp_path: Path, teacher_folder: Path, student_folder: Path
) -> None:
    models = teacher_folder, student_folder
    work = [] if name == "cues" else case_overrides(name, tmp_path, *models)
    overrides = [*tiny_overrides(tmp_path, *models), *SMALL, *work]
    whole = prepare(compose(*overrides, f"cache.dir={tmp_path / 'whole'}"), tmp_path / "run")
    curriculum = build_curriculum(whole)
    assert name not in TAKES or TAKES[name](whole, curriculum)
    config, num_batches = compose(*overrides, f"cache.dir={tmp_path / 'broken'}"), 0
    while True:
        num_batches += 1
        job = interrupted(prepare(config, tmp_path / "run"), num_batches)
        try:
            resumed = build_curriculum(job)
        except KeyboardInterrupt:
            continue
        break
    assert num_batches > 3
    assert shards(tmp_path / "broken") == shards(tmp_path / "whole")
    assert resumed.train == curriculum.train
