"""The language-model head and all active losses at once, a chunk of positions at a time.

Only supervised positions come here, and logits exist for one chunk only. Their gradient is formed while
they are there: with bucket probabilities q_b, the rest of the vocabulary being bucket 0, and a divergence's
slopes u_b = dD/d(log q_b),

    dD/dz_i = q_i (u_0 / q_0 - U)                     for every i, with U = sum of all u_b
            + [i is kept] (u_i - q_i u_0 / q_0)

so any number of losses costs one softmax per temperature and a few scattered adds.
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
_CHUNK_BYTES, _CPU_CHUNK_BYTES = 2**29, 2**26  # of logits that exist at a time
_FEWEST_ROWS = 256  # but so many rows at least: with fewer a matrix product is slow
_SMALLEST_REST = 1e-9


@dataclass(frozen=True)
class Shape:
    """What a model makes of its head's outputs z: softcap * tanh(scale * z / softcap)."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: Any) -> Shape:
        """By the names that transformers gives it: of Cohere, Granite, Gemma 2."""
        settings = model.config.get_text_config()
        scale = getattr(settings, "logit_scale", None) or 1 / (getattr(settings, "logits_scaling", None) or 1)
        return cls(scale, getattr(settings, "final_logit_softcapping", None))

    def __call__(self, z: Float[Tensor, "... V"]) -> Float[Tensor, "... V"]:
        """Logits of the head's outputs."""
        if self.scale != 1:
            z = z * self.scale
        return z if self.softcap is None else self.softcap * (z / self.softcap).tanh()


@dataclass(frozen=True)
class Head:
    """A language-model head: logits = shape(W h + b), without padded rows."""

    weight_VH: Float[Tensor, "V H"]
    bias_V: Float[Tensor, "V"] | None = None
    shape: Shape = Shape()

    @classmethod
    def of(cls, model: Any, vocabulary_size: int) -> Head:
        """Rows from `vocabulary_size` on are padding, and are cut off."""
        head = model.get_output_embeddings()
        bias_V = getattr(head, "bias", None)
        return cls(head.weight[:vocabulary_size], None if bias_V is None else bias_V[:vocabulary_size], Shape.of(model))


@dataclass(frozen=True)
class Term:
    """One loss on those of the N positions that are used; its targets are at `temperature`."""

    formula: Formula
    targets: Entries
    is_used_N: Bool[Tensor, "N"]
    temperature: float
    scale: float


def head_loss(
    hidden_NH: Float[Tensor, "N H"], head: Head, terms: Sequence[Term]
) -> tuple[Float[Tensor, ""], Float[Tensor, "L"]]:
    """Return the scaled total, which can be differentiated once, and the plain sum of each term.

    Total = sum over terms of scale * temperature^2 * sum of D. Computed in float32, or float64 if the
    hidden states are; the gradient is exact and formed here, not in backward.
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
    """The most probable token at each position; a shape keeps the order of logits."""
    weight_VH = head.weight_VH
    hidden_NH = hidden_NH.to(weight_VH.dtype)
    none = torch.zeros(0, dtype=torch.int64, device=hidden_NH.device)
    return torch.cat([none, *(logits_CV.argmax(-1) for _, logits_CV in _chunks(hidden_NH, weight_VH, head.bias_V))])


def _chunks(
    hidden_NH: Float[Tensor, "N H"], weight_VH: Float[Tensor, "V H"], bias_V: Float[Tensor, "V"] | None
) -> Iterator[tuple[int, Float[Tensor, "C V"]]]:
    """The first position of each chunk, and its logits, which are gone when the next ones come."""
    most = _CPU_CHUNK_BYTES if weight_VH.device.type == "cpu" else _CHUNK_BYTES
    num_chunks = -(-len(hidden_NH) // max(_FEWEST_ROWS, most // (weight_VH.element_size() * len(weight_VH))))
    num_rows = -(-len(hidden_NH) // max(1, num_chunks))
    buffer_CV = hidden_NH.new_empty(num_rows, len(weight_VH))  # new memory for each chunk would cost more than a pass
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
        new_like = torch.empty_like if len(hidden_NH) and terms else torch.zeros_like  # that is written as a whole
        gradients = [
            new_like(hidden_NH) if needs_hidden else None,
            new_like(weight_VH) if needs_weight else None,
            torch.zeros_like(bias_V) if needs_bias and bias_V is not None else None,
        ]
        sums_L = hidden_NH.new_zeros(len(terms))
        wanted = any(g is not None for g in gradients)
        for start, logits_CV in _chunks(hidden_NH, weight_VH, bias_V):
            tanh_CV = None
            if softcap is not None:
                tanh_CV = (logits_CV / softcap).tanh_()
                logits_CV = tanh_CV * softcap
            slope_CV = _chunk(logits_CV, start, terms, sums_L, wanted)
            if slope_CV is None:
                continue
            if tanh_CV is not None:
                slope_CV.addcmul_(slope_CV, tanh_CV.square_(), value=-1)
            _collect(gradients, slope_CV, hidden_NH[start : start + len(slope_CV)], weight_VH, start)
        ctx.gradients = gradients
        ctx.mark_non_differentiable(sums_L)
        factors = [term.scale * term.temperature**2 for term in terms]
        total = (sums_L * sums_L.new_tensor(factors)).sum()
        return total, sums_L

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("this loss was differentiated already, and its gradients were given away")
        given, ctx.gradients = ctx.gradients, None  # in place: another gradient of the head's size is not held
        if outer[0].device.type != "cpu" or outer[0] != 1:  # looked at where nothing has to wait for it
            given = [None if g is None else g.mul_(outer[0]) for g in given]
        return (*given, None, None)


def _chunk(
    logits_CV: Float[Tensor, "C V"], start: int, terms: Sequence[Term], sums_L: Float[Tensor, "L"], wanted: bool
) -> Float[Tensor, "C V"] | None:
    """Add each term's sum for this chunk to `sums_L`; return d total / d logits if wanted. Consumes the logits."""
    slope_CV = None
    temperatures = sorted({term.temperature for term in terms})
    for temperature in temperatures:
        z_CV = logits_CV if temperature == temperatures[-1] else logits_CV.clone()
        if temperature != 1:
            z_CV /= temperature
        parts = [
            (index, _Part.of(term, z_CV, start)) for index, term in enumerate(terms) if term.temperature == temperature
        ]
        # One softmax for all of them, in the place of its logits: more passes over V cost more than all the rest.
        most_C = z_CV.amax(-1)
        p_CV = z_CV.sub_(most_C.unsqueeze(-1)).exp_()
        norm_C = p_CV.sum(-1)
        factor_C = torch.zeros_like(norm_C)
        corrections = []
        for index, part in parts:
            sum_, correction_E = part.add(most_C + norm_C.log(), factor_C)
            sums_L[index] += sum_
            corrections.append((part.at_E, correction_E))
        if wanted:
            p_CV.mul_((factor_C / norm_C).unsqueeze(-1))
            for at_E, correction_E in corrections:
                p_CV.view(-1).index_add_(0, at_E, correction_E)
            slope_CV = p_CV if slope_CV is None else slope_CV.add_(p_CV)
    return slope_CV


