"""Instructions on the texts of another task: in turn, one text in one split, no gold answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distill.app import config as configuration
from distill.errors import AnswerError, ConfigError
from distill.records import Example, Splits
from distill.tasks import Task
from tests.conftest import compose

SIZES = {"num_train": 9, "num_validation": 6, "num_test": 6}


def instructions(tmp_path: Path, **settings: Any) -> Any:
    path = tmp_path / "ratings.tsv"
    path.write_text("\n".join(f"{i}\t{2.5 if i % 2 else -2.5}\tSentence number {i} is rated." for i in range(40)))
    own = {f"num_{name}": 6 for name in ("labelled", "unlabelled", "validation", "test")} | {"file": path}
    values = {f"task.examples.{key}": value for key, value in (SIZES | settings).items()}
    values |= {f"task.texts.examples.{key}": value for key, value in own.items()}
    return configuration.build(compose("task=instruct", *(f"{k}={v}" for k, v in values.items())).task.examples)


def parts(splits: Splits) -> list[tuple[str, str]]:
    examples = (*splits.test, *splits.validation, *splits.train)
    return [tuple(example.question.split("\n\n")) for example in examples]


def test_each_text_has_one_instruction_and_is_in_one_split(tmp_path: Path) -> None:
    splits = instructions(tmp_path).splits()
    pairs = parts(splits)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [9, 6, 6]
    assert len({text for _, text in pairs}) == 21
    names = [instruction for instruction, _ in pairs]
    assert len(set(names)) == 3
    assert all(names[k] == names[k % 3] for k in range(21))  # so each split has all of them
    assert all(example.answer is None for part in (splits.train, splits.validation, splits.test) for example in part)
    lost = splits.counts["train"].lost
    assert lost["over num_train"] == 3
    assert sum(lost.values()) + 21 == 40


def test_another_seed_draws_other_texts(tmp_path: Path) -> None:
    assert parts(instructions(tmp_path).splits()) == parts(instructions(tmp_path).splits())
    assert parts(instructions(tmp_path).splits()) != parts(instructions(tmp_path, split_seed=1).splits())


def test_too_few_texts_and_repeated_instructions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"num_train=30: there are 24 texts; lower these numbers"):
        instructions(tmp_path, num_train=30).splits()
    with pytest.raises(ConfigError, match="expected at least 1, all of them different"):
        instructions(tmp_path, instructions="[a,a]")


def test_an_answer_is_the_whole_text(tmp_path: Path) -> None:
    task = instructions(tmp_path)
    assert isinstance(task, Task)
    assert task.read_answer(" one\n\n  two ", Example("?")) == "one\n\n  two"
    assert list(task.shots()) == []
    with pytest.raises(AnswerError):
        task.read_answer(" ", Example("?"))
