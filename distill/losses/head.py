"""The language-model head fused with all active losses, a chunk of positions at a time.

The input holds supervised positions only, and logits exist for one chunk at a time. Their gradient is computed
while the chunk is in memory: with bucket probabilities q_b, where bucket 0 is the rest of the vocabulary, and a
divergence's slopes u_b = dD/d(log q_b),

    dD/dz_i = q_i (u_0 / q_0 - U)                     for every i, with U = sum over b of u_b
            + [i is kept] (u_i - q_i u_0 / q_0)

so any number of losses costs one softmax per temperature and a few scatter-adds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from distill.records import Entries

Formula = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
_CHUNK_BYTES, _CPU_CHUNK_BYTES = 2**29, 2**26  # upper bound on the logits of one chunk
_MIN_ROWS = 256  # per chunk, whatever their size: a matrix product with fewer rows is slow
_MIN_REST = 1e-9


@dataclass(frozen=True)
class Shape:
    """How a model turns its head's outputs z into logits: softcap * tanh(scale * z / softcap)."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: Any) -> Shape:
        """Read it from a transformers configuration: `logit_scale`, `logits_scaling`, `final_logit_softcapping`."""
        settings = model.config.get_text_config()
        scale = getattr(settings, "logit_scale", None) or 1 / (getattr(settings, "logits_scaling", None) or 1)
        return cls(scale, getattr(settings, "final_logit_softcapping", None))

    def __call__(self, z: Float[Tensor, "... V"]) -> Float[Tensor, "... V"]:
        """Return the logits for the head's outputs."""
        if self.scale != 1:
            z = z * self.scale
        return z if self.softcap is None else self.softcap * (z / self.softcap).tanh()


@dataclass(frozen=True)
class Head:
    """A language-model head without padding rows: logits = shape(W h + b)."""

    weight_VH: Float[Tensor, "V H"]
    bias_V: Float[Tensor, "V"] | None = None
    shape: Shape = Shape()

    @classmethod
    def of(cls, model: Any, vocabulary_size: int) -> Head:
        """Take a model's head and drop its rows from `vocabulary_size` on, which are padding."""
        head = model.get_output_embeddings()
        bias_V = getattr(head, "bias", None)
        return cls(head.weight[:vocabulary_size], None if bias_V is None else bias_V[:vocabulary_size], Shape.of(model))


@dataclass(frozen=True)
class Term:
    """One loss on the positions in `is_used_N`; its targets were made at `temperature`."""

    formula: Formula
    targets: Entries
    is_used_N: Bool[Tensor, "N"]
    temperature: float
    scale: float


def head_loss(
    hidden_NH: Float[Tensor, "N H"], head: Head, terms: Sequence[Term]
) -> tuple[Float[Tensor, ""], Float[Tensor, "L"]]:
    """Return the scaled total, which can be differentiated once, and the unscaled sum of each term.

    Total = sum over terms of scale * temperature^2 * sum of D, computed in float32, or in float64 if the hidden states
    are float64. The gradient is exact and is computed here, not in backward.
    """
    with torch.autocast(hidden_NH.device.type, enabled=False):
        precise = torch.float64 if hidden_NH.dtype == torch.float64 else torch.float32
        scale, bias_V = head.shape.scale, head.bias_V
        inputs = (
            hidden_NH.to(precise) if scale == 1 else hidden_NH.to(precise) * scale,
            head.weight_VH.to(precise),
            None if bias_V is None else bias_V.to(precise) * scale,
        )
        total, sums_L = _HeadLoss.apply(*inputs, head.shape.softcap, tuple(terms))  # type: ignore[no-untyped-call]
    return total, sums_L


@torch.no_grad()
def predicted_ids(hidden_NH: Float[Tensor, "N H"], head: Head) -> Int[Tensor, "N"]:
    """Return the most probable token at each position. `Shape` is monotonic, so it is not applied."""
    weight_VH = head.weight_VH
    hidden_NH = hidden_NH.to(weight_VH.dtype)
    empty = torch.zeros(0, dtype=torch.int64, device=hidden_NH.device)
    return torch.cat([empty, *(logits_CV.argmax(-1) for _, logits_CV in _chunks(hidden_NH, weight_VH, head.bias_V))])


