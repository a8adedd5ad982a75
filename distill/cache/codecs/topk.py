"""The k most probable tokens with their probabilities under the full softmax, and the mass of the tail.

Never renormalised: with k < 25 that trains worse than no soft targets at all (arXiv 2503.16870).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import numpy as np
from jaxtyping import Float
from torch import Tensor

from distill.app.fingerprint import arguments_of, fingerprint_of
from distill.cache import Lengths
from distill.cache.codecs import compact
from distill.errors import ConfigError
from distill.records import Entries, SoftTargets


@final
class TopK:
    """3 k bytes per position, and k / 8 more per bit of an id above 16; rounded as in `compact`."""

    seed = None

    def __init__(self, *, k: int, temperature: float) -> None:
        """`temperature` must equal that of the loss: a truncated distribution has a single temperature."""
        self._arguments = arguments_of(locals())
        if k < 1 or temperature <= 0:
            raise ConfigError(f"cache.codec.k={k}, cache.codec.temperature={temperature}: both must be positive")
        self._k, self._temperature = k, temperature

    def cut(self, logprobs_NV: Float[Tensor, "N V"], uniform_N: Float[Tensor, "N"]) -> SoftTargets:
        """Keep the k most probable ids, in descending order."""
        logprobs_NV = compact.apply_temperature(logprobs_NV, self._temperature)
        top_NK, ids_NK = logprobs_NV.topk(min(self._k, logprobs_NV.shape[-1]), -1)
        tail_N = (1 - top_NK.exp().sum(-1)).clamp(min=0)
        return _equal_rows(ids_NK.int().cpu().numpy(), top_NK.cpu().numpy(), tail_N.cpu().numpy())

    def pack(self, soft: SoftTargets) -> dict[str, np.ndarray]:
        """Store ids and probabilities by row; the first probability of a row is implied by the others."""
        soft.check()
        low, planes = compact.pack_ids(soft.ids_E)
        codes, odds_N = compact.pack_probabilities(soft)
        return {
            "position.id": low.reshape(len(soft), -1),
            "position.code": codes.reshape(len(soft), -1),
            "position.tail": odds_N,
            "plane.bits": planes,
        }

    def unpack(self, arrays: Mapping[str, np.ndarray], lengths: Lengths | None = None) -> SoftTargets:
        """Decode rows of equal length."""
        layout = {"position.id": (np.uint16, 2), "position.code": (np.uint8, 2), "position.tail": (np.uint8, 1)}
        compact.check_arrays(arrays, layout | {"plane.bits": (np.uint8, 1)})
        low_NK, codes, odds_N = (arrays[name] for name in layout)
        width = low_NK.shape[1]
        if width > self._k or codes.shape[1] != width - 1:
            raise compact.inconsistent(f"{width} ids and {codes.shape[1]} probabilities per row, at most {self._k} ids")
        length_R, plane_R = compact.record_lengths(("position.id", "plane.bits"), arrays, lengths)
        ids = compact.unpack_ids(low_NK.ravel(), arrays["plane.bits"], length_R * width, plane_R)
        logprobs_NK, tail_N = compact.unpack_equal_rows(codes, odds_N)
        return _equal_rows(ids.reshape(low_NK.shape), logprobs_NK, tail_N)

    def at_temperature(self, entries: Entries, temperature: float) -> Entries:
        """Return the entries as stored."""
        return entries

    def check_temperature(self, temperature: float) -> None:
        """Accept only the codec's temperature."""
        compact.check_temperature(temperature, self._temperature)

    def fingerprint(self) -> dict[str, Any]:
        """All settings, and the layout of the stored arrays."""
        return fingerprint_of(self, self._arguments, stored=compact.LAYOUT)


def _equal_rows(ids_NK: np.ndarray, logprobs_NK: np.ndarray, tail_N: np.ndarray) -> SoftTargets:
    num_exact_N = np.full(len(ids_NK), ids_NK.shape[1], np.int32)
    return SoftTargets(ids_NK.ravel(), logprobs_NK.ravel(), tail_N, num_exact_N)
