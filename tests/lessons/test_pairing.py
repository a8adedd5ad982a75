"""A chat model teaches its base model, which has another end token: the ends pair in lessons, preflight and figures."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from distill.lessons.curriculum import Curriculum, Job, build_curriculum, prepare
from distill.prompts.tokenizers import load_tokenizer
from distill.training.fit import build_training, open_job_student, preflight_input
from distill.training.preflight import data_checks
from distill.training.preflight.inputs import samples_of
from tests.conftest import by_span, compose, tiny_overrides


@pytest.fixture(scope="module")
def chat_folder(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher with an end token of its own, id 320."""
    folder = shutil.copytree(teacher_folder, tmp_path_factory.mktemp("chat") / "model")
    tokenizer = load_tokenizer(folder)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def taught(chat_folder: Path, student_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Curriculum]:
    root = tmp_path_factory.mktemp("paired")
    job = prepare(compose(*tiny_overrides(root, chat_folder, student_folder), "loss=[kl]", "cache.codec.k=321"), root)
    return job, build_curriculum(job)


def test_lessons_end_with_the_students_end_and_its_soft_target_is_that_of_the_teachers(taught: Any) -> None:
    job, curriculum = taught
    assert (job.annotation_job.prompts.end, job.prompts.end) == (320, 1)
    assert any(lesson.sequences[0].targets[0].soft for lesson in curriculum.train)
    for lesson in curriculum.train:
        (sequence,) = lesson.sequences
        place = by_span(sequence)["answer"].soft.place
        assert sequence.ids[-1] == 1
        stored = job.annotation_job.store.soft_targets([place])
        pairs = zip(curriculum.read([place]).rows(), stored.rows(), strict=True)
        for (ids, logprobs), (own_ids, own_logprobs) in pairs:
            own = [(1 if i == 320 else i, p) for i, p in zip(own_ids.tolist(), own_logprobs, strict=True) if i != 1]
            assert list(zip(ids.tolist(), logprobs, strict=True)) == own
    read = [curriculum.read([lesson.sequences[0].targets[0].soft.place]).ids_E for lesson in curriculum.train]
    assert max(ids_E.max() for ids_E in read) < job.prompts.vocabulary_size == 320
    assert any(1 in ids_E for ids_E in read)  # the end


def test_preflight_passes_with_paired_ends(taught: Any) -> None:
    job, curriculum = taught
    inputs = preflight_input(job, build_training(job, curriculum, open_job_student(job), []))
    findings = [finding for check in data_checks.OF_TOKENS for finding in check(inputs, samples_of(inputs))]
    assert [finding.check for finding in findings if finding.passed is False] == []
    assert {"template", "vocabulary", "end"} <= {finding.check for finding in findings if finding.passed}
