"""Lookup of record numbers by key, for millions of records: sorted arrays and a small dictionary of recent keys."""

from __future__ import annotations

from typing import final

import numpy as np

KEY_BYTES = 16
_MIN_SORTED = 4096  # new keys before the arrays are sorted again


@final
class Index:
    """Keys numbered in the order they were added; of equal keys the last one is found."""

    def __init__(self) -> None:
        """Create an empty index."""
        self._keys = bytearray()
        self._sorted_S = np.zeros(0, np.uint64)  # first half of each key, sorted
        self._number_S = np.zeros(0, np.int64)  # the number of each sorted key
        self._num_distinct = 0
        self._recent: dict[bytes, int] = {}
        self._num_indexed = 0

    def __len__(self) -> int:
        """Number of distinct keys."""
        self._update()
        return self._num_distinct

    def add(self, keys: bytes) -> None:
        """Append keys of 16 bytes each."""
        self._keys += keys

    def find(self, keys: bytes) -> np.ndarray:
        """Return the numbers of M concatenated keys, -1 for missing keys."""
        self._update()
        number_M = np.full(len(keys) // KEY_BYTES, -1)
        if len(self._number_S):
            query_M2 = np.frombuffer(keys, np.uint64).reshape(-1, 2)
            position_M = np.searchsorted(self._sorted_S, query_M2[:, 0].byteswap(), side="right") - 1
            stored_S2 = np.frombuffer(self._keys, np.uint64).reshape(-1, 2)
            is_match_M = (stored_S2[self._number_S[position_M]] == query_M2).all(1) & (position_M >= 0)
            number_M[is_match_M] = self._number_S[position_M[is_match_M]]
            for place in np.flatnonzero(~is_match_M).tolist():  # missing, or several keys have this first half
                number = self._find_sorted(keys[KEY_BYTES * place : KEY_BYTES * (place + 1)])
                number_M[place] = -1 if number is None else number
        if self._recent:
            queries = (keys[start : start + KEY_BYTES] for start in range(0, len(keys), KEY_BYTES))
            recent_M = np.array([self._recent.get(key, -1) for key in queries], np.int64)
            number_M = np.where(recent_M < 0, number_M, recent_M)
        return number_M

    def _find_sorted(self, key: bytes) -> int | None:
        first_half = np.frombuffer(key, ">u8", 1).astype(np.uint64)[0]
        position = int(np.searchsorted(self._sorted_S, first_half, side="right")) - 1
        while position >= 0 and self._sorted_S[position] == first_half:
            number = int(self._number_S[position])
            if self._key(number) == key:
                return number
            position -= 1
        return None

    def _update(self) -> None:
        """Index the keys that were added since the last call."""
        total = len(self._keys) // KEY_BYTES
        if total - len(self._number_S) > _MIN_SORTED + len(self._number_S) // 4:
            self._sort(total)
        for number in range(self._num_indexed, total):
            key = self._key(number)
            self._num_distinct += key not in self._recent and self._find_sorted(key) is None
            self._recent[key] = number
        self._num_indexed = total

    def _sort(self, total: int) -> None:
        first_half_S = np.frombuffer(self._keys, ">u8").reshape(-1, 2)[:, 0].astype(np.uint64)
        self._number_S = np.argsort(first_half_S, kind="stable")
        self._sorted_S = first_half_S[self._number_S]
        self._recent, self._num_indexed = {}, total
        equals_previous_S = np.diff(self._sorted_S, prepend=self._sorted_S[:1] ^ np.uint64(1)) == 0
        is_shared_S = equals_previous_S | np.append(equals_previous_S[1:], False)
        keys_of_shared = {self._key(number) for number in self._number_S[is_shared_S].tolist()}
        self._num_distinct = int((~is_shared_S).sum()) + len(keys_of_shared)

    def _key(self, number: int) -> bytes:
        return bytes(self._keys[KEY_BYTES * number : KEY_BYTES * (number + 1)])
