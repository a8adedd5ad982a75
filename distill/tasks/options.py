"""Choices that belong to a row: as its column has them, as answers, and as the prompt shows them.

The column of CommonsenseQA, ARC, MMLU, AQuA and the like holds one of

    ["a hat", "a shoe"]                                      texts
    ["A)21", "B)21.5"]                                       texts behind their labels
    {"label": ["A", "B"], "text": ["a hat", "a shoe"]}       labels and texts
    [{"label": "A", "text": "a hat"}, ...]                   the same, one by one
    {"A": "a hat", "B": "a shoe"}                            the same, by label; a null is no choice
    '["a hat", "a shoe"]'                                    one of these as a text of JSON, as a CSV file has it
    'a hat|a shoe'                                           texts with a separator between them
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

from distill.app.quoting import escape_problem
from distill.errors import AnswerError, ConfigError
from distill.tasks.answers import AnswerFormat
from distill.tasks.tables import parse_json
from distill.tasks.texts import text_of

LETTERS = string.ascii_uppercase
_LABELLED = re.compile(r"\s*\(?([A-Z])\s?[).:]\s*(.*)", re.DOTALL)


@dataclass(frozen=True)
class OwnChoices:
    """The choices of a row, in their order: labels in the data, texts, and the answers that a model chooses from."""

    labels: tuple[str, ...]
    texts: tuple[str, ...]
    answers: tuple[str, ...]


@final
class Options:
    """How rows with choices of their own become examples."""

    def __init__(
        self,
        *,
        column: str | list[str | bool | int | float],
        answer: Literal["letter", "text"],
        show: str,
        gold: Literal["label", "text"] | None,
        invalid: Literal["refuse", "drop"] | None,
        separator: str | None,
    ) -> None:
        """`column` is the name of their column; a list is that of the task's choices, with which nothing else is used.

        The `answer` is a letter by the place of a choice, or its text. `show` is what stands behind the question for
        every choice, with {letter} and {text}. `gold` says what the column of answers holds: a label, or an index from
        0, or a text; None is the one that fits. Rows with invalid choices or answers are refused or dropped.
        The `separator` stands between the choices of a column that is one text and not JSON.
        """
        self.column = column if isinstance(column, str) else None
        self._answer, self._show, self._gold, self.drops_invalid = answer, show, gold, invalid == "drop"
        self._separator = separator
        _check_show(show, is_needed=answer == "letter")
        _check_separator(separator)

    def read(self, value: Any, answers: AnswerFormat) -> OwnChoices:
        """Read the choices of a row from the value of its column; AnswerError if they are invalid."""
        try:
            pairs = [(_plain(label), _plain(text)) for label, text in _pairs(self._parsed(value))]
        except ValueError as error:  # of a list, say, where a text is expected
            raise AnswerError(f"its choices: {error}") from None
        if len(pairs) < 2:
            raise AnswerError(f"{value!r:.60} has {len(pairs)} choices; at least 2 are needed")
        labels, texts = zip(*pairs, strict=True)
        for name, values in (("labels", labels), ("texts", texts)):
            if "" in values or len(set(values)) < len(values):
                raise AnswerError(f"the {name} of its choices must not be empty or repeated, got {list(values)!r:.90}")
        if self._answer == "text":
            return OwnChoices(labels, texts, answers.checked_choices(texts))
        if len(texts) > len(LETTERS):
            raise AnswerError(f"{len(texts)} choices have no letters; set task.options.answer=text")
        return OwnChoices(labels, texts, answers.checked_choices(LETTERS[: len(texts)]))

    def _parsed(self, value: Any) -> Any:
        """The value of the column; one that is a text is parsed as JSON or cut at the separator."""
        if not isinstance(value, str) or not value.strip():
            return value
        try:
            parsed = parse_json(value)
            if isinstance(parsed, list | dict):
                return parsed
            problem = "a single value"
        except (ValueError, RecursionError) as error:
            problem = str(error)
        if self._separator is not None:
            return value.split(self._separator)
        raise AnswerError(
            f"{value[:60]!r} is not a JSON list of choices ({problem}); write one, or set task.options.separator to "
            "what stands between the choices"
        )

    def shown(self, choices: OwnChoices) -> str:
        """What stands behind the question."""
        lines = zip(_letters(len(choices.texts)), choices.texts, strict=True)
        return "".join(self._show.format(letter=letter, text=text) for letter, text in lines)

    def gold(self, value: str, choices: OwnChoices) -> str:
        """The answer that a value of the column of answers stands for; AnswerError if it is none of the choices."""
        ways = {"label": _place_of_label, "text": _place_of_text}
        used = {name: way for name, way in ways.items() if self._gold in (None, name)}
        places = {name: place for name, way in used.items() if (place := way(value, choices)) is not None}
        if not places:
            shown = ", ".join(
                f"{label}: {text[:30]}" for label, text in zip(choices.labels, choices.texts, strict=True)
            )
            raise AnswerError(f"the answer {value[:60]!r} is none of its choices, {shown}")
        if len(set(places.values())) > 1:
            raise AnswerError(
                f"the answer {value[:60]!r} is the text of one choice and the label or index of another; set "
                "task.options.gold=label or task.options.gold=text"
            )
        return choices.answers[next(iter(places.values()))]


def _check_show(show: str, *, is_needed: bool) -> None:
    if problem := escape_problem("task.options.show", show):
        raise ConfigError(problem)
    try:
        parsed = [name for _, name, spec, conversion in string.Formatter().parse(show) if name is not None or spec]
    except ValueError as error:
        raise ConfigError(f"task.options.show={show!r}: {error}; expected text with {{letter}} and {{text}}") from None
    needed = {"letter", "text"} if is_needed else {"text"} if show else set()
    if not needed <= set(parsed) <= {"letter", "text"}:
        raise ConfigError(
            f"task.options.show={show!r}: expected text with {{letter}} and {{text}} in braces"
            + (", without which a letter means nothing; or set task.options.answer=text" if is_needed else "")
        )


def _check_separator(separator: str | None) -> None:
    if separator is None:
        return
    if problem := escape_problem("task.options.separator", separator):
        raise ConfigError(problem)
    if not separator:
        raise ConfigError("task.options.separator='': expected at least one character, such as '|', or null")


def _letters(number: int) -> Sequence[str]:
    """Letters by place; numbers where there are more choices than letters."""
    return LETTERS[:number] if number <= len(LETTERS) else [str(1 + place) for place in range(number)]


def _plain(value: Any) -> str:
    return unicodedata.normalize("NFC", text_of(value)).strip()


def _pairs(value: Any) -> Sequence[tuple[Any, Any]]:
    """Labels and texts of choices."""
    if isinstance(value, Mapping):
        return _pairs_of_mapping(value)
    if not isinstance(value, list | tuple):
        raise AnswerError(f"{value!r:.60} has no choices; expected a list of texts, or labels and texts")
    if value and all(isinstance(item, Mapping) for item in value):
        return [_pair(item) for item in value]
    texts = [_plain(item) for item in value]
    matches = [_LABELLED.fullmatch(text) for text in texts]
    labels = "".join(match[1] if match else " " for match in matches)
    if labels and labels == LETTERS[: len(texts)]:
        return [(match[1], match[2]) for match in matches if match]
    return list(zip(_letters(len(texts)), texts, strict=True))


def _pairs_of_mapping(value: Mapping[Any, Any]) -> Sequence[tuple[Any, Any]]:
    if set(value) != {"label", "text"}:
        return [(label, text) for label, text in value.items() if text is not None]
    labels, texts = value["label"], value["text"]
    if not isinstance(labels, list | tuple) or not isinstance(texts, list | tuple) or len(labels) != len(texts):
        raise AnswerError(f"{value!r:.60}: expected a list of labels and a list of as many texts")
    return list(zip(labels, texts, strict=True))


def _pair(item: Mapping[Any, Any]) -> tuple[Any, Any]:
    if not {"label", "text"} <= set(item):
        raise AnswerError(f"{dict(item)!r:.60}: expected a choice with label and text")
    return item["label"], item["text"]


def _place_of_label(value: str, choices: OwnChoices) -> int | None:
    """The place of a choice by its label; by its index where labels are no numbers."""
    labels = [label.casefold() for label in choices.labels]
    if (label := _plain(value).casefold()) in labels:
        return labels.index(label)
    are_numbers = any(label.isdecimal() for label in labels)
    is_index = label.isdecimal() and label.isascii() and not are_numbers and int(label) < len(labels)
    return int(label) if is_index else None


def _place_of_text(value: str, choices: OwnChoices) -> int | None:
    text = _plain(value)
    if text in choices.texts:
        return choices.texts.index(text)
    same = [place for place, other in enumerate(choices.texts) if other.casefold() == text.casefold()]
    return same[0] if len(same) == 1 else None
