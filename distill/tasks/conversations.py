"""Rows that are conversations: messages of a system, a user and an assistant, in the forms in which they are shared."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from distill.errors import AnswerError, ConfigError
from distill.records import Example, Message, Role
from distill.tasks.answers import AnswerFormat
from distill.tasks.columns import columns_of, with_columns
from distill.tasks.tables import Table, raise_problems
from distill.tasks.texts import text_of

Learn = Literal["all", "last"]

_COLUMNS = ("messages", "conversations", "conversation")
_PAIR = ("prompt", "completion")
_ROLES: Mapping[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}
_REASONING = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)
_SPACE = " \t\r\n"


@dataclass(frozen=True)
class Conversations:
    """Examples of an assistant's turn, after the messages before it.

    `messages` is the column with the messages, objects with role and content or from and value; None: `messages` or
    `conversations`, else `prompt` and `completion`, which may be texts. `learn` is all of the assistant's turns or the
    last one of each row. A conversation that ends with the user is an example without label.
    """

    messages: str | None
    learn: Learn
    answer = "answer of the assistant"

    def examples(self, table: Table, answers: AnswerFormat, *, rationales: bool) -> dict[str, Example]:
        """The examples of a table by their places, in its order; ConfigError names the first invalid rows."""
        columns = self._columns(table)
        table = with_columns(table, columns)
        examples: dict[str, Example] = {}
        problems: list[str] = []
        for place, row in table.rows.items():
            try:
                messages = [message for column in columns for message in _messages(row.get(column), column)]
                numbered = [*_examples(messages, answers, rationales=rationales)]
                for number, example in numbered if self.learn == "all" else numbered[-1:]:
                    examples[f"{place}, message {number}"] = example
            except (ValueError, AnswerError, RecursionError) as error:
                problems.append(f"{place}: {error}")
        raise_problems(table.name, problems, "messages of the user and the assistant in turn")
        return examples

    def _columns(self, table: Table) -> Sequence[str]:
        if self.messages is not None:
            return (self.messages,)
        names = columns_of(table)
        if column := next((name for name in _COLUMNS if name in names), None):
            return (column,)
        if set(_PAIR) <= set(names):
            return _PAIR
        expected = f"{', '.join(map(repr, _COLUMNS))}, nor {' and '.join(map(repr, _PAIR))}"
        hint = "name the column with the messages: task.messages=…"
        raise ConfigError(f"{table.name} has no column {expected}; it has {', '.join(map(repr, names))}; {hint}")


def _messages(value: Any, column: str) -> Iterator[Mapping[str, Any]]:
    """The messages of a column: a list, one as JSON, or the text of a prompt or a completion."""
    if isinstance(value, str) and (column not in _PAIR or value.lstrip().startswith('[{"')):
        value = json.loads(value)
    if isinstance(value, str) and value.strip(_SPACE):
        yield {"role": "assistant" if column == "completion" else "user", "content": value}
    elif isinstance(value, list | tuple):
        for message in value:
            if not isinstance(message, Mapping):
                raise ValueError(f"{message!r:.60} is not a message, an object with role and content")
            yield message
    elif value and not isinstance(value, str):
        raise ValueError(f"{column!r} is {value!r:.60}, expected a list of messages")


def _examples(
    messages: Sequence[Mapping[str, Any]], answers: AnswerFormat, *, rationales: bool
) -> Iterator[tuple[int, Example]]:
    """An example for each turn of the assistant, with the number of its message; one for a last turn of the user."""
    history: list[Message] = []
    for number, message in enumerate(messages, start=1):
        role = _role(message, number)
        _check_turn(role, history, number)
        content = _content(message, number)
        if role == "assistant":
            rationale, text = _split_reasoning(message, content)
            if not text:
                raise ValueError(f"message {number} has reasoning, but no answer")
            question = history[-1].content
            kept = rationale if rationales else None
            yield number, Example(question, answers.read_gold(text), kept, history=tuple(history[:-1]))
            content = text
        history.append(Message(role, content))
    if not history or history[-1].role == "system":
        raise ValueError("there is no message of the user")
    if history[-1].role == "user":
        yield len(history), Example(history[-1].content, history=tuple(history[:-1]))


def _role(message: Mapping[str, Any], number: int) -> Role:
    name = message.get("role", message.get("from"))
    if name not in _ROLES:
        raise ValueError(f"message {number} is of {name!r}, expected one of {', '.join(_ROLES)}")
    if message.get("tool_calls") or message.get("function_call"):
        raise ValueError(f"message {number} calls a tool, which is not supported")
    return _ROLES[name]


def _check_turn(role: Role, history: Sequence[Message], number: int) -> None:
    """Raise ValueError unless the system speaks first or not at all, then the user and the assistant in turn."""
    before = history[-1].role if history else None
    allowed = {None: ("system", "user"), "system": ("user",), "user": ("assistant",), "assistant": ("user",)}[before]
    if role not in allowed:
        raise ValueError(f"message {number} is of the {role}, expected one of the {' or the '.join(allowed)}")


def _content(message: Mapping[str, Any], number: int) -> str:
    """The text of a message, without outer spaces, which templates remove or keep as they like."""
    value = message.get("content", message.get("value"))
    if isinstance(value, list | tuple) and any(isinstance(part, Mapping) for part in value):
        if other := [part for part in value if not (isinstance(part, Mapping) and "text" in part)]:
            raise ValueError(f"message {number} contains {other[0]!r:.60}, expected text only")
        value = "\n".join(text_of(part["text"]) for part in value)
    text = text_of(value).strip(_SPACE)
    if not text:
        raise ValueError(f"message {number} is empty")
    return text


def _split_reasoning(message: Mapping[str, Any], content: str) -> tuple[str | None, str]:
    """Reasoning that stands in a field of its own or in <think> before the answer, and the answer."""
    if reasoning := text_of(message.get("reasoning_content", message.get("reasoning"))).strip(_SPACE):
        return reasoning, content
    if match := _REASONING.fullmatch(content):
        return match[1].strip(_SPACE) or None, match[2].strip(_SPACE)
    return None, content
