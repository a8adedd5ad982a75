"""Tables of rows from JSON lines, CSV, Parquet, saved datasets and the hub."""

from __future__ import annotations

import codecs
import csv
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from distill.errors import ConfigError
from distill.records import SPLITS
from distill.tasks.numerals import exact
from distill.tasks.packed import PACKED, content_of, format_of, too_large, unpacked_limit

Rows = dict[str, dict[str, Any]]  # columns of each row, keyed by its place for error messages, such as "line 3"

_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_WILDCARD = re.compile(r"[*?\[]")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*){1,2}")
_MAX_SHOWN_PROBLEMS = 3  # per file, in a message
_BATCH_ROWS = 256


@dataclass(frozen=True)
class Table:
    """The rows of a file or of a split."""

    name: str
    rows: Rows


def open_tables(path: str, root: Path) -> dict[str, Table]:
    """Open the tables of files, a folder or a hub dataset, by split; the table of files is `train`.

    The files of a folder are those of its splits if all of their names begin with one, as in train-1.jsonl.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        files = [member for member in sorted(file.iterdir()) if _is_table(member)]
        tables = _read_splits(file, files) if files else _read_saved(file)
    elif file.is_file():
        tables = {"train": read_file(file)}
    elif _WILDCARD.search(path):
        tables = {"train": _read_files(path, matching_files(path))}
    elif format_of(file) in _SUFFIXES or not _HUB_ID.fullmatch(path):
        raise ConfigError(f"{path} does not exist; expected a file, a folder, files such as data/*.jsonl, or a hub id")
    else:
        tables = _download(path, root)
    for table in tables.values():
        raise_problems(table.name, [] if table.rows else ["it has no rows"], "at least one")
    return tables


def matching_files(path: str) -> list[Path]:
    """The file of this path, or else those that it matches as a pattern such as data/*.jsonl; empty if none does."""
    file = Path(path).expanduser()
    if file.is_file() or not _WILDCARD.search(path):
        return [file] if file.is_file() else []
    root = Path(file.anchor)
    return sorted(match for match in root.glob(str(file.relative_to(root))) if match.is_file())


def select_split(tables: Mapping[str, Table], name: str) -> Table:
    """The table of this split, or the only table."""
    if name not in tables and len(tables) != 1:
        table = next(iter(tables.values()))
        raise ConfigError(f"{table.name} has no split {name!r}; it has {', '.join(tables)}")
    return tables[name] if name in tables else next(iter(tables.values()))


def raise_problems(name: str, problems: Sequence[str], expected: str) -> None:
    """Raise ConfigError with the first problems of a file; do nothing if there are none."""
    if problems:
        more = f"; and {len(problems) - _MAX_SHOWN_PROBLEMS} more" if len(problems) > _MAX_SHOWN_PROBLEMS else ""
        raise ConfigError(f"{name}: {'; '.join(problems[:_MAX_SHOWN_PROBLEMS])}{more}; expected {expected}")


def _is_table(file: Path) -> bool:
    """Whether a file of a folder holds rows; those beside the Arrow files of a saved dataset do not."""
    is_of_dataset = file.name in ("dataset_info.json", "dataset_dict.json", "state.json")
    return file.is_file() and format_of(file) in _SUFFIXES and not file.name.startswith(".") and not is_of_dataset


def _read_splits(folder: Path, files: Sequence[Path]) -> dict[str, Table]:
    by_split = defaultdict[str, list[Path]](list)
    for file in files:
        by_split[re.split(r"[-_.]", file.name)[0]].append(file)
    if not {"train"} <= set(by_split) <= set(SPLITS):
        by_split = defaultdict(list, train=list(files))
    return {split: _read_files(f"{folder} ({split})", members) for split, members in by_split.items()}


def _read_files(name: str, files: Sequence[Path]) -> Table:
    """Read several files as one table, whose places name them."""
    if not files:
        raise ConfigError(f"{name} matches no file; expected files that end in {_endings()}")
    tables = map(read_file, files)
    return Table(name, {f"{table.name}, {place}": row for table in tables for place, row in table.rows.items()})


def _endings() -> str:
    return f"{', '.join(_SUFFIXES)}, all but the last also with {' or '.join(PACKED)} behind it"


def read_file(file: Path) -> Table:
    """Read a file in the format of its suffix, packed or not."""
    readers: dict[str, Callable[[Path], Rows]] = {
        ".jsonl": _read_json_lines,
        ".json": _read_json,
        ".csv": partial(_read_csv, delimiter=","),
        ".tsv": partial(_read_csv, delimiter="\t"),
        ".parquet": _read_parquet,
    }
    suffix, is_packed = format_of(file), file.suffix.lower() in PACKED
    if suffix not in readers or (is_packed and suffix == ".parquet"):
        raise ConfigError(f"{file}: expected a file that ends in {_endings()}")
    return Table(str(file), readers[suffix](file))


def _lines(file: Path) -> list[str]:
    """Lines of a file with their line ends, without a leading byte order mark."""
    lines: list[str] = []
    problems: list[str] = []
    for number, line in enumerate(content_of(file).removeprefix(codecs.BOM_UTF8).splitlines(keepends=True), start=1):
        try:
            lines.append(line.decode())
        except UnicodeDecodeError as error:
            problems.append(f"line {number}: {error.reason} at byte {error.start}")
    raise_problems(str(file), problems, "UTF-8")
    return lines


def _read_json_lines(file: Path) -> Rows:
    rows: Rows = {}
    problems: list[str] = []
    for number, line in enumerate(_lines(file), start=1):
        try:
            if line.strip():
                rows[f"line {number}"] = _object(parse_json(line))
        except (ValueError, RecursionError) as error:
            problems.append(f"line {number}: {error}")
    raise_problems(str(file), problems, "one JSON object per line")
    return rows


def _read_json(file: Path) -> Rows:
    """Read an array of objects, or JSON lines in a file named .json."""
    text = "".join(_lines(file))
    if not text.lstrip().startswith("["):
        return _read_json_lines(file)
    try:
        return {f"row {number}": _object(row) for number, row in enumerate(parse_json(text), start=1)}
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: {error}; expected an array of JSON objects") from None


def parse_json(text: str) -> Any:
    """Parse JSON without losing anything: a repeated key is an error, and every number keeps its exact value."""
    return json.loads(text, parse_float=_exact_number, object_pairs_hook=_distinct_keys)


def _exact_number(text: str) -> float | Decimal:
    number = exact(text)
    return float(text) if math.isfinite(float(text)) and Decimal(repr(float(text))) == number else number


def _distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if repeated := _repeated(name for name, _ in pairs):
        raise ValueError(f"the key {repeated[0]!r} appears twice in one object")
    return dict(pairs)


def _repeated(names: Iterable[str]) -> list[str]:
    return [name for name, number in Counter(names).items() if number > 1]


def _check_header(file: Path, names: Sequence[str]) -> None:
    """Raise ConfigError if two columns have one name, which would hide the values of one; unnamed ones may repeat."""
    if repeated := [name for name in _repeated(names) if name]:
        raise ConfigError(f"{file}: more than one column is named {', '.join(map(repr, repeated))}; rename all but one")


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{value!r:.60} is not an object")
    return value


def _read_csv(file: Path, *, delimiter: str) -> Rows:
    reader = csv.reader(_lines(file), delimiter=delimiter, strict=True)
    rows: Rows = {}
    problems: list[str] = []
    try:
        names = next(reader, [])
        _check_header(file, names)
        for fields in reader:
            if len(fields) == len(names):
                rows[f"line {reader.line_num}"] = dict(zip(names, fields, strict=True))
            elif fields:
                problems.append(f"line {reader.line_num}: {len(fields)} fields, but the first line has {len(names)}")
    except csv.Error as error:
        problems.append(f"line {reader.line_num}: {error}")
    raise_problems(str(file), problems, "column names on the first line, and as many fields on every other")
    return rows


def _read_parquet(file: Path) -> Rows:
    import pyarrow
    from pyarrow import parquet

    rows: list[dict[str, Any]] = []
    remaining = limit = unpacked_limit(file)
    try:
        table = parquet.ParquetFile(file)
        _check_header(file, table.schema_arrow.names)
        for batch in table.iter_batches(_BATCH_ROWS):
            remaining -= batch.nbytes
            if remaining < 0:
                advice = "remove columns that repeat the same value, or convert the table to JSON lines"
                raise too_large(file, limit, advice)
            rows += _rows_of(batch)
    except (pyarrow.ArrowException, OSError, OverflowError) as error:  # Python has no dates after the year 9999
        raise ConfigError(f"{file} is not readable as Parquet: {error}") from None
    return {f"row {number}": row for number, row in enumerate(rows, start=1)}


def _rows_of(batch: Any) -> list[dict[str, Any]]:
    """Rows of a pyarrow table; floats of 16 or 32 bits as their shortest decimal, 0.1 and not 0.10000000149."""
    rows: list[dict[str, Any]] = batch.to_pylist()
    for field in batch.schema:
        for row in rows:
            row[field.name] = _with_short_decimals(row[field.name], field.type)
    return rows


def _with_short_decimals(value: Any, kind: Any) -> Any:
    """The value of a pyarrow type, as a column has it or within a list or an object."""
    import pyarrow

    if value is None:
        return None
    if kind in (pyarrow.float16(), pyarrow.float32()):
        return float(str(kind.to_pandas_dtype()(value)))
    if isinstance(kind, pyarrow.StructType):
        return {field.name: _with_short_decimals(value[field.name], field.type) for field in kind}
    if isinstance(kind, pyarrow.ListType | pyarrow.LargeListType | pyarrow.FixedSizeListType):
        return [_with_short_decimals(item, kind.value_type) for item in value]
    return value


def _read_saved(folder: Path) -> dict[str, Table]:
    """Read a folder saved by `datasets.save_to_disk`."""
    import datasets

    try:
        return _tables(str(folder), datasets.load_from_disk(str(folder)))
    except (OSError, ValueError, OverflowError) as error:
        raise ConfigError(
            f"{folder} has no files of rows and was not saved by datasets.save_to_disk: {error}"
        ) from None


def _download(name: str, root: Path) -> dict[str, Table]:
    """Download a hub dataset, `owner/name` or `owner/name/configuration`, without running its code."""
    import datasets

    owner, short, *configuration = name.split("/")
    try:
        loaded = datasets.load_dataset(f"{owner}/{short}", *configuration, cache_dir=str(root / "sources" / "datasets"))
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"{name} is not a local file or folder, and could not be loaded from the hub as a dataset ({reason}). "
            "Check the name and the network, or provide a file"
        ) from None
    return _tables(name, loaded)


def _tables(name: str, loaded: Any) -> dict[str, Table]:
    splits = loaded if isinstance(loaded, dict) else {"train": loaded}
    return {split: Table(f"{name} ({split})", _rows(dataset)) for split, dataset in splits.items()}


def _rows(dataset: Any) -> Rows:
    """Rows of a `datasets.Dataset`, with class labels as names; the label -1 means no label."""
    batches = dataset.with_format("arrow").iter(_BATCH_ROWS)
    rows = {f"row {number}": row for number, row in enumerate(chain.from_iterable(map(_rows_of, batches)), start=1)}
    for name, feature in dataset.features.items():
        for row in rows.values():
            row[name] = _with_label_names(row[name], feature)
    return rows


def _with_label_names(value: Any, feature: Any) -> Any:
    """The value of a feature of `datasets`, as a column has it or within a list or an object."""
    import datasets

    if value is None:
        return None
    if isinstance(feature, datasets.ClassLabel):
        return None if value == -1 else feature.int2str(value)
    if isinstance(feature, Mapping):
        return {name: _with_label_names(value[name], inner) for name, inner in feature.items()}
    if isinstance(feature, datasets.List | datasets.LargeList):
        return [_with_label_names(item, feature.feature) for item in value]
    return value
