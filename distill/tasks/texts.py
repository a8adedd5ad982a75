"""Texts from the columns of a row: single values, and questions laid out by a template."""

from __future__ import annotations

import math
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from typing import Any

from distill.app.quoting import escape_problem
from distill.errors import ConfigError
from distill.tasks.columns import columns_of
from distill.tasks.numerals import plain_decimal
from distill.tasks.tables import Table

_MAX_CHARACTERS = 1_000_000  # of a value
_SPACE = " \t\r\n"

Template = Sequence[tuple[str, str | None]]  # a literal text and a column behind it, repeatedly


def text_of(value: Any) -> str:
    """A text, number or date as text, empty for null and NaN; a list of one is its item. ValueError for others."""
    if isinstance(value, list | tuple):
        if len(value) > 1:
            raise ValueError(f"{value!r:.60} is a list of {len(value)} values, expected one text or number")
        return text_of(value[0]) if value else ""
    if value is None or (isinstance(value, float | Decimal) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float | Decimal):
        return _number_text(value)
    if not isinstance(value, str | int | date):
        raise ValueError(f"{value!r:.60} is a {type(value).__name__}, expected a text or a number")
    text = str(value)
    text.encode()  # a lone surrogate, which JSON can contain, raises UnicodeEncodeError, a ValueError
    return _check_length(text)


def texts_of(value: Any) -> list[str]:
    """The texts of a value or of a list of values."""
    return [text_of(item) for item in value] if isinstance(value, list | tuple) else [text_of(value)]


def joined_text(value: Any) -> str:
    """A value or a list of values, such as the steps of a rationale, as one text."""
    return _check_length(" ".join(texts_of(value)))


def _number_text(value: float | Decimal) -> str:
    number = Decimal(repr(float(value))) if isinstance(value, float) else value
    if not number.is_finite():
        raise ValueError(f"{value} is not a finite number")
    if isinstance(value, Decimal) and value != value.to_integral_value():
        return _check_length(format(value, "f"))  # a decimal's zeros are its precision
    return plain_decimal(number)


def _check_length(text: str) -> str:
    if len(text) > _MAX_CHARACTERS:
        raise ValueError(f"a text of {len(text):,} characters; at most {_MAX_CHARACTERS:,} are allowed")
    return text


@dataclass(frozen=True)
class QuestionLayout:
    """How the question of a row is laid out: literal texts, and the columns behind them."""

    template: Template

    @property
    def columns(self) -> list[str]:
        """Names of the columns that it shows."""
        return [name for _, name in self.template if name is not None]

    def lay_out(self, row: Mapping[str, Any]) -> str:
        """The question of a row; ValueError if all of the columns are empty."""
        values = {name: text_of(row.get(name)).strip(_SPACE) for name in self.columns}
        if not any(values.values()):
            raise ValueError(f"{', '.join(values)} is empty")
        return "".join(literal + (values[name] if name is not None else "") for literal, name in self.template)


def question_layout(table: Table, question: str) -> QuestionLayout:
    """The layout of the questions of this table: `question` is a column or a template with {columns} in braces.

    Tasks and recorded answers use it, so equal rows have the same question, and the same example id, in both.
    """
    names = columns_of(table)
    if question in names or "{" not in question:
        return QuestionLayout([("", question)])
    try:
        parsed = list(string.Formatter().parse(question))
    except ValueError as error:
        raise ConfigError(f"task.question={question!r}: {error}; expected text and {{columns}}") from None
    if any(format_spec or conversion for _, _, format_spec, conversion in parsed):
        raise ConfigError(f"task.question={question!r}: expected only columns in braces, as in {{{names[0]}}}")
    if problem := escape_problem("task.question", question):
        raise ConfigError(problem)
    return QuestionLayout([(literal, name) for literal, name, _, _ in parsed])
