"""Test data shared by this folder."""

from __future__ import annotations

import numpy as np

from distill.records import SoftTargets


def soft(number: int, k: int = 3) -> SoftTargets:
    """`number` soft targets with the ids 0 to k - 1 and a tail mass of 0.5."""
    ids_E, tail_N = np.tile(np.arange(k, dtype=np.int32), number), np.full(number, 0.5, np.float32)
    return SoftTargets(ids_E, np.full(number * k, -2, np.float32), tail_N, np.full(number, k))
