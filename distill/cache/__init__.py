"""The cache: what a teacher left on disk. `store` keeps records whole; a codec says what is kept of a distribution.

A new codec is one file here and one in conf/cache/.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float
from torch import Tensor

from distill.records import Entries, SoftTargets

Lengths = Mapping[str, np.ndarray]


@runtime_checkable
class Codec(Protocol):
    """How much of a teacher's distribution is kept, in which bytes, and at which loss temperatures it can be read."""

    @property
    def seed(self) -> int | None:
        """Of its draws. None: it draws nothing, and what is left over is one bucket in training too."""
        ...

    def cut(self, logprobs_NV: Float[Tensor, "N V"], uniform_N: Float[Tensor, "N"]) -> SoftTargets:
        """Keep what is to be kept of each distribution; draws are a function of `uniform_N` (float64, on the CPU)."""
        ...

    def pack(self, soft: SoftTargets) -> dict[str, np.ndarray]:
        """Arrays to store, named "axis.name": `position` has a row per position, other axes are ragged.

        Raises CacheError for targets that are no distributions.
        """
        ...

    def unpack(self, arrays: Mapping[str, np.ndarray], lengths: Lengths | None = None) -> SoftTargets:
        """Targets of which `pack` makes the same bytes again; raises CacheError for arrays that do not fit together.

        Arrays of several records may stand one after the other: `lengths` tells how long each record is on each axis.
        """
        ...

    def check_temperature(self, temperature: float) -> None:
        """Raise ConfigError if targets at this loss temperature cannot be made of what is kept."""
        ...

    def at_temperature(self, entries: Entries, temperature: float) -> Entries:
        """What is kept, at a loss temperature that was checked."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """All that decides what is kept and how it is stored, as plain JSON values."""
        ...


def uniforms(key: str, num_positions: int, seed: int) -> np.ndarray:
    """Numbers in [0, 1) for the positions of a record: a hash of (seed, key, position), whatever the batch or order."""
    texts = (f"{seed}/{key}/{position}".encode() for position in range(num_positions))
    digests = b"".join(hashlib.blake2b(text, digest_size=8).digest() for text in texts)
    return (np.frombuffer(digests, "<u8") >> np.uint64(11)) * 2.0**-53
