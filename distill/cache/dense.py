"""Every token's probability: exact at any temperature, and large (4 V bytes per position and more)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import numpy as np
from jaxtyping import Float
from torch import Tensor

from distill.records import SoftTargets


@final
class Dense:
    """K = V, nothing left over."""

    def cut(self, logprobs_NV: Float[Tensor, "N V"]) -> SoftTargets:
        """Keep all, in order of id."""
        num_positions, size = logprobs_NV.shape
        ids_NK = np.broadcast_to(np.arange(size, dtype=np.int32), (num_positions, size))
        return SoftTargets(ids_NK, logprobs_NV.float().cpu().numpy(), np.zeros(num_positions, np.float32))

    def pack(self, soft: SoftTargets) -> dict[str, np.ndarray]:
        """The ids are the places."""
        return {"position.logprobs": soft.logprobs_NK}

    def unpack(self, arrays: Mapping[str, np.ndarray]) -> SoftTargets:
        """As it was."""
        logprobs_NK = arrays["position.logprobs"]
        ids_NK = np.broadcast_to(np.arange(logprobs_NK.shape[1], dtype=np.int32), logprobs_NK.shape)
        return SoftTargets(ids_NK, logprobs_NK, np.zeros(len(logprobs_NK), np.float32))

    def check_temperature(self, temperature: float) -> None:
        """Any will do."""

    def at_temperature(self, logprobs_MK: Float[Tensor, "M K"], temperature: float) -> Float[Tensor, "M K"]:
        """The whole distribution is there, so its normaliser is too."""
        return logprobs_MK if temperature == 1 else (logprobs_MK / temperature).log_softmax(-1)

    def fingerprint(self) -> dict[str, Any]:
        """Nothing to choose."""
        return {"codec": "dense"}
