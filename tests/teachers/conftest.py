"""Helpers shared by the tests of teachers."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import DictConfig

from distill.annotation.annotation_job import open_annotation_job
from distill.app import config as configuration
from distill.cache.codecs.dense import Dense
from distill.errors import AnswerError
from distill.models.generation import Generation
from distill.prompts.rendering import Prompts
from distill.records import Annotation, Example, Request, Splits
from distill.teachers import Calibration
from tests.conftest import compose, tiny_overrides

Configured = Callable[..., DictConfig]


def record_answers(root: Path, splits: Splits) -> list[str]:
    """Write answers to every question except the first of train; return the overrides for a teacher that reads them."""
    rows = [_row(e, i) for i, e in enumerate([*splits.train[1:], *splits.validation, *splits.test])]
    (root / "recorded.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        "teacher=recorded",
        f"teacher.kind.files=[{root / 'recorded.jsonl'}]",
        "teacher.kind.answer=reply",
        "teacher.kind.rationale=why",
        "rationales=all",
    ]


def _row(example: Example, index: int) -> dict[str, str | None]:
    answer = example.answer or str(index)
    return {"question": example.question, "reply": f" {answer}.", "why": f"Since it is {answer}, it is so."}


def without(overrides: list[str], *names: str) -> list[str]:
    return [override for override in overrides if not override.startswith(names)]


@pytest.fixture
def recorded(configured: Configured, tmp_path: Path, teacher_folder: Path, student_folder: Path) -> Configured:
    """Compose a run with a recorded teacher."""
    tiny = without(tiny_overrides(tmp_path, teacher_folder, student_folder), "teacher")
    teacher = record_answers(tmp_path, open_annotation_job(configured()).splits)
    return lambda *overrides: compose(*tiny, *teacher, *overrides)


class Verbs:
    """A task of fixed choices, the second of which has several tokens."""

    version = "1"
    is_free_text = False
    choices = ("has", "gets back")

    def splits(self) -> Splits:
        return Splits.disjoint((), (), ())

    def shots(self) -> Sequence[Example]:
        return ()

    def read_answer(self, text: str, example: Example) -> str:
        matches = [choice for choice in self.choices if text.strip().startswith(choice)]
        if not matches:
            raise AnswerError(text)
        return matches[0]

    def value(self, answer: str) -> str:
        return answer

    def is_same(self, answer: str, reference: str) -> bool:
        return answer == reference


class FreeText(Verbs):
    """A task without choices that all questions share, whose answers are whole texts."""

    choices = ()

    def read_answer(self, text: str, example: Example) -> str:
        return text.strip()


def generation(**changes: Any) -> Generation:
    """The default settings of generated texts, with changes."""
    return replace(_kind().keywords["generation"], **changes)


@functools.cache
def _kind() -> Any:
    """The teacher of conf/teacher/causal_lm.yaml in float32, without the arguments that a job adds."""
    return configuration.build(compose("teacher=causal_lm", "teacher.kind.dtype=float32").teacher.kind)


def make_teacher(folder: Path, prompts: Prompts, *calibration: Example, **settings: Any) -> Any:
    """A teacher for `Verbs` with dense soft targets, not loaded; `settings` are its own or those of its texts."""
    settings = {
        "hashes": folder.parent / "hashes",
        "task": Verbs(),
        "codec": Dense(),
        "calibration": Calibration(len(calibration), calibration),
        "max_new_tokens": 6,
    } | settings
    own = {f.name: settings.pop(f.name) for f in fields(Generation) if f.name in settings}
    return _kind()(folder=folder, prompts=prompts, generation=generation(**own), **settings)


def answer_requests(prompts: Prompts, questions: Sequence[Example]) -> list[Request]:
    return [prompts.request(Example(example.question), "answer") for example in questions]


def is_close(left: Annotation, right: Annotation, tolerance: float = 1e-5) -> bool:
    """Whether two annotations are equal up to `tolerance`."""
    if replace(left, targets={}, choice_logprobs=()) != replace(right, targets={}, choice_logprobs=()):
        return False
    pairs = [(left.targets[span], right.targets[span]) for span in left.targets]
    return np.allclose(left.choice_logprobs, right.choice_logprobs, atol=tolerance) and all(
        a.token_ids == b.token_ids
        and a.soft
        and b.soft
        and np.allclose(a.soft.logprobs_E, b.soft.logprobs_E, atol=tolerance)
        for a, b in pairs
    )
