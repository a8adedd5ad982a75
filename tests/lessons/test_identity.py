"""A run may be resumed only as the same run: its identity holds all that decides what the student learns."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from distill.lessons.curriculum import Curriculum, Job, build_curriculum, identity_of, prepare
from distill.lessons.join import with_shared_turns
from distill.records import Example, Splits
from tests.conftest import compose, tiny_overrides, with_targets
from tests.lessons.test_orders import lesson_of

Change = Callable[[Job, Curriculum], tuple[Job, Curriculum]]


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, student_folder: Path
) -> tuple[Job, Curriculum]:
    root = tmp_path_factory.mktemp("identity")
    job = prepare(compose(*tiny_overrides(root, teacher_folder, student_folder), "loss=[answer,kl]"), root / "run")
    return job, build_curriculum(job)


def setting(key: str, value: Any) -> Change:
    def change(job: Job, curriculum: Curriculum) -> tuple[Job, Curriculum]:
        config = copy.deepcopy(job.config)
        OmegaConf.update(config, key, value)
        return replace(job, config=config), curriculum

    return change


def other_cache(job: Job, curriculum: Curriculum) -> tuple[Job, Curriculum]:
    store = copy.copy(job.annotation_job.store)
    store.fingerprint = {"another": "teacher"}
    return replace(job, annotation_job=replace(job.annotation_job, store=store)), curriculum


def other_test(job: Job, curriculum: Curriculum) -> tuple[Job, Curriculum]:
    splits = job.annotation_job.splits
    splits = Splits.disjoint(splits.train, splits.validation, [Example("Another question?", "7")])
    return replace(job, annotation_job=replace(job.annotation_job, splits=splits)), curriculum


def without_labels(job: Job, curriculum: Curriculum) -> tuple[Job, Curriculum]:
    lesson = next(lesson for lesson in curriculum.train if lesson.sequences[0].targets[0].is_labelled)
    unlabelled = with_targets(lesson, is_labelled=False)
    return job, replace(curriculum, train=[unlabelled if item is lesson else item for item in curriculum.train])


CHANGES: dict[str, Change] = {
    "seed": setting("seed", 1),
    "batch_size": setting("batch_size", 2),
    "batch_unit": setting("batch_unit", "tokens"),
    "order": setting("order", "short_first"),
    "balance": setting("balance", "answer"),
    "loss": setting("loss.kl.weight", 7.0),
    "optimizer": setting("optim.optimizer.lr", 7.0),
    "dropout": setting("student.dropout", 0.1),
    "kind": setting("student.kind.layer_decay", 0.9),
    "cache": other_cache,
    "soft_cache": lambda job, c: (replace(job, soft_annotation_job=job.annotation_job), c),
    "train": without_labels,
    "validation": lambda job, c: (job, replace(c, validation=c.validation[1:])),
    "test": other_test,
}


@pytest.mark.parametrize("key", CHANGES)
def test_whatever_decides_what_is_learned_is_in_the_identity(key: str, made: tuple[Job, Curriculum]) -> None:
    before, after = identity_of(*made, "weights"), identity_of(*CHANGES[key](*made), "weights")
    assert [name for name in before if before[name] != after[name]] == [key]


def test_the_identity_holds_the_weights_of_the_student(made: tuple[Job, Curriculum]) -> None:
    assert identity_of(*made, "weights")["student"] == "weights"
    assert {*CHANGES, "student"} == identity_of(*made, "weights").keys()


def test_a_conversation_in_one_sequence_is_another_run_than_its_turns_apart(made: tuple[Job, Curriculum]) -> None:
    job, curriculum = made
    turns = [lesson_of(6), lesson_of(9)]
    lessons = (turns, with_shared_turns(turns))
    apart, shared = (identity_of(job, replace(curriculum, train=part), "") for part in lessons)
    assert [len(part) for part in lessons] == [2, 1]
    assert [name for name in apart if apart[name] != shared[name]] == ["train"]


@pytest.mark.parametrize(("key", "value"), [("trainer.max_steps", 9), ("checkpoint_every", 9), ("microbatch_size", 1)])
def test_how_long_and_how_a_run_computes_is_not_in_the_identity(
    key: str, value: int, made: tuple[Job, Curriculum]
) -> None:
    assert identity_of(*setting(key, value)(*made), "weights") == identity_of(*made, "weights")
