"""Checks that only read: weights, batches, and their soft targets in the cache."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from distill.lessons.join import Lesson, PlacedTarget, TrainingSequence
from distill.models.body import max_positions
from distill.prompts.pieces import same_text
from distill.prompts.rendering import Prompts
from distill.records import SPANS, AnswerDefect, Batch, Example, Span
from distill.training.preflight.inputs import Finding, PreflightInput, Sample, plain, targets_of

_ROUNDING = 1e-3  # tolerance of log-probabilities above 0
_MIN_PAIRS, _MIN_GAP = 4, 0.05  # needed to distinguish a shift from chance
_MIN_MASS = 0.5
_DEFECTS: tuple[AnswerDefect, ...] = ("unmatched", "empty", "truncated", "unreadable")
_MIN_LOST = 20  # texts
_MAX_UNKNOWN = 0.02  # of the tokens of a text
_REMEDIES = {
    "truncated": "The teacher's texts end at the token limit: increase teacher.kind.max_new_tokens, and with it "
    "prompt.max_length (annotates again)",
    "unmatched": "Set teacher.kind.question so that it gives the same texts as task.question",
}


def _vocabulary(inputs: PreflightInput, samples: Sequence[Sample]) -> Iterator[Finding]:
    size = inputs.token_prompts.vocabulary_size
    num_embedded, num_predicted = (
        len(layer.weight)
        for layer in (inputs.module.model.get_input_embeddings(), inputs.module.model.get_output_embeddings())
    )
    largest = max([-1, *(int(s.soft.ids_E.max(initial=-1)) for s in samples if s.soft is not None)])
    has_soft = any(objective.source == "soft" for objective in inputs.objectives.values())
    shared = "shared" if inputs.is_vocabulary_shared else "not shared"
    yield Finding(
        "vocabulary",
        largest < size <= min(num_embedded, num_predicted) and (inputs.is_vocabulary_shared or not has_soft),
        f"{size} tokens, {shared}; {min(num_embedded, num_predicted)} rows; "
        + (f"largest soft id {largest}" if largest >= 0 else "no soft targets"),
        "soft ids < tokens <= rows; shared",
        "Use the tokenizer that belongs to the student's weights and a teacher of the same family; or train without "
        "losses that need soft targets: loss=[answer,rationale]",
        True,
    )


def _length(inputs: PreflightInput, _: Sequence[Sample]) -> Iterator[Finding]:
    """The model has a position for every token of the longest text."""
    limit = max_positions(inputs.module.model.config)
    longest = max(
        len(part.ids) for lesson in inputs.lessons for sequence in lesson.sequences for part in plain(sequence)
    )
    yield Finding(
        "length",
        limit is None or longest <= limit,
        f"the longest text has {longest} tokens",
        "no limit" if limit is None else f"at most {limit} positions",
        "The student cannot read its longest texts: lower prompt.max_length, or choose a student for longer texts",
        True,
    )


def _finite(inputs: PreflightInput, samples: Sequence[Sample]) -> Iterator[Finding]:
    bad_weights = [name for name, weight in inputs.module.model.named_parameters() if not weight.isfinite().all()]
    soft = [sample.soft for sample in samples if sample.soft is not None]
    num_bad = sum(int((np.isnan(s.logprobs_E) | (s.logprobs_E > _ROUNDING)).sum()) for s in soft)
    num_bad += sum(int((~np.isfinite(s.tail_N)).sum()) for s in soft)
    yield Finding(
        "finite",
        not bad_weights and not num_bad,
        f"weights not finite: {', '.join(bad_weights[:3]) or 'none'}; invalid soft targets: {num_bad}",
        "none",
        "Replace the student's weights with an intact copy; annotate again if the cache is damaged",
        True,
    )


def _lost(inputs: PreflightInput, _: Sequence[Sample]) -> Iterator[Finding]:
    """Most of what the teacher wrote can be learned."""
    targets = (target for lesson in inputs.lessons for target in lesson.targets)
    num_taught = sum(target.span == "answer" and not target.is_labelled for target in targets)
    spans = {objective.span for objective in inputs.objectives.values()}
    train, rationales = inputs.rows["train"], inputs.rows["rationales"]
    yield _lost_texts("answers", train.lost, num_taught, train.kept)
    if "rationale" in spans:
        yield _lost_texts("rationales", rationales.lost, rationales.kept, train.kept)


def _lost_texts(check: str, reasons: Mapping[str, int], num_taught: int, num_examples: int) -> Finding:
    lost = {reason: number for reason, number in reasons.items() if reason in _DEFECTS}
    num_lost = sum(lost.values())
    # A few texts say little about a setting, unless hardly anything else is left to learn.
    are_too_many = num_lost >= 9 * num_examples or (num_lost >= _MIN_LOST and num_lost >= 9 * num_taught)
    reason = max(lost, key=lost.__getitem__, default="")
    return Finding(
        f"lost {check}",
        not (num_lost and are_too_many),
        f"{num_taught} {check} of the teacher are learned; " + ", ".join(f"{n} {why}" for why, n in lost.items() if n)
        if lost
        else f"{num_taught} {check} of the teacher are learned, none is lost",
        "less than nine tenths lost",
        _REMEDIES.get(reason, "Look at what the teacher writes: python -m distill.annotate show=<a question>"),
        True,
    )


def _labels(_: PreflightInput, samples: Sequence[Sample]) -> Iterator[Finding]:
    num_wrong, num_labels = 0, 0
    for batch, lessons in ((sample.batch, sample.lessons) for sample in samples):
        expected = [token for s, target in targets_of(lessons) for token in s.ids[target.start : target.stop]]
        after_N = (batch.before_N + 1).clamp(max=batch.input_ids_BT.shape[1] - 1)
        is_next_N = batch.label_N == batch.input_ids_BT[batch.sequence_N, after_N]
        is_complete = batch.label_N.tolist() == expected
        num_wrong += int((~is_next_N).sum()) if is_complete else len(expected)
        num_labels += len(expected)
    yield Finding(
        "labels",
        not num_wrong,
        f"{num_wrong} of {num_labels} are not the next token",
        "0",
        "Batches are built incorrectly (distill/lessons/collate.py): a label must be the next token",
        True,
    )


def _shift(_: PreflightInput, samples: Sequence[Sample]) -> Iterator[Finding]:
    """A text is more likely at its own positions than shifted by one."""
    expected = "highest in place"
    parts = {by: [_likelihoods(s.batch, by) for s in samples if s.batch.soft is not None] for by in (-1, 1)}
    likelihoods = {by: np.concatenate(pairs, 1) for by, pairs in parts.items() if pairs}
    if not likelihoods or min(pairs.shape[1] for pairs in likelihoods.values()) < _MIN_PAIRS:
        yield Finding("shift", None, "too few adjacent soft targets", expected, "", True)
        return
    gaps = {by: pairs[1] - pairs[0] for by, pairs in likelihoods.items()}
    noise = {by: 2 * gap.std() / math.sqrt(len(gap)) for by, gap in gaps.items()}
    shifted = {by: f"{pairs[1].mean():.3f} {'before' if by < 0 else 'behind'}" for by, pairs in likelihoods.items()}
    yield Finding(
        "shift",
        all(gap.mean() <= max(_MIN_GAP, noise[by]) for by, gap in gaps.items()),
        f"p(token) {likelihoods[1][0].mean():.3f} in place, {', '.join(shifted.values())}",
        expected,
        "The cache's soft targets are shifted against the tokens: annotate again; if that does not help, inspect how "
        "the teacher's rows are cut (row p predicts token p + 1)",
        True,
    )


def _likelihoods(batch: Batch, by: int) -> np.ndarray:
    """Return the probability of the token at a position and of its neighbour, for positions that have both."""
    assert batch.soft is not None
    soft, label_N = batch.soft, batch.label_N.numpy()
    position_E, ids_E, p_E = soft.position_E.numpy(), soft.ids_E.numpy(), soft.logprobs_E.double().exp().numpy()
    neighbour_N = np.roll(label_N, -by)
    place_N = np.stack([batch.target_N.numpy(), batch.before_N.numpy()])
    is_adjacent_N = (np.roll(place_N, -by, 1) == place_N + np.array([[0], [by]])).all(0)
    is_used_N = is_adjacent_N & batch.is_soft_N.numpy() & (label_N != neighbour_N)
    both = (label_N, neighbour_N)
    sums = [np.bincount(position_E, p_E * (ids_E == ids_N[position_E]), len(label_N)) for ids_N in both]
    return np.stack(sums)[:, is_used_N]


def _template(inputs: PreflightInput, samples: Sequence[Sample]) -> Iterator[Finding]:
    targets = [placed for sample in samples for placed in targets_of(sample.lessons)]
    differences = [reason for placed in targets if (reason := _difference(inputs, *placed))]
    yield Finding(
        "template",
        not differences,
        f"{len(differences)} of {len(targets)} targets differ"
        + (f", for example: {differences[0]}" if differences else ""),
        "0",
        "Teacher and student render prompts or targets differently: compare task.layout and tokenizers, annotate again",
        True,
    )


def _difference(inputs: PreflightInput, sequence: TrainingSequence, target: PlacedTarget) -> str | None:
    """Return how a target differs from the student's rendering of the teacher's text, or None."""
    prompts, span, ids = inputs.token_prompts, target.span, sequence.ids[target.start : target.stop]
    if not prompts.is_before_target(sequence.ids[: target.start], span):
        return f"the {span} {prompts.text(ids)!r} does not follow {prompts.around_question(span)[1]!r}"
    if target.soft is None:
        return None
    key, _ = target.soft.place
    annotation = inputs.annotation(key)
    target_ids = annotation.targets[span].token_ids
    if target_ids != ids[: len(target_ids)]:
        return f"the teacher read {prompts.text(target_ids)!r}, the student {prompts.text(ids)!r}"
    text = annotation.answer if span == "answer" else annotation.rationale
    if text is None or (span == "answer" and (target.is_labelled or inputs.has_second_teacher)):
        return None  # the teacher scored the gold answer or another teacher's, which need not be its own
    rendered = prompts.answer_ids(text) if span == "answer" else prompts.rationale_ids(text)
    if rendered != target_ids or "".join(prompts.text(target_ids).split()) != "".join(text.split()):
        return f"the teacher wrote {text!r}, its tokens decode to {prompts.text(target_ids)!r}"
    return None


def _text(inputs: PreflightInput, samples: Sequence[Sample]) -> Iterator[Finding]:
    """The tokens before a target decode to the text that the layout and the question give; so do labels."""
    lessons = [lesson for sample in samples for lesson in sample.lessons]
    differences = [reason for lesson in lessons if (reason := _lost_text(inputs, lesson))]
    yield Finding(
        "text",
        not differences,
        f"{len(differences)} of {len(lessons)} prompts or labels are not their text"
        + (f", for example: {differences[0]}" if differences else ""),
        "0",
        "The student's tokenizer has no tokens for parts of these texts: replace them in the data, or choose a model "
        "whose tokenizer has them",
        False,
    )


def _lost_text(inputs: PreflightInput, lesson: Lesson) -> str | None:
    """Return a text of a lesson as it is decoded, or its prompt up to a target, if that differs from the text."""
    prompts, examples = inputs.token_prompts, {id_: inputs.example(id_) for id_ in lesson.example_ids}
    for text in dict.fromkeys(text for example in examples.values() for text in _texts(example)):
        if not same_text(decoded := prompts.text(prompts.encode(text)), text.strip()):
            return f"{text[:40]!r} is read back as {decoded[:40]!r}"
    for sequence, target in targets_of([lesson]):
        first = next(other for other in sequence.targets if other.example_id == target.example_id)
        reason = _lost_question(prompts, sequence.ids[: first.start], first.span, examples[target.example_id])
        if reason:
            return reason
    return None


def _texts(example: Example) -> Iterator[str]:
    """Yield the texts before and after the question."""
    yield from (message.content for message in example.history)
    yield from (text for text in (example.answer, example.rationale) if text is not None)


def _lost_question(prompts: Prompts, ids: Sequence[int], span: Span, example: Example) -> str | None:
    """Return the question as it is decoded from the tokens before a target, if it differs; it may be cut at its end."""
    before, after = prompts.around_question(span, example.history)
    decoded, question = prompts.decode(ids), example.question
    middle = decoded.removeprefix(before).removesuffix(after)
    is_whole = decoded == f"{before}{middle}{after}" and same_text(middle, question)
    is_cut = prompts.too_long == "cut" and question.startswith(middle.rstrip("\ufffd"))
    return None if is_whole or is_cut else f"{question[:40]!r} is read back as {middle[:40]!r}"


def _end(inputs: PreflightInput, samples: Sequence[Sample]) -> Iterator[Finding]:
    """Every learned answer includes its end token."""
    num_answers, num_endless = 0, 0
    for batch in (sample.batch for sample in samples):
        used = [term.is_used_N for term in inputs.module.terms(batch).values()]
        is_used_N = torch.stack(used).any(0) if used else torch.zeros_like(batch.is_soft_N)
        is_answer_N = is_used_N & (batch.span_N == SPANS.index("answer"))
        answers = set(batch.target_N[is_answer_N].tolist())
        ended = set(batch.target_N[is_answer_N & (batch.label_N == inputs.prompts.end)].tolist())
        num_answers, num_endless = num_answers + len(answers), num_endless + len(answers - ended)
    yield Finding(
        "end",
        not num_endless if num_answers else None,
        f"{num_endless} of {num_answers} answers lack their end token",
        "0",
        "A student that never sees an end token does not stop: a target must end with the tokenizer's eos_token, which "
        "must not be masked where it is also the padding token",
        True,
    )


def _mass(inputs: PreflightInput, samples: Sequence[Sample]) -> Iterator[Finding]:
    soft = [sample.soft for sample in samples if sample.soft is not None]
    readers = [n for n, o in inputs.objectives.items() if o.source == "soft" and o.divergence.needs_rest]
    expected = f">= {_MIN_MASS} if a loss reads the rest"
    if not soft:
        yield Finding("captured mass", None, "no soft targets", expected, "", False)
        return
    captured = 1 - float(np.concatenate([s.tail_N for s in soft]).mean(dtype=np.float64))
    drawn = any(s.num_drawn_N is not None for s in soft)
    yield Finding(
        "captured mass",
        captured >= _MIN_MASS or not readers,
        f"{captured:.3f} kept exactly, the rest {'sampled' if drawn else 'as one bucket'}",
        expected,
        f"Increase cache.codec.k (annotates again), or remove {', '.join(readers)}",
        False,
    )


def _classes(inputs: PreflightInput, _: Sequence[Sample]) -> Iterator[Finding]:
    """Every class has examples."""
    answers = Counter(lesson.answer for lesson in inputs.lessons)
    labels = inputs.class_prompts.labels
    empty = [label for label in labels if not answers[label]]
    yield Finding(
        "classes",
        not empty,
        f"{len(labels)} classes; without an example: {', '.join(empty)[:60] or 'none'}",
        "examples of each",
        "The student cannot learn these classes: add examples of them, or take them out of task.choices",
        False,
    )


def _unknown(inputs: PreflightInput, samples: Sequence[Sample]) -> Iterator[Finding]:
    """The tokenizer knows the texts."""
    ids = {id_ for sample in samples for lesson in sample.lessons for id_ in lesson.example_ids}
    counts = [inputs.class_prompts.num_unknown(inputs.example(id_)) for id_ in ids]
    num_unknown, num_tokens = (sum(numbers) for numbers in zip(*counts, strict=True))
    yield Finding(
        "unknown tokens",
        num_unknown <= _MAX_UNKNOWN * num_tokens,
        f"{num_unknown} of {num_tokens} tokens of {len(ids)} texts",
        f"<= {_MAX_UNKNOWN:.0%}",
        "The student's tokenizer has no tokens for parts of these texts: choose a model of their language",
        False,
    )


OF_TOKENS = (_lost, _vocabulary, _length, _finite, _labels, _shift, _template, _text, _end, _mass)
OF_CLASSES = (_lost, _classes, _finite, _labels, _unknown)
