"""The most probable tokens exactly, and a systematic sample of the others: unbiased, in a few bytes.

Per position, with tau = 1 / n: the head is every token with p >= tau and at least the `k_min` most probable ones.
The tail is sampled systematically (Madow & Madow 1944): a tail token is selected if its interval of the cumulative
sum over the tail contains one of the points (u + j) tau, with a single u uniform in [0, 1) for the position. So a
tail token is selected with probability p / tau, at most once, with weight tau: the expected target is p, with

    E |t - p|^2 = sum over the tail of p (tau - p) <= tau * tail,      |sum t - 1| < tau

where n independent samples of p (RS-KD: Anshumann et al. 2025, arXiv 2503.16870) have (1 - sum p^2) / n. The target
is never renormalised. The forward KL is estimated without bias, since its gradient is linear in the target.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from distill.app.fingerprint import arguments_of, fingerprint_of
from distill.cache import Lengths
from distill.cache.codecs import compact
from distill.errors import ConfigError
from distill.records import Entries, SoftTargets

_POSITIONS = ("position.num_exact", "position.num_draws", "position.tail")
_BYTES = (*_POSITIONS, "lesser.code", "head_plane.bits", "draw_plane.bits")


@final
class Sampled:
    """2 + 3 bytes per exact entry + 2 per sample, and 1/8 per bit of an id above 16; rounded as in `compact`.

    Rounding also moves mass between head and tail: decoded targets have |sum t - 1| < tau + 0.008.
    """

    def __init__(self, *, n: int, k_min: int, seed: int, temperature: float) -> None:
        """`temperature` must equal that of the loss: a truncated distribution has a single temperature."""
        self._arguments = arguments_of(locals())
        if not (1 <= n <= 255 and 0 <= k_min <= 255 and temperature > 0):
            raise ConfigError(
                f"cache.codec.n={n}, cache.codec.k_min={k_min}, cache.codec.temperature={temperature}: expected n in "
                "1 ... 255, k_min in 0 ... 255 and a positive temperature"
            )
        self._n, self._k_min, self._seed, self._temperature = n, k_min, seed, temperature

    @property
    def seed(self) -> int:
        """Seed of the samples."""
        return self._seed

    def cut(self, logprobs_NV: Float[Tensor, "N V"], uniform_N: Float[Tensor, "N"]) -> SoftTargets:
        """Keep the head, sample the tail."""
        logprobs_NV = compact.apply_temperature(logprobs_NV, self._temperature)
        size = logprobs_NV.shape[-1]
        top_NK, ids_NK = logprobs_NV.topk(min(max(self._n, self._k_min), size), -1)
        is_forced_K = torch.arange(top_NK.shape[-1], device=top_NK.device) < self._k_min
        is_head_NK = (top_NK >= -math.log(self._n)) | (is_forced_K & (top_NK > -torch.inf))
        p_NV = logprobs_NV.exp()
        p_NV.scatter_(-1, ids_NK, p_NV.gather(-1, ids_NK).masked_fill(is_head_NK, 0))
        tail = compact.Cumulative.from_probabilities(p_NV)
        drawn_NJ = tail.sample((uniform_N.unsqueeze(-1) + torch.arange(self._n)) / self._n)
        return self._targets(
            is_head_NK.sum(-1).cpu().numpy(),
            (drawn_NJ < size).sum(-1).cpu().numpy(),
            ids_NK[is_head_NK].cpu().numpy(),
            top_NK[is_head_NK].cpu().numpy(),
            drawn_NJ[drawn_NJ < size].cpu().numpy(),
            tail.end_NP[:, -1].cpu().numpy(),
        )

    def pack(self, soft: SoftTargets) -> dict[str, np.ndarray]:
        """Store head and samples separately; the first probability of a head is implied by the others."""
        soft.check()
        is_head_E, num_draws_N = soft.is_exact_E, soft.num_N - soft.num_exact_N
        head, head_planes = compact.pack_ids(soft.ids_E[is_head_E])
        draws, draw_planes = compact.pack_ids(soft.ids_E[~is_head_E])
        codes, odds_N = compact.pack_probabilities(soft)
        return {
            "position.num_exact": soft.num_exact_N.astype(np.uint8),
            "position.num_draws": num_draws_N.astype(np.uint8),
            "position.tail": odds_N,
            "head.id": head,
            "head_plane.bits": head_planes,
            "lesser.code": codes,
            "draw.id": draws,
            "draw_plane.bits": draw_planes,
        }

    def unpack(self, arrays: Mapping[str, np.ndarray], lengths: Lengths | None = None) -> SoftTargets:
        """Decode rows of head and samples."""
        layout: dict[str, tuple[Any, int]] = dict.fromkeys(_BYTES, (np.uint8, 1))
        compact.check_arrays(arrays, layout | {"head.id": (np.uint16, 1), "draw.id": (np.uint16, 1)})
        num_exact_N, num_draws_N, odds_N, codes, head_planes, draw_planes = (arrays[name] for name in _BYTES)
        axes = ("position.tail", "head.id", "draw.id", "head_plane.bits", "draw_plane.bits")
        length_R, head_R, draw_R, head_plane_R, draw_plane_R = compact.record_lengths(axes, arrays, lengths)
        is_counted_R = compact.sum_per_record(num_exact_N, length_R) == head_R
        is_counted_R &= compact.sum_per_record(num_draws_N, length_R) == draw_R
        if not is_counted_R.all() or (num_draws_N > self._n).any():
            raise compact.inconsistent(f"{head_R.sum()} and {draw_R.sum()} ids do not match the counts per position")
        head = compact.unpack_ids(arrays["head.id"], head_planes, head_R, head_plane_R)
        draws = compact.unpack_ids(arrays["draw.id"], draw_planes, draw_R, draw_plane_R)
        logprobs, tail_N = compact.unpack_probabilities(codes, odds_N, num_exact_N)
        return self._targets(num_exact_N, num_draws_N, head, logprobs, draws, tail_N)

    def at_temperature(self, entries: Entries, temperature: float) -> Entries:
        """Return the entries as stored."""
        return entries

    def check_temperature(self, temperature: float) -> None:
        """Accept only the codec's temperature."""
        compact.check_temperature(temperature, self._temperature)

    def fingerprint(self) -> dict[str, Any]:
        """All settings, and the layout of the stored arrays."""
        return fingerprint_of(self, self._arguments, stored=compact.LAYOUT)

    def _targets(
        self,
        num_exact_N: np.ndarray,
        num_draws_N: np.ndarray,
        head: np.ndarray,
        logprobs: np.ndarray,
        draws: np.ndarray,
        tail_N: np.ndarray,
    ) -> SoftTargets:
        """Interleave heads, with their log-probabilities, and samples into rows."""
        num_N2 = np.stack([num_exact_N, num_draws_N], 1).astype(np.int32)
        is_head_E = np.repeat(np.arange(num_N2.size) % 2 == 0, num_N2.ravel())
        ids_E, logprobs_E = np.empty(len(is_head_E), np.int32), np.full(len(is_head_E), -math.log(self._n), np.float32)
        ids_E[is_head_E], ids_E[~is_head_E], logprobs_E[is_head_E] = head, draws, logprobs
        return SoftTargets(ids_E, logprobs_E, tail_N.astype(np.float32), *num_N2.T)
