"""Which codec for this teacher and these texts: what each keeps, loses and takes, measured on a few hundred positions.

Of a target t that is stored for a distribution p, over the draws that it might be:

    noise = E |t - E t|^2     averages out over the positions of a run
    bias  = |E t - p|^2       does not

Both are told as shares of the noise of a hard label drawn from p, 1 - sum p^2. What a loss sees as one bucket for
the rest is taken as spread evenly over the rest of the vocabulary. Neither says how well a student will learn: of
two targets without bias the noisier one may teach as well, and a bias that looks small may not be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from distill.cache import Codec, uniforms
from distill.cache.codecs.dense import Dense
from distill.cache.codecs.rs_kd import RandomSampling
from distill.cache.codecs.sampled import Sampled
from distill.cache.codecs.topk import TopK
from distill.records import SPANS, Request, SoftTargets, spread
from distill.teachers import Teacher

_POSITIONS, _DRAWS, _BATCH = 300, 8, 4
_MOST_NOISE, _MOST_BIAS = 1e-2, 1e-4


@dataclass(frozen=True)
class Kept:
    """What a codec cuts from distributions, what is read back of it, and the bytes between."""

    cut: SoftTargets
    back: SoftTargets
    num_bytes: int


@dataclass(frozen=True)
class Fidelity:
    """What one codec does to the distributions of a probe."""

    bytes_per_position: float
    captured: float  # probability of the entries that are kept exactly
    kl: float  # nats, of the full distribution to the exact entries with the rest spread evenly
    noise: float
    bias: float

    @property
    def is_faithful(self) -> bool:
        """Little noise beside a hard label's, and no bias to speak of."""
        return self.noise <= _MOST_NOISE and self.bias <= _MOST_BIAS


def candidates(temperature: float) -> dict[str, Codec]:
    """What is compared, by the overrides that choose it."""
    found: dict[str, Codec] = {
        f"cache=topk cache.codec.k={k}": TopK(k=k, temperature=temperature) for k in (16, 32, 64)
    }
    for n in (64, 128):
        found[f"cache=sampled cache.codec.n={n}"] = Sampled(n=n, k_min=1, seed=0, temperature=temperature)
    found["cache=rs_kd cache.codec.n=64"] = RandomSampling(n=64, seed=0, temperature=temperature)
    return found | {"cache=dense": Dense()}


def sample(teacher: Teacher, requests: Sequence[Request], seed: int) -> list[SoftTargets]:
    """Whole distributions at a few hundred positions of each span; `teacher` is loaded and cuts nothing away."""
    found: list[SoftTargets] = []
    for span in SPANS:
        asked, num_positions = [request for request in requests if request.span == span], 0
        order = np.random.default_rng(seed).permutation(len(asked)).tolist()
        while order and num_positions < _POSITIONS:
            batch, order = [asked[place] for place in order[:_BATCH]], order[_BATCH:]
            made = [t.soft for a in teacher.annotate(batch) for t in a.targets.values() if t.soft is not None]
            found += made
            num_positions += sum(map(len, made))
    return found


def compare(wholes: Sequence[SoftTargets], codecs: Mapping[str, Codec]) -> dict[str, Fidelity]:
    """What each codec does to these distributions."""
    return {name: _fidelity(wholes, codec) for name, codec in codecs.items()}


def recommended(found: Mapping[str, Fidelity]) -> str:
    """The faithful codec of the fewest bytes."""
    faithful = {name: one for name, one in found.items() if one.is_faithful} or found
    return min(faithful, key=lambda name: faithful[name].bytes_per_position)


def table(found: Mapping[str, Fidelity], num_positions: int) -> str:
    """The comparison as text, and what is recommended."""
    best = recommended(found)
    lines = [
        f"{'':32} {'bytes':>9} {'captured':>9} {'KL':>9} {'noise':>9} {'bias':>9}   per position, of {num_positions}"
    ]
    lines += [
        f"{name:32} {one.bytes_per_position:9.1f} {one.captured:9.4f} {one.kl:9.2g} {one.noise:9.2g} {one.bias:9.2g}"
        f"{'   <- recommended' if name == best else ''}"
        for name, one in found.items()
    ]
    lines += [
        "",
        "captured: probability kept exactly; KL in nats, the rest spread evenly; noise and bias as shares of the",
        f"noise of a hard label. Recommended is the smallest with noise <= {_MOST_NOISE:g} and bias <= {_MOST_BIAS:g}.",
        "A loss that needs the rest as one bucket (reverse KL) needs cache=topk.",
    ]
    return "\n".join(lines)


def _fidelity(wholes: Sequence[SoftTargets], codec: Codec) -> Fidelity:
    size, sums = 0, np.zeros(5)
    for number, whole in enumerate(wholes):
        logprobs_NV = torch.from_numpy(whole.logprobs_E.reshape(len(whole), -1))
        p_NV = logprobs_NV.double().exp().numpy()
        num_draws = 1 if codec.seed is None else _DRAWS
        drawn = [pass_through(logprobs_NV, codec, f"{number}/{draw}") for draw in range(num_draws)]
        targets = [_spread(kept.back.for_training(), p_NV.shape[1]) for kept in drawn]
        half = len(targets) // 2
        means = (np.mean(targets[:half] or targets, 0), np.mean(targets[half:], 0))
        label_N = np.maximum(1 - np.square(p_NV).sum(1), 1e-9)
        # Two independent halves: the noise of one is not that of the other, so what is left is bias.
        bias_N = ((means[0] - p_NV) * (means[1] - p_NV)).sum(1)
        noise_N = np.mean([np.square(target_NV - p_NV).sum(1) for target_NV in targets], 0) - bias_N
        buckets = drawn[0].back.buckets()
        q_NV = _spread(buckets, p_NV.shape[1])
        log_ratio_NV = np.log(p_NV, where=p_NV > 0, out=np.zeros_like(p_NV)) - np.log(q_NV.clip(1e-30))
        size += drawn[0].num_bytes
        sums += [(1 - buckets.tail_N).sum(), (p_NV * log_ratio_NV).sum(), noise_N.sum(), bias_N.sum(), label_N.sum()]
    captured, kl, noise, bias, label = sums.tolist()
    number = sum(map(len, wholes))
    return Fidelity(size / number, captured / number, kl / number, max(0.0, noise / label), max(0.0, bias / label))


def pass_through(logprobs_NV: Float[Tensor, "N V"], codec: Codec, key: str) -> Kept:
    """Pass distributions through a codec as the record of this key."""
    uniform_N = torch.from_numpy(uniforms(key, len(logprobs_NV), codec.seed or 0))
    cut = codec.cut(logprobs_NV, uniform_N)
    arrays = codec.pack(cut)
    return Kept(cut, codec.unpack(arrays), sum(array.nbytes for array in arrays.values()))


def _spread(soft: SoftTargets, size: int) -> np.ndarray:
    """Rows over the vocabulary; what is left over lies evenly on the ids that are not kept."""
    kept, row_NV = (spread(soft.num_N)[0], soft.ids_E), np.zeros((len(soft), size))
    row_NV[kept] = np.exp(soft.logprobs_E)
    is_other_NV = np.ones((len(soft), size), bool)
    is_other_NV[kept] = False
    num_other_N1 = is_other_NV.sum(1, keepdims=True)
    row_NV += is_other_NV * (soft.tail_N[:, None] / np.maximum(num_other_N1, 1))
    return row_NV
