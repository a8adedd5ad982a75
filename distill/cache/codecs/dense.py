"""Full distributions: exact at any temperature, and large (4 V bytes per position, float32)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, final

import numpy as np
from jaxtyping import Float
from torch import Tensor

from distill.app.fingerprint import fingerprint_of
from distill.cache import Lengths
from distill.cache.codecs.compact import check_arrays
from distill.records import Entries, SoftTargets


@final
class Dense:
    """K = V: no tail, no error."""

    seed = None

    def cut(self, logprobs_NV: Float[Tensor, "N V"], uniform_N: Float[Tensor, "N"]) -> SoftTargets:
        """Keep all ids in order."""
        return _in_order(logprobs_NV.float().cpu().numpy())

    def pack(self, soft: SoftTargets) -> dict[str, np.ndarray]:
        """Store log-probabilities; ids are implied by their order."""
        soft.check()
        return {"position.logprob": soft.logprobs_E.reshape(len(soft), -1).astype(np.float32)}

    def unpack(self, arrays: Mapping[str, np.ndarray], lengths: Lengths | None = None) -> SoftTargets:
        """Decode without loss."""
        check_arrays(arrays, {"position.logprob": (np.float32, 2)})
        return _in_order(arrays["position.logprob"])

    def check_temperature(self, temperature: float) -> None:
        """Accept any temperature."""

    def at_temperature(self, entries: Entries, temperature: float) -> Entries:
        """Rescale and normalize the full distribution."""
        if temperature == 1:
            return entries
        logprobs_E = entries.logprobs_E / temperature
        sum_N = logprobs_E.new_zeros(len(entries.ends_N)).index_add(0, entries.position_E, logprobs_E.exp())
        return replace(entries, logprobs_E=logprobs_E - sum_N.log()[entries.position_E])

    def fingerprint(self) -> dict[str, Any]:
        """Name of the codec and type of the stored numbers."""
        return fingerprint_of(self, {}, stored="float32")


def _in_order(logprobs_NV: np.ndarray) -> SoftTargets:
    num_rows, size = logprobs_NV.shape
    ids_E = np.tile(np.arange(size, dtype=np.int32), num_rows)
    return SoftTargets(ids_E, logprobs_NV.ravel(), np.zeros(num_rows, np.float32), np.full(num_rows, size, np.int32))
