"""Size and fidelity of each codec on real distributions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks import material
from benchmarks.measure import Row
from distill.annotation.codec_probe import Kept, round_trip
from distill.cache import Codec
from distill.cache.codecs.rs_kd import RandomSampling
from distill.records import SoftTargets, ragged_indices

Texts = Sequence[Float[Tensor, "N V"]]
_LARGE_VOCABULARY = 151_936
_SAMPLED_BARS = {"chat": 30, "manual": 60, "reviews": 60}  # bytes per token


def round_trips(codec: Codec, texts: Texts, name: str) -> list[Kept]:
    """Pass each text through the codec as a separate record."""
    return [round_trip(logprobs_NV, codec, f"{name}/{index}") for index, logprobs_NV in enumerate(texts)]


def sizes(kind: str, texts: Texts) -> Iterator[Row]:
    """Bytes, rounding error, captured mass and noise of each codec.

    Bytes grow with entropy: the bar for prose fits the manual; reviews without context have one nat more.
    """
    codecs = {"sampled": material.codec("sampled"), "topk k=32": material.codec("topk")}
    codecs |= {f"topk k={k}": material.codec("topk", k=k) for k in (16, 64)}
    codecs |= {"rs_kd n=64": material.codec("rs_kd"), "dense": material.codec("dense")}
    byte_bars = {"sampled": _SAMPLED_BARS[kind], "topk k=16": 48, "topk k=64": 200}
    yield Row(f"{kind}: mean entropy, nats", _mean_entropy(texts), None, "lower")
    for name, codec in codecs.items():
        trips = round_trips(codec, texts, kind)
        yield Row(f"{kind}: {name}, bytes per token", _bytes_per_token(trips), byte_bars.get(name), "lower")
        if name != "dense" and not name.startswith("rs_kd"):  # these do not round
            rounding = sum(_rounding_kl(trip) for trip in trips) / _num_positions(trips)
            bar = {"topk k=16": 1.5e-4, "topk k=64": 1e-4}.get(name)
            yield Row(f"{kind}: {name}, KL by rounding, nats", rounding, bar, "lower")
            mass = 1 - sum(float(trip.cut.tail_N.sum()) for trip in trips) / _num_positions(trips)
            yield Row(f"{kind}: {name}, mass of exact entries", mass, None, "higher")
    yield from _noise_rows(kind, texts, codecs["sampled"])
    wide = [material.widen(logprobs_NV, _LARGE_VOCABULARY) for logprobs_NV in texts]
    for name in ("sampled", "topk k=16", "topk k=32", "topk k=64", "rs_kd n=64"):
        bar = byte_bars["sampled"] if name == "sampled" else None  # the other bars are for 16-bit ids
        trips = round_trips(codecs[name], wide, kind)
        yield Row(f"{kind}: {name}, bytes per token at V={_LARGE_VOCABULARY}", _bytes_per_token(trips), bar, "lower")


def _noise_rows(kind: str, texts: Texts, sampled: Codec) -> Iterator[Row]:
    """The noise of `sampled`, and its bytes beside those of equally noisy independent draws."""
    trips = round_trips(sampled, texts, kind)
    noise = sum(map(_squared_error, trips, texts)) / _num_positions(trips)
    single_draw_noise = float(
        torch.cat([1 - logprobs_NV.double().exp().square().sum(-1) for logprobs_NV in texts]).mean()
    )
    n = round(single_draw_noise / noise)  # the noise of n independent draws is that of one, divided by n
    equally_noisy = RandomSampling(n=n, seed=0, temperature=1.0)
    ratio = _bytes_per_token(trips) / _bytes_per_token(round_trips(equally_noisy, texts, kind))
    yield Row(f"{kind}: sampled, E|t-p|^2", noise, None, "lower")
    yield Row(f"{kind}: n at which rs_kd is as noisy", n, None, "higher")
    yield Row(f"{kind}: bytes of sampled / rs_kd at equal noise", ratio, 0.45, "lower")


def _mean_entropy(texts: Texts) -> float:
    return float(torch.cat([-(logprobs_NV.exp() * logprobs_NV).sum(-1) for logprobs_NV in texts]).mean())


def _num_positions(trips: Sequence[Kept]) -> int:
    return sum(len(trip.cut) for trip in trips)


def _bytes_per_token(trips: Sequence[Kept]) -> float:
    return sum(trip.num_bytes for trip in trips) / _num_positions(trips)


def _rounding_kl(trip: Kept) -> float:
    """Sum over positions of KL(stored || read back), the tail counted as one outcome."""
    before, after = _buckets(trip.cut), _buckets(trip.back)
    is_positive = before > 0
    return float((before[is_positive] * np.log(before[is_positive] / after[is_positive])).sum())


def _buckets(soft: SoftTargets) -> np.ndarray:
    head = soft.buckets()
    return np.concatenate([np.exp(head.logprobs_E.astype(np.float64)), head.tail_N])


def _squared_error(trip: Kept, logprobs_NV: Float[Tensor, "N V"]) -> float:
    """Sum over positions of |t - p|^2, where t is the target that a student trains on."""
    p_NV = logprobs_NV.double().exp()
    t_E, (row_E, _) = torch.from_numpy(trip.back.logprobs_E).double().exp(), ragged_indices(trip.back.num_N)
    p_E = p_NV[torch.from_numpy(row_E), torch.from_numpy(trip.back.ids_E)]
    return float(p_NV.square().sum() + (t_E * (t_E - 2 * p_E)).sum())
