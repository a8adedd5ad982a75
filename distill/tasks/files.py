"""Tasks from your own files (JSON lines, CSV, Parquet or a saved dataset).

A file is read into rows, rows become examples, and the examples not held out for validation and test are for training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, final, runtime_checkable

from distill.errors import AnswerError, ConfigError
from distill.records import SPLITS, Example, RowCounts, Splits, content_id, folded_id
from distill.tasks.answers import AnswerFormat
from distill.tasks.columns import with_columns
from distill.tasks.options import Options
from distill.tasks.splitting import Conflicts, cut, distinct_questions
from distill.tasks.tables import Table, open_tables, raise_problems, select_split
from distill.tasks.texts import joined_text, question_layout, text_of, texts_of

_HELD_OUT, _MAX_HELD_OUT = 10, 2000  # by default one labelled row in 10, at most 2,000, for each of validation and test
_SPACE = " \t\r\n"


@runtime_checkable
class RowReader(Protocol):
    """How the rows of a table become examples; `answer` names what an example without label lacks."""

    answer: str

    def examples(self, table: Table, answers: AnswerFormat, *, rationales: bool) -> dict[str, Example]:
        """The examples of a table by their places, in its order; ConfigError names the first invalid rows."""
        ...


@dataclass(frozen=True)
class Columns:
    """Examples of one question; `question` is a column or a template with {columns} in braces.

    `options` say how rows with choices of their own are read; None, or without a column: there are none.
    """

    question: str
    answer: str
    rationale: str | None
    options: Options | None

    @property
    def own(self) -> Options | None:
        """The options, if rows have choices of their own."""
        return self.options if self.options and self.options.column else None

    def examples(self, table: Table, answers: AnswerFormat, *, rationales: bool) -> dict[str, Example]:
        """The examples of a table by their places, in its order; ConfigError names the first invalid rows."""
        return read_examples(table, self if rationales else replace(self, rationale=None), answers)


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
        rows: RowReader,
        read: AnswerFormat,
        split_names: dict[str, str | None] | None,
        conflicts: Conflicts,
        shots: list[dict[str, Any]],
        num_labelled: int | None,
        num_unlabelled: int | None,
        num_validation: int | None,
        num_test: int | None,
        folds: int | None,
        fold: int,
        split_seed: int,
    ) -> None:
        """Downloads from the hub are kept in `root`; local files are only read.

        `split_names` are those of the train, validation and test splits in a data set, None for a split to draw from
        train. `conflicts` says what happens to a question whose rows have different answers. With `folds`, test is part
        number `fold` of so many parts, about equal in size, of what can be held out.
        """
        self.choices = read.choices
        self.is_free_text = read.is_free_text
        self._root, self._path = Path(root), path
        self._split_paths = {"validation": validation_path, "test": test_path}
        self._rows = rows
        self._format, self._conflicts = read, conflicts
        self._names = _names(split_names or {})
        self._shots = [_shot(shot, read, rows) for shot in shots]
        self._sizes = {"labelled": num_labelled, "unlabelled": num_unlabelled}
        self._sizes |= {"validation": num_validation, "test": num_test}
        self._folds, self._fold, self._split_seed = folds, fold, split_seed
        if negative := [f"num_{name}={size}" for name, size in self._sizes.items() if size is not None and size < 0]:
            raise ConfigError(f"task.examples: {', '.join(negative)}: expected a number of at least 0, or null")
        if folds is not None and not (folds > 1 and 0 <= fold < folds):
            raise ConfigError(
                f"task.examples.folds={folds} and fold={fold}: expected at least 2 folds, and one of 0 to folds - 1"
            )
        if folds is not None and (test_path or num_test is not None):
            raise ConfigError(
                f"task.examples.folds={folds} makes test splits of all rows, which task.test_path and "
                "task.examples.num_test exclude; leave them null, or folds"
            )

    def splits(self) -> Splits:
        """Hold out validation and test, then take labelled and unlabelled examples, in the order of `_rank`.

        Labelled examples are held out; of free texts without any label, examples without. A question that occurs in
        several splits is kept in only one: test before validation before train.
        """
        tables = self._tables()
        available = self._available(tables)
        candidates = [example for example in available.train if example.answer is not None]
        if self.is_free_text and not candidates:
            candidates = list(available.train)
        num_held_out = min(len(candidates) // _HELD_OUT, _MAX_HELD_OUT)
        own_test = available.test if "test" in tables else None
        if self._folds is None:
            test, candidates = self._hold_out("test", own_test, candidates, num_held_out)
        else:
            test, candidates = self._held_out_fold(own_test, candidates, self._folds)
        own_validation = available.validation if "validation" in tables else None
        validation, candidates = self._hold_out("validation", own_validation, candidates, num_held_out)
        remaining = [example for example in candidates if example.answer is not None]
        labelled, _ = self._take("labelled", remaining, len(remaining))
        taken = {example.id for example in (*test, *validation, *labelled)}
        rest = [example.unlabelled() for example in available.train if example.id not in taken]
        unlabelled, _ = self._take("unlabelled", rest, len(rest))
        if not labelled and not unlabelled:
            raise ConfigError(f"{self._path}: no examples are left for training; lower task.examples.num_test=…")
        parts = {"train": (*labelled, *unlabelled), "validation": tuple(validation), "test": tuple(test)}
        return Splits(**parts, counts=_counts(available.counts, parts, drawn=set(SPLITS) - set(tables)))

    def shots(self) -> Sequence[Example]:
        """The demonstrations of the configuration."""
        return self._shots

    def read_answer(self, text: str, example: Example) -> str:
        """Read the canonical answer from a text, as configured in `task.read`."""
        return self._format.read(text, example.choices)

    def value(self, answer: str) -> str:
        """Value of an answer, as configured in `task.read`."""
        return self._format.value(answer)

    def is_same(self, answer: str, reference: str) -> bool:
        """Whether an answer counts as the same as a reference, as configured in `task.read`."""
        return self._format.is_same(answer, reference)

    def _tables(self) -> dict[str, Table]:
        """The train table, and the tables of splits that have their own file or a split of this name in `path`."""
        tables, names = open_tables(self._path, self._root), self._names
        named = {name: names[name] or "" for name in self._split_paths}
        own = {name: tables[named[name]] for name in named if named[name] in tables and len(tables) > 1}
        own |= {
            name: select_split(open_tables(path, self._root), named[name] or name)
            for name, path in self._split_paths.items()
            if path
        }
        return {"train": select_split(tables, names["train"] or "train"), **own}

    def _available(self, tables: Mapping[str, Table]) -> Splits:
        """All examples of the tables, in an order that does not depend on the order of rows."""
        examples, counts = {name: list[Example]() for name in SPLITS}, {name: RowCounts(0) for name in SPLITS}
        for name, table in tables.items():
            examples[name], counts[name] = self._examples(name, table)
        ids = {example.id for part in examples.values() for example in part}
        if repeated := [shot.question for shot in self._shots if shot.id in ids]:
            raise ConfigError(
                f"task.examples.shots: {repeated[0][:60]!r} is also a question of the data; write a different one"
            )
        return Splits.disjoint(examples["train"], examples["validation"], examples["test"], counts=counts)

    def _examples(self, name: str, table: Table) -> tuple[list[Example], RowCounts]:
        rows = self._rows.examples(table, self._format, rationales=name == "train")
        num_unlabelled = sum(example.answer is None for example in rows.values())
        # Free texts without gold texts are compared with the teacher's; one split is compared with one of them.
        is_unlabelled = self.is_free_text and num_unlabelled == len(rows)
        if num_unlabelled and name != "train" and not is_unlabelled:
            raise ConfigError(f"{table.name}: {num_unlabelled} {name} rows have no {self._rows.answer!r}; all need one")
        examples, counts = distinct_questions(table.name, rows, self.value, self._conflicts)
        num_invalid = max(0, len(table.rows) - len(rows))  # a row is one example, or several
        read = RowCounts(len(rows) + num_invalid, {}, len(rows) + num_invalid)
        return sorted(examples, key=self._rank), read.less("invalid choices", num_invalid).then(counts)

    def _rank(self, example: Example) -> tuple[bytes, str, str]:
        """A pseudorandom order by seed and question; near duplicates, such as those in capitals, are neighbours.

        The turns of a conversation stand together.
        """
        digest = hashlib.blake2b(f"{self._split_seed} {folded_id(example.opening)}".encode(), digest_size=16).digest()
        return digest, content_id(example.opening), example.id

    def _hold_out(
        self, name: str, own: Sequence[Example] | None, candidates: Sequence[Example], default_size: int
    ) -> tuple[list[Example], list[Example]]:
        """Examples for a split, from its own table or else from `candidates`; and the candidates that remain."""
        if own is None:
            return self._take(name, candidates, default_size)
        return self._take(name, own, len(own))[0], list(candidates)

    def _held_out_fold(
        self, own: Sequence[Example] | None, candidates: Sequence[Example], folds: int
    ) -> tuple[list[Example], list[Example]]:
        """The part of the `candidates` whose index is `fold`, and the others; a conversation is in one part."""
        if own is not None:
            raise ConfigError(
                f"task.examples.folds={folds} makes test splits of all rows, but {self._path} has a test split; "
                "set task.splits.test=null to leave it out, or folds=null"
            )
        openings = list(dict.fromkeys(example.opening for example in candidates))
        if len(openings) < folds:
            raise ConfigError(f"task.examples.folds={folds}: {self._path} has {len(openings)} labelled examples only")
        first, last = (place * len(openings) // folds for place in (self._fold, self._fold + 1))
        held_out = set(openings[first:last])
        test = [example for example in candidates if example.opening in held_out]
        return test, [example for example in candidates if example.opening not in held_out]

    def _take(self, name: str, examples: Sequence[Example], default_size: int) -> tuple[list[Example], list[Example]]:
        configured_size = self._sizes[name]
        size = default_size if configured_size is None else configured_size
        if size > len(examples):
            raise ConfigError(
                f"task.examples.num_{name}={size}: {self._split_paths.get(name) or self._path} has {len(examples)} "
                "distinct examples left for it; request fewer, or provide more rows"
            )
        while 0 < size < len(examples) and examples[size - 1].opening == examples[size].opening:
            size += 1  # a conversation is in one split
        taken, rest = cut(examples, [size])
        return taken, rest


def _counts(
    available: Mapping[str, RowCounts], parts: Mapping[str, Sequence[Example]], *, drawn: set[str]
) -> dict[str, RowCounts]:
    """What became of the rows; those of the train table that were `drawn` for another split are counted there."""
    counts = {
        name: available[name].less(f"over num_{name}", available[name].kept - len(parts[name]))
        for name in SPLITS
        if name != "train" and name not in drawn
    }
    counts |= {name: RowCounts(len(parts[name]), {}, len(parts[name])) for name in drawn}
    num_drawn = sum(len(parts[name]) for name in drawn)
    own = replace(
        available["train"], read=available["train"].read - num_drawn, kept=available["train"].kept - num_drawn
    )
    counts["train"] = own.less("over num_unlabelled", own.kept - len(parts["train"]))
    return {name: counts[name] for name in SPLITS}


def _names(configured: Mapping[str, str | None]) -> dict[str, str | None]:
    """Names of the splits in a data set; ConfigError for a split that there is not."""
    if unknown := set(configured) - set(SPLITS):
        raise ConfigError(f"task.splits: {', '.join(sorted(unknown))}: expected {', '.join(SPLITS)}")
    return {name: configured.get(name, name) for name in SPLITS}


def read_examples(table: Table, columns: Columns, answers: AnswerFormat) -> dict[str, Example]:
    """The examples of a table by their places, in its order; ConfigError names the first invalid rows.

    Rows with invalid choices of their own are left out if they are to be dropped.
    """
    layout, options = question_layout(table, columns.question), columns.own
    others = (columns.answer, columns.rationale, options and options.column)
    table = with_columns(table, [*layout.columns, *(name for name in others if name)])
    examples: dict[str, Example] = {}
    problems: list[str] = []
    for place, row in table.rows.items():
        try:
            examples[place] = _example(layout.lay_out(row), row, columns, answers)
        except (ValueError, AnswerError, RecursionError) as error:
            if not (options and options.drops_invalid and isinstance(error, AnswerError)):
                problems.append(f"{place}: {error}")
    raise_problems(
        table.name,
        problems,
        "a question, at least 2 different choices, and one of them or nothing as the answer; to leave out rows with "
        "invalid choices or answers, set task.options.invalid=drop"
        if options
        else f"a question, and an answer of kind {answers.kind} or an empty one",
    )
    return examples


def _example(question: str, row: Mapping[str, Any], columns: Columns, answers: AnswerFormat) -> Example:
    """An example of a row; of several answers, the first is trained on, and the others are accepted."""
    texts = [text for value in texts_of(row.get(columns.answer)) if (text := value.strip(_SPACE))]
    read_gold: Callable[[str], str] = answers.read_gold
    choices: tuple[str, ...] = ()
    if options := columns.own:
        own = options.read(row.get(str(options.column)), answers)
        question, read_gold, choices = question + options.shown(own), partial(options.gold, choices=own), own.answers
    if not texts:
        return Example(question, choices=choices)
    answer, *others = dict.fromkeys(map(read_gold, texts))
    rationale = joined_text(row.get(columns.rationale)).strip(_SPACE) if columns.rationale else ""
    return Example(question, answer, rationale or None, tuple(others), choices)


def _shot(shot: Mapping[str, Any], answers: AnswerFormat, rows: RowReader) -> Example:
    """A demonstration; where rows have choices of their own, it has them too, under the key `choices`."""
    options = rows.own if isinstance(rows, Columns) else None
    own = {"choices"} if options else set()
    if not {"question", "answer", *own} <= set(shot) <= {"question", "rationale", "answer", *own}:
        keys = ", ".join(["question", "rationale", *own])
        raise ConfigError(f"task.examples.shots: {dict(shot)!r:.80}: expected the keys {keys} and answer")
    columns = Columns("question", "answer", "rationale", options)
    row = {**shot, options.column: shot["choices"]} if options and options.column else shot
    try:
        example = _example(text_of(shot["question"]), row, columns, answers)
        if example.answer is None:
            raise AnswerError("the answer is empty")
    except (ValueError, AnswerError) as error:
        raise ConfigError(f"task.examples.shots: {error}") from None
    return example
