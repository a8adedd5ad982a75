"""Likelihood of given texts under a model, and its divergence from a teacher along them; a chunk of rows at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from distill.evaluation.texts import Likelihood
from distill.losses.forward_kl import ForwardKL
from distill.models.reading import PrefixedReader
from distill.records import SoftTargets, Target, ragged_indices

Ids = tuple[int, ...]


class Closeness(NamedTuple):
    """How close a model is to its teacher along a text: KL(teacher || model) in nats, and bounds of the acceptance.

    The acceptance is the probability with which speculative decoding keeps a token that the model has drafted for the
    teacher, if both sample at temperature 1: 1 minus the total variation (Leviathan et al. 2023, arXiv 2211.17192,
    theorem 3.5).
    """

    kl: float
    accepted_low: float
    accepted_high: float


def likelihoods(
    reader: PrefixedReader, prompts: Sequence[Ids], targets: Sequence[Target | None]
) -> list[Likelihood | None]:
    """Return the likelihood of each target after its prompt, None for no target or one that the model cannot hold.

    The KL is None without soft targets that have exact entries.
    """
    pairs = {
        index: (prompt, target)
        for index, (prompt, target) in enumerate(zip(prompts, targets, strict=True))
        if target and _has_room(reader, prompt, target)
    }
    results: list[Likelihood | None] = [None] * len(targets)
    if not pairs:
        return results
    hidden_NH = reader.hidden_before_targets(
        [prompt for prompt, _ in pairs.values()], [target.token_ids for _, target in pairs.values()]
    )
    pieces = hidden_NH.split([len(target.token_ids) for _, target in pairs.values()])
    for (index, (_, target)), hidden_TH in zip(pairs.items(), pieces, strict=True):
        results[index] = _likelihood(reader, hidden_TH, target)
    return results


def _has_room(reader: PrefixedReader, prompt: Ids, target: Target) -> bool:
    room = reader.room(len(prompt))
    return room is None or len(target.token_ids) - 1 <= room  # the last token is not read


def _likelihood(reader: PrefixedReader, hidden_TH: Float[Tensor, "T H"], target: Target) -> Likelihood:
    soft, start, nats, parts = compared(target), 0, 0.0, list[Closeness]()
    for logprobs_MV in reader.logprobs_in_chunks(hidden_TH):
        stop = start + len(logprobs_MV)
        ids_M1 = torch.tensor(target.token_ids[start:stop], device=logprobs_MV.device).unsqueeze(1)
        nats -= float(logprobs_MV.gather(1, ids_M1).double().sum())
        parts += [_closeness(logprobs_MV, soft[start:stop])] if soft else []
        start = stop
    return Likelihood(nats, start, *map(sum, zip(*parts, strict=True)))


def compared(target: Target | None) -> SoftTargets | None:
    """Return the buckets of a target that a model can be compared by; None if there are none, or not at all tokens."""
    if target is None or target.soft is None or target.chosen is not None:
        return None
    soft = target.soft.buckets()
    # Only draws: a single bucket, in which all models are equal.
    return soft if soft.num_exact_N.all() else None


def closeness_of(logprobs_NV: Float[Tensor, "N V"], target: Target | None) -> Closeness | None:
    """Return means over the positions of a target; None without soft targets that a model can be compared by."""
    soft = compared(target)
    return None if soft is None else Closeness(*(total / len(soft) for total in _closeness(logprobs_NV, soft)))


def _closeness(logprobs_NV: Float[Tensor, "N V"], soft: SoftTargets) -> Closeness:
    """Return sums over positions in the teacher's buckets.

    What the two share of the tail is at least 0, and at most the smaller one of their tails.
    """
    row_E, _ = ragged_indices(soft.num_exact_N)
    log_q_E = logprobs_NV.cpu()[torch.from_numpy(row_E), torch.from_numpy(soft.ids_E)]
    log_p_E, tail_N = torch.from_numpy(soft.logprobs_E), torch.from_numpy(soft.tail_N)
    rest_N = 1 - torch.zeros(len(soft)).index_add(0, torch.from_numpy(row_E), log_q_E.exp())
    log_q = torch.cat([log_q_E, rest_N.clamp(min=1e-9).log()])
    kl = float(ForwardKL()(log_q, torch.cat([log_p_E, tail_N.log()]))[0].sum())
    shared = float(torch.minimum(log_p_E, log_q_E).double().exp().sum())
    return Closeness(kl, shared, shared + float(torch.minimum(tail_N, rest_N.clamp(min=0)).double().sum()))
