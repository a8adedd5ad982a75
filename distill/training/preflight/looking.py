"""Checks that only look: at weights, at batches, and at what the cache holds for them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from distill.lessons.join import TrainingSequence
from distill.records import SPANS, Batch, Prompt, Span
from distill.training.preflight.plan import Finding, Plan, Sample, spans_of

_ROUNDING = 1e-3  # by which a log-probability may lie above 0
_FEWEST_PAIRS, _LEAST_GAP = 4, 0.05  # from which a shift is told from chance
_LEAST_MASS = 0.5


def _vocabulary(plan: Plan, samples: Sequence[Sample]) -> Iterator[Finding]:
    size = plan.prompts.vocabulary_size
    num_embedded, num_predicted = (
        len(layer.weight)
        for layer in (plan.module.model.get_input_embeddings(), plan.module.model.get_output_embeddings())
    )
    largest = max([-1, *(int(s.soft.ids_E.max(initial=-1)) for s in samples if s.soft is not None)])
    has_soft = any(objective.source == "soft" for objective in plan.objectives.values())
    shared = "shared" if plan.is_vocabulary_shared else "not shared"
    yield Finding(
        "vocabulary",
        largest < size <= min(num_embedded, num_predicted) and (plan.is_vocabulary_shared or not has_soft),
        f"{size} tokens, {shared}; {min(num_embedded, num_predicted)} rows; "
        + (f"largest soft id {largest}" if largest >= 0 else "no soft targets"),
        "soft ids < tokens <= rows; shared",
        "Take the tokenizer that belongs to the student's weights, and a teacher of the same family; or train without "
        "the losses that need soft targets: loss=[answer,rationale]",
        True,
    )


def _finite(plan: Plan, samples: Sequence[Sample]) -> Iterator[Finding]:
    broken = [name for name, weight in plan.module.model.named_parameters() if not weight.isfinite().all()]
    soft = [sample.soft for sample in samples if sample.soft is not None]
    num_bad = sum(int((np.isnan(s.logprobs_E) | (s.logprobs_E > _ROUNDING)).sum()) for s in soft)
    num_bad += sum(int((~np.isfinite(s.tail_N)).sum()) for s in soft)
    yield Finding(
        "finite",
        not broken and not num_bad,
        f"broken weights: {', '.join(broken[:3]) or 'none'}; broken soft targets: {num_bad}",
        "none",
        "Take another copy of the student's weights; annotate a damaged cache anew",
        True,
    )


def _labels(_: Plan, samples: Sequence[Sample]) -> Iterator[Finding]:
    wrong, number = 0, 0
    for batch, lessons in ((sample.batch, sample.lessons) for sample in samples):
        wanted = [token for _, prompt, _, a, b in spans_of(lessons) for token in prompt.ids[a:b]]
        after_N = (batch.before_N + 1).clamp(max=batch.input_ids_BT.shape[1] - 1)
        is_next_N = batch.label_N == batch.input_ids_BT[batch.sequence_N, after_N]
        is_alike = batch.label_N.tolist() == wanted
        wrong += len(wanted) if not is_alike else int((~is_next_N).sum())
        number += len(wanted)
    yield Finding(
        "labels",
        not wrong,
        f"{wrong} of {number} are not the next token",
        "0",
        "The batches are made wrong (distill/data.py): a student would learn to predict another token than the next",
        True,
    )


def _shift(_: Plan, samples: Sequence[Sample]) -> Iterator[Finding]:
    """A text is likelier where it stands than one place before or behind."""
    wanted = "highest in place"
    parts = {by: [_likelihoods(s.batch, by) for s in samples if s.batch.soft is not None] for by in (-1, 1)}
    found = {by: np.concatenate(pairs, 1) for by, pairs in parts.items() if pairs}
    if not found or min(pairs.shape[1] for pairs in found.values()) < _FEWEST_PAIRS:
        yield Finding("shift", None, "too few soft targets side by side", wanted, "", True)
        return
    gaps = {by: pairs[1] - pairs[0] for by, pairs in found.items()}
    noise = {by: 2 * gap.std() / math.sqrt(len(gap)) for by, gap in gaps.items()}
    told = {by: f"{pairs[1].mean():.3f} {'before' if by < 0 else 'behind'}" for by, pairs in found.items()}
    yield Finding(
        "shift",
        all(gap.mean() <= max(_LEAST_GAP, noise[by]) for by, gap in gaps.items()),
        f"p(token) {found[1][0].mean():.3f} in place, {', '.join(told.values())}",
        wanted,
        "The cache's soft targets belong to other tokens than those they stand at: annotate anew, and if that does not "
        "help look at how the teacher's rows are cut (row p predicts token p + 1)",
        True,
    )


def _likelihoods(batch: Batch, by: int) -> np.ndarray:
    """Probability of the token at a position, and of the one beside it, for the positions that have both."""
    assert batch.soft is not None
    soft, label_N = batch.soft, batch.label_N.numpy()
    position_E, ids_E, p_E = soft.position_E.numpy(), soft.ids_E.numpy(), soft.logprobs_E.double().exp().numpy()
    beside_N = np.roll(label_N, -by)
    place_N = np.stack([batch.sequence_N.numpy(), batch.span_N.numpy(), batch.before_N.numpy()])
    is_beside_N = (np.roll(place_N, -by, 1) == place_N + np.array([[0], [0], [by]])).all(0)
    is_told_N = is_beside_N & batch.is_soft_N.numpy() & (label_N != beside_N)
    both = (label_N, beside_N)
    sums = [np.bincount(position_E, p_E * (ids_E == ids_N[position_E]), len(label_N)) for ids_N in both]
    return np.stack(sums)[:, is_told_N]


def _template(plan: Plan, samples: Sequence[Sample]) -> Iterator[Finding]:
    spans = [each for sample in samples for each in spans_of(sample.lessons)]
    wrong = [why for each in spans if (why := _disagreement(plan, *each))]
    yield Finding(
        "template",
        not wrong,
        f"{len(wrong)} of {len(spans)} targets differ{f', for example: {wrong[0]}' if wrong else ''}",
        "0",
        "Teacher and student write prompts or targets unlike: compare task.layout and the tokenizers, annotate anew",
        True,
    )


def _disagreement(
    plan: Plan, sequence: TrainingSequence, prompt: Prompt, span: Span, start: int, stop: int
) -> str | None:
    """Why a target is not what the student's prompts make of the teacher's text, if so."""
    prompts, ids = plan.prompts, prompt.ids[start:stop]
    cue = prompts.layout.answer_cue if span == "answer" else prompts.layout.rationale_cue
    if prompt.ids[:start][-len(prompts.encode(cue)) :] != prompts.encode(cue):
        return f"the {span} {prompts.text(ids)!r} does not stand behind {cue!r}"
    if span not in sequence.soft:
        return None
    key, _ = sequence.soft[span].place
    annotation = plan.annotation(key)
    read = annotation.targets[span].token_ids
    if read != ids[: len(read)]:
        return f"the teacher read {prompts.text(read)!r}, the student {prompts.text(ids)!r}"
    said = annotation.answer if span == "answer" else annotation.rationale
    if said is None or (span == "answer" and span in sequence.labelled):
        return None  # a gold answer was given to the teacher, whatever it said itself
    written = prompts.answer_ids(said) if span == "answer" else prompts.rationale_ids(said)
    if written != read or "".join(prompts.text(read).split()) != "".join(said.split()):
        return f"the teacher said {said!r}, its tokens read {prompts.text(read)!r}"
    return None


def _end(plan: Plan, samples: Sequence[Sample]) -> Iterator[Finding]:
    """Where an answer is learned, so is where it ends."""
    number, without = 0, 0
    for batch in (sample.batch for sample in samples):
        used = [term.is_used_N for term in plan.module.terms(batch).values()]
        is_used_N = torch.stack(used).any(0) if used else torch.zeros_like(batch.is_soft_N)
        is_answer_N = is_used_N & (batch.span_N == SPANS.index("answer"))
        answers = set(batch.sequence_N[is_answer_N].tolist())
        ended = set(batch.sequence_N[is_answer_N & (batch.label_N == plan.prompts.end)].tolist())
        number, without = number + len(answers), without + len(answers - ended)
    yield Finding(
        "end",
        not without if number else None,
        f"{without} of {number} answers are taught without their end",
        "0",
        "A student that never sees an end does not stop: a target must end with the tokenizer's eos_token, and that "
        "must not be masked where it is the padding too",
        True,
    )


def _mass(plan: Plan, samples: Sequence[Sample]) -> Iterator[Finding]:
    soft = [sample.soft for sample in samples if sample.soft is not None]
    readers = [n for n, o in plan.objectives.items() if o.source == "soft" and o.divergence.needs_rest]
    wanted = f">= {_LEAST_MASS} where a loss reads the rest"
    if not soft:
        yield Finding("captured mass", None, "no soft targets", wanted, "", False)
        return
    captured = 1 - float(np.concatenate([s.tail_N for s in soft]).mean(dtype=np.float64))
    drawn = any(s.num_drawn_N is not None for s in soft)
    yield Finding(
        "captured mass",
        captured >= _LEAST_MASS or not readers,
        f"{captured:.3f} kept exactly, the rest {'as draws' if drawn else 'as one bucket'}",
        wanted,
        f"raise cache.codec.k (annotates anew), or leave out {', '.join(readers)}",
        False,
    )


CHECKS = (_vocabulary, _finite, _labels, _shift, _template, _end, _mass)
