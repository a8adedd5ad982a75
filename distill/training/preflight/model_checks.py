"""Checks that pass a few lessons through the model: comparisons in float32, gradients as in training."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from distill.cache.codecs.topk import TopK
from distill.lessons.collate import entries
from distill.lessons.join import Lesson
from distill.losses.cross_entropy import CrossEntropy
from distill.losses.forward_kl import ForwardKL
from distill.losses.head import Term, head_loss
from distill.prompts.classes import ClassPrompts
from distill.records import Batch, Entries, SoftTargets
from distill.training.module import StudentModule
from distill.training.preflight.inputs import Finding, PreflightInput, Sample, collated, targets_of

_KEPT = 64  # kept entries of the student's own distributions
_KL_ROUNDING, _LOSS_ROUNDING = 1e-3, 1e-3
_MAX_RATIO = 100.0
_NEAR_UNIFORM, _WORSE_THAN_UNIFORM = 0.3, 1.02  # of ln V; with another tokenizer, a real model has more


def _self_kl(inputs: PreflightInput, sample: Sample) -> Iterator[Finding]:
    """The student's KL to itself is 0; bucket divergences are non-negative, so a zero sum is zero everywhere."""
    temperatures = {o.temperature for o in inputs.objectives.values() if o.source == "soft"} or {1.0}
    num_positions, sums = len(sample.batch.label_N), {}
    all_N = torch.ones_like(sample.batch.is_soft_N)
    inputs.module.eval()
    with torch.no_grad():
        hidden_NH = inputs.module.hidden(sample.batch)
        for temperature in sorted(temperatures):
            soft = entries(all_N.cpu().numpy(), _own_targets(inputs, sample.lessons, temperature)).to(inputs.device)
            term = Term(ForwardKL(), soft, all_N, temperature, 1.0)
            sums[temperature] = float(head_loss(hidden_NH, inputs.module.head(), [term])[1])
    worst = max(sums.values(), key=lambda value: math.inf if math.isnan(value) else value)
    yield Finding(
        "self-KL",
        worst <= _KL_ROUNDING + 1e-5 * num_positions,
        f"{worst:.1e} nats, summed over {num_positions} positions",
        "0 to rounding",
        "The student is compared with itself, so soft targets do not match their logits: look for a shift by one "
        "position, a head cut at another vocabulary size, or a prompt that the model reads differently in a batch "
        "(try share_prompt=false)",
        True,
    )


def _own_targets(inputs: PreflightInput, lessons: Sequence[Lesson], temperature: float) -> SoftTargets:
    """Return the student's distribution at each position, one sequence at a time: no padding, branches or chunks."""
    codec, targets = TopK(k=_KEPT, temperature=temperature), []
    for sequence, target in targets_of(lessons):
        for logits_MV in inputs.seam.plain_logits(inputs.module.model, sequence.ids, target.start, target.stop):
            targets.append(codec.cut(logits_MV.log_softmax(-1), torch.zeros(len(logits_MV), dtype=torch.float64)))
    return SoftTargets.join(targets)


def _mask(inputs: PreflightInput, sample: Sample) -> Iterator[Finding]:
    other = (inputs.prompts.end + 1) % inputs.prompts.vocabulary_size
    inputs.module.eval()
    with torch.no_grad():
        sums_L = _sums(inputs, sample.batch)
        padded_L = _sums(inputs, _padded(collated(inputs, sample.lessons, other).to(inputs.device), other))
        single = [collated(inputs, [lesson], inputs.prompts.end).to(inputs.device) for lesson in sample.lessons]
        single_L = torch.stack([_sums(inputs, batch) for batch in single]).sum(0)
    size_L = sums_L.abs().clamp(min=1)
    by_padding, by_neighbours = (float(((x_L - sums_L).abs() / size_L).max()) for x_L in (padded_L, single_L))
    yield Finding(
        "mask",
        by_padding <= _LOSS_ROUNDING and by_neighbours <= _LOSS_ROUNDING,
        f"losses change by {by_padding:.0e} with padding, {by_neighbours:.0e} with neighbours",
        f"<= {_LOSS_ROUNDING:g}, relative",
        "A token attends to padding or to another lesson, or padding is learned. This student may ignore the attention "
        "mask: try share_prompt=false, or another attn_implementation in the model's config",
        True,
    )


def _padded(batch: Batch, padding_id: int) -> Batch:
    """Return the batch with three more columns of padding."""

    def wider(x_BT: Tensor, value: int) -> Tensor:
        return nn.functional.pad(x_BT, (0, 3), value=value)

    return replace(
        batch,
        input_ids_BT=wider(batch.input_ids_BT, padding_id),
        mask_BT=wider(batch.mask_BT, 0),
        position_BT=wider(batch.position_BT, 0),
        branch_BT=None if batch.branch_BT is None else wider(batch.branch_BT, 0),
    )


def _sums(inputs: PreflightInput, batch: Batch) -> Float[Tensor, "L"]:
    """Return the sum of each loss."""
    terms = inputs.module.terms(batch)
    _, sums_L = head_loss(inputs.module.hidden(batch), inputs.module.head(), list(terms.values()))
    sums = dict(zip(terms, sums_L, strict=True))
    return torch.stack([sums.get(name, sums_L.new_zeros(())) for name in inputs.objectives])


