"""The k most probable tokens with their probabilities under the full softmax, and the mass of the rest.

Never renormalised: below k = 25 that trains worse than no soft targets at all (arXiv 2503.16870).
Stored exactly as computed, in float32: the error is that of the teacher's own softmax.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import numpy as np
from jaxtyping import Float
from torch import Tensor

from distill.records import ConfigError, SoftTargets


@final
class TopK:
    """8 k + 4 bytes per position."""

    def __init__(self, *, k: int, temperature: float) -> None:
        """`temperature` is that of the loss which the targets are for: a cut distribution has just one."""
        if k < 1 or temperature <= 0:
            raise ConfigError(f"cache.k={k}, cache.temperature={temperature}: both must be positive")
        self._k, self._temperature = k, temperature

    def cut(self, logprobs_NV: Float[Tensor, "N V"]) -> SoftTargets:
        """Keep k of V."""
        if self._temperature != 1:
            logprobs_NV = (logprobs_NV / self._temperature).log_softmax(-1)
        top_NK, ids_NK = logprobs_NV.topk(min(self._k, logprobs_NV.shape[-1]), -1)
        tail_N = (1 - top_NK.exp().sum(-1)).clamp(min=0)
        return SoftTargets(
            ids_NK.cpu().numpy().astype(np.int32),
            top_NK.float().cpu().numpy(),
            tail_N.float().cpu().numpy(),
        )

    def pack(self, soft: SoftTargets) -> dict[str, np.ndarray]:
        """As it is."""
        return {"position.ids": soft.ids_NK, "position.logprobs": soft.logprobs_NK, "position.tail": soft.tail_N}

    def unpack(self, arrays: Mapping[str, np.ndarray]) -> SoftTargets:
        """As it was."""
        return SoftTargets(arrays["position.ids"], arrays["position.logprobs"], arrays["position.tail"])

    def at_temperature(self, logprobs_MK: Float[Tensor, "M K"], temperature: float) -> Float[Tensor, "M K"]:
        """As stored."""
        return logprobs_MK

    def check_temperature(self, temperature: float) -> None:
        """Only the one it was made for."""
        if temperature != self._temperature:
            raise ConfigError(
                f"a loss has temperature {temperature}, the cache keeps {self._k} tokens at temperature "
                f"{self._temperature}, and the normaliser at another one is lost with the rest; set "
                f"cache.temperature={temperature} (annotates anew) or cache=dense"
            )

    def fingerprint(self) -> dict[str, Any]:
        """k and temperature."""
        return {"codec": "topk", "k": self._k, "temperature": self._temperature}
