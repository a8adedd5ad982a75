"""Conversations in the forms in which they are shared become examples; others are refused with their place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill.app import config as configuration
from distill.errors import ConfigError
from distill.records import Example, Message, Splits
from tests.conftest import compose

TURNS = [("user", "One?"), ("assistant", "First.\n\nReally."), ("user", "Two?"), ("assistant", "Second.")]
LATER = (Message("user", "One?"), Message("assistant", "First.\n\nReally."))


def shared(turns: list[tuple[str, str]], keys: tuple[str, str] = ("role", "content"), **names: str) -> list[Any]:
    """Messages as objects with these keys, the roles under other names."""
    return [{keys[0]: names.get(role, role), keys[1]: content} for role, content in turns]


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Splits]:
    """Read rows of task=chat, all for training."""

    def read(rows: list[dict[str, Any]], *overrides: str) -> Splits:
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        sizes = ("task.examples.num_validation=0", "task.examples.num_test=0")
        task = configuration.build(compose("task=chat", f"task.path={path}", *sizes, *overrides).task.examples)
        splits = task.splits()
        assert isinstance(splits, Splits)
        return splits

    return read


@pytest.mark.parametrize(
    "row",
    [
        {"messages": shared(TURNS)},
        {"conversations": shared(TURNS, ("from", "value"), user="human", assistant="gpt")},
        {"messages": json.dumps(shared(TURNS))},
        {"messages": [{"role": r, "content": [{"type": "text", "text": f" {c}\n"}]} for r, c in TURNS]},
        {"prompt": shared(TURNS[:3]), "completion": shared(TURNS[3:])},
        {"prompt": shared(TURNS[:3]), "completion": "Second."},
    ],
)
def test_every_form_of_a_conversation_is_the_same_example(read: Callable[..., Splits], row: dict[str, Any]) -> None:
    assert read([row]).train == (Example("Two?", "Second.", history=LATER),)


def test_all_turns_or_the_last_one_are_learned(read: Callable[..., Splits]) -> None:
    row = {"messages": shared([("system", "Be brief."), *TURNS])}
    system = Message("system", "Be brief.")
    first = Example("One?", "First.\n\nReally.", history=(system,))
    last = Example("Two?", "Second.", history=(system, *LATER))
    assert read([row]).train == (last,)
    assert set(read([row], "task.learn=all").train) == {first, last}
    unanswered = Example("Two?", history=(system, *LATER))
    row = {"messages": shared([("system", "Be brief."), *TURNS[:3]])}
    assert read([row]).train == (unanswered,)
    assert set(read([row], "task.learn=all").train) == {first, unanswered}


def test_a_pair_of_texts_is_a_question_and_its_answer(read: Callable[..., Splits]) -> None:
    rows = [{"prompt": "One?", "completion": " First."}, {"prompt": '["a"] is what?', "completion": "[1] is one."}]
    assert set(read(rows).train) == {Example("One?", "First."), Example('["a"] is what?', "[1] is one.")}


def test_a_column_of_another_name_can_be_named(read: Callable[..., Splits]) -> None:
    rows = [{"dialog": shared(TURNS)}]
    assert read(rows, "task.messages=dialog").train == (Example("Two?", "Second.", history=LATER),)
    with pytest.raises(ConfigError, match=r"no column 'messages'.*it has 'dialog'; name .* task\.messages="):
        read(rows)


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", None])
def test_reasoning_before_an_answer_is_its_rationale(read: Callable[..., Splits], field: str | None) -> None:
    content = "2" if field else "<think>\nOne more.\n</think>\n\n2"
    answer = {"role": "assistant", "content": content} | ({field: "One more."} if field else {})
    row = {"messages": [{"role": "user", "content": "1 + 1?"}, answer, *shared(TURNS[2:])]}
    first = Example("1 + 1?", "2", "One more.")
    last = Example("Two?", "Second.", history=(Message("user", "1 + 1?"), Message("assistant", "2")))
    assert set(read([row], "task.learn=all").train) == {first, last}


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([], "there is no message of the user"),
        ([("system", "Be brief.")], "there is no message of the user"),
        ([("assistant", "Hello.")], "message 1 is of the assistant, expected one of the system or the user"),
        ([("user", "a"), ("user", "b")], "message 2 is of the user, expected one of the assistant"),
        ([*TURNS, ("system", "Now.")], "message 5 is of the system, expected one of the user"),
        ([("user", "a"), ("tool", "b")], "message 2 is of 'tool', expected one of system, user"),
        ([("user", "a"), ("assistant", " \n")], "message 2 is empty"),
        ([("user", "a"), ("assistant", "<think>b</think>")], "message 2 has reasoning, but no answer"),
    ],
)
def test_an_invalid_conversation_is_refused_with_its_place(
    read: Callable[..., Splits], turns: list[tuple[str, str]], reason: str
) -> None:
    with pytest.raises(ConfigError, match=f"line 2: {reason}"):
        read([{"messages": shared(TURNS)}, {"messages": shared(turns)}])


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (5, "'messages' is 5, expected a list of messages"),
        (["a"], "'a' is not a message"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "message 1 contains .*image_url.*expected text only"),
        ([{"role": "assistant", "content": "", "tool_calls": [{}]}], "message 1 calls a tool"),
    ],
)
def test_what_is_no_text_is_refused_with_its_place(read: Callable[..., Splits], value: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"line 1: {reason}"):
        read([{"messages": value}])


def test_different_answers_to_a_conversation_are_all_right(read: Callable[..., Splits]) -> None:
    rows = [{"messages": shared([*TURNS[:3], ("assistant", answer)])} for answer in ("b", "a", "b")]
    splits = read(rows)
    assert splits.train == (Example("Two?", "a", accepted=("b",), history=LATER),)
    assert dict(splits.counts["train"].lost) == {"repeated": 2}
    with pytest.raises(ConfigError, match="rows with different answers"):
        read(rows, "task.conflicts=null")


def test_all_turns_of_a_conversation_are_in_one_split(read: Callable[..., Splits]) -> None:
    rows = [
        {"messages": shared([(role, f"{content} {number}") for role, content in TURNS * 2])} for number in range(40)
    ]
    splits = read(rows, "task.learn=all", "task.examples.num_test=10", "task.examples.num_validation=6")
    openings = [{example.opening for example in part} for part in (splits.train, splits.validation, splits.test)]
    assert [len(part) for part in openings] == [35, 2, 3]
    assert len(set.union(*openings)) == 40
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [140, 8, 12]