def _start(inputs: PreflightInput, sample: Sample) -> Iterator[Finding]:
    """Compare the cross-entropy of the text with ln V, that of a uniform student.

    A student without some of its layers knows nothing at first; whether the tokenizer is that of the weights shows in
    the model with all its layers.
    """
    value, whole = _nats_per_token(inputs, sample), None
    if inputs.open_uncut:
        with _replaced(inputs.module, inputs.open_uncut().to(inputs.device)):
            whole = _nats_per_token(inputs, sample)
    uniform = math.log(inputs.prompts.vocabulary_size)
    # A new class head knows nothing either, but is not uniform.
    worst = 1 + _NEAR_UNIFORM if isinstance(inputs.prompts, ClassPrompts) else _WORSE_THAN_UNIFORM
    tolerance, maximum = _NEAR_UNIFORM * uniform, worst * uniform
    expected = f"<= {maximum:.2f}" + ("" if whole is None else " with all layers")
    if inputs.is_from_scratch:
        expected = f"{uniform - tolerance:.2f} to {uniform + tolerance:.2f}, untrained"
    judged = value if whole is None else whole
    yield Finding(
        "loss at start",
        abs(value - uniform) <= tolerance if inputs.is_from_scratch else judged <= maximum,
        f"{value:.2f} nats per token"
        + ("" if whole is None else f", {whole:.2f} with all layers")
        + f"; ln V = {uniform:.2f}",
        expected,
        "Worse than uniform guessing: the tokenizer or the head does not belong to these weights, or the initial "
        "weights are too large (initializer_range in the model's config)",
        False,
    )


def _nats_per_token(inputs: PreflightInput, sample: Sample) -> float:
    """Return the mean cross-entropy of the text, without its ends: a model need not know yet where an answer ends."""
    batch, num_positions = sample.batch, len(sample.batch.label_N)
    is_text_N = batch.label_N != inputs.prompts.end
    if isinstance(inputs.prompts, ClassPrompts):  # of which none is an end
        is_text_N = torch.ones_like(is_text_N)
    labels = Entries(
        np.arange(1, num_positions + 1),
        torch.arange(num_positions, device=inputs.device),
        batch.label_N,
        torch.zeros(num_positions, device=inputs.device),
        None,
    )
    inputs.module.eval()
    with torch.no_grad():
        term = Term(CrossEntropy(), labels, is_text_N, 1.0, 1.0)
        total = head_loss(inputs.module.hidden(batch), inputs.module.head(), [term])[1]
    return float(total) / max(1, int(is_text_N.sum()))


@contextmanager
def _replaced(module: StudentModule, model: Any) -> Iterator[None]:
    """Give the module another model for the block."""
    kept, module.model = module.model, model
    try:
        yield
    finally:
        module.model = kept


def gradients(inputs: PreflightInput, sample: Sample) -> Iterator[Finding]:
    """Check that each loss has targets, is finite and has a gradient, computed as in training."""
    batch = sample.batch
    inputs.module.train()
    with inputs.precision():
        hidden_NH, head = inputs.module.hidden(batch), inputs.module.head()
        terms = {
            n: t for n, t in inputs.module.terms(batch).items() if inputs.objectives[n].weight and t.is_used_N.any()
        }
        pairs = {name: _loss_and_norm(inputs, head_loss(hidden_NH, head, [term])[0]) for name, term in terms.items()}
    empty = [name for name, objective in inputs.objectives.items() if objective.weight and name not in pairs]
    yield Finding(
        "losses",
        not empty,
        f"without a target in {len(inputs.lessons)} lessons: {', '.join(empty) or 'none'}",
        "none",
        "These losses have no effect: remove them, or see rejected.jsonl for why they have no targets",
        False,
    )
    yield Finding(
        "finite step",
        all(map(math.isfinite, itertools.chain(*pairs.values()))),
        f"weighted {', '.join(f'{name} {value:.3g}' for name, (value, _) in pairs.items()) or 'none'}",
        "finite values and gradients",
        f"Inspect the examples {', '.join(batch.example_ids)}; try trainer.precision=32-true",
        True,
    )
    yield from _norms({name: norm for name, (_, norm) in pairs.items()})


def _loss_and_norm(inputs: PreflightInput, total: Float[Tensor, ""]) -> tuple[float, float]:
    """Return a loss and the norm of its gradient over all trained parameters, without touching their `grad`."""
    trained = [weight for weight in inputs.module.model.parameters() if weight.requires_grad]
    if not (trained and total.requires_grad):
        return float(total.detach()), 0.0
    gradients = torch.autograd.grad(total, trained, retain_graph=True, allow_unused=True)
    norms = [gradient.double().norm() for gradient in gradients if gradient is not None]
    return float(total.detach()), float(torch.stack(norms).norm()) if norms else 0.0


def _norms(norms: Mapping[str, float]) -> Iterator[Finding]:
    without_gradient = [f"loss.{name}" for name, norm in norms.items() if norm == 0]
    yield Finding(
        "gradients",
        not without_gradient if norms else None,
        f"weighted {', '.join(f'{name} {norm:.3g}' for name, norm in norms.items()) or 'none'}",
        "each > 0",
        f"{', '.join(without_gradient)}: zero gradient, so the loss has no effect. student.freeze or student.lora "
        "leaves no parameter that it depends on; train some of them",
        True,
    )
    if len(norms) < 2 or without_gradient:
        yield Finding("balance", None, "fewer than two gradients", f"<= {_MAX_RATIO:g} times", "", False)
        return
    small, large = min(norms, key=norms.__getitem__), max(norms, key=norms.__getitem__)
    ratio = norms[large] / norms[small]
    yield Finding(
        "balance",
        ratio <= _MAX_RATIO,
        f"{large} is {ratio:.3g} times {small}",
        f"<= {_MAX_RATIO:g} times",
        f"loss.{small} has no effect beside loss.{large}: raise loss.{small}.weight, lower loss.{large}.weight, or "
        "remove it",
        False,
    )


IDENTITIES = (_self_kl, _mask, _start)
