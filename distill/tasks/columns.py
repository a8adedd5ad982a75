"""Columns of a table by name, also what stands in the objects of its rows, by a dotted path such as `record.text`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from distill.errors import ConfigError
from distill.tasks.tables import Rows, Table, raise_problems

_MAX_DEPTH = 4  # of the objects whose keys a message lists
_MAX_SHOWN_NAMES = 40

Path = Sequence[str]  # a column, the key of an object in it, and so on


def columns_of(table: Table) -> list[str]:
    """Names of the columns that any row has."""
    return list(dict.fromkeys(name for row in table.rows.values() for name in row))


def with_columns(table: Table, required: Iterable[str]) -> Table:
    """The table with the values of all required dotted paths as columns of these names.

    A column that has the whole path as its name is that column. ConfigError lists every missing column.
    """
    names = set(columns_of(table))
    paths = {name: _path(table, name) for name in dict.fromkeys(required) if name not in names}
    if missing := [name for name, path in paths.items() if path is None]:
        known = list(dict.fromkeys(path for row in table.rows.values() for path in _paths(row, _MAX_DEPTH)))
        raise ConfigError(*(_missing(table.name, name, known) for name in missing))
    nested = {name: path for name, path in paths.items() if path}
    return replace(table, rows=_with_nested(table, nested)) if nested else table


def _missing(table: str, name: str, known: Sequence[str]) -> str:
    """The problem of a column that no row has, with the names and paths that there are."""
    close = difflib.get_close_matches(name, known, n=1) or [path for path in known if path.endswith(f".{name}")]
    hint = f"; did you mean {close[0]!r}?" if close else ""
    more = f" and {len(known) - _MAX_SHOWN_NAMES} more" if len(known) > _MAX_SHOWN_NAMES else ""
    return f"{table} has no column {name!r}{hint}; it has {', '.join(map(repr, known[:_MAX_SHOWN_NAMES]))}{more}"


def _paths(row: Mapping[str, Any], depth: int) -> Iterator[str]:
    for name, value in row.items():
        yield name
        if depth and isinstance(value, Mapping):
            yield from (f"{name}.{path}" for path in _paths(value, depth - 1))


def _path(table: Table, name: str) -> Path | None:
    """The keys that the first row which has a value at this dotted path has it at; they may contain dots themselves."""
    paths = (_keys(row, name) for row in table.rows.values())
    return next((path for path in paths if path), None)


def _keys(row: Mapping[str, Any], name: str) -> Path | None:
    if name in row:
        return [name]
    for dot in (place for place, character in enumerate(name) if character == "."):
        inner = row.get(name[:dot])
        if isinstance(inner, Mapping) and (path := _keys(inner, name[dot + 1 :])):
            return [name[:dot], *path]
    return None


def _with_nested(table: Table, nested: Mapping[str, Path]) -> Rows:
    rows: Rows = {}
    problems: list[str] = []
    for place, row in table.rows.items():
        try:
            rows[place] = row | {name: _value(row, path) for name, path in nested.items()}
        except ValueError as error:
            problems.append(f"{place}: {error}")
    raise_problems(table.name, problems, f"objects in {', '.join(map(repr, nested))}")
    return rows


def _value(row: Mapping[str, Any], path: Path) -> Any:
    """The value at a path, None where it or an object on the way is missing; ValueError where there is no object."""
    value: Any = row
    for place, key in enumerate(path):
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise ValueError(f"{'.'.join(path[:place])!r} is {value!r:.60}, not an object with {key!r}")
        value = value.get(key)
    return value
