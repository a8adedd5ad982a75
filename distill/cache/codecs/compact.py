"""Compact encoding of distributions, shared by the codecs that store only a part of each.

An id takes 16 bits. Its higher bits are stored separately, in planes of one bit per id; trailing planes of zeros are
omitted: no plane for a vocabulary of 65,536, at most one for 131,072, two for 262,144.

A probability takes one byte, relative to the largest of its row, which is not stored:

    c = 255 (p / p_max)^(1/4), rounded to nearest even        0 only for a probability of exactly 0

The fourth root gives more steps to larger probabilities (companding: Bennett 1948). It is computed as two square
roots, which all machines round identically. With errors uniform in a step, E KL = 1/24 sum_j p_j (dlog p_j / dc)^2,
to second order, is 1.03e-5 sum_j (p_max p_j)^(1/2) <= 5.1e-6 (1 + K^(1/2)) for K kept entries: 2.6e-5 at 16, 4.6e-5
at 64.

The tail mass takes one byte for its odds against the kept mass, on the same scale from both ends:

    c = 255 a / (a + b),   a = tail^(1/4),   b = kept^(1/4)   0: no tail; 255: no kept mass

which adds at most 4.1e-5, where both are 1/2. Kept probabilities are scaled to 1 - tail, so rows sum to 1 by
construction. Errors of single positions are up to three times as large.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from distill.errors import CacheError, ConfigError
from distill.records import SoftTargets, ragged_indices

LAYOUT = {"ids": "u16 + planes", "probabilities": "u8 fourth root", "tail": "u8 fourth root of odds"}
_RATIO = (np.arange(256) / 255) ** 4
_LOG_RATIO = np.log(_RATIO, where=_RATIO > 0, out=np.full(256, -np.inf)).astype(np.float32)
_ROUNDING = 1e-5
_MAX_PLANES = 15
_BLOCK = 64


def apply_temperature(logprobs_NV: Float[Tensor, "N V"], temperature: float) -> Float[Tensor, "N V"]:
    """Return log-probabilities in float32 at a codec's temperature."""
    logprobs_NV = logprobs_NV.float()
    return logprobs_NV if temperature == 1 else (logprobs_NV / temperature).log_softmax(-1)


def check_temperature(loss_temperature: float, stored_temperature: float) -> None:
    """Raise ConfigError unless both are equal: a truncated distribution has a single temperature."""
    if loss_temperature != stored_temperature:
        raise ConfigError(
            f"a loss has temperature {loss_temperature}, but the cache stores truncated distributions at temperature "
            f"{stored_temperature}, which lack the normaliser of any other; set "
            f"cache.codec.temperature={loss_temperature} (annotates again) or cache=dense"
        )


def check_arrays(arrays: Mapping[str, np.ndarray], layout: Mapping[str, tuple[Any, int]]) -> None:
    """Raise CacheError unless the arrays have the names, types and numbers of dimensions of `layout`."""
    actual = {name: (array.dtype, array.ndim) for name, array in arrays.items()}
    expected = {name: (np.dtype(dtype), ndim) for name, (dtype, ndim) in layout.items()}
    if actual != expected:
        raise CacheError(f"a record has the arrays {actual}, expected {expected}; annotate again")
    if len({len(array) for name, array in arrays.items() if name.startswith("position.")}) != 1:
        raise inconsistent("arrays with different numbers of positions")


def inconsistent(reason: str) -> CacheError:
    """Create the error for arrays that cannot belong to one record."""
    return CacheError(f"a record is damaged, its arrays are inconsistent: {reason}; delete its cache to annotate again")


