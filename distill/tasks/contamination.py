"""Contamination: finds and drops train examples that share an n-gram of words with validation or test."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from distill.errors import ConfigError
from distill.records import Example, Splits


@dataclass(frozen=True)
class Overlap:
    """A train example, a validation or test example, and the first n-gram that both questions contain."""

    train_id: str
    other_id: str
    split: str
    ngram: str


def find_overlaps(splits: Splits, n: int) -> list[Overlap]:
    """Pairs of questions that share `n` consecutive words, ignoring case, Unicode form, spacing and punctuation.

    A question of fewer than `n` words is compared as a whole with others as short; a question without words overlaps
    nothing. Takes time linear in the number of words and of overlaps.
    """
    if n < 1:
        raise ConfigError(f"overlap.words={n}: expected at least 1")
    eval_ngrams: defaultdict[str, dict[tuple[str, str], None]] = defaultdict(dict)
    for split, examples in (("validation", splits.validation), ("test", splits.test)):
        for example in examples:
            key = example.id, split  # the id is a hash of the question
            for ngram in _ngrams(example.question, n):
                eval_ngrams[ngram][key] = None
    return [overlap for example in splits.train for overlap in _overlaps_of(example, n, eval_ngrams)]


def screen_splits(splits: Splits, n: int, action: str) -> tuple[Splits, list[Overlap]]:
    """Find overlaps; return them and the splits, without the overlapping train examples if `action` is `drop`."""
    if action not in ("report", "drop"):
        raise ConfigError(f"overlap.action={action}: expected report or drop")
    overlaps = find_overlaps(splits, n)
    return (drop_overlaps(splits, overlaps) if action == "drop" else splits), overlaps


def drop_overlaps(splits: Splits, overlaps: Sequence[Overlap]) -> Splits:
    """Remove the train examples that overlap; they are counted in `dropped` under `overlap`."""
    ids = {overlap.train_id for overlap in overlaps}
    train = tuple(example for example in splits.train if example.id not in ids)
    num_dropped = len(splits.train) - len(train)
    if not num_dropped:
        return splits
    dropped = {**splits.dropped, "overlap": splits.dropped.get("overlap", 0) + num_dropped}
    return replace(splits, train=train, dropped=dropped)


def _overlaps_of(example: Example, n: int, eval_ngrams: dict[str, dict[tuple[str, str], None]]) -> list[Overlap]:
    first: dict[tuple[str, str], str] = {}
    for ngram in dict.fromkeys(_ngrams(example.question, n)):
        for other in eval_ngrams.get(ngram, ()):
            first.setdefault(other, ngram)
    train_id = example.id
    return [Overlap(train_id, other_id, split, ngram) for (other_id, split), ngram in first.items()]


def _ngrams(text: str, n: int) -> Iterator[str]:
    words = _words(text)
    if words:
        yield from (" ".join(words[start : start + n]) for start in range(max(1, len(words) - n + 1)))


def _words(text: str) -> list[str]:
    """Words, normalised as in `content_id`, with punctuation treated as space."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return "".join(" " if unicodedata.category(c).startswith("P") else c for c in plain).split()
