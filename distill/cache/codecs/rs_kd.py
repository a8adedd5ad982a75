"""Random sampling knowledge distillation (RS-KD): n tokens sampled from each distribution, and their counts.

Anshumann et al. 2025, arXiv 2503.16870, with the teacher itself as the proposal. The expected target is the
teacher's distribution, E |t - p|^2 = (1 - sum p^2) / n. A baseline for `sampled`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from distill.app.fingerprint import arguments_of, fingerprint_of
from distill.cache import Lengths
from distill.cache.codecs import compact
from distill.errors import CacheError, ConfigError
from distill.records import Entries, SoftTargets, ragged_indices


@final
class RandomSampling:
    """1 + 3 bytes per distinct token (2 + 4 if n > 255), 1/8 per bit of an id above 16; no rounding."""

    def __init__(self, *, n: int, seed: int, temperature: float) -> None:
        """`temperature` must equal that of the loss: a truncated distribution has a single temperature."""
        self._arguments = arguments_of(locals())
        if not (1 <= n <= 65535 and temperature > 0):
            raise ConfigError(
                f"cache.codec.n={n}, cache.codec.temperature={temperature}: expected n in 1 ... 65535 and a positive "
                "temperature"
            )
        self._n, self._seed, self._temperature = n, seed, temperature
        self._count = np.min_scalar_type(n)

    @property
    def seed(self) -> int:
        """Seed of the samples."""
        return self._seed

    def cut(self, logprobs_NV: Float[Tensor, "N V"], uniform_N: Float[Tensor, "N"]) -> SoftTargets:
        """Sample with replacement, and count."""
        cumulative = compact.Cumulative.from_probabilities(
            compact.apply_temperature(logprobs_NV, self._temperature).exp()
        )
        points_NJ = _expand(uniform_N, self._n) * cumulative.end_NP[:, -1:].cpu()
        ids_NJ = cumulative.sample(points_NJ).sort(-1).values.cpu().numpy()
        is_first_NJ = np.diff(ids_NJ, prepend=-1) > 0
        starts = np.flatnonzero(is_first_NJ)
        counts = np.diff(starts, append=ids_NJ.size)
        return self._targets(is_first_NJ.sum(1), ids_NJ.ravel()[starts], counts)

    def pack(self, soft: SoftTargets) -> dict[str, np.ndarray]:
        """Store distinct tokens in order of id, and their counts."""
        soft.check()
        counts = np.rint(np.exp(soft.logprobs_E.astype(np.float64)) * self._n)
        if soft.num_exact_N.any() or not soft.num_N.all() or counts.sum() != len(soft) * self._n:
            raise CacheError(f"soft targets cannot be packed: expected {self._n} samples per position and nothing else")
        low, planes = compact.pack_ids(soft.ids_E)
        return {
            "position.num_draws": soft.num_N.astype(self._count),
            "draw.id": low,
            "draw.count": counts.astype(self._count),
            "plane.bits": planes,
        }

    def unpack(self, arrays: Mapping[str, np.ndarray], lengths: Lengths | None = None) -> SoftTargets:
        """Decode distinct tokens and their weights."""
        layout: dict[str, tuple[Any, int]] = {"draw.id": (np.uint16, 1), "plane.bits": (np.uint8, 1)}
        layout |= dict.fromkeys(("position.num_draws", "draw.count"), (self._count, 1))
        compact.check_arrays(arrays, layout)
        low, planes, num_draws_N, counts = (arrays[name] for name in layout)
        axes = ("position.num_draws", "draw.id", "plane.bits")
        length_R, draw_R, plane_R = compact.record_lengths(axes, arrays, lengths)
        is_counted = len(low) == len(counts) and (compact.sum_per_record(num_draws_N, length_R) == draw_R).all()
        if not is_counted or not counts.all():
            raise compact.inconsistent(f"{len(low)} ids and {len(counts)} counts, expected {num_draws_N.sum()}")
        ids = compact.unpack_ids(low, planes, draw_R, plane_R)
        row_E, _ = ragged_indices(num_draws_N)
        if (np.bincount(row_E, counts, len(num_draws_N)) != self._n).any():
            raise compact.inconsistent(f"the counts of a position do not sum to {self._n}")
        return self._targets(num_draws_N, ids, counts)

    def at_temperature(self, entries: Entries, temperature: float) -> Entries:
        """Return the entries as stored."""
        return entries

    def check_temperature(self, temperature: float) -> None:
        """Accept only the codec's temperature."""
        compact.check_temperature(temperature, self._temperature)

    def fingerprint(self) -> dict[str, Any]:
        """All settings, and the layout of the stored arrays."""
        return fingerprint_of(self, self._arguments, stored=compact.LAYOUT["ids"])

    def _targets(self, num_draws_N: np.ndarray, ids: np.ndarray, counts: np.ndarray) -> SoftTargets:
        logprobs_E = np.log(counts / self._n).astype(np.float32)
        tail_N, num_exact_N = np.ones(len(num_draws_N), np.float32), np.zeros(len(num_draws_N), np.int32)
        return SoftTargets(ids.astype(np.int32), logprobs_E, tail_N, num_exact_N, num_draws_N.astype(np.int32))


def _expand(uniform_N: Float[Tensor, "N"], number: int) -> Float[Tensor, "N J"]:
    """Expand each number in [0, 1) to independent ones: SplitMix64 (Steele et al. 2014), seeded with its bits."""
    with np.errstate(over="ignore"):
        start_N1 = (uniform_N.numpy() * 2.0**53).astype(np.uint64)[:, None] << np.uint64(11)
        x_NJ = start_N1 + np.arange(1, number + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x_NJ = (x_NJ ^ (x_NJ >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x_NJ = (x_NJ ^ (x_NJ >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x_NJ ^= x_NJ >> np.uint64(31)
    return torch.from_numpy((x_NJ >> np.uint64(11)) * 2.0**-53)
