"""Formats of answers: how a canonical answer is read from generated text, and from the labels of a file."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Literal, final

from distill.errors import AnswerError, ConfigError
from distill.tasks import mathematics
from distill.tasks.expressions import evaluate_expression
from distill.tasks.numerals import read_expression, read_number
from distill.tasks.texts import text_of

Kind = Literal["choice", "number", "last_number", "expression", "math", "line", "text", "pattern"]
Choices = tuple[str, ...]
# A text and the possible answers -> the canonical answer, and the text around it that is no part of it.
Read = Callable[[str, Choices], tuple[str, str]]

_MARKS = " \t\r\n.!\"'*_()[]“”‘’«»"  # may surround an answer without being part of it
_WORD_GOES_ON = re.compile(r"\w|[-‐‑.,/⁄]\w|[:'’^][0-9]")  # directly behind a choice: it only begins this word
_HINTS: Mapping[Kind, str] = {
    "line": "; for answers of several lines set task.read.kind=text",
    "number": "; expected one number and at most a unit; for a number at the end of a text set "
    "task.read.kind=last_number, with #### before it",
    "last_number": "; expected one number and at most a unit, alone or behind a last ####",
}


@final
class AnswerFormat:
    """Reads answers from text."""

    def __init__(
        self, *, kind: Kind | None, pattern: str | None, choices: str | list[str | bool | int | float]
    ) -> None:
        """`choices` are all possible answers, or the name of the column that has them, other ones in each row.

        If `kind` is None it is `pattern` if there is a pattern, else `choice` if there are choices, else `line`.

        `choice` reads the choice that the text begins with, `number` and `last_number` the first and the last number,
        `expression` the arithmetic at the start of the first line, `math` the formula of the last box or the last one,
        `line` the first line, `text` the whole text,
        `pattern` the only group of a regular expression, matched anywhere in the text. Letters are compared in their
        composed form, NFC.
        """
        self.kind: Kind = kind or ("pattern" if pattern is not None else "choice" if choices else "line")
        if self.kind == "choice" and not choices:
            raise ConfigError("task.read.kind=choice needs choices, such as task.choices=[yes,no], or their column")
        if pattern is not None and self.kind != "pattern":
            raise ConfigError(f"task.read.pattern={pattern!r} requires task.read.kind=pattern, got {self.kind}")
        if self.kind == "math":
            mathematics.require_math()
        readers: dict[Kind, Callable[[], Read]] = {
            "choice": lambda: _read_choice,
            "number": lambda: lambda text, _: read_number(0, text),
            "last_number": lambda: lambda text, _: read_number(-1, text),
            "expression": lambda: lambda text, _: read_expression(text)[:2],
            "math": lambda: lambda text, _: mathematics.read_math(text),
            "line": lambda: lambda text, _: _read_line(text),
            "text": lambda: lambda text, _: _read_text(text),
            "pattern": lambda: partial(_read_group, _compile_pattern(_composed(pattern or ""))),
        }
        self._read = readers[self.kind]()
        self.choices: Choices = ()
        if not isinstance(choices, str):
            try:
                self.choices = self.checked_choices([text_of(choice) for choice in choices])
            except AnswerError as error:
                raise ConfigError(f"task.choices: {error}") from None

    @property
    def is_free_text(self) -> bool:
        """Whether answers are texts that are rarely equal although both are good."""
        return self.kind == "text" and not self.choices

    def checked_choices(self, texts: Iterable[str]) -> Choices:
        """Canonical forms of choices; AnswerError unless they can be told apart and are read back as they are."""
        choices = tuple(_composed(text).strip() for text in texts)
        folded = {choice.casefold() for choice in choices}
        if len(folded) < len(choices) or "" in folded:
            raise AnswerError(f"{list(choices)}: choices must not be empty, or differ only in case or outer spaces")
        if unread := [choice for choice in choices if not self._reads_back(choice, choices)]:
            raise AnswerError(
                f"{unread[0]!r} is not what task.read.kind={self.kind} reads from it; write every choice as it is "
                "read, such as 1000 for 1,000 with kind=number, or set task.read.kind=choice"
            )
        return choices

    def read(self, text: str, own_choices: Choices = ()) -> str:
        """Read the canonical answer from a text; AnswerError if it has none, or one that is none of the choices."""
        return self._answer_and_rest(text, own_choices or self.choices)[0]

    def read_gold(self, text: str) -> str:
        """Canonical form of a gold answer, which must be nothing but an answer and must read back unchanged.

        A number may have a unit. What `pattern` does not match is no part of the answer.
        """
        answer, rest = self._answer_and_rest(text, self.choices)
        if rest.strip(_MARKS):
            raise AnswerError(f"{text[:60]!r} has more text than the answer {answer[:60]!r}{_HINTS.get(self.kind, '')}")
        if not self._reads_back(answer, self.choices):
            raise AnswerError(
                f"{answer[:60]!r} does not read back unchanged; use a pattern such as '(?s)(?:.*####)?(.+)'"
            )
        return answer

    def _answer_and_rest(self, text: str, choices: Choices) -> tuple[str, str]:
        answer, rest = self._read(_composed(text), choices)
        if choices and answer not in choices:
            raise AnswerError(f"{answer[:60]!r} is not one of {', '.join(choices)}")
        return answer, rest

    def _reads_back(self, answer: str, choices: Choices) -> bool:
        try:
            return self._answer_and_rest(answer, choices)[0] == answer
        except AnswerError:
            return False

    def value(self, answer: str) -> str:
        """The exact value if the answer is an expression or a plain number, else the answer itself."""
        if self.kind == "math":
            return mathematics.value(answer)
        return str(evaluate_expression(answer)) if self.kind == "expression" else answer

    def is_same(self, answer: str, reference: str) -> bool:
        """Whether an answer counts as the same as a reference."""
        if self.kind == "math":
            return mathematics.is_same(answer, reference)
        return self.value(answer) == self.value(reference)


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _compile_pattern(pattern: str) -> re.Pattern[str]:
    try:
        compiled = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(f"task.read.pattern={pattern!r} is not a valid regular expression: {error}") from None
    if compiled.groups != 1:
        raise ConfigError(f"task.read.pattern={pattern!r} has {compiled.groups} groups, expected exactly 1, the answer")
    return compiled


def _read_group(pattern: re.Pattern[str], text: str, _: Choices) -> tuple[str, str]:
    match = pattern.search(text)
    answer = (match[1] or "").strip() if match else ""
    if not answer:
        raise AnswerError(f"{text[:60]!r} does not match the pattern")
    return answer, ""


def _read_choice(text: str, choices: Choices) -> tuple[str, str]:
    """Read a leading choice: the longest, and none that is only the start of a longer word or number."""
    folded, by_length = text.casefold(), _by_length(choices)
    for start in range(1 + len(folded) - len(folded.lstrip(_MARKS))):
        for word, choice in by_length:
            end = start + len(word)
            if folded.startswith(word, start) and not _WORD_GOES_ON.match(folded, end):
                return choice, folded[end:]
    raise AnswerError(f"{text[:60]!r} does not begin with any of {', '.join(choices)}")


@functools.lru_cache
def _by_length(choices: Choices) -> tuple[tuple[str, str], ...]:
    """Choices with their case folded, the longest first."""
    return tuple(sorted(((choice.casefold(), choice) for choice in choices), key=lambda pair: -len(pair[0])))


def _read_line(text: str) -> tuple[str, str]:
    line, _, rest = text.strip().partition("\n")
    if not line:
        raise AnswerError("the text is empty")
    return line.strip(), rest


def _read_text(text: str) -> tuple[str, str]:
    if not (whole := text.strip()):
        raise AnswerError("the text is empty")
    return whole, ""
