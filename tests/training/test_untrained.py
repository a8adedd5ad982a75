"""The student before training is evaluated once; exactly the runs that would measure the same share its row."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.evaluation.answers import Evaluation, model_row
from distill.lessons.curriculum import Job, build_curriculum, prepare
from distill.records import Annotation
from distill.students.causal_lm import open_student, weights_hash
from distill.training.untrained import untrained_row
from tests.conftest import WHOLE_STUDENT, compose, reviews, tiny_overrides

EVALUATES, REUSES = "evaluating the student before training", "evaluated by an earlier run"


def parts(root: Path, teacher: Path, student: Path, *overrides: str) -> tuple[Job, Any, dict[str, Annotation]]:
    """A run's job, its student before training, and the teacher's answers on test."""
    job = prepare(compose(*tiny_overrides(root, teacher, student), "loss=[answer]", *overrides), root / "run")
    records = job.annotation_job.reader(build_curriculum(job).filled.requests)
    answers = {example.id: records.find(example.id, "answer") for example in job.annotation_job.splits.test}
    opened = open_student(job.student_folder, **WHOLE_STUDENT)
    return job, opened, {key: annotation for key, annotation in answers.items() if annotation}


def row(job: Job, student: Any, teacher: dict[str, Annotation]) -> Any:
    config = job.config
    evaluation = Evaluation(
        student, job.prompts, job.annotation_job.task, config.task.answer_mode, config.max_new_tokens
    )
    return untrained_row(job, evaluation, teacher, weights_hash(student))


@pytest.fixture(scope="module")
def evaluated(
    tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, student_folder: Path
) -> tuple[Callable[..., Any], Any]:
    """A function that returns the row of a run in a folder where one has evaluated the student, and the row of that."""
    root = tmp_path_factory.mktemp("evaluated")

    def row_of(*overrides: str) -> Any:
        return row(*parts(root, teacher_folder, student_folder, *overrides))

    return row_of, row_of()


def test_the_row_is_the_evaluation_of_the_student_before_training(
    tmp_path: Path, teacher_folder: Path, student_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job, student, teacher = parts(tmp_path, teacher_folder, student_folder)
    first = row(job, student, teacher)
    assert EVALUATES in capsys.readouterr().err
    evaluation = Evaluation(student, job.prompts, job.annotation_job.task, "direct", job.config.max_new_tokens)
    assert first == model_row(evaluation.predict(job.annotation_job.splits.test, teacher), student)


@pytest.mark.parametrize("override", ["seed=1", "loss=[answer,teacher_answer]", "batch_size=4", "order=short_first"])
def test_runs_that_begin_with_the_same_student_share_its_row(
    evaluated: tuple[Callable[..., Any], Any], capsys: pytest.CaptureFixture[str], override: str
) -> None:
    row_of, first = evaluated
    capsys.readouterr()
    assert row_of(override) == first
    said = capsys.readouterr().err
    assert REUSES in said
    assert EVALUATES not in said


@pytest.mark.parametrize("override", ["task.examples.num_test=3", "max_new_tokens=3", "prompt.max_length=200"])
def test_runs_with_another_evaluation_do_not_share_the_row(
    evaluated: tuple[Callable[..., Any], Any], capsys: pytest.CaptureFixture[str], override: str
) -> None:
    row_of, _ = evaluated
    capsys.readouterr()
    row_of(override)
    assert EVALUATES in capsys.readouterr().err


def other_weights(student: Any, teacher: dict[str, Annotation]) -> None:
    with torch.no_grad():
        student.base_model.layers[0].mlp.up_proj.weight[0, 0] += 1


def other_settings(student: Any, teacher: dict[str, Annotation]) -> None:
    student.config.rms_norm_eps = 0.5


def other_answer(student: Any, teacher: dict[str, Annotation]) -> None:
    key = next(iter(teacher))
    teacher[key] = replace(teacher[key], answer="12345")


def other_soft_targets(student: Any, teacher: dict[str, Annotation]) -> None:
    key = next(key for key, annotation in teacher.items() if annotation.targets)
    target = teacher[key].targets["answer"]
    assert target.soft
    soft = replace(target.soft, logprobs_E=target.soft.logprobs_E - 1)
    teacher[key] = replace(teacher[key], targets={"answer": replace(target, soft=soft)})


@pytest.fixture(scope="module")
def chosen(
    tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, student_folder: Path
) -> tuple[Job, Any, dict[str, Annotation]]:
    """The parts of a run on a task with choices, whose student before training is evaluated."""
    root = tmp_path_factory.mktemp("chosen")
    job, student, teacher = parts(root, teacher_folder, student_folder, *reviews(root), "teacher.calibrate=0")
    row(job, student, teacher)
    return job, student, teacher


@pytest.mark.parametrize("change", [other_weights, other_settings, other_answer, other_soft_targets])
def test_another_student_or_teacher_does_not_share_the_row(
    chosen: tuple[Job, Any, dict[str, Annotation]], capsys: pytest.CaptureFixture[str], change: Any
) -> None:
    job, student, teacher = chosen[0], deepcopy(chosen[1]), dict(chosen[2])
    row(job, student, teacher)
    assert REUSES in capsys.readouterr().err
    change(student, teacher)
    row(job, student, teacher)
    assert EVALUATES in capsys.readouterr().err
