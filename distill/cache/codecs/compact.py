"""Distributions in few bytes: what the codecs that keep a part of one have in common.

An id takes 16 bits. Its higher bits lie apart, in planes of one bit per id, and planes of zeros alone at the end
are not stored: none for a vocabulary of 65,536, one at most for 131,072, two for 262,144.

A probability takes one byte, relative to the largest of its row, which takes none:

    c = 255 (p / p_max)^(1/4), rounded to nearest even        0 stands for an exact 0 and for nothing else

The fourth root spends the steps where the probability is (companding: Bennett 1948), and is two square roots,
which every machine rounds alike. With errors uniform in a step, E KL = 1/24 sum_j p_j (dlog p_j / dc)^2, to second
order, is 1.03e-5 sum_j (p_max p_j)^(1/2) <= 5.1e-6 (1 + K^(1/2)) for K kept entries: 2.6e-5 at 16, 4.6e-5 at 64.

What is left over takes one byte for its odds against what is kept, on the same scale from both ends:

    c = 255 a / (a + b),   a = tail^(1/4),   b = kept^(1/4)   0: nothing is left over; 255: nothing is kept

which adds at most 4.1e-5, where both are 1/2. Kept probabilities are scaled to what the tail leaves, so a row sums
to 1 by construction. Errors of single positions are up to three times these.
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
from distill.records import SoftTargets, spread

LAYOUT = {"ids": "u16 + planes", "probabilities": "u8 fourth root", "tail": "u8 fourth root of odds"}
_RATIO = (np.arange(256) / 255) ** 4
_LOG_RATIO = np.log(_RATIO, where=_RATIO > 0, out=np.full(256, -np.inf)).astype(np.float32)
_ROUNDING = 1e-5
_MOST_PLANES = 15
_BLOCK = 64


def retempered(logprobs_NV: Float[Tensor, "N V"], temperature: float) -> Float[Tensor, "N V"]:
    """Log-probabilities in float32 at the temperature that a codec keeps."""
    logprobs_NV = logprobs_NV.float()
    return logprobs_NV if temperature == 1 else (logprobs_NV / temperature).log_softmax(-1)


def check_temperature(wanted: float, kept: float) -> None:
    """Raise ConfigError unless they are the same: a cut distribution has just one temperature."""
    if wanted != kept:
        raise ConfigError(
            f"a loss has temperature {wanted}, the cache keeps a part of each distribution at temperature {kept}, "
            "and the normaliser at another one is lost with the rest; set "
            f"cache.codec.temperature={wanted} (annotates anew) or cache=dense"
        )


def check_arrays(arrays: Mapping[str, np.ndarray], wanted: Mapping[str, tuple[Any, int]]) -> None:
    """Raise CacheError unless these arrays are there and no others, each of its type and number of dimensions."""
    found = {name: (array.dtype, array.ndim) for name, array in arrays.items()}
    expected = {name: (np.dtype(kind), ndim) for name, (kind, ndim) in wanted.items()}
    if found != expected:
        raise CacheError(f"a record has the arrays {found}, wanted are {expected}; annotate anew")
    if len({len(array) for name, array in arrays.items() if name.startswith("position.")}) != 1:
        raise misfit("arrays of unlike numbers of positions")


def misfit(what: str) -> CacheError:
    """The error for arrays that cannot be one record."""
    return CacheError(f"a record does not fit together ({what}): it is damaged; delete its cache to annotate anew")


def pack_ids(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Low 16 bits of each id, and planes of the higher ones."""
    high = ids >> 16
    planes = [np.packbits((high >> bit & 1).astype(bool)) for bit in range(int(high.max(initial=0)).bit_length())]
    return ids.astype(np.uint16), np.concatenate([np.zeros(0, np.uint8), *planes])


