"""Train examples that share a run of words with what is measured on: found, and left out."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from distill.errors import ConfigError
from distill.records import Example, Splits


@dataclass(frozen=True)
class Overlap:
    """A train example and one of validation or test, and the first run of words that both questions hold."""

    train_id: str
    other_id: str
    split: str
    ngram: str


def overlaps(splits: Splits, n: int) -> list[Overlap]:
    """Pairs of questions that share `n` words in a row, up to case, Unicode form, spacing and punctuation.

    A question of fewer words is compared whole, with others as short; one without words overlaps nothing. Takes time
    in proportion to the words and to what is found.
    """
    if n < 1:
        raise ConfigError(f"{n} words in a row: wanted at least 1")
    others: defaultdict[str, dict[tuple[str, str], None]] = defaultdict(dict)
    for split, examples in (("validation", splits.validation), ("test", splits.test)):
        for example in examples:
            key = example.id, split  # the id is a hash of the question
            for ngram in _ngrams(example.question, n):
                others[ngram][key] = None
    return [overlap for example in splits.train for overlap in _of(example, n, others)]


def screened(splits: Splits, n: int, action: str) -> tuple[Splits, list[Overlap]]:
    """The splits with what was found in them; without these train examples where `action` is `drop`, not `report`."""
    if action not in ("report", "drop"):
        raise ConfigError(f"overlap.action={action}: wanted report or drop")
    found = overlaps(splits, n)
    return (decontaminated(splits, found) if action == "drop" else splits), found


def decontaminated(splits: Splits, found: Sequence[Overlap]) -> Splits:
    """The same splits without the train examples that were found, counted as dropped under `overlap`."""
    ids = {overlap.train_id for overlap in found}
    train = tuple(example for example in splits.train if example.id not in ids)
    num_dropped = len(splits.train) - len(train)
    if not num_dropped:
        return splits
    dropped = {**splits.dropped, "overlap": splits.dropped.get("overlap", 0) + num_dropped}
    return replace(splits, train=train, dropped=dropped)


def _of(example: Example, n: int, others: dict[str, dict[tuple[str, str], None]]) -> list[Overlap]:
    first: dict[tuple[str, str], str] = {}
    for ngram in dict.fromkeys(_ngrams(example.question, n)):
        for other in others.get(ngram, ()):
            first.setdefault(other, ngram)
    train_id = example.id
    return [Overlap(train_id, other_id, split, ngram) for (other_id, split), ngram in first.items()]


def _ngrams(text: str, n: int) -> Iterator[str]:
    words = _words(text)
    if words:
        yield from (" ".join(words[start : start + n]) for start in range(max(1, len(words) - n + 1)))


def _words(text: str) -> list[str]:
    """Words as `content_id` sees them, punctuation read as space."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return "".join(" " if unicodedata.category(c).startswith("P") else c for c in plain).split()