def _chunks(
    hidden_NH: Float[Tensor, "N H"], weight_VH: Float[Tensor, "V H"], bias_V: Float[Tensor, "V"] | None
) -> Iterator[tuple[int, Float[Tensor, "C V"]]]:
    """Yield the first position of each chunk and its logits, which the next chunk overwrites."""
    max_bytes = _CPU_CHUNK_BYTES if weight_VH.device.type == "cpu" else _CHUNK_BYTES
    num_chunks = -(-len(hidden_NH) // max(_MIN_ROWS, max_bytes // (weight_VH.element_size() * len(weight_VH))))
    num_rows = -(-len(hidden_NH) // max(1, num_chunks))
    buffer_CV = hidden_NH.new_empty(num_rows, len(weight_VH))  # allocating per chunk costs more than a pass over it
    for start in range(0, len(hidden_NH), max(1, num_rows)):
        hidden_CH = hidden_NH[start : start + num_rows]
        logits_CV = torch.mm(hidden_CH, weight_VH.T, out=buffer_CV[: len(hidden_CH)])
        yield start, logits_CV if bias_V is None else logits_CV.add_(bias_V)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        softcap: float | None,
        terms: tuple[Term, ...],
    ) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        new_like = torch.empty_like if len(hidden_NH) and terms else torch.zeros_like  # every row is written
        gradients = [
            new_like(hidden_NH) if needs_hidden else None,
            new_like(weight_VH) if needs_weight else None,
            torch.zeros_like(bias_V) if needs_bias and bias_V is not None else None,
        ]
        sums_L = hidden_NH.new_zeros(len(terms))
        has_gradients = any(g is not None for g in gradients)
        for start, logits_CV in _chunks(hidden_NH, weight_VH, bias_V):
            tanh_CV = None
            if softcap is not None:
                tanh_CV = (logits_CV / softcap).tanh_()
                logits_CV = tanh_CV * softcap
            slope_CV = _reduce_chunk(logits_CV, start, terms, sums_L, has_gradients)
            if slope_CV is None:
                continue
            if tanh_CV is not None:
                slope_CV.addcmul_(slope_CV, tanh_CV.square_(), value=-1)
            _accumulate(gradients, slope_CV, hidden_NH[start : start + len(slope_CV)], weight_VH, start)
        ctx.gradients = gradients
        ctx.mark_non_differentiable(sums_L)
        factors = [term.scale * term.temperature**2 for term in terms]
        total = (sums_L * sums_L.new_tensor(factors)).sum()
        return total, sums_L

    @staticmethod
    def backward(ctx: Any, outer: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("this loss was already differentiated, and its gradients were released")
        gradients, ctx.gradients = ctx.gradients, None  # scaled in place: no second gradient of the head's size
        if outer.device.type != "cpu" or outer != 1:  # read on the CPU only: elsewhere this would wait for the device
            gradients = [None if g is None else g.mul_(outer) for g in gradients]
        return (*gradients, None, None)


def _reduce_chunk(
    logits_CV: Float[Tensor, "C V"], start: int, terms: Sequence[Term], sums_L: Float[Tensor, "L"], has_gradients: bool
) -> Float[Tensor, "C V"] | None:
    """Add each term's sum over this chunk to `sums_L`; return d total / d logits. Overwrites the logits."""
    slope_CV = None
    temperatures = sorted({term.temperature for term in terms})
    for temperature in temperatures:
        z_CV = logits_CV if temperature == temperatures[-1] else logits_CV.clone()
        if temperature != 1:
            z_CV /= temperature
        parts = [
            (index, _Part.of(term, z_CV, start)) for index, term in enumerate(terms) if term.temperature == temperature
        ]
        # One softmax for all terms, in place: passes over V dominate the cost.
        max_C = z_CV.amax(-1)
        p_CV = z_CV.sub_(max_C.unsqueeze(-1)).exp_()
        norm_C = p_CV.sum(-1)
        factor_C = torch.zeros_like(norm_C)
        corrections = []
        for index, part in parts:
            sum_, correction_E = part.add(max_C + norm_C.log(), factor_C)
            sums_L[index] += sum_
            corrections.append((part.at_E, correction_E))
        if has_gradients:
            p_CV.mul_((factor_C / norm_C).unsqueeze(-1))
            for at_E, correction_E in corrections:
                p_CV.view(-1).index_add_(0, at_E, correction_E)
            slope_CV = p_CV if slope_CV is None else slope_CV.add_(p_CV)
    return slope_CV


@dataclass(frozen=True)
class _Part:
    """A term's entries in one chunk of C positions: their rows, their flat indices into the logits, their logits."""

    term: Term
    rows: slice
    row_E: Int[Tensor, "E"]
    at_E: Int[Tensor, "E"]
    z_E: Float[Tensor, "E"]
    log_t_E: Float[Tensor, "E"]

    @classmethod
    def of(cls, term: Term, z_CV: Float[Tensor, "C V"], start: int) -> _Part:
        """Gather the logits of the term's entries."""
        rows, targets = slice(start, start + len(z_CV)), term.targets
        first = int(targets.ends_N[start - 1]) if start else 0
        entries = slice(first, int(targets.ends_N[rows.stop - 1]))
        row_E = targets.position_E[entries].long() - start
        at_E = row_E * z_CV.shape[-1] + targets.ids_E[entries]
        z_E = z_CV.view(-1)[at_E]
        return cls(term, rows, row_E, at_E, z_E, targets.logprobs_E[entries].to(z_E))

    def add(
        self, log_norm_C: Float[Tensor, "C"], factor_C: Float[Tensor, "C"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "E"]]:
        """Return the term's sum and the corrections at kept ids; add the term's factor of q to `factor_C`."""
        is_used_C = self.term.is_used_N[self.rows]
        # T^2 from the loss times 1/T from the logits.
        weight_C = is_used_C.to(factor_C) * (self.term.scale * self.term.temperature)
        log_q_E = self.z_E - log_norm_C[self.row_E]
        value_E, slope_E = self.term.formula(log_q_E, self.log_t_E)
        value_C, slope_C = self._row_sums(value_E, factor_C), self._row_sums(slope_E, factor_C)
        if self.term.targets.tail_N is None:
            factor_C -= weight_C * slope_C
        else:
            q_E = log_q_E.exp()
            rest_C = (1 - self._row_sums(q_E, factor_C)).clamp(min=_MIN_REST)
            log_tail_C = self.term.targets.tail_N[self.rows].to(factor_C).log()
            rest_value_C, rest_slope_C = self.term.formula(rest_C.log(), log_tail_C)
            rest_slope_C = rest_slope_C * (rest_C > _MIN_REST)  # clamped: the value is constant there
            per_rest_C = rest_slope_C / rest_C
            value_C += rest_value_C
            factor_C += weight_C * (per_rest_C - slope_C - rest_slope_C)
            slope_E = slope_E - q_E * per_rest_C[self.row_E]
        return value_C.where(is_used_C, 0).sum(), slope_E * weight_C[self.row_E]

    def _row_sums(self, value_E: Float[Tensor, "E"], like_C: Float[Tensor, "C"]) -> Float[Tensor, "C"]:
        return torch.zeros_like(like_C).index_add_(0, self.row_E, value_E)


def _accumulate(
    gradients: list[Tensor | None],
    slope_CV: Float[Tensor, "C V"],
    hidden_CH: Float[Tensor, "C H"],
    weight_VH: Float[Tensor, "V H"],
    start: int,
) -> None:
    hidden_grad, weight_grad, bias_grad = gradients
    if hidden_grad is not None:
        torch.mm(slope_CV, weight_VH, out=hidden_grad[start : start + len(slope_CV)])
    if weight_grad is not None:
        weight_grad.addmm_(
            slope_CV.T, hidden_CH, beta=1 if start else 0
        )  # the first chunk overwrites uninitialised memory
    if bias_grad is not None:
        bias_grad.add_(slope_CV.sum(0))
