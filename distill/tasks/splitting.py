"""Examples cut into parts of given sizes, and parts made into splits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from distill.records import Example, Splits


def cut(examples: Sequence[Example], sizes: Iterable[int]) -> list[list[Example]]:
    """Consecutive parts of these sizes, and last the remaining examples."""
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
    """Splits disjoint by content; of the unlabelled train examples only the questions are kept."""
    return Splits.disjoint([*labelled, *(Example(e.question) for e in unlabelled)], validation, test)
