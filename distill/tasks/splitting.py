"""From the rows of a file to splits: each question once, parts of given sizes, and counts of the rows left out."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from distill.errors import ConfigError
from distill.records import Example, RowCounts, Splits

Conflicts = Literal["refuse", "drop", "majority", "accept"] | None  # None is "refuse"
Value = Callable[[str], str]

_MAX_SHOWN = 3  # questions, in a message


def distinct_questions(
    name: str, rows: Mapping[str, Example], value: Value, conflicts: Conflicts
) -> tuple[list[Example], RowCounts]:
    """Keep one example per question, and count the rows left out; independent of the order of rows.

    `rows` are the examples of the table `name` by their places. A question whose rows have different answers is
    refused, dropped, or kept with the answer of most rows; without a single most frequent answer it is dropped. With
    `accept`, all its answers are right.
    """
    by_question: defaultdict[str, dict[str, Example]] = defaultdict(dict)
    for place, example in rows.items():
        by_question[example.id][place] = example
    compared = {} if conflicts == "accept" else by_question
    contradicting = {id_: group for id_, group in compared.items() if not _agree(group.values(), value)}
    if contradicting and conflicts in (None, "refuse"):
        raise ConfigError(_refusal(name, list(contradicting.values()), value))
    kept: list[Example] = []
    lost: Counter[str] = Counter()
    for id_, group in by_question.items():
        matching = list(group.values())
        if id_ in contradicting:
            matching = _of_most(matching, value) if conflicts == "majority" else []
            lost["contradicting"] += len(group) - len(matching)
        if matching:
            best = min(matching, key=_preference)
            kept.append(_accepting(best, matching) if conflicts == "accept" else best)
            lost["repeated"] += len(matching) - 1
    return kept, RowCounts(len(rows), {reason: n for reason, n in lost.items() if n}, len(kept))


def _agree(examples: Iterable[Example], value: Value) -> bool:
    """Whether one answer is right in all labelled examples."""
    right = [set(map(value, example.right_answers)) for example in examples if example.answer is not None]
    return len(right) < 2 or bool(set.intersection(*right))


def _accepting(best: Example, others: Iterable[Example]) -> Example:
    """The example, with the right answers of all others."""
    answers = dict.fromkeys([*best.accepted, *sorted(answer for other in others for answer in other.right_answers)])
    return replace(best, accepted=tuple(answer for answer in answers if answer != best.answer))


def _of_most(examples: Sequence[Example], value: Value) -> list[Example]:
    """The examples in which the most frequent answer is right; none if as many others have another one."""
    places = defaultdict[str, list[int]](list)
    for place, example in enumerate(examples):
        for answer in set(map(value, example.right_answers)):
            places[answer].append(place)
    most = max(map(len, places.values()))
    first, *others = {tuple(members) for members in places.values() if len(members) == most}
    return [] if others else [examples[place] for place in first]


def _preference(example: Example) -> tuple[bool, bool, int, str, tuple[str, ...], str]:
    """Of equal questions, prefer a labelled one, then one with a rationale, then one with more accepted answers."""
    answer, rationale, accepted = example.answer, example.rationale, example.accepted
    return answer is None, rationale is None, -len(accepted), answer or "", accepted, rationale or ""


def _refusal(name: str, groups: Sequence[Mapping[str, Example]], value: Value) -> str:
    shown = []
    for group in groups[:_MAX_SHOWN]:
        places: dict[str, str] = {}
        for place, example in group.items():
            if example.answer is not None:
                places.setdefault(value(example.answer), f"{place} says {example.answer[:40]!r}")
        shown.append(" but ".join(list(places.values())[:2]))
    more = f"; and {len(groups) - _MAX_SHOWN} more" if len(groups) > _MAX_SHOWN else ""
    return (
        f"{name}: rows with different answers for {_counted(len(groups))}: {'; '.join(shown)}{more}. Correct "
        "the rows, or set task.conflicts=drop to leave these questions out, or task.conflicts=majority to keep the "
        "answer of most rows"
    )


def _counted(number: int) -> str:
    return f"{number} question{'s' if number != 1 else ''}"


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
    lost: Mapping[str, int] | None = None,
) -> Splits:
    """Assemble splits, disjoint by content; unlabelled examples keep only their question.

    `lost` counts rows that were left out before, by reason; they belong to train.
    """
    train = [*labelled, *(e.unlabelled() for e in unlabelled)]
    sizes = {"train": len(train), "validation": len(validation), "test": len(test)}
    counts = {name: RowCounts(size, {}, size) for name, size in sizes.items()}
    lost = {reason: number for reason, number in (lost or {}).items() if number}
    counts["train"] = RowCounts(len(train) + sum(lost.values()), lost, len(train))
    return Splits.disjoint(train, validation, test, counts=counts)


def require_examples(splits: Splits, names: Iterable[str]) -> None:
    """Raise ConfigError if one of these splits is empty."""
    num_labelled = sum(example.answer is not None for example in splits.train)
    if empty := [name for name in names if not getattr(splits, name)]:
        raise ConfigError(
            *(
                f"there are no labelled rows for {name}: give a file (task.{name}_path) or a number "
                f"(task.examples.num_{name}). By default a tenth of the labelled rows is held out, which of the "
                f"{num_labelled} that are left for training would be {num_labelled // 10}"
                for name in empty
            )
        )
