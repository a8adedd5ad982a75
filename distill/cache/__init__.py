"""The cache of the teacher's outputs on disk. `store` reads and writes records; codecs compress soft targets.

To add a codec, add a file to `codecs/` and one to conf/cache/. The cache does not interpret its records.
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
class Cut(Protocol):
    """Which part of a teacher's distribution is stored."""

    @property
    def seed(self) -> int | None:
        """Seed of the sampled entries. None if nothing is sampled: then the tail is one bucket in training too."""
        ...

    def cut(self, logprobs_NV: Float[Tensor, "N V"], uniform_N: Float[Tensor, "N"]) -> SoftTargets:
        """Select the entries to store; samples are a function of `uniform_N` (float64, on the CPU)."""
        ...


@runtime_checkable
class Codec(Cut, Protocol):
    """Which part of a teacher's distribution is stored, how, and for which loss temperatures."""

    def pack(self, soft: SoftTargets) -> dict[str, np.ndarray]:
        """Encode as arrays named "axis.name": axis `position` has a row per position, other axes are ragged.

        Raises CacheError if the targets are not distributions.
        """
        ...

    def unpack(self, arrays: Mapping[str, np.ndarray], lengths: Lengths | None = None) -> SoftTargets:
        """Decode; packing the result gives the same bytes. Raises CacheError if the arrays are inconsistent.

        The arrays of several records may be concatenated; `lengths` then holds each record's length on each axis.
        """
        ...

    def check_temperature(self, temperature: float) -> None:
        """Raise ConfigError if the stored entries cannot give targets at this loss temperature."""
        ...

    def at_temperature(self, entries: Entries, temperature: float) -> Entries:
        """Convert entries to a loss temperature that `check_temperature` accepts."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """Everything that determines the stored bytes, as JSON values."""
        ...


def uniforms(key: str, num_positions: int, seed: int) -> np.ndarray:
    """Pseudorandom numbers in [0, 1) per position of a record, a hash of (seed, key, position): batch-independent."""
    texts = (f"{seed}/{key}/{position}".encode() for position in range(num_positions))
    digests = b"".join(hashlib.blake2b(text, digest_size=8).digest() for text in texts)
    return (np.frombuffer(digests, "<u8") >> np.uint64(11)) * 2.0**-53
