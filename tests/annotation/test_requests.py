"""What the teacher is asked: never with the answers that the student is measured by."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig

from distill.annotation import job as annotate_job
from distill.annotation.annotation_job import open_annotation_job
from distill.annotation.fill import fill
from distill.annotation.reader import AnswerCounts
from distill.annotation.requests import collect_requests, without_labels
from distill.errors import ConfigError
from distill.lessons.curriculum import examples_to_annotate, prepare
from distill.records import Example
from tests.conftest import compose, make_model, tiny_overrides

Configured = Callable[..., DictConfig]


@pytest.fixture
def configured(tmp_path: Path, teacher_folder: Path, student_folder: Path) -> Configured:
    tiny = tiny_overrides(tmp_path, teacher_folder, student_folder)
    return lambda *overrides: compose(*tiny, *overrides)


def test_questions_without_labels_are_the_questions_alone() -> None:
    assert without_labels([Example("Why?", "yes", "so it is", ("Yes",))]) == [Example("Why?")]


def test_the_answers_of_test_reach_no_teacher(configured: Configured, tmp_path: Path) -> None:
    job = prepare(configured("loss=[answer,kl,rationale]", "num_samples=4"), tmp_path / "run")
    questions = {example.question for example in job.annotation_job.splits.test}
    annotated = [e for examples in examples_to_annotate(job).values() for e in examples if e.question in questions]
    assert len(annotated) == 2 * len(questions)  # for an answer, and for the reasoning that the report shows
    assert {(example.answer, example.rationale) for example in annotated} == {(None, None)}


def test_as_many_questions_are_explained_as_configured(configured: Configured, tmp_path: Path) -> None:
    job = prepare(configured("loss=[answer,rationale]", "teacher.num_rationales=8", "num_samples=0"), tmp_path / "run")
    train = job.annotation_job.splits.train
    explained = [example for example in train[:8] if example.rationale is None]  # others have one of their own
    assert 0 < len(explained) < sum(example.rationale is None for example in train)
    assert list(examples_to_annotate(job)["rationale"]) == explained


def test_the_annotate_command_sends_no_answers_of_test_either(configured: Configured) -> None:
    job = open_annotation_job(configured())
    questions = {example.question for example in job.splits.test}
    config = compose("task=arithmetic", "teacher=causal_lm", "teacher.model=x", name="annotate")
    annotated = [e for e in annotate_job._examples_by_span(config, job)["answer"] if e.question in questions]
    assert len(annotated) == len(questions)
    assert {example.answer for example in annotated} == {None}


@pytest.mark.parametrize("part", ["0/4", "5/4", "1", "-1/4", "1/0", "a/b"])
def test_a_part_that_is_none_is_refused(part: str) -> None:
    with pytest.raises(ConfigError, match="expected number/parts, for example part=3/16"):
        annotate_job._part(DictConfig({"part": part, "devices": 1}))


@pytest.mark.parametrize("number", [1, 3])
def test_as_many_rationales_are_sampled_as_configured(configured: Configured, number: int) -> None:
    job = open_annotation_job(configured(f"teacher.rationales_each={number}"))
    samples = collect_requests(job, {"rationale": job.splits.train[:2]}).samples
    assert [[request.sample for request in requests] for requests in samples.values()] == [[*range(number)]] * 2


@pytest.mark.parametrize("use_given", [False, True])
def test_a_rationale_of_the_data_is_scored_only_where_that_is_wanted(configured: Configured, use_given: bool) -> None:
    job = open_annotation_job(configured())
    example = Example("How many?", "7", "Since it is so.")
    (request,) = collect_requests(job, {"rationale": [example]}, use_given_rationales=use_given).all_requests
    assert bool(request.given_ids) == use_given


def test_a_teacher_that_cannot_read_the_longest_text_annotates_nothing(configured: Configured, tmp_path: Path) -> None:
    teacher = make_model(tmp_path / "short", seed=1, max_position_embeddings=64)
    alone = ["teacher.calibrate=0", "prompt.num_shots=0", "teacher.group_size=1", "teacher.batch_size=1"]
    job = open_annotation_job(configured(f"teacher.model={teacher}", *alone))
    with pytest.raises(ConfigError, match="exceeds the 64 positions"):
        fill(job, {"answer": [Example("Short?"), Example("A long one, " * 12)]})
    assert len(job.store) == 0


def test_recorded_answers_are_counted_without_those_that_are_missing() -> None:
    lines = AnswerCounts(10, {"unmatched": 4}, 0, 0).lines
    assert lines[1] == "6 of 10 questions have a recorded answer"
