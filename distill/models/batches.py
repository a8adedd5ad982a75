"""How many texts pass through a model together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

BatchUnit = Literal["examples", "tokens"]


@dataclass(frozen=True)
class BatchLimit:
    """The largest batch of one forward pass: a number of examples, or of tokens including padding."""

    size: int
    unit: BatchUnit = "examples"

    def batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Cut the indices of texts, sorted by length, into batches within the limit, of at least one text each."""
        batches: list[list[int]] = []
        for index in np.argsort(lengths, kind="stable").tolist():
            if not batches or len(batches[-1]) >= self.num_texts(lengths[index]):
                batches.append([])
            batches[-1].append(index)
        return batches

    def num_texts(self, length: int) -> int:
        """Number of texts of at most this length that fit into a batch, at least one."""
        return self.size if self.unit == "examples" else max(1, self.size // max(1, length))
