"""Comparison of codecs for a teacher and its texts: size and errors of each, measured on a few hundred positions.

For a target t stored for a distribution p, in expectation over the codec's samples:

    noise = E |t - E t|^2     averages out over the positions of a run
    bias  = |E t - p|^2       does not

Both are given as fractions of the noise of a hard label sampled from p, 1 - sum p^2. The mass of a rest bucket is
spread evenly over the ids that are not kept. Neither number predicts how well a student learns: of two unbiased
targets the noisier one may build_curriculum equally well, and a small bias may still matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from distill.annotation.positions import Positions
from distill.cache import Codec, uniforms
from distill.cache.codecs.dense import Dense
from distill.cache.codecs.rs_kd import RandomSampling
from distill.cache.codecs.sampled import Sampled
from distill.cache.codecs.topk import TopK
from distill.records import SPANS, Request, SoftTargets, ragged_indices
from distill.teachers import Teacher

_NUM_POSITIONS, _NUM_REPEATS, _BATCH_SIZE = 300, 8, 4
_MAX_NOISE, _MAX_BIAS = 1e-2, 1e-4


@dataclass(frozen=True)
class Kept:
    """Distributions as cut by a codec, as decoded from its bytes, and the number of bytes."""

    cut: SoftTargets
    back: SoftTargets
    num_bytes: int


@dataclass(frozen=True)
class Fidelity:
    """Size and errors of a codec."""

    bytes_per_position: float
    captured: float  # probability mass of the exact entries
    kl: float  # nats, from the full distribution to the exact entries with the rest spread evenly
    noise: float
    bias: float

    @property
    def is_faithful(self) -> bool:
        """Whether noise and bias are small compared with the noise of a hard label."""
        return self.noise <= _MAX_NOISE and self.bias <= _MAX_BIAS


def candidate_codecs(temperature: float) -> dict[str, Codec]:
    """Return the codecs to compare, by the overrides that select them."""
    codecs: dict[str, Codec] = {
        f"cache=topk cache.codec.k={k}": TopK(k=k, temperature=temperature) for k in (16, 32, 64)
    }
    for n in (64, 128):
        codecs[f"cache=sampled cache.codec.n={n}"] = Sampled(n=n, k_min=1, seed=0, temperature=temperature)
    codecs["cache=rs_kd cache.codec.n=64"] = RandomSampling(n=64, seed=0, temperature=temperature)
    return codecs | {"cache=dense": Dense()}


def sample_distributions(
    teacher: Teacher, positions: Positions, requests: Sequence[Request], seed: int
) -> list[SoftTargets]:
    """Return full distributions at a few hundred positions per span, of those that are kept.

    The teacher must be loaded, with the dense codec.
    """
    distributions: list[SoftTargets] = []
    for span in SPANS:
        of_span, num_positions = [request for request in requests if request.span == span], 0
        order = np.random.default_rng(seed).permutation(len(of_span)).tolist()
        while order and num_positions < _NUM_POSITIONS:
            batch, order = [of_span[index] for index in order[:_BATCH_SIZE]], order[_BATCH_SIZE:]
            annotations = positions.reduced(batch, teacher.annotate(batch))
            softs = [t.soft for a in annotations for t in a.targets.values() if t.soft is not None]
            distributions += softs
            num_positions += sum(map(len, softs))
    return distributions


def compare_codecs(distributions: Sequence[SoftTargets], codecs: Mapping[str, Codec]) -> dict[str, Fidelity]:
    """Measure each codec on the same full distributions."""
    return {name: _fidelity(distributions, codec) for name, codec in codecs.items()}


def recommend(fidelities: Mapping[str, Fidelity]) -> str:
    """Return the name of the smallest faithful codec; of the smallest codec if none is faithful."""
    faithful = {name: fidelity for name, fidelity in fidelities.items() if fidelity.is_faithful} or fidelities
    return min(faithful, key=lambda name: faithful[name].bytes_per_position)


def format_fidelity(fidelities: Mapping[str, Fidelity], num_positions: int) -> str:
    """Format the comparison as a table with the recommended codec."""
    best = recommend(fidelities)
    lines = [
        f"{'':32} {'bytes':>9} {'captured':>9} {'KL':>9} {'noise':>9} {'bias':>9}   per position, of {num_positions}"
    ]
    lines += [
        f"{name:32} {f.bytes_per_position:9.1f} {f.captured:9.4f} {f.kl:9.2g} {f.noise:9.2g} {f.bias:9.2g}"
        f"{'   <- recommended' if name == best else ''}"
        for name, f in fidelities.items()
    ]
    lines += [
        "",
        "captured: probability kept exactly; KL in nats, the rest spread evenly; noise and bias as fractions of the",
        f"noise of a hard label. Recommended: the smallest with noise <= {_MAX_NOISE:g} and bias <= {_MAX_BIAS:g}.",
        "A loss that needs the rest as one bucket (reverse KL) needs cache=topk.",
    ]
    return "\n".join(lines)


def _fidelity(distributions: Sequence[SoftTargets], codec: Codec) -> Fidelity:
    size, sums = 0, np.zeros(5)
    for number, dense in enumerate(distributions):
        logprobs_NV = torch.from_numpy(dense.logprobs_E.reshape(len(dense), -1))
        p_NV = logprobs_NV.double().exp().numpy()
        num_repeats = 1 if codec.seed is None else _NUM_REPEATS
        round_trips = [round_trip(logprobs_NV, codec, f"{number}/{repeat}") for repeat in range(num_repeats)]
        targets = [_to_rows(kept.back.for_training(), p_NV.shape[1]) for kept in round_trips]
        half = len(targets) // 2
        means = (np.mean(targets[:half] or targets, 0), np.mean(targets[half:], 0))
        label_noise_N = np.maximum(1 - np.square(p_NV).sum(1), 1e-9)
        # The means of two independent halves have uncorrelated noise, so their product estimates the bias alone.
        bias_N = ((means[0] - p_NV) * (means[1] - p_NV)).sum(1)
        noise_N = np.mean([np.square(target_NV - p_NV).sum(1) for target_NV in targets], 0) - bias_N
        buckets = round_trips[0].back.buckets()
        q_NV = _to_rows(buckets, p_NV.shape[1])
        log_ratio_NV = np.log(p_NV, where=p_NV > 0, out=np.zeros_like(p_NV)) - np.log(q_NV.clip(1e-30))
        size += round_trips[0].num_bytes
        kl_N = (p_NV * log_ratio_NV).sum(1)
        sums += [x_N.sum() for x_N in (1 - buckets.tail_N, kl_N, noise_N, bias_N, label_noise_N)]
    captured, kl, noise, bias, label_noise = sums.tolist()
    count = sum(map(len, distributions))
    return Fidelity(
        size / count, captured / count, kl / count, max(0.0, noise / label_noise), max(0.0, bias / label_noise)
    )


def round_trip(logprobs_NV: Float[Tensor, "N V"], codec: Codec, key: str) -> Kept:
    """Encode and decode distributions as the record with this key."""
    uniform_N = torch.from_numpy(uniforms(key, len(logprobs_NV), codec.seed or 0))
    cut = codec.cut(logprobs_NV, uniform_N)
    arrays = codec.pack(cut)
    return Kept(cut, codec.unpack(arrays), sum(array.nbytes for array in arrays.values()))


def _to_rows(soft: SoftTargets, size: int) -> np.ndarray:
    """Return dense rows over the vocabulary, with each tail spread evenly over the ids that are not kept."""
    kept, row_NV = (ragged_indices(soft.num_N)[0], soft.ids_E), np.zeros((len(soft), size))
    row_NV[kept] = np.exp(soft.logprobs_E)
    is_other_NV = np.ones((len(soft), size), bool)
    is_other_NV[kept] = False
    num_other_N1 = is_other_NV.sum(1, keepdims=True)
    row_NV += is_other_NV * (soft.tail_N[:, None] / np.maximum(num_other_N1, 1))
    return row_NV
