"""Contamination: finds and drops train examples that share an n-gram of words with validation or test."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import numpy as np

from distill.errors import ConfigError
from distill.records import Splits

# An n-gram of more held-out questions, or of more than half of the train questions, is wording that the questions of
# the task have in common, such as a template around each; it says nothing about one question.
_MAX_HELD_OUT, _MIN_TRAIN = 10, 10
_INDEX_BITS, _SHIFT = 24, np.uint64(64 - 24)
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no bit of a word's hash is lost


@dataclass(frozen=True)
class Overlap:
    """A train example, a validation or test example, and the first n-gram that both questions contain."""

    train_id: str
    other_id: str
    split: str
    ngram: str


def find_overlaps(splits: Splits, n: int) -> list[Overlap]:
    """Train questions that share `n` consecutive words with a held-out one, each with the first such question.

    Case, Unicode form, spacing and punctuation are ignored. A question of fewer than `n` words is compared as a whole
    with others as short; a question without words overlaps nothing. Words that the task's questions have in common do
    not count. Takes time and memory linear in the number of words: n-grams are compared by hashes of 64 bits.
    """
    if n < 1:
        raise ConfigError(f"overlap.words={n}: expected at least 1")
    held_out = [(split, example) for split in ("validation", "test") for example in getattr(splits, split)]
    questions = [example.text for _, example in held_out]
    index = _Index([_hashes(_words(question), n) for question in questions])
    shared = [index.shared(_hashes(_words(example.text), n)) for example in splits.train]
    common = index.common(shared)
    index = _Index([_hashes(_own_words(question, n, common), n) for question in questions]) if len(common) else index
    overlaps = []
    for example in (example for example, ngrams in zip(splits.train, shared, strict=True) if len(ngrams)):
        words = _own_words(example.text, n, common)
        places = index.places(_hashes(words, n))
        for start in np.flatnonzero(places >= 0)[:1]:
            split, other = held_out[index.first_owners[places[start]]]
            overlaps.append(Overlap(example.id, other.id, split, " ".join(words[start : start + n])))
    return overlaps


def screen_splits(splits: Splits, n: int, action: str) -> tuple[Splits, list[Overlap]]:
    """Find overlaps; return them and the splits, without the overlapping train examples if `action` is `drop`."""
    if action not in ("report", "drop"):
        raise ConfigError(f"overlap.action={action}: expected report or drop")
    overlaps = find_overlaps(splits, n)
    return (drop_overlaps(splits, overlaps) if action == "drop" else splits), overlaps


def drop_overlaps(splits: Splits, overlaps: Sequence[Overlap]) -> Splits:
    """Remove the train examples that overlap, and count them."""
    ids = {overlap.train_id for overlap in overlaps}
    train = tuple(example for example in splits.train if example.id not in ids)
    counts = splits.counts["train"].less("shares words with held-out", len(splits.train) - len(train))
    return replace(splits, train=train, counts={**splits.counts, "train": counts})


@final
class _Index:
    """The distinct n-grams of the held-out questions: sorted hashes, of which each has a place."""

    def __init__(self, ngrams: Sequence[np.ndarray]) -> None:
        """`ngrams` are the hashes of each question; `first_owners` has the first question with the hash of a place."""
        rows = [np.unique(row) for row in ngrams]
        owners = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
        hashes = np.concatenate([*rows, np.zeros(0, np.uint64)])
        self._hashes, first, self._num_owners = np.unique(hashes, return_index=True, return_counts=True)
        self.first_owners = owners[first]
        # Few n-grams of train are in the index. Looking at some bits of each first saves most of the binary searches.
        self._has_bits = np.zeros(1 << _INDEX_BITS, bool)
        self._has_bits[self._hashes >> _SHIFT] = True

    def places(self, hashes: np.ndarray) -> np.ndarray:
        """Return the place of each hash, -1 for those that are not in the index."""
        places = np.full(len(hashes), -1)
        candidates = np.flatnonzero(self._has_bits[hashes >> _SHIFT])
        if len(candidates):
            nearest = np.searchsorted(self._hashes, hashes[candidates]).clip(max=len(self._hashes) - 1)
            places[candidates] = np.where(self._hashes[nearest] == hashes[candidates], nearest, -1)
        return places

    def shared(self, hashes: np.ndarray) -> np.ndarray:
        """Return the distinct places of the hashes that are in the index."""
        places = self.places(hashes)
        return np.unique(places[places >= 0])

    def common(self, shared: Sequence[np.ndarray]) -> np.ndarray:
        """Return the hashes of wording that questions have in common, given the places in each train question."""
        num_train = np.zeros(len(self._hashes), np.int64)
        for places in shared:
            num_train[places] += 1
        is_common = (num_train > max(_MIN_TRAIN, len(shared) // 2)) | (self._num_owners > _MAX_HELD_OUT)
        return self._hashes[is_common]


def _own_words(text: str, n: int, common: np.ndarray) -> list[str]:
    """Words of a text that are in no common n-gram."""
    words = _words(text)
    is_own = np.ones(len(words), bool)
    for start in np.flatnonzero(np.isin(_hashes(words, n), common)):
        is_own[start : start + n] = False
    return [word for word, own in zip(words, is_own, strict=True) if own]


def _hashes(words: Sequence[str], n: int) -> np.ndarray:
    """Hashes of the n-grams of a text, in order: polynomials in the hashes of their words, modulo 2 to the 64."""
    word_hashes = np.fromiter(map(hash, words), np.int64, len(words)).view(np.uint64)
    num_ngrams = max(min(1, len(words)), len(words) - n + 1)
    hashes = np.zeros(num_ngrams, np.uint64)
    for offset in range(min(n, len(words))):
        hashes = hashes * _MULTIPLIER + word_hashes[offset : offset + num_ngrams]
    return hashes


def _words(text: str) -> list[str]:
    """Words, normalised as in `folded_id`, with punctuation treated as space."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    for mark in [c for c in set(plain) if unicodedata.category(c).startswith("P")]:
        plain = plain.replace(mark, " ")
    return plain.split()
