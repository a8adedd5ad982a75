"""Which record has which key, for millions of them: sorted arrays, and a small dictionary of what came since."""

from __future__ import annotations

from typing import final

import numpy as np

KEY_BYTES = 16
_FEW = 4096


@final
class Index:
    """Keys in the order in which they were added; of equal ones the last counts."""

    def __init__(self) -> None:
        """Nothing is in it."""
        self._keys = bytearray()
        self._sorted_S = np.zeros(0, np.uint64)  # the first half of each sorted key, and whose it is
        self._number_S = np.zeros(0, np.int64)
        self._num_distinct = 0
        self._recent: dict[bytes, int] = {}
        self._num_settled = 0

    def __len__(self) -> int:
        """Number of different keys."""
        self._settle()
        return self._num_distinct

    def add(self, keys: bytes) -> None:
        """Add keys of 16 bytes each; they are numbered on."""
        self._keys += keys

    def find(self, keys: bytes) -> np.ndarray:
        """Return the number of each of many keys, -1 for one that is not there."""
        self._settle()
        number_M = np.full(len(keys) // KEY_BYTES, -1)
        if len(self._number_S):
            wanted_M2 = np.frombuffer(keys, np.uint64).reshape(-1, 2)
            place_M = np.searchsorted(self._sorted_S, wanted_M2[:, 0].byteswap(), side="right") - 1
            every_S2 = np.frombuffer(self._keys, np.uint64).reshape(-1, 2)
            is_there_M = (every_S2[self._number_S[place_M]] == wanted_M2).all(1) & (place_M >= 0)
            number_M[is_there_M] = self._number_S[place_M[is_there_M]]
            for place in np.flatnonzero(~is_there_M).tolist():  # such as share their first half
                number = self._find_sorted(keys[KEY_BYTES * place : KEY_BYTES * (place + 1)])
                number_M[place] = -1 if number is None else number
        if self._recent:
            each = (keys[start : start + KEY_BYTES] for start in range(0, len(keys), KEY_BYTES))
            recent_M = np.array([self._recent.get(key, -1) for key in each], np.int64)
            number_M = np.where(recent_M < 0, number_M, recent_M)
        return number_M

    def _find_sorted(self, key: bytes) -> int | None:
        first = np.frombuffer(key, ">u8", 1).astype(np.uint64)[0]
        place = int(np.searchsorted(self._sorted_S, first, side="right")) - 1
        while place >= 0 and self._sorted_S[place] == first:
            number = int(self._number_S[place])
            if self._key(number) == key:
                return number
            place -= 1
        return None

    def _settle(self) -> None:
        total = len(self._keys) // KEY_BYTES
        if total - len(self._number_S) > _FEW + len(self._number_S) // 4:
            self._sort(total)
        for number in range(self._num_settled, total):
            key = self._key(number)
            self._num_distinct += key not in self._recent and self._find_sorted(key) is None
            self._recent[key] = number
        self._num_settled = total

    def _sort(self, total: int) -> None:
        first = np.frombuffer(self._keys, ">u8").reshape(-1, 2)[:, 0].astype(np.uint64)
        self._number_S = np.argsort(first, kind="stable")
        self._sorted_S = first[self._number_S]
        self._recent, self._num_settled = {}, total
        is_like_former_S = np.diff(self._sorted_S, prepend=self._sorted_S[:1] ^ np.uint64(1)) == 0
        is_like_S = is_like_former_S | np.append(is_like_former_S[1:], False)
        alike = {self._key(number) for number in self._number_S[is_like_S].tolist()}
        self._num_distinct = int((~is_like_S).sum()) + len(alike)

    def _key(self, number: int) -> bytes:
        return bytes(self._keys[KEY_BYTES * number : KEY_BYTES * (number + 1)])