@dataclass(frozen=True)
class _Part:
    """The entries of a term in one chunk of C positions: their rows, where their logits are, and those."""

    term: Term
    rows: slice
    row_E: Int[Tensor, "E"]
    at_E: Int[Tensor, "E"]
    z_E: Float[Tensor, "E"]
    log_t_E: Float[Tensor, "E"]

    @classmethod
    def of(cls, term: Term, z_CV: Float[Tensor, "C V"], start: int) -> _Part:
        """Take the entries' logits out of all of them."""
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
        """Return the term's sum and the corrections at kept ids; add to each row's factor of q."""
        is_used_C = self.term.is_used_N[self.rows]
        # T^2 for the loss, 1/T for the logits.
        weight_C = is_used_C.to(factor_C) * (self.term.scale * self.term.temperature)
        log_q_E = self.z_E - log_norm_C[self.row_E]
        value_E, slope_E = self.term.formula(log_q_E, self.log_t_E)
        value_C, slope_C = self._summed(value_E, factor_C), self._summed(slope_E, factor_C)
        if self.term.targets.tail_N is None:
            factor_C -= weight_C * slope_C
        else:
            q_E = log_q_E.exp()
            rest_C = (1 - self._summed(q_E, factor_C)).clamp(min=_SMALLEST_REST)
            log_tail_C = self.term.targets.tail_N[self.rows].to(factor_C).log()
            rest_value_C, rest_slope_C = self.term.formula(rest_C.log(), log_tail_C)
            rest_slope_C = rest_slope_C * (rest_C > _SMALLEST_REST)  # at the floor the value does not move
            per_rest_C = rest_slope_C / rest_C
            value_C += rest_value_C
            factor_C += weight_C * (per_rest_C - slope_C - rest_slope_C)
            slope_E = slope_E - q_E * per_rest_C[self.row_E]
        return value_C.where(is_used_C, 0).sum(), slope_E * weight_C[self.row_E]

    def _summed(self, value_E: Float[Tensor, "E"], like_C: Float[Tensor, "C"]) -> Float[Tensor, "C"]:
        return torch.zeros_like(like_C).index_add_(0, self.row_E, value_E)


def _collect(
    gradients: list[Tensor | None],
    slope_CV: Float[Tensor, "C V"],
    hidden_CH: Float[Tensor, "C H"],
    weight_VH: Float[Tensor, "V H"],
    start: int,
) -> None:
    for_hidden, for_weight, for_bias = gradients
    if for_hidden is not None:
        torch.mm(slope_CV, weight_VH, out=for_hidden[start : start + len(slope_CV)])
    if for_weight is not None:
        for_weight.addmm_(slope_CV.T, hidden_CH, beta=1 if start else 0)  # at first there is nothing to add to
    if for_bias is not None:
        for_bias.add_(slope_CV.sum(0))
