"""Checks that pass a few lessons through the model, in float32 where they compare and as in training else."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from distill.cache.codecs.topk import TopK
from distill.lessons.collate import entries
from distill.lessons.join import Lesson
from distill.losses.cross_entropy import CrossEntropy
from distill.losses.forward_kl import ForwardKL
from distill.losses.head import Shape, Term, head_loss
from distill.records import Batch, Entries, SoftTargets
from distill.training.preflight.plan import Finding, Plan, Sample, collated, spans_of

_KEPT = 64  # entries of the student's own distributions
_KL_ROUNDING, _LOSS_ROUNDING = 1e-3, 1e-3
_MOST_RATIO = 100.0
_NEAR_UNIFORM, _WORSE_THAN_UNIFORM = 0.3, 1.5


def _self_kl(plan: Plan, sample: Sample) -> Iterator[Finding]:
    """A bucket divergence is nowhere negative, so a sum of 0 is 0 at every position."""
    temperatures = {o.temperature for o in plan.objectives.values() if o.source == "soft"} or {1.0}
    number, sums = len(sample.batch.label_N), {}
    every_N = torch.ones_like(sample.batch.is_soft_N)
    plan.module.eval()
    with torch.no_grad():
        hidden_NH = plan.module.hidden(sample.batch)
        for temperature in sorted(temperatures):
            soft = entries(every_N.cpu().numpy(), _own_targets(plan, sample.lessons, temperature)).to(plan.device)
            term = Term(ForwardKL(), soft, every_N, temperature, 1.0)
            sums[temperature] = float(head_loss(hidden_NH, plan.module.head(), [term])[1])
    worst = max(sums.values(), key=lambda value: math.inf if math.isnan(value) else value)
    yield Finding(
        "self-KL",
        worst <= _KL_ROUNDING + 1e-5 * number,
        f"{worst:.1e} nats, summed over {number} positions",
        "0 to rounding",
        "The student is its own teacher here, so soft targets do not meet the logits that they are for: look for a "
        "shift by one position, a head cut at another vocabulary than the targets', a prompt that a batch shows "
        "otherwise than it is alone (share_prompt=false)",
        True,
    )


def _own_targets(plan: Plan, lessons: Sequence[Lesson], temperature: float) -> SoftTargets:
    """What the student expects at each position, each prompt by itself, without padding, branches or a chunked head."""
    model, found = plan.module.model, []
    size, codec, shape = plan.prompts.vocabulary_size, TopK(k=_KEPT, temperature=temperature), Shape.of(model)
    for _, prompt, _, start, stop in spans_of(lessons):
        ids_BT = torch.tensor([prompt.ids], device=plan.device)
        hidden_NH = model.base_model(ids_BT, use_cache=False).last_hidden_state[0, start - 1 : stop - 1]
        for part_NH in hidden_NH.split(64):
            logits_NV = shape(model.get_output_embeddings()(part_NH).float())[:, :size]
            found.append(codec.cut(logits_NV.log_softmax(-1), torch.zeros(len(logits_NV), dtype=torch.float64)))
    return SoftTargets.join(found)


def _mask(plan: Plan, sample: Sample) -> Iterator[Finding]:
    other = (plan.prompts.end + 1) % plan.prompts.vocabulary_size
    plan.module.eval()
    with torch.no_grad():
        sums_L = _sums(plan, sample.batch)
        padded_L = _sums(plan, _padded(collated(plan, sample.lessons, other).to(plan.device), other))
        alone = [collated(plan, [lesson], plan.prompts.end).to(plan.device) for lesson in sample.lessons]
        alone_L = torch.stack([_sums(plan, batch) for batch in alone]).sum(0)
    size_L = sums_L.abs().clamp(min=1)
    by_padding, by_neighbours = (float(((x_L - sums_L).abs() / size_L).max()) for x_L in (padded_L, alone_L))
    yield Finding(
        "mask",
        by_padding <= _LOSS_ROUNDING and by_neighbours <= _LOSS_ROUNDING,
        f"losses change {by_padding:.0e} by padding, {by_neighbours:.0e} by neighbours",
        f"<= {_LOSS_ROUNDING:g} of themselves",
        "A token sees padding or another lesson, or padding is learned. This student may not take the mask that it is "
        "given: try share_prompt=false, or another attention (attn_implementation in the model's config)",
        True,
    )


def _padded(batch: Batch, padding_id: int) -> Batch:
    """With three more columns of padding."""

    def wider(x_BT: Tensor, value: int) -> Tensor:
        return nn.functional.pad(x_BT, (0, 3), value=value)

    return replace(
        batch,
        input_ids_BT=wider(batch.input_ids_BT, padding_id),
        mask_BT=wider(batch.mask_BT, 0),
        position_BT=wider(batch.position_BT, 0),
        branch_BT=None if batch.branch_BT is None else wider(batch.branch_BT, 0),
    )


def _sums(plan: Plan, batch: Batch) -> Float[Tensor, "L"]:
    """Each loss, not divided by anything."""
    terms = plan.module.terms(batch)
    _, sums_L = head_loss(plan.module.hidden(batch), plan.module.head(), list(terms.values()))
    found = dict(zip(terms, sums_L, strict=True))
    return torch.stack([found.get(name, sums_L.new_zeros(())) for name in plan.objectives])


def _start(plan: Plan, sample: Sample) -> Iterator[Finding]:
    """Cross-entropy of the text beside that of a student who knows nothing, ln V."""
    batch, number = sample.batch, len(sample.batch.label_N)
    every_N = torch.ones_like(batch.is_soft_N)
    position_N = torch.arange(number, device=plan.device)
    labels = Entries(np.arange(1, number + 1), position_N, batch.label_N, torch.zeros(number, device=plan.device), None)
    plan.module.eval()
    with torch.no_grad():
        term = Term(CrossEntropy(), labels, every_N, 1.0, 1.0)
        value = float(head_loss(plan.module.hidden(batch), plan.module.head(), [term])[1]) / number
    uniform = math.log(plan.prompts.vocabulary_size)
    near, most = _NEAR_UNIFORM * uniform, _WORSE_THAN_UNIFORM * uniform
    yield Finding(
        "loss at start",
        abs(value - uniform) <= near if plan.is_from_scratch else value <= most,
        f"{value:.2f} nats per token; ln V = {uniform:.2f}",
        f"{uniform - near:.2f} to {uniform + near:.2f}, untrained" if plan.is_from_scratch else f"<= {most:.2f}",
        "Worse than guessing: the tokenizer or the head is not that of these weights, or the initial weights are too "
        "large (initializer_range in the model's config)",
        False,
    )


def gradients(plan: Plan, sample: Sample) -> Iterator[Finding]:
    """What each loss asks of the parameters, computed as in training."""
    batch = sample.batch
    plan.module.train()
    with plan.precision():
        hidden_NH, head = plan.module.hidden(batch), plan.module.head()
        terms = {n: t for n, t in plan.module.terms(batch).items() if plan.objectives[n].weight and t.is_used_N.any()}
        pairs = {name: _loss_and_norm(plan, head_loss(hidden_NH, head, [term])[0]) for name, term in terms.items()}
    unread = [name for name, objective in plan.objectives.items() if objective.weight and name not in pairs]
    yield Finding(
        "losses",
        not unread,
        f"without a target in {len(plan.lessons)} lessons: {', '.join(unread) or 'none'}",
        "none",
        "Nothing is learned by these: leave them out, or see rejected.jsonl for why there are no targets",
        False,
    )
    yield Finding(
        "finite step",
        all(map(math.isfinite, itertools.chain(*pairs.values()))),
        f"weighted {', '.join(f'{name} {value:.3g}' for name, (value, _) in pairs.items()) or 'none'}",
        "finite, and their gradients",
        f"Look at the examples {', '.join(batch.example_ids)}; try trainer.precision=32-true",
        True,
    )
    yield from _norms({name: norm for name, (_, norm) in pairs.items()})


def _loss_and_norm(plan: Plan, total: Float[Tensor, ""]) -> tuple[float, float]:
    """Norm of what a loss asks of all trained parameters; their own `grad` is not touched."""
    trained = [weight for weight in plan.module.model.parameters() if weight.requires_grad]
    if not (trained and total.requires_grad):
        return float(total.detach()), 0.0
    asked = torch.autograd.grad(total, trained, retain_graph=True, allow_unused=True)
    norms = [gradient.double().norm() for gradient in asked if gradient is not None]
    return float(total.detach()), float(torch.stack(norms).norm()) if norms else 0.0


def _norms(norms: Mapping[str, float]) -> Iterator[Finding]:
    still = [f"loss.{name}" for name, norm in norms.items() if norm == 0]
    yield Finding(
        "gradients",
        not still if norms else None,
        f"weighted {', '.join(f'{name} {norm:.3g}' for name, norm in norms.items()) or 'none'}",
        "> 0 each",
        f"{', '.join(still)}: no gradient, so nothing is learned by it. student.freeze or student.lora leaves no "
        "parameter that it could move; let some train",
        True,
    )
    if len(norms) < 2 or still:
        yield Finding("balance", None, "fewer than two gradients", f"<= {_MOST_RATIO:g} times", "", False)
        return
    small, large = min(norms, key=norms.__getitem__), max(norms, key=norms.__getitem__)
    ratio = norms[large] / norms[small]
    yield Finding(
        "balance",
        ratio <= _MOST_RATIO,
        f"{large} is {ratio:.3g} times {small}",
        f"<= {_MOST_RATIO:g} times",
        f"loss.{small} does nothing beside loss.{large}: raise loss.{small}.weight, lower loss.{large}.weight, or "
        "leave it out",
        False,
    )


IDENTITIES = (_self_kl, _mask, _start)
