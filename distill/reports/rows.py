"""What became of the rows that were read: lessons, or lost for a reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from distill.app.files import Json
from distill.reports.runs import Run, mapping, number

MANY = 0.1  # share of the rows of a stage; a larger loss is named in a sentence


class Rows(NamedTuple):
    """Rows of one kind: how many were read, lost for each reason and kept, in the named runs."""

    runs: tuple[str, ...]
    kind: str
    read: int
    lost: Mapping[str, int]
    kept: int


def row_counts(runs: Sequence[Run]) -> list[Rows]:
    """Return the recorded counts of every kind of rows; runs with equal counts share an entry."""
    entries: dict[str, Rows] = {}
    for run in runs:
        for kind, counts in mapping(run.facts.get("rows")).items():
            entry = _entry(run, str(kind), mapping(counts))
            known = entries.get(key := str(entry[1:]))
            entries[key] = entry._replace(runs=(*(known.runs if known else ()), run.name))
    return list(entries.values())


def _entry(run: Run, kind: str, counts: Json) -> Rows:
    lost = {str(reason): _count(value) for reason, value in mapping(counts.get("lost")).items()}
    return Rows((run.name,), kind, _count(counts.get("read")), lost, _count(counts.get("kept")))


def _count(value: object) -> int:
    return int(number(value) or 0)


def losses_of_rows(runs: Sequence[Run]) -> list[str]:
    """State each loss of more than a tenth of the rows read, with its reasons, the largest first."""
    return list(dict.fromkeys(_sentence(entry) for entry in row_counts(runs) if _is_large(entry)))


def _is_large(entry: Rows) -> bool:
    return entry.read > 0 and entry.read - entry.kept > MANY * entry.read


def _sentence(entry: Rows) -> str:
    missing = entry.read - entry.kept
    ranked = sorted(entry.lost.items(), key=lambda item: -item[1])
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in ranked if count)
    return (
        f"{missing:,} of {entry.read:,} {entry.kind} rows ({100 * missing / entry.read:.0f} %) were not used"
        f"{': ' + reasons if reasons else ''}."
    )


def rows_table(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Return titles and cells: a line for each kind of rows, a column for each reason."""
    entries = row_counts(runs)
    reasons = list(dict.fromkeys(reason for entry in entries for reason in entry.lost))
    shown = [
        [entry.kind, *(f"{count:,}" for count in (entry.read, *(entry.lost.get(r, 0) for r in reasons), entry.kept))]
        for entry in entries
    ]
    has_several = len({entry.runs for entry in entries}) > 1
    if has_several:
        shown = [[f"{row[0]}: {', '.join(entry.runs)}", *row[1:]] for row, entry in zip(shown, entries, strict=True)]
    return ["rows", "read", *reasons, "kept"], shown
