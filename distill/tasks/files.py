"""Tasks from your own files (JSON lines, CSV, Parquet or a saved dataset), and formats of answers.

A file is read into rows, rows become examples, and the examples not held out for validation and test are for training.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, final

from distill.errors import AnswerError, ConfigError
from distill.records import Example, Splits
from distill.tasks.expressions import ASCII_SIGNS, NUMBER, evaluate_expression
from distill.tasks.splitting import cut
from distill.tasks.tables import (
    Table,
    check_columns,
    fill_template,
    open_tables,
    parse_template,
    raise_problems,
    select_split,
    text_of,
)

Kind = Literal["choice", "number", "last_number", "expression", "line", "pattern"]
Read = Callable[[str], tuple[str, str]]  # text -> canonical answer, text after the answer

_NUMBER = rf"(?a:{NUMBER})"  # ASCII digits only
_SIGNED = re.compile(rf"((?<![\w).])-)?\$?({_NUMBER})")
_SYMBOL = re.compile(rf"\s*({_NUMBER}|[-+*/()])")
_MARKS = " \t\r\n.!\"'*_()[]“”‘’«»"  # may surround an answer without being part of it
_HELD_OUT = 10  # by default one labelled row in 10 is held out for each of validation and test


@final
class AnswerFormat:
    """Reads answers from text."""

    def __init__(self, *, kind: Kind | None, pattern: str | None, choices: list[str | bool | int | float]) -> None:
        """If `kind` is None it is `pattern` if there is a pattern, else `choice` if there are choices, else `line`.

        `choice` reads the choice that the text begins with, `number` and `last_number` the first and the last number,
        `expression` the arithmetic at the start of the first line, `line` the first line, `pattern` the only group of
        a regular expression, matched anywhere in the text.
        """
        self.choices = tuple(text_of(choice) for choice in choices)
        self.kind: Kind = kind or ("pattern" if pattern is not None else "choice" if choices else "line")
        folded = {choice.casefold(): choice for choice in self.choices}
        if len(folded) < len(choices) or "" in folded:
            raise ConfigError(f"task.choices={list(choices)}: choices must not be empty or differ only in case")
        if self.kind == "choice" and not choices:
            raise ConfigError("task.read.kind=choice needs choices, such as task.choices=[yes,no]")
        if pattern is not None and self.kind != "pattern":
            raise ConfigError(f"task.read.pattern={pattern!r} requires task.read.kind=pattern, got {self.kind}")
        readers: dict[Kind, Callable[[], Read]] = {
            "choice": lambda: partial(_read_choice, _choice_pattern(folded), folded),
            "number": lambda: partial(_read_number, 0),
            "last_number": lambda: partial(_read_number, -1),
            "expression": lambda: _read_expression,
            "line": lambda: _read_line,
            "pattern": lambda: partial(_read_group, _compile_pattern(pattern)),
        }
        self._read = readers[self.kind]()

    def read(self, text: str) -> str:
        """Read the canonical answer from a text; AnswerError if it has none."""
        answer, _ = self._read(text)
        if self.choices and answer not in self.choices:
            raise AnswerError(f"{answer[:60]!r} is not one of {', '.join(self.choices)}")
        return answer

    def read_gold(self, text: str) -> str:
        """Canonical form of a gold answer, which must be nothing but an answer and must read back unchanged."""
        answer, (_, rest) = self.read(text), self._read(text)
        if rest.strip(_MARKS):
            raise AnswerError(f"{text[:60]!r} has more text after the answer {answer!r}")
        if not self._reads_back(answer):
            raise AnswerError(
                f"{answer[:60]!r} does not read back unchanged; use a pattern such as '(?s)(?:.*####)?(.+)'"
            )
        return answer

    def _reads_back(self, answer: str) -> bool:
        try:
            return self.read(answer) == answer
        except AnswerError:
            return False

    def value(self, answer: str) -> str:
        """The exact value if the answer is an expression, else the answer itself."""
        return str(evaluate_expression(answer)) if self.kind == "expression" else answer


@dataclass(frozen=True)
class Columns:
    """Columns of an example; `question` is a column or a template with {columns} in braces."""

    question: str
    answer: str
    rationale: str | None


@final
class FileTask:
    """A task defined by configuration alone, with examples from local files or a hub dataset."""

    version = "1"

    def __init__(
        self,
        *,
        root: str,
        path: str,
        test_path: str | None,
        validation_path: str | None,
        question: str,
        answer: str,
        rationale: str | None,
        read: AnswerFormat,
        shots: list[dict[str, Any]],
        num_labelled: int | None,
        num_unlabelled: int | None,
        num_validation: int | None,
        num_test: int | None,
        split_seed: int,
    ) -> None:
        """Downloads from the hub are kept in `root`; local files are only read."""
        self.choices = read.choices
        self._root, self._path = Path(root), path
        self._split_paths = {"validation": validation_path, "test": test_path}
        self._columns = Columns(question, answer, rationale)
        self._format = read
        self._shots = [_shot(shot, read) for shot in shots]
        self._sizes = {"labelled": num_labelled, "unlabelled": num_unlabelled}
        self._sizes |= {"validation": num_validation, "test": num_test}
        self._split_seed = split_seed
        if negative := [f"num_{name}={size}" for name, size in self._sizes.items() if size is not None and size < 0]:
            raise ConfigError(f"task.examples: {', '.join(negative)}: expected a number of at least 0, or null")

    def splits(self) -> Splits:
        """Hold out validation and test, then take labelled and unlabelled examples, in the order of `_rank`.

        A question that occurs in several splits is kept in only one: test before validation before train.
        """
        tables = self._tables()
        available = self._available(tables)
        labelled = [example for example in available.train if example.answer is not None]
        num_held_out = len(labelled) // _HELD_OUT
        own_test = available.test if "test" in tables else None
        test, labelled = self._hold_out("test", own_test, labelled, num_held_out)
        own_validation = available.validation if "validation" in tables else None
        validation, labelled = self._hold_out("validation", own_validation, labelled, num_held_out)
        labelled, surplus = self._take("labelled", labelled, len(labelled))
        surplus_ids = {example.id for example in surplus}
        rest = [Example(e.question) for e in available.train if e.answer is None or e.id in surplus_ids]
        unlabelled, _ = self._take("unlabelled", rest, len(rest))
        if not labelled and not unlabelled:
            raise ConfigError(f"{self._path}: no examples are left for training; lower task.examples.num_test=…")
        return Splits((*labelled, *unlabelled), tuple(validation), tuple(test), available.dropped)

    def shots(self) -> Sequence[Example]:
        """The demonstrations of the configuration."""
        return self._shots

    def read_answer(self, text: str) -> str:
        """Read the canonical answer from a text, as configured in `task.read`."""
        return self._format.read(text)

    def value(self, answer: str) -> str:
        """Value of an answer, as configured in `task.read`."""
        return self._format.value(answer)

    def _tables(self) -> dict[str, Table]:
        """The train table, and the tables of splits that have their own file or a split of this name in `path`."""
        tables = open_tables(self._path, self._root)
        own = {name: tables[name] for name in self._split_paths if name in tables and "train" in tables}
        own |= {
            name: select_split(open_tables(path, self._root), name) for name, path in self._split_paths.items() if path
        }
        return {"train": select_split(tables, "train"), **own}

    def _available(self, tables: Mapping[str, Table]) -> Splits:
        """All examples of the tables, in an order that does not depend on the order of rows."""
        examples = {name: self._examples(name, table) for name, table in tables.items()}
        ids = {example.id for part in examples.values() for example in part}
        if repeated := [shot.question for shot in self._shots if shot.id in ids]:
            raise ConfigError(
                f"task.examples.shots: {repeated[0][:60]!r} is also a question of the data; write a different one"
            )
        return Splits.disjoint(examples["train"], examples.get("validation", []), examples.get("test", []))

    def _examples(self, name: str, table: Table) -> list[Example]:
        columns = self._columns if name == "train" else replace(self._columns, rationale=None)
        examples = read_examples(table, columns, self._format)
        num_unlabelled = sum(example.answer is None for example in examples)
        if num_unlabelled and name != "train":
            raise ConfigError(f"{table.name}: {num_unlabelled} {name} rows have no {columns.answer!r}; all need one")
        return sorted(examples, key=self._rank)

    def _rank(self, example: Example) -> tuple[bytes, bool, str, str]:
        """A pseudorandom order by seed and question; of equal questions, labelled ones first."""
        digest = hashlib.blake2b(f"{self._split_seed} {example.id}".encode(), digest_size=16).digest()
        return digest, example.answer is None, example.answer or "", example.rationale or ""

    def _hold_out(
        self, name: str, own: Sequence[Example] | None, labelled: Sequence[Example], default_size: int
    ) -> tuple[list[Example], list[Example]]:
        """Examples for a split, from its own table or else from `labelled`; and the labelled ones that remain."""
        if own is None:
            return self._take(name, labelled, default_size)
        return self._take(name, own, len(own))[0], list(labelled)

    def _take(self, name: str, examples: Sequence[Example], default_size: int) -> tuple[list[Example], list[Example]]:
        configured_size = self._sizes[name]
        size = default_size if configured_size is None else configured_size
        if size > len(examples):
            raise ConfigError(
                f"task.examples.num_{name}={size}: {self._split_paths.get(name) or self._path} has {len(examples)} "
                "distinct examples left for it; request fewer, or provide more rows"
            )
        taken, rest = cut(examples, [size])
        return taken, rest


def read_examples(table: Table, columns: Columns, answers: AnswerFormat) -> list[Example]:
    """The examples of a table, in its order; ConfigError names the first invalid rows."""
    template = parse_template(table, columns.question)
    check_columns(table, (columns.answer, columns.rationale or columns.answer))
    examples: list[Example] = []
    problems: list[str] = []
    for place, row in table.rows.items():
        try:
            examples.append(_example(row, template, columns, answers))
        except (ValueError, AnswerError, RecursionError) as error:
            problems.append(f"{place}: {error}")
    raise_problems(table.name, problems, f"a question, and an answer of kind {answers.kind} or an empty one")
    return examples


def _example(
    row: Mapping[str, Any], template: Sequence[tuple[str, str | None]], columns: Columns, answers: AnswerFormat
) -> Example:
    question = fill_template(row, template)
    answer = text_of(row.get(columns.answer)).strip(" \t\r\n")
    if not answer:
        return Example(question)
    rationale = text_of(row.get(columns.rationale)).strip(" \t\r\n") if columns.rationale else ""
    return Example(question, answers.read_gold(answer), rationale or None)


def _shot(shot: Mapping[str, Any], answers: AnswerFormat) -> Example:
    if not {"question", "answer"} <= set(shot) <= {"question", "rationale", "answer"}:
        raise ConfigError(f"task.examples.shots: {dict(shot)!r:.80}: expected the keys question, rationale and answer")
    try:
        return Example(
            text_of(shot["question"]),
            answers.read_gold(text_of(shot["answer"])),
            text_of(shot.get("rationale")) or None,
        )
    except (ValueError, AnswerError) as error:
        raise ConfigError(f"task.examples.shots: {error}") from None


def _compile_pattern(pattern: str | None) -> re.Pattern[str]:
    try:
        compiled = re.compile(pattern or "")
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(f"task.read.pattern={pattern!r} is not a valid regular expression: {error}") from None
    if compiled.groups != 1:
        raise ConfigError(f"task.read.pattern={pattern!r} has {compiled.groups} groups, expected exactly 1, the answer")
    return compiled


def _read_group(pattern: re.Pattern[str], text: str) -> tuple[str, str]:
    match = pattern.search(text)
    answer = (match[1] or "").strip() if match else ""
    if not answer:
        raise AnswerError(f"{text[:60]!r} does not match the pattern")
    return answer, ""


def _choice_pattern(choices: Iterable[str]) -> re.Pattern[str]:
    """Match a leading choice: the longest, and none that is only the start of a longer word or number."""
    words = "|".join(re.escape(choice) for choice in sorted(choices, key=len, reverse=True))
    return re.compile(rf"[{re.escape(_MARKS)}]*?({words})(?!\w|[-.,]\w)")


def _read_choice(pattern: re.Pattern[str], choices: Mapping[str, str], text: str) -> tuple[str, str]:
    folded = text.casefold()
    match = pattern.match(folded)
    if match is None:
        raise AnswerError(f"{text[:60]!r} does not begin with any of {', '.join(choices.values())}")
    return choices[match[1]], folded[match.end() :]


def _read_line(text: str) -> tuple[str, str]:
    line, _, rest = text.strip().partition("\n")
    if not line:
        raise AnswerError("the text is empty")
    return line.strip(), rest


def _read_number(index: int, text: str) -> tuple[str, str]:
    numbers = _SIGNED.findall(text.replace("−", "-"))
    if not numbers:
        raise AnswerError(f"{text[:60]!r} has no number")
    sign, digits = numbers[index]
    plain = _shortest(digits)
    return (plain if plain == "0" else sign + plain), ""


def _shortest(number: str) -> str:
    """Write a number without thousands commas and insignificant zeros."""
    whole, _, fraction = number.replace(",", "").partition(".")
    fraction = fraction.rstrip("0")
    return (whole.lstrip("0") or "0") + (f".{fraction}" if fraction else "")


def _read_expression(text: str) -> tuple[str, str]:
    first_line, rest = _read_line(text)
    line, end, symbols = first_line.translate(ASCII_SIGNS), 0, []
    while match := _SYMBOL.match(line, end):
        symbols.append(_shortest(match[1]) if match[1][-1].isdigit() else match[1])
        end = match.end()
    expression = _format_expression(symbols)
    try:
        evaluate_expression(expression)
    except ValueError as error:
        raise AnswerError(f"{first_line[:60]!r} does not begin with an expression: {error}") from None
    return expression, line[end:] + rest


def _format_expression(symbols: Iterable[str]) -> str:
    """Join symbols with single spaces around operators, none inside brackets or after a sign."""
    text, previous = "", "("
    for symbol in symbols:
        text += symbol if previous in ("(", "sign") or symbol == ")" else f" {symbol}"
        is_sign = symbol in ("+", "-") and previous in ("(", "sign", "operator")
        previous = "sign" if is_sign else "operator" if symbol in ("+", "-", "*", "/") else symbol
    return text
