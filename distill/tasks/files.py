"""Tasks from your own files: columns of JSON lines, CSV, Parquet or a saved data set, and how an answer is read.

A file is read into rows, each with the place that an error names; rows become examples; what is not held out for
validation and test is trained on.
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
from distill.tasks.expressions import ASCII_SIGNS, NUMBER, value_of
from distill.tasks.splitting import cut
from distill.tasks.tables import Table, check_columns, composed, open_tables, pick, pieces_of, refuse, text_of

Kind = Literal["choice", "number", "last_number", "expression", "line", "pattern"]
Read = Callable[[str], tuple[str, str]]  # a text to its canonical answer, and what stands behind that

_NUMBER = rf"(?a:{NUMBER})"  # ASCII digits only
_SIGNED = re.compile(rf"((?<![\w).])-)?\$?({_NUMBER})")
_PIECE = re.compile(rf"\s*({_NUMBER}|[-+*/()])")
_MARKS = " \t\r\n.!\"'*_()[]“”‘’«»"  # may stand around an answer without being of it
_HELD_OUT = 10  # one labelled row in so many is held out where no number is given


@final
class AnswerFormat:
    """How an answer is read out of text."""

    def __init__(self, *, kind: Kind | None, pattern: str | None, choices: list[str | bool | int | float]) -> None:
        """Without a `kind`: by the pattern where there is one, else by the choices, else the first line.

        `choice` is the one that the text begins with, `number` the first number, `expression` what can be worked out
        at the beginning of the first line, `pattern` the one group of a regular expression, wherever it is found.
        """
        self.choices = tuple(text_of(choice) for choice in choices)
        self.kind: Kind = kind or ("pattern" if pattern is not None else "choice" if choices else "line")
        folded = {choice.casefold(): choice for choice in self.choices}
        if len(folded) < len(choices) or "" in folded:
            raise ConfigError(f"task.choices={list(choices)}: some are empty, or the same but for case")
        if self.kind == "choice" and not choices:
            raise ConfigError("task.read.kind=choice needs the choices: task.choices=[yes,no]")
        if pattern is not None and self.kind != "pattern":
            raise ConfigError(f"task.read.pattern={pattern!r} goes with task.read.kind=pattern, not {self.kind}")
        readings: dict[Kind, Callable[[], Read]] = {
            "choice": lambda: partial(_choice, _begins_with(folded), folded),
            "number": lambda: partial(_number, 0),
            "last_number": lambda: partial(_number, -1),
            "expression": lambda: _expression,
            "line": lambda: _line,
            "pattern": lambda: partial(_group, _compiled(pattern)),
        }
        self._read = readings[self.kind]()

    def read(self, text: str) -> str:
        """The canonical answer in a text; AnswerError where there is none."""
        answer, _ = self._read(text)
        if self.choices and answer not in self.choices:
            raise AnswerError(f"{answer[:60]!r} is none of {', '.join(self.choices)}")
        return answer

    def read_gold(self, text: str) -> str:
        """The canonical form of an answer that somebody gave: nothing may stand behind it, and it reads as itself."""
        answer, (_, rest) = self.read(text), self._read(text)
        if rest.strip(_MARKS):
            raise AnswerError(f"{text[:60]!r} goes on behind {answer!r}")
        if self._reads_otherwise(answer):
            raise AnswerError(f"{answer[:60]!r} is not read as itself; wanted a pattern such as '(?s)(?:.*####)?(.+)'")
        return answer

    def _reads_otherwise(self, answer: str) -> bool:
        try:
            return self.read(answer) != answer
        except AnswerError:
            return True

    def value(self, answer: str) -> str:
        """What a canonical answer comes to: of an expression its exact value, else the answer itself."""
        return str(value_of(answer)) if self.kind == "expression" else answer


@dataclass(frozen=True)
class Columns:
    """Where the pieces of an example are; `question` is a column, or a text with {columns} in it."""

    question: str
    answer: str
    rationale: str | None


@final
class FileTask:
    """A task that needs no code: its examples from files of yours or of the hub."""

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
        """What the hub sends is kept below `root`; files of yours are only read."""
        self.choices = read.choices
        self._root, self._path = Path(root), path
        self._own = {"validation": validation_path, "test": test_path}
        self._columns = Columns(question, answer, rationale)
        self._format = read
        self._shots = [_shot(shot, read) for shot in shots]
        self._sizes = {"labelled": num_labelled, "unlabelled": num_unlabelled}
        self._sizes |= {"validation": num_validation, "test": num_test}
        self._split_seed = split_seed
        if wrong := [f"num_{name}={size}" for name, size in self._sizes.items() if size is not None and size < 0]:
            raise ConfigError(f"task.examples: {', '.join(wrong)}: wanted a number from 0 on, or null")

    def splits(self) -> Splits:
        """Hold out validation and test, then take labelled and unlabelled ones, as the seed and the content decide.

        A question that stands in two places counts once: in test before validation before train.
        """
        tables = self._tables()
        found = self._found(tables)
        labelled = [example for example in found.train if example.answer is not None]
        share = len(labelled) // _HELD_OUT
        test, labelled = self._hold_out("test", found.test if "test" in tables else None, labelled, share)
        own = found.validation if "validation" in tables else None
        validation, labelled = self._hold_out("validation", own, labelled, share)
        labelled, surplus = self._take("labelled", labelled, len(labelled))
        ids = {example.id for example in surplus}
        rest = [Example(e.question) for e in found.train if e.answer is None or e.id in ids]
        unlabelled, _ = self._take("unlabelled", rest, len(rest))
        if not labelled and not unlabelled:
            raise ConfigError(f"{self._path}: nothing is left to train on; hold out less (task.examples.num_test=…)")
        return Splits((*labelled, *unlabelled), tuple(validation), tuple(test), found.dropped)

    def shots(self) -> Sequence[Example]:
        """Those of the configuration."""
        return self._shots

    def read_answer(self, text: str) -> str:
        """Canonical answer in a text, as `task.read` says."""
        return self._format.read(text)

    def value(self, answer: str) -> str:
        """What the answer comes to, as `task.read` says."""
        return self._format.value(answer)

    def _tables(self) -> dict[str, Table]:
        """A table to train on, and those of the splits that have one of their own."""
        tables = open_tables(self._path, self._root)
        own = {name: tables[name] for name in self._own if name in tables and "train" in tables}
        own |= {name: pick(open_tables(path, self._root), name) for name, path in self._own.items() if path}
        return {"train": pick(tables, "train"), **own}

    def _found(self, tables: Mapping[str, Table]) -> Splits:
        """Every example there is, in an order that the seed and the content decide, not the order of the files."""
        read = {name: self._examples(name, table) for name, table in tables.items()}
        found = Splits.disjoint(read["train"], read.get("validation", []), read.get("test", []))
        every = {example.id for part in read.values() for example in part}
        if shown := [shot.question for shot in self._shots if shot.id in every]:
            raise ConfigError(
                f"task.examples.shots: {shown[0][:60]!r} is a question of the data too; write one of your own"
            )
        return found

    def _examples(self, name: str, table: Table) -> list[Example]:
        columns = self._columns if name == "train" else replace(self._columns, rationale=None)
        examples = examples_of(table, columns, self._format)
        bare = sum(example.answer is None for example in examples)
        if bare and name != "train":
            raise ConfigError(f"{table.name}: {bare} rows for {name} have no {columns.answer!r}; each needs one")
        return sorted(examples, key=self._rank)

    def _rank(self, example: Example) -> tuple[bytes, bool, str, str]:
        drawn = hashlib.blake2b(f"{self._split_seed} {example.id}".encode(), digest_size=16).digest()
        return drawn, example.answer is None, example.answer or "", example.rationale or ""

    def _hold_out(
        self, name: str, own: Sequence[Example] | None, labelled: Sequence[Example], share: int
    ) -> tuple[list[Example], list[Example]]:
        """Examples for a split, and the labelled ones that are left; from the latter where it has none of its own."""
        if own is None:
            return self._take(name, labelled, share)
        return self._take(name, own, len(own))[0], list(labelled)

    def _take(self, name: str, among: Sequence[Example], default: int) -> tuple[list[Example], list[Example]]:
        asked = self._sizes[name]
        number = default if asked is None else asked
        if number > len(among):
            raise ConfigError(
                f"task.examples.num_{name}={number}: {self._own.get(name) or self._path} has {len(among)} different "
                "examples left for it; ask for fewer, or give more rows"
            )
        taken, rest = cut(among, [number])
        return taken, rest


def examples_of(table: Table, columns: Columns, answers: AnswerFormat) -> list[Example]:
    """The examples of a table in its order; ConfigError names the first rows that are none."""
    pieces = pieces_of(table, columns.question)
    check_columns(table, (columns.answer, columns.rationale or columns.answer))
    examples: list[Example] = []
    problems: list[str] = []
    for place, row in table.rows.items():
        try:
            examples.append(_example(row, pieces, columns, answers))
        except (ValueError, AnswerError, RecursionError) as error:
            problems.append(f"{place}: {error}")
    refuse(table.name, problems, f"a question, and an answer of the kind {answers.kind} or none")
    return examples


def _example(
    row: Mapping[str, Any], pieces: Sequence[tuple[str, str | None]], columns: Columns, answers: AnswerFormat
) -> Example:
    question = composed(row, pieces)
    answer = text_of(row.get(columns.answer)).strip(" \t\r\n")
    if not answer:
        return Example(question)
    rationale = text_of(row.get(columns.rationale)).strip(" \t\r\n") if columns.rationale else ""
    return Example(question, answers.read_gold(answer), rationale or None)


def _shot(shot: Mapping[str, Any], answers: AnswerFormat) -> Example:
    if not {"question", "answer"} <= set(shot) <= {"question", "rationale", "answer"}:
        raise ConfigError(f"task.examples.shots: {dict(shot)!r:.80}: wanted question, rationale and answer")
    try:
        return Example(
            text_of(shot["question"]),
            answers.read_gold(text_of(shot["answer"])),
            text_of(shot.get("rationale")) or None,
        )
    except (ValueError, AnswerError) as error:
        raise ConfigError(f"task.examples.shots: {error}") from None


def _compiled(pattern: str | None) -> re.Pattern[str]:
    try:
        compiled = re.compile(pattern or "")
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(f"task.read.pattern={pattern!r} is no regular expression: {error}") from None
    if compiled.groups != 1:
        raise ConfigError(f"task.read.pattern={pattern!r} has {compiled.groups} groups, wanted one: the answer")
    return compiled


def _group(pattern: re.Pattern[str], text: str) -> tuple[str, str]:
    found = pattern.search(text)
    answer = (found[1] or "").strip() if found else ""
    if not answer:
        raise AnswerError(f"{text[:60]!r} holds nothing that the pattern finds")
    return answer, ""


def _begins_with(choices: Iterable[str]) -> re.Pattern[str]:
    """Longer choices first, and none that only begins a longer word or number."""
    words = "|".join(re.escape(choice) for choice in sorted(choices, key=len, reverse=True))
    return re.compile(rf"[{re.escape(_MARKS)}]*?({words})(?!\w|[-.,]\w)")


def _choice(pattern: re.Pattern[str], choices: Mapping[str, str], text: str) -> tuple[str, str]:
    folded = text.casefold()
    found = pattern.match(folded)
    if found is None:
        raise AnswerError(f"{text[:60]!r} begins with none of {', '.join(choices.values())}")
    return choices[found[1]], folded[found.end() :]


def _line(text: str) -> tuple[str, str]:
    line, _, rest = text.strip().partition("\n")
    if not line:
        raise AnswerError("the text is empty")
    return line.strip(), rest


def _number(which: int, text: str) -> tuple[str, str]:
    found = _SIGNED.findall(text.replace("−", "-"))
    if not found:
        raise AnswerError(f"{text[:60]!r} holds no number")
    sign, digits = found[which]
    plain = _plain(digits)
    return (plain if plain == "0" else sign + plain), ""


def _plain(number: str) -> str:
    """The shortest way to write a number: no thousands, no zeros that say nothing."""
    whole, _, part = number.replace(",", "").partition(".")
    part = part.rstrip("0")
    return (whole.lstrip("0") or "0") + (f".{part}" if part else "")


def _expression(text: str) -> tuple[str, str]:
    first, rest = _line(text)
    line, end, pieces = first.translate(ASCII_SIGNS), 0, []
    while found := _PIECE.match(line, end):
        pieces.append(_plain(found[1]) if found[1][-1].isdigit() else found[1])
        end = found.end()
    tidy = _tidy(pieces)
    try:
        value_of(tidy)
    except ValueError as error:
        raise AnswerError(f"{first[:60]!r} begins with no expression: {error}") from None
    return tidy, line[end:] + rest


def _tidy(pieces: Iterable[str]) -> str:
    """Single spaces around operators, none inside brackets or behind a sign."""
    text, before = "", "("
    for piece in pieces:
        text += piece if before in ("(", "sign") or piece == ")" else f" {piece}"
        is_sign = piece in ("+", "-") and before in ("(", "sign", "operator")
        before = "sign" if is_sign else "operator" if piece in ("+", "-", "*", "/") else piece
    return text
