"""Splitting a list of examples into parts of given sizes, and assembling the splits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from distill.records import Example, Splits


def cut(examples: Sequence[Example], sizes: Iterable[int]) -> list[list[Example]]:
    """Consecutive parts of these sizes, followed by the remaining examples as a last part."""
    parts, rest = list[list[Example]](), list(examples)
    for size in sizes:
        parts.append(rest[:size])
        rest = rest[size:]
    return [*parts, rest]


def make_splits(
    *,
    labelled: Sequence[Example],
    unlabelled: Sequence[Example],
    validation: Sequence[Example],
    test: Sequence[Example],
) -> Splits:
    """Assemble splits, disjoint by content; unlabelled examples keep only their question."""
    return Splits.disjoint([*labelled, *(Example(e.question) for e in unlabelled)], validation, test)