def unpack_ids(low: np.ndarray, planes: np.ndarray, num_ids_R: np.ndarray, num_bytes_R: np.ndarray) -> np.ndarray:
    """Ids of what `pack_ids` made for each of R records; raises CacheError for planes that it would not make."""
    ids = low.astype(np.int32)
    if not len(planes):
        return ids
    plane_bytes_R = -(-num_ids_R // 8)
    num_planes_R = num_bytes_R // np.maximum(plane_bytes_R, 1)
    if (num_planes_R * plane_bytes_R != num_bytes_R).any() or num_planes_R.max() > _MOST_PLANES:
        raise misfit(f"{len(planes)} bytes of high bits for {len(low)} ids")
    bits, num_used = np.unpackbits(planes), 0
    starts_R = 8 * (np.cumsum(num_bytes_R) - num_bytes_R)
    record_M = np.repeat(np.arange(len(num_ids_R)), num_ids_R)
    place_M = starts_R[record_M] + np.arange(len(ids)) - (np.cumsum(num_ids_R) - num_ids_R)[record_M]
    for plane in range(num_planes_R.max()):
        is_there_M = (plane < num_planes_R)[record_M]
        bit_M = bits[place_M[is_there_M] + plane * 8 * plane_bytes_R[record_M[is_there_M]]].astype(np.int32)
        ids[is_there_M] |= bit_M << (16 + plane)
        num_used += int(bit_M.sum())
        is_some_R = np.bincount(record_M[is_there_M], bit_M, len(num_ids_R)) > 0
        if not is_some_R[num_planes_R == plane + 1].all():
            raise misfit("a plane of high bits that are all zero")
    if num_used != bits.sum():
        raise misfit("high bits of no id")
    return ids


def lengths_of(
    names: Sequence[str], arrays: Mapping[str, np.ndarray], lengths: Mapping[str, np.ndarray] | None
) -> tuple[np.ndarray, ...]:
    """How long each record is in these arrays; where nobody says, they are one record."""
    if lengths is None:
        return tuple(np.array([len(arrays[name])]) for name in names)
    return tuple(lengths[name.partition(".")[0]] for name in names)


def sums(values_N: np.ndarray, length_R: np.ndarray) -> np.ndarray:
    """The sum over the positions of each record."""
    ends_R = np.cumsum(length_R)
    totals = np.concatenate([[0], np.cumsum(values_N, dtype=np.int64)])
    each: np.ndarray = totals[ends_R] - totals[ends_R - length_R]
    return each


def pack_probabilities(soft: SoftTargets) -> tuple[np.ndarray, np.ndarray]:
    """One byte per exact entry but each row's first, row after row, and one per tail.

    The first exact entry of a row must be its most probable one, else CacheError.
    """
    head = soft.buckets()
    log_p_E = head.logprobs_E.astype(np.float64)
    row_E, place_E = spread(head.num_exact_N)
    most_E = log_p_E[np.arange(len(log_p_E)) - place_E]
    if (log_p_E > most_E + _ROUNDING).any():
        raise CacheError("soft targets whose first entry is not the most probable one cannot be packed")
    ratio_E = np.exp(log_p_E - np.where(most_E > -np.inf, most_E, 0))
    code_E = np.where(ratio_E > 0, np.rint(255 * _fourth_root(ratio_E)).clip(1, 255), 0).astype(np.uint8)
    a_N = _fourth_root(head.tail_N.astype(np.float64))
    b_N = _fourth_root(np.bincount(row_E, np.exp(log_p_E), len(head)))
    odds_N = np.rint(255 * a_N / (a_N + b_N))
    is_both_N = (a_N > 0) & (b_N > 0)
    return code_E[place_E > 0], np.where(is_both_N, odds_N.clip(1, 254), odds_N).astype(np.uint8)


def unpack_probabilities(
    codes: np.ndarray, odds_N: np.ndarray, num_exact_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of the exact entries, row after row, and what they leave over."""
    num_exact_N = num_exact_N.astype(np.int64)
    if len(codes) != np.maximum(num_exact_N - 1, 0).sum() or ((odds_N == 255) != (num_exact_N == 0)).any():
        raise misfit(f"{len(codes)} probabilities for rows of {num_exact_N}")
    start_N = np.cumsum(num_exact_N) - num_exact_N
    code_M = np.full(num_exact_N.sum(), 255, np.uint8)
    is_lesser_M = np.ones(len(code_M), bool)
    is_lesser_M[start_N[num_exact_N > 0]] = False
    code_M[is_lesser_M] = codes
    totals = np.concatenate([[0.0], np.cumsum(_ratios(code_M), dtype=np.float64)])
    log_scale_N, tail_N = _scale(odds_N, totals[start_N + num_exact_N] - totals[start_N])
    logprobs_M = _LOG_RATIO.take(code_M, mode="wrap")
    logprobs_M += np.repeat(log_scale_N, num_exact_N)
    return logprobs_M, tail_N


def unpack_equal_rows(codes: np.ndarray, odds_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same where all rows are equally long, and none is empty."""
    if (odds_N == 255).any():
        raise misfit("rows of which nothing is kept")
    log_scale_N, tail_N = _scale(odds_N, 1 + _ratios(codes).sum(1))
    logprobs_NK = np.empty((len(codes), codes.shape[1] + 1), np.float32)
    logprobs_NK[:, 0] = log_scale_N
    np.add(_LOG_RATIO.take(codes, mode="wrap"), log_scale_N[:, None], out=logprobs_NK[:, 1:])
    return logprobs_NK, tail_N


def _ratios(codes: np.ndarray) -> np.ndarray:
    ratios = codes * np.float32(1 / 255)  # multiplied out: faster than to look each up
    ratios *= ratios
    ratios *= ratios
    return ratios


def _scale(odds_N: np.ndarray, sum_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logs of what makes rows of ratios sum to what their tails leave, and the tails."""
    tail_N, kept_N = _RATIO[odds_N], _RATIO[255 - odds_N]
    scale_N = kept_N / (tail_N + kept_N) / sum_N.clip(1)
    log_scale_N = np.log(scale_N, where=kept_N > 0, out=np.zeros(len(odds_N)))
    return log_scale_N.astype(np.float32), (tail_N / (tail_N + kept_N)).astype(np.float32)


@dataclass(frozen=True)
class Cumulative:
    """Running sums of probabilities over blocks of a vocabulary; within a block they are made where they are needed.

    A row's sums do not depend on what else is in its batch.
    """

    p_NPB: Float[Tensor, "N P B"]
    end_NP: Float[Tensor, "N P"]
    size: int

    @classmethod
    def of(cls, p_NV: Float[Tensor, "N V"]) -> Cumulative:
        """Sum probabilities block by block."""
        size = p_NV.shape[-1]
        padded_NV = torch.nn.functional.pad(p_NV, (0, -size % _BLOCK)) if size % _BLOCK else p_NV
        p_NPB = padded_NV.unflatten(-1, (-1, _BLOCK))
        return cls(p_NPB, p_NPB.sum(-1).double().cumsum(-1), size)

    def drawn(self, points_NJ: Float[Tensor, "N J"]) -> Int[Tensor, "N J"]:
        """The token in whose share of the sum each point lies; V for a point behind all of them."""
        points_NJ = points_NJ.to(self.end_NP.device)
        ids_NJ = torch.full_like(points_NJ, self.size, dtype=torch.int64)
        is_within_NJ = points_NJ < self.end_NP[:, -1:]
        row_M, _ = is_within_NJ.nonzero(as_tuple=True)
        block_M = torch.searchsorted(self.end_NP, points_NJ, right=True)[is_within_NJ]
        inside_MB = self.p_NPB[row_M, block_M].double().cumsum(-1)
        start_M = self.end_NP[row_M, block_M] - inside_MB[:, -1]
        place_M1 = torch.searchsorted(inside_MB, (points_NJ[is_within_NJ] - start_M).unsqueeze(-1), right=True)
        last_M1 = torch.searchsorted(inside_MB, inside_MB[:, -1:].contiguous())  # that has any probability
        ids_NJ[is_within_NJ] = block_M * _BLOCK + place_M1.minimum(last_M1).squeeze(-1)
        return ids_NJ


def _fourth_root(x: np.ndarray) -> np.ndarray:
    root: np.ndarray = np.sqrt(np.sqrt(x))
    return root
