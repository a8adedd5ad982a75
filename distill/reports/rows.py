"""What became of the rows that were read: lessons, or lost for a reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from distill.app.files import Json
from distill.reports.runs import Run, mapping, number

MANY = 0.1  # share of the rows of a stage; a larger loss is named in a sentence
_BY_CHOICE = ("over ", "no label", "no loss on")  # beginnings of reasons that are settings, not losses


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
    """State each loss of more than a tenth of the rows that settings leave, with its reasons, the largest first."""
    return list(dict.fromkeys(_sentence(entry) for entry in row_counts(runs) if _is_large(entry)))


def _is_large(entry: Rows) -> bool:
    missing = sum(_losses(entry).values())
    return missing > MANY * (entry.kept + missing)


def _losses(entry: Rows) -> dict[str, int]:
    return {reason: count for reason, count in entry.lost.items() if count and not reason.startswith(_BY_CHOICE)}


def _sentence(entry: Rows) -> str:
    losses = _losses(entry)
    missing, kind = sum(losses.values()), entry.kind if entry.kind == "rationales" else f"{entry.kind} rows"
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(losses.items(), key=lambda item: -item[1]))
    total = entry.kept + missing
    return f"{missing:,} of {total:,} {kind} ({100 * missing / total:.0f} %) were not used: {reasons}."


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