def pack_ids(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the low 16 bits of each id, and the planes of the higher bits."""
    high = ids >> 16
    planes = [np.packbits((high >> bit & 1).astype(bool)) for bit in range(int(high.max(initial=0)).bit_length())]
    return ids.astype(np.uint16), np.concatenate([np.zeros(0, np.uint8), *planes])


def unpack_ids(low: np.ndarray, planes: np.ndarray, num_ids_R: np.ndarray, num_bytes_R: np.ndarray) -> np.ndarray:
    """Decode the output of `pack_ids` for R records; raises CacheError for planes that it cannot produce."""
    ids = low.astype(np.int32)
    if not len(planes):
        return ids
    plane_bytes_R = -(-num_ids_R // 8)
    num_planes_R = num_bytes_R // np.maximum(plane_bytes_R, 1)
    if (num_planes_R * plane_bytes_R != num_bytes_R).any() or num_planes_R.max() > _MAX_PLANES:
        raise inconsistent(f"{len(planes)} bytes of high bits for {len(low)} ids")
    bits, num_used = np.unpackbits(planes), 0
    starts_R = 8 * (np.cumsum(num_bytes_R) - num_bytes_R)
    record_M = np.repeat(np.arange(len(num_ids_R)), num_ids_R)
    offset_M = starts_R[record_M] + np.arange(len(ids)) - (np.cumsum(num_ids_R) - num_ids_R)[record_M]
    for plane in range(num_planes_R.max()):
        has_plane_M = (plane < num_planes_R)[record_M]
        bit_M = bits[offset_M[has_plane_M] + plane * 8 * plane_bytes_R[record_M[has_plane_M]]].astype(np.int32)
        ids[has_plane_M] |= bit_M << (16 + plane)
        num_used += int(bit_M.sum())
        is_nonzero_R = np.bincount(record_M[has_plane_M], bit_M, len(num_ids_R)) > 0
        if not is_nonzero_R[num_planes_R == plane + 1].all():
            raise inconsistent("the last plane of high bits is all zero")
    if num_used != bits.sum():
        raise inconsistent("high bits beyond the last id")
    return ids


def record_lengths(
    names: Sequence[str], arrays: Mapping[str, np.ndarray], lengths: Mapping[str, np.ndarray] | None
) -> tuple[np.ndarray, ...]:
    """Return the length of each record in these arrays; without `lengths` they hold a single record."""
    if lengths is None:
        return tuple(np.array([len(arrays[name])]) for name in names)
    return tuple(lengths[name.partition(".")[0]] for name in names)


def sum_per_record(values_N: np.ndarray, length_R: np.ndarray) -> np.ndarray:
    """Sum over the positions of each record."""
    ends_R = np.cumsum(length_R)
    totals = np.concatenate([[0], np.cumsum(values_N, dtype=np.int64)])
    sum_R: np.ndarray = totals[ends_R] - totals[ends_R - length_R]
    return sum_R


def pack_probabilities(soft: SoftTargets) -> tuple[np.ndarray, np.ndarray]:
    """Return one byte per exact entry except the first of each row, and one byte per tail.

    Raises CacheError unless the first exact entry of each row is its most probable one.
    """
    head = soft.buckets()
    log_p_E = head.logprobs_E.astype(np.float64)
    row_E, offset_E = ragged_indices(head.num_exact_N)
    log_max_E = log_p_E[np.arange(len(log_p_E)) - offset_E]
    if (log_p_E > log_max_E + _ROUNDING).any():
        raise CacheError("soft targets cannot be packed: the first entry of a row is not the most probable one")
    ratio_E = np.exp(log_p_E - np.where(log_max_E > -np.inf, log_max_E, 0))
    code_E = np.where(ratio_E > 0, np.rint(255 * _fourth_root(ratio_E)).clip(1, 255), 0).astype(np.uint8)
    a_N = _fourth_root(head.tail_N.astype(np.float64))
    b_N = _fourth_root(np.bincount(row_E, np.exp(log_p_E), len(head)))
    odds_N = np.rint(255 * a_N / (a_N + b_N))
    has_both_N = (a_N > 0) & (b_N > 0)
    return code_E[offset_E > 0], np.where(has_both_N, odds_N.clip(1, 254), odds_N).astype(np.uint8)


def unpack_probabilities(
    codes: np.ndarray, odds_N: np.ndarray, num_exact_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the log-probabilities of the exact entries of all rows, and the tails."""
    num_exact_N = num_exact_N.astype(np.int64)
    if len(codes) != np.maximum(num_exact_N - 1, 0).sum() or ((odds_N == 255) != (num_exact_N == 0)).any():
        raise inconsistent(f"{len(codes)} probabilities for rows of {num_exact_N} entries")
    start_N = np.cumsum(num_exact_N) - num_exact_N
    code_M = np.full(num_exact_N.sum(), 255, np.uint8)
    is_stored_M = np.ones(len(code_M), bool)
    is_stored_M[start_N[num_exact_N > 0]] = False
    code_M[is_stored_M] = codes
    totals = np.concatenate([[0.0], np.cumsum(_ratios(code_M), dtype=np.float64)])
    log_scale_N, tail_N = _scale(odds_N, totals[start_N + num_exact_N] - totals[start_N])
    logprobs_M = _LOG_RATIO.take(code_M, mode="wrap")
    logprobs_M += np.repeat(log_scale_N, num_exact_N)
    return logprobs_M, tail_N


def unpack_equal_rows(codes: np.ndarray, odds_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Decode like `unpack_probabilities` rows of equal length of at least 1."""
    if (odds_N == 255).any():
        raise inconsistent("rows without kept probability")
    log_scale_N, tail_N = _scale(odds_N, 1 + _ratios(codes).sum(1))
    logprobs_NK = np.empty((len(codes), codes.shape[1] + 1), np.float32)
    logprobs_NK[:, 0] = log_scale_N
    np.add(_LOG_RATIO.take(codes, mode="wrap"), log_scale_N[:, None], out=logprobs_NK[:, 1:])
    return logprobs_NK, tail_N


def _ratios(codes: np.ndarray) -> np.ndarray:
    ratios = codes * np.float32(1 / 255)  # two multiplications are faster than a table lookup
    ratios *= ratios
    ratios *= ratios
    return ratios


def _scale(odds_N: np.ndarray, sum_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the log of the factor that makes each row's ratios sum to 1 - tail, and the tails."""
    tail_N, kept_N = _RATIO[odds_N], _RATIO[255 - odds_N]
    scale_N = kept_N / (tail_N + kept_N) / sum_N.clip(1)
    log_scale_N = np.log(scale_N, where=kept_N > 0, out=np.zeros(len(odds_N)))
    return log_scale_N.astype(np.float32), (tail_N / (tail_N + kept_N)).astype(np.float32)


@dataclass(frozen=True)
class Cumulative:
    """Cumulative probabilities by blocks of the vocabulary; those inside a block are computed when needed.

    A row's sum_per_record do not depend on the rest of its batch.
    """

    p_NPB: Float[Tensor, "N P B"]
    end_NP: Float[Tensor, "N P"]
    size: int

    @classmethod
    def from_probabilities(cls, p_NV: Float[Tensor, "N V"]) -> Cumulative:
        """Sum probabilities by block."""
        size = p_NV.shape[-1]
        padded_NV = torch.nn.functional.pad(p_NV, (0, -size % _BLOCK)) if size % _BLOCK else p_NV
        p_NPB = padded_NV.unflatten(-1, (-1, _BLOCK))
        return cls(p_NPB, p_NPB.sum(-1).double().cumsum(-1), size)

    def sample(self, points_NJ: Float[Tensor, "N J"]) -> Int[Tensor, "N J"]:
        """Return the token whose interval of the cumulative sum contains each point; V beyond the last one."""
        points_NJ = points_NJ.to(self.end_NP.device)
        ids_NJ = torch.full_like(points_NJ, self.size, dtype=torch.int64)
        is_within_NJ = points_NJ < self.end_NP[:, -1:]
        row_M, _ = is_within_NJ.nonzero(as_tuple=True)
        block_M = torch.searchsorted(self.end_NP, points_NJ, right=True)[is_within_NJ]
        inside_MB = self.p_NPB[row_M, block_M].double().cumsum(-1)
        start_M = self.end_NP[row_M, block_M] - inside_MB[:, -1]
        offset_M1 = torch.searchsorted(inside_MB, (points_NJ[is_within_NJ] - start_M).unsqueeze(-1), right=True)
        last_M1 = torch.searchsorted(inside_MB, inside_MB[:, -1:].contiguous())  # last token with p > 0
        ids_NJ[is_within_NJ] = block_M * _BLOCK + offset_M1.minimum(last_M1).squeeze(-1)
        return ids_NJ


def _fourth_root(x: np.ndarray) -> np.ndarray:
    root: np.ndarray = np.sqrt(np.sqrt(x))
    return root
