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

    def find(self, key: bytes) -> int | None:
        """Return the number of a key."""
        self._settle()
        number = self._recent.get(key)
        return self._find_sorted(key) if number is None else number

    def has(self, keys: bytes) -> np.ndarray:
        """Whether each of many keys is there."""
        self._settle()
        wanted_M2 = np.frombuffer(keys, np.uint64).reshape(-1, 2)
        place_M = np.searchsorted(self._sorted_S, wanted_M2[:, 0].byteswap(), side="right") - 1
        is_there_M = np.zeros(len(wanted_M2), bool)
        if len(self._number_S):
            every_E2 = np.frombuffer(self._keys, np.uint64).reshape(-1, 2)
            is_there_M = (every_E2[self._number_S[place_M]] == wanted_M2).all(1) & (place_M >= 0)
        for number in np.flatnonzero(~is_there_M).tolist():  # recent ones, or such as share their first half
            is_there_M[number] = self.find(keys[KEY_BYTES * number : KEY_BYTES * (number + 1)]) is not None
        return is_there_M

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
