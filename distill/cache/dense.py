"""Every token's probability: exact at any temperature, and large (4 V bytes per position, float32)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import numpy as np
from jaxtyping import Float
from torch import Tensor

from distill.cache import Lengths
from distill.cache.compact import check_arrays
from distill.records import SoftTargets


@final
class Dense:
    """K = V, nothing left over, no error."""

    seed = None

    def cut(self, logprobs_NV: Float[Tensor, "N V"], uniform_N: Float[Tensor, "N"]) -> SoftTargets:
        """Keep all, in order of id."""
        return _in_order(logprobs_NV.float().cpu().numpy())

    def pack(self, soft: SoftTargets) -> dict[str, np.ndarray]:
        """Ids are their places."""
        soft.check()
        return {"position.logprob": np.ascontiguousarray(soft.logprobs_NK, np.float32)}

    def unpack(self, arrays: Mapping[str, np.ndarray], lengths: Lengths | None = None) -> SoftTargets:
        """As it was."""
        check_arrays(arrays, {"position.logprob": (np.float32, 2)})
        return _in_order(arrays["position.logprob"])

    def check_temperature(self, temperature: float) -> None:
        """Any will do."""

    def at_temperature(self, logprobs_MK: Float[Tensor, "M K"], temperature: float) -> Float[Tensor, "M K"]:
        """The whole distribution is there, so its normaliser is too."""
        return logprobs_MK if temperature == 1 else (logprobs_MK / temperature).log_softmax(-1)

    def fingerprint(self) -> dict[str, Any]:
        """Nothing to choose."""
        return {"codec": "dense", "stored": "float32"}


def _in_order(logprobs_NV: np.ndarray) -> SoftTargets:
    num_positions, size = logprobs_NV.shape
    ids_NV = np.broadcast_to(np.arange(size, dtype=np.int32), (num_positions, size))
    return SoftTargets(ids_NV, logprobs_NV, np.zeros(num_positions, np.float32))
