"""The language-model head and all active losses at once, a chunk of positions at a time.

Only supervised positions come here, and logits exist for one chunk only. Their gradient is formed while
they are there: with bucket probabilities q_b, the rest of the vocabulary being bucket 0, and a divergence's
slopes u_b = dD/d(log q_b),

    dD/dz_i = q_i (u_0 / q_0 - U)                     for every i, with U = sum of all u_b
            + [i is kept] (u_i - q_i u_0 / q_0)

so any number of losses costs one softmax per temperature and a few scattered adds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

Formula = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
_CHUNK = 256
_SMALLEST_REST = 1e-9


@dataclass(frozen=True)
class Term:
    """One loss on some of the positions: targets at temperature `temperature`, the rest bucket last.

    Rows may be ragged: an id of -1 with log_t = -inf is no bucket at all.
    """

    formula: Formula
    rows_M: Int[Tensor, "M"]
    ids_MK: Int[Tensor, "M K"]
    log_t_MB: Float[Tensor, "M B"]
    temperature: float
    scale: float


def head_loss(
    hidden_NH: Float[Tensor, "N H"],
    weight_VH: Float[Tensor, "V H"],
    bias_V: Float[Tensor, "V"] | None,
    terms: Sequence[Term],
) -> tuple[Float[Tensor, ""], Float[Tensor, "L"]]:
    """Return the scaled total, which can be differentiated once, and the plain sum of each term.

    Total = sum over terms of scale * temperature^2 * sum of D. Computed in float32, or float64 if the
    hidden states are; the gradient is exact and formed here, not in backward.
    """
    with torch.autocast(hidden_NH.device.type, enabled=False):
        precise = torch.float64 if hidden_NH.dtype == torch.float64 else torch.float32
        inputs = (
            hidden_NH.to(precise),
            weight_VH.to(precise),
            None if bias_V is None else bias_V.to(precise),
        )
        total, sums_L = _HeadLoss.apply(*inputs, tuple(terms))  # type: ignore[no-untyped-call]
    return total, sums_L


@torch.no_grad()
def predicted_ids(
    hidden_NH: Float[Tensor, "N H"], weight_VH: Float[Tensor, "V H"], bias_V: Float[Tensor, "V"] | None
) -> Int[Tensor, "N"]:
    """The most probable token at each position."""
    chunks = [_logits(h.to(weight_VH.dtype), weight_VH, bias_V).argmax(-1) for h in hidden_NH.split(_CHUNK)]
    return torch.cat(chunks)


def _logits(
    hidden_CH: Float[Tensor, "C H"], weight_VH: Float[Tensor, "V H"], bias_V: Float[Tensor, "V"] | None
) -> Float[Tensor, "C V"]:
    logits_CV = hidden_CH @ weight_VH.T
    return logits_CV if bias_V is None else logits_CV.add_(bias_V)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, terms: tuple[Term, ...]
    ) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_weight, needs_bias, _ = ctx.needs_input_grad
        gradients = [
            torch.zeros_like(x) if needed and x is not None else None
            for x, needed in ((hidden_NH, needs_hidden), (weight_VH, needs_weight), (bias_V, needs_bias))
        ]
        sums_L = hidden_NH.new_zeros(len(terms))
        for start in range(0, len(hidden_NH), _CHUNK):
            hidden_CH = hidden_NH[start : start + _CHUNK]
            logits_CV = _logits(hidden_CH, weight_VH, bias_V)
            slope_CV = _chunk(logits_CV, start, terms, sums_L, any(g is not None for g in gradients))
            if slope_CV is not None:
                _collect(gradients, slope_CV, hidden_CH, weight_VH, start)
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(sums_L)
        factors = [term.scale * term.temperature**2 for term in terms]
        total = (sums_L * sums_L.new_tensor(factors)).sum()
        return total, sums_L

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        return (*(None if g is None else g * outer[0] for g in ctx.saved_tensors), None)


def _chunk(
    logits_CV: Float[Tensor, "C V"],
    start: int,
    terms: Sequence[Term],
    sums_L: Float[Tensor, "L"],
    wanted: bool,
) -> Float[Tensor, "C V"] | None:
    """Add each term's sum for this chunk to `sums_L`; return d total / d logits if wanted."""
    slope_CV = None
    for temperature in sorted({term.temperature for term in terms}):
        log_p_CV = (logits_CV / temperature).log_softmax(-1)
        factor_C = log_p_CV.new_zeros(len(log_p_CV))
        corrections: list[tuple[Tensor, Tensor, Tensor]] = []
        for index, term in enumerate(terms):
            if term.temperature == temperature:
                sums_L[index] += _add_term(term, log_p_CV, start, factor_C, corrections)
        if wanted:
            part_CV = log_p_CV.exp_().mul_(factor_C.unsqueeze(-1))
            for rows_m, ids_mK, kept_mK in corrections:
                part_CV.index_put_((rows_m.unsqueeze(-1).expand_as(ids_mK), ids_mK), kept_mK, accumulate=True)
            slope_CV = part_CV if slope_CV is None else slope_CV.add_(part_CV)
    return slope_CV


def _add_term(
    term: Term,
    log_p_CV: Float[Tensor, "C V"],
    start: int,
    factor_C: Float[Tensor, "C"],
    corrections: list[tuple[Tensor, Tensor, Tensor]],
) -> Float[Tensor, ""]:
    """Return one term's sum for this chunk; add to each row's factor of q, and to the corrections at kept ids."""
    inside = (term.rows_M >= start) & (term.rows_M < start + len(log_p_CV))
    rows_m, ids_mK = term.rows_M[inside] - start, term.ids_MK[inside]
    is_there_mK = ids_mK >= 0
    ids_mK = ids_mK.clamp(min=0)  # where nothing is kept nothing is added below
    log_q_mK = log_p_CV[rows_m.unsqueeze(-1), ids_mK].masked_fill(~is_there_mK, -torch.inf)
    rest_m = (1 - log_q_mK.exp().sum(-1)).clamp(min=_SMALLEST_REST)
    log_q_mB = torch.cat([log_q_mK, rest_m.log().unsqueeze(-1)], -1)
    value_m, slope_mB = term.formula(log_q_mB, term.log_t_MB[inside].to(log_q_mB))
    slope_mB = slope_mB * (term.scale * term.temperature)  # T^2 for the loss, 1/T for the logits
    slope_mB[:, -1] *= rest_m > _SMALLEST_REST  # at the floor the value does not move
    per_rest_m = slope_mB[:, -1] / rest_m
    factor_C.index_add_(0, rows_m, per_rest_m - slope_mB.sum(-1))
    corrections.append((rows_m, ids_mK, slope_mB[:, :-1] - log_q_mK.exp() * per_rest_m.unsqueeze(-1)))
    return value_m.sum()


def _collect(
    gradients: list[Tensor | None],
    slope_CV: Float[Tensor, "C V"],
    hidden_CH: Float[Tensor, "C H"],
    weight_VH: Float[Tensor, "V H"],
    start: int,
) -> None:
    for_hidden, for_weight, for_bias = gradients
    if for_hidden is not None:
        for_hidden[start : start + len(slope_CV)] = slope_CV @ weight_VH
    if for_weight is not None:
        for_weight.addmm_(slope_CV.T, hidden_CH)
    if for_bias is not None:
        for_bias.add_(slope_CV.sum(0))
