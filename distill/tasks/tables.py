"""Rows of files: JSON lines, CSV, Parquet, what `datasets` saved or the hub has; and texts made of their columns."""

from __future__ import annotations

import codecs
import csv
import difflib
import json
import math
import re
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

from distill.errors import ConfigError

Rows = dict[str, dict[str, Any]]  # the columns of each row, under the place that an error names

_SUFFIXES = {".jsonl", ".json", ".csv", ".tsv", ".parquet"}
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*){1,2}")
_MOST_TOLD = 3  # problems of one file that a message shows
_WHOLE_BELOW = 10**15  # numbers that a float tells from their neighbours
_MOST_CHARACTERS = 1_000_000  # of one value
_ROWS_AT_ONCE = 256
_MOST_UNPACKED_BYTES, _MOST_UNPACKED_TIMES = 2**30, 1000  # one of them a file may exceed


@dataclass(frozen=True)
class Table:
    """Rows of one file."""

    name: str
    rows: Rows


def open_tables(path: str, root: Path) -> dict[str, Table]:
    """The tables that a path names, by split; a single file's is called train."""
    file = Path(path).expanduser()
    if file.is_dir():
        tables = _saved(file)
    elif file.is_file():
        tables = {"train": read_file(file)}
    elif file.suffix.lower() in _SUFFIXES or not _HUB_ID.fullmatch(path):
        raise ConfigError(f"{path} does not exist; wanted a file, a folder saved by datasets, or owner/name of the hub")
    else:
        tables = _from_hub(path, root)
    for table in tables.values():
        refuse(table.name, [] if table.rows else ["it holds no rows"], "at least one")
    return tables


def pick(tables: Mapping[str, Table], name: str) -> Table:
    """The table of this name, or the only one."""
    if name not in tables and len(tables) != 1:
        table = next(iter(tables.values()))
        raise ConfigError(f"{table.name} has no split {name!r}, but {', '.join(tables)}")
    return tables[name] if name in tables else next(iter(tables.values()))


def text_of(value: Any) -> str:
    """A value of a column as text, empty where there is none; ValueError where it has no text of its own."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return _short_enough(" ".join(text_of(item) for item in value))
    if isinstance(value, float | Decimal) and math.isfinite(value):
        whole = int(value)
        return str(whole) if whole == value and abs(whole) < _WHOLE_BELOW else str(value)
    if not isinstance(value, str | int | float | Decimal | date):
        raise ValueError(f"{value!r:.60} is a {type(value).__name__}, wanted a text or a number")
    text = str(value)
    text.encode()  # half a surrogate pair, which JSON can spell, is no text: UnicodeEncodeError, a ValueError
    return _short_enough(text)


def _short_enough(text: str) -> str:
    if len(text) > _MOST_CHARACTERS:
        raise ValueError(f"a text of {len(text):,} characters; at most {_MOST_CHARACTERS:,} are read")
    return text


def pieces_of(table: Table, question: str) -> list[tuple[str, str | None]]:
    """The texts of a question, and the column behind each; a template's words in braces are columns, nothing else."""
    names = _columns_of(table)
    if question in names or "{" not in question:
        check_columns(table, (question,))
        return [("", question)]
    try:
        parsed = list(string.Formatter().parse(question))
    except ValueError as error:
        raise ConfigError(f"task.question={question!r}: {error}; wanted words and {{columns}}") from None
    if any(how or conversion for _, _, how, conversion in parsed):
        raise ConfigError(f"task.question={question!r}: wanted nothing but columns in braces, as in {{{names[0]}}}")
    check_columns(table, [name for _, name, _, _ in parsed if name is not None])
    return [(literal, name) for literal, name, _, _ in parsed]


def composed(row: Mapping[str, Any], pieces: Sequence[tuple[str, str | None]]) -> str:
    """The text that `pieces_of` describes, of one row; ValueError where every column of it is empty."""
    values = {name: text_of(row.get(name)).strip(" \t\r\n") for _, name in pieces if name is not None}
    if not any(values.values()):
        raise ValueError(f"{', '.join(values)} is empty")
    return "".join(literal + (values[name] if name is not None else "") for literal, name in pieces)


def _columns_of(table: Table) -> list[str]:
    return list(dict.fromkeys(name for row in table.rows.values() for name in row))


def check_columns(table: Table, wanted: Iterable[str]) -> None:
    """Raise ConfigError with every column that is not there."""
    names = _columns_of(table)
    problems = []
    for name in dict.fromkeys(wanted):
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            problems.append(f"{table.name} has no column {name!r}, but {', '.join(map(repr, names))}{hint}")
    if problems:
        raise ConfigError(*problems)


def refuse(name: str, problems: Sequence[str], wanted: str) -> None:
    """Raise ConfigError with the first problems of a file, if there are any."""
    if problems:
        more = f"; and {len(problems) - _MOST_TOLD} more" if len(problems) > _MOST_TOLD else ""
        raise ConfigError(f"{name}: {'; '.join(problems[:_MOST_TOLD])}{more}; wanted {wanted}")


