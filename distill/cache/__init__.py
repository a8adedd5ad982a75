"""The cache: what a teacher left on disk. `store` keeps records whole; a codec says what is kept of a distribution.

A new codec is one file here and one in conf/cache/.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float
from torch import Tensor

from distill.records import SoftTargets


@runtime_checkable
class Codec(Protocol):
    """How much of a teacher's distribution is kept, and at which loss temperatures it can be read."""

    def cut(self, logprobs_NV: Float[Tensor, "N V"]) -> SoftTargets:
        """Keep what is to be kept of each distribution."""
        ...

    def pack(self, soft: SoftTargets) -> dict[str, np.ndarray]:
        """Arrays to be stored, named axis.what: a row per position, or per something that positions have several of."""
        ...

    def unpack(self, arrays: Mapping[str, np.ndarray]) -> SoftTargets:
        """What was packed; raises CacheError for arrays that cannot be."""
        ...

    def check_temperature(self, temperature: float) -> None:
        """Raise ConfigError if targets at this loss temperature cannot be made of what is kept."""
        ...

    def at_temperature(self, logprobs_MK: Float[Tensor, "M K"], temperature: float) -> Float[Tensor, "M K"]:
        """Kept log-probabilities at a loss temperature that was checked."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """All that decides what is kept, as plain JSON values."""
        ...
