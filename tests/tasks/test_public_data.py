"""Tasks of conf/task/ on the public data they are written for; skipped without DISTILL_DATA."""

from __future__ import annotations

import json
import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from distill.app import config as configuration
from distill.errors import AnswerError
from distill.records import Example, Splits
from distill.tasks.contamination import find_overlaps
from distill.tasks.files import FileTask
from tests.conftest import compose


def public(name: str) -> Path:
    folder = os.environ.get("DISTILL_DATA", "")
    if not folder:
        pytest.skip("DISTILL_DATA is not set to the folder with the public data")
    path = Path(folder) / name
    if not path.is_file():
        pytest.skip(f"{name} is not in the folder DISTILL_DATA")
    return path


def published(name: str, path: Path, *overrides: str) -> tuple[FileTask, Splits, list[dict[str, Any]]]:
    """A task of conf/task/ on its public data, its splits, and the rows of the file."""
    config = compose(f"task={name}", f"task.path={path}", *overrides)
    configuration.check(config)
    built = configuration.build(config.task.examples)
    return built, built.splits(), [json.loads(line) for line in path.read_text().strip().split("\n")]


@pytest.mark.parametrize(("name", "size"), [("svamp_palm_train.jsonl", 800), ("svamp_palm_test.jsonl", 200)])
def test_every_gold_equation_of_svamp_is_readable_and_has_the_right_value(name: str, size: int) -> None:
    built, splits, rows = published("svamp", public(name))
    assert len(rows) == size
    assert (
        sum(map(len, (splits.train, splits.validation, splits.test))) + sum(splits.counts["train"].lost.values())
        == size
    )
    read = [(built.read_answer(row["equation"], Example("?")), row) for row in rows]
    assert all(Fraction(built.value(answer)) == Fraction(row["answer"]) for answer, row in read)
    tokens = (answer.replace("(", "").replace(")", "").split(" ") for answer, _ in read)
    assert all(token in "+-*/" or str(float(token)).removesuffix(".0") == token for line in tokens for token in line)


def test_most_answers_of_the_published_svamp_teacher_are_readable() -> None:
    """Unreadable are only answers with open brackets, unknowns or other text."""
    built, _, rows = published("svamp", public("svamp_palm_train.jsonl"))
    unreadable = []
    for row in rows:
        try:
            built.read_answer(row["teacher_answer"] or "", Example("?"))
        except AnswerError:
            unreadable.append(row["teacher_answer"] or "()")
    is_open = [text.count("(") != text.count(")") for text in unreadable]
    has_words = [any(c.isalpha() or c in "=,$%" for c in text) for text in unreadable]
    assert len(unreadable) < 0.05 * len(rows)
    assert all(o or w or text == "()" for o, w, text in zip(is_open, has_words, unreadable, strict=True)), unreadable


def test_the_public_rationales_of_gsm8k_and_strategyqa_belong_to_their_answers() -> None:
    train, test = public("gsm8k_train.jsonl"), public("gsm8k_test.jsonl")
    built, splits, rows = published("gsm8k", train, f"task.test_path={test}")
    answers = {row["question"].strip(): (row["answer"].replace(",", ""), row["human_rationale"]) for row in rows}
    assert all(answers[e.question] == (e.answer, e.rationale) for e in splits.train)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (2900, 100, 1319)
    built, splits, rows = published("strategyqa", public("strategyqa_train.jsonl"))
    facts = {row["question"].strip(): (str(row["answer"]).lower(), " ".join(row["facts"]).strip()) for row in rows}
    assert all(facts[e.question] == (e.answer, e.rationale) for e in splits.train)
    assert built.choices == ("true", "false")


@pytest.mark.parametrize(("name", "file"), [("svamp", "svamp_palm"), ("gsm8k", "gsm8k"), ("strategyqa", "strategyqa")])
def test_demonstrations_are_not_copied_from_the_public_data(name: str, file: str) -> None:
    built, splits, _ = published(name, public(f"{file}_train.jsonl"))
    examples = (*splits.train, *splits.validation, *splits.test)
    assert find_overlaps(Splits(tuple(built.shots()), (), examples), 8) == []
