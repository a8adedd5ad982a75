"""Sizes and fidelity: what each codec makes of real distributions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks import material
from benchmarks.measure import Row
from distill.annotation.codec_probe import Kept, pass_through
from distill.cache import Codec
from distill.cache.codecs.rs_kd import RandomSampling
from distill.records import SoftTargets, spread

Texts = Sequence[Float[Tensor, "N V"]]
_LARGE_VOCABULARY = 151_936
_SAMPLED_BARS = {"chat": 30, "manual": 60, "reviews": 60}  # bytes per token


def kept(codec: Codec, texts: Texts, name: str) -> list[Kept]:
    """Pass each text through the codec, as a record of its own."""
    return [pass_through(logprobs_NV, codec, f"{name}/{place}") for place, logprobs_NV in enumerate(texts)]


def sizes(kind: str, texts: Texts) -> Iterator[Row]:
    """Bytes, rounding, captured mass and noise, on real distributions.

    Bytes go with entropy: the manual's is what their bar for prose is of, reviews torn out of context have a nat more.
    """
    codecs = {"sampled": material.codec("sampled"), "topk k=32": material.codec("topk")}
    codecs |= {f"topk k={k}": material.codec("topk", k=k) for k in (16, 64)}
    codecs |= {"rs_kd n=64": material.codec("rs_kd"), "dense": material.codec("dense")}
    byte_bars = {"sampled": _SAMPLED_BARS[kind], "topk k=16": 48, "topk k=64": 200}
    yield Row(f"{kind}: mean entropy, nats", _mean_entropy(texts), None, "lower")
    for name, codec in codecs.items():
        found = kept(codec, texts, kind)
        yield Row(f"{kind}: {name}, bytes per token", _bytes_per_token(found), byte_bars.get(name), "lower")
        if name != "dense" and not name.startswith("rs_kd"):  # neither rounds
            rounding = sum(_rounding(one) for one in found) / _num_positions(found)
            bar = {"topk k=16": 1.5e-4, "topk k=64": 1e-4}.get(name)
            yield Row(f"{kind}: {name}, KL by rounding, nats", rounding, bar, "lower")
            mass = 1 - sum(float(one.cut.tail_N.sum()) for one in found) / _num_positions(found)
            yield Row(f"{kind}: {name}, mass of exact entries", mass, None, "higher")
    yield from _noise(kind, texts, codecs["sampled"])
    wide = [material.widened(logprobs_NV, _LARGE_VOCABULARY) for logprobs_NV in texts]
    for name in ("sampled", "topk k=16", "topk k=32", "topk k=64", "rs_kd n=64"):
        bar = byte_bars["sampled"] if name == "sampled" else None  # the others' are for ids of 16 bits
        found = kept(codecs[name], wide, kind)
        yield Row(f"{kind}: {name}, bytes per token at V={_LARGE_VOCABULARY}", _bytes_per_token(found), bar, "lower")


def _noise(kind: str, texts: Texts, sampled: Codec) -> Iterator[Row]:
    """The noise of `sampled`, and its bytes beside those of independent draws that are as noisy."""
    found = kept(sampled, texts, kind)
    noise = sum(map(_squared_error, found, texts)) / _num_positions(found)
    alone = float(torch.cat([1 - logprobs_NV.double().exp().square().sum(-1) for logprobs_NV in texts]).mean())
    n = round(alone / noise)  # of n independent draws the noise is alone / n
    as_noisy = RandomSampling(n=n, seed=0, temperature=1.0)
    ratio = _bytes_per_token(found) / _bytes_per_token(kept(as_noisy, texts, kind))
    yield Row(f"{kind}: sampled, E|t-p|^2", noise, None, "lower")
    yield Row(f"{kind}: n at which rs_kd is as noisy", n, None, "higher")
    yield Row(f"{kind}: bytes of sampled / rs_kd at equal noise", ratio, 0.45, "lower")


def _mean_entropy(texts: Texts) -> float:
    return float(torch.cat([-(logprobs_NV.exp() * logprobs_NV).sum(-1) for logprobs_NV in texts]).mean())


def _num_positions(found: Sequence[Kept]) -> int:
    return sum(len(one.cut) for one in found)


def _bytes_per_token(found: Sequence[Kept]) -> float:
    return sum(one.num_bytes for one in found) / _num_positions(found)


def _rounding(one: Kept) -> float:
    """Sum over positions of the KL from what was cut to what is read back, the rest being one outcome."""
    before, after = _buckets(one.cut), _buckets(one.back)
    is_there = before > 0
    return float((before[is_there] * np.log(before[is_there] / after[is_there])).sum())


def _buckets(soft: SoftTargets) -> np.ndarray:
    head = soft.buckets()
    return np.concatenate([np.exp(head.logprobs_E.astype(np.float64)), head.tail_N])


def _squared_error(one: Kept, logprobs_NV: Float[Tensor, "N V"]) -> float:
    """Sum over positions of |t - p|^2, t being what a student is taught."""
    p_NV = logprobs_NV.double().exp()
    t_E, (row_E, _) = torch.from_numpy(one.back.logprobs_E).double().exp(), spread(one.back.num_N)
    p_E = p_NV[torch.from_numpy(row_E), torch.from_numpy(one.back.ids_E)]
    return float(p_NV.square().sum() + (t_E * (t_E - 2 * p_E)).sum())