def read_file(file: Path) -> Table:
    """The rows of one file, by what its name ends in."""
    readers: dict[str, Callable[[Path], Rows]] = {
        ".jsonl": _read_json_lines,
        ".json": _read_json,
        ".csv": partial(_read_csv, delimiter=","),
        ".tsv": partial(_read_csv, delimiter="\t"),
        ".parquet": _read_parquet,
    }
    if file.suffix.lower() not in readers:
        raise ConfigError(f"{file}: wanted a file that ends in {', '.join(readers)}")
    return Table(str(file), readers[file.suffix.lower()](file))


def _lines(file: Path) -> list[str]:
    """The lines of a file with their ends; a byte order mark at the beginning is left out."""
    lines: list[str] = []
    problems: list[str] = []
    for number, line in enumerate(file.read_bytes().removeprefix(codecs.BOM_UTF8).splitlines(keepends=True), start=1):
        try:
            lines.append(line.decode())
        except UnicodeDecodeError as error:
            problems.append(f"line {number}: {error.reason} at byte {error.start}")
    refuse(str(file), problems, "UTF-8")
    return lines


def _read_json_lines(file: Path) -> Rows:
    rows: Rows = {}
    problems: list[str] = []
    for number, line in enumerate(_lines(file), start=1):
        try:
            if line.strip():
                rows[f"line {number}"] = _object(json.loads(line))
        except (ValueError, RecursionError) as error:
            problems.append(f"line {number}: {error}")
    refuse(str(file), problems, "one JSON object on each line")
    return rows


def _read_json(file: Path) -> Rows:
    """One array of objects, or JSON lines under another name."""
    text = "".join(_lines(file))
    if not text.lstrip().startswith("["):
        return _read_json_lines(file)
    try:
        return {f"row {number}": _object(row) for number, row in enumerate(json.loads(text), start=1)}
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: {error}; wanted one array of JSON objects") from None


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{value!r:.60} is no object")
    return value


def _read_csv(file: Path, *, delimiter: str) -> Rows:
    reader = csv.reader(_lines(file), delimiter=delimiter, strict=True)
    rows: Rows = {}
    problems: list[str] = []
    try:
        names = next(reader, [])
        for fields in reader:
            if len(fields) == len(names):
                rows[f"line {reader.line_num}"] = dict(zip(names, fields, strict=True))
            elif fields:
                problems.append(f"line {reader.line_num}: {len(fields)} fields, the first line has {len(names)}")
    except csv.Error as error:
        problems.append(f"line {reader.line_num}: {error}")
    refuse(str(file), problems, "the columns' names on the first line, then as many fields on each")
    return rows


def _read_parquet(file: Path) -> Rows:
    import pyarrow
    from pyarrow import parquet

    rows: list[dict[str, Any]] = []
    packed = file.stat().st_size
    room = most = max(_MOST_UNPACKED_BYTES, _MOST_UNPACKED_TIMES * packed)
    try:
        for batch in parquet.ParquetFile(file).iter_batches(_ROWS_AT_ONCE):
            room -= batch.nbytes
            if room < 0:
                raise ConfigError(
                    f"{file} has {packed:,} bytes and unpacks to more than {most:,}, so it is not read; leave out the "
                    "columns that all rows repeat, or give the table as JSON lines"
                )
            rows += batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(f"{file} does not open as Parquet: {error}") from None
    return {f"row {number}": row for number, row in enumerate(rows, start=1)}


def _saved(folder: Path) -> dict[str, Table]:
    """What `datasets` saved in a folder."""
    import datasets

    try:
        found = datasets.load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} was not saved by datasets.save_to_disk: {error}") from None
    return _tables(str(folder), found)


def _from_hub(name: str, root: Path) -> dict[str, Table]:
    """A data set of the hub, `owner/name` or `owner/name/configuration`; no code of it is run."""
    import datasets

    owner, short, *configuration = name.split("/")
    try:
        found = datasets.load_dataset(f"{owner}/{short}", *configuration, cache_dir=str(root / "sources" / "datasets"))
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"{name} is no file or folder here, and is not to be had from the hub as a data set ({reason}). "
            "Check the name and the network, or give a file"
        ) from None
    return _tables(name, found)


def _tables(name: str, found: Any) -> dict[str, Table]:
    splits = found if isinstance(found, dict) else {"train": found}
    return {split: Table(f"{name} ({split})", _rows(dataset)) for split, dataset in splits.items()}


def _rows(dataset: Any) -> Rows:
    """Rows of a `datasets.Dataset`; labels that are numbers there get their names back, and -1 is none."""
    import datasets

    rows = {f"row {number}": dict(row) for number, row in enumerate(dataset, start=1)}
    for name, feature in dataset.features.items():
        if isinstance(feature, datasets.ClassLabel):
            for row in rows.values():
                row[name] = None if row[name] in (None, -1) else feature.int2str(row[name])
    return rows
