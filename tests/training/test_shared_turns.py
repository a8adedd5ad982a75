"""Laws 3, 5 and 11: a sequence with the turns of a conversation has the losses and gradients of separate ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from distill.cache.codecs.topk import TopK
from distill.lessons.collate import collate
from distill.lessons.join import Lesson, SoftPlace, TrainingSequence, with_shared_turns
from distill.losses.head import predicted_ids
from distill.prompts.rendering import Prompts
from distill.records import Prompt, Span
from distill.training.preflight.inputs import targets_of
from tests.conftest import keep, objectives, read, student_module
from tests.training.conftest import assert_same, loss_and_gradients, plain_loss, total_counts
from tests.training.test_shared_prompts import FAMILIES, family_model

TURNS = (3, 1, 4, 2)  # of the conversations in a batch


def soft(number: int, prompts: Prompts, generator: torch.Generator) -> SoftPlace:
    logits_NV = 3 * torch.randn(number, prompts.vocabulary_size, generator=generator)
    return keep(TopK(k=8, temperature=1.0).cut(logits_NV.log_softmax(-1), torch.zeros(number)))


def conversations(prompts: Prompts) -> list[Lesson]:
    """A lesson for each turn of the conversations: gold answers, the teacher's, with and without soft targets."""
    generator, draw = torch.Generator().manual_seed(0), np.random.default_rng(0)
    lessons = []
    for conversation, number in enumerate(TURNS):
        ids: tuple[int, ...] = (0,)
        for turn in range(number):
            question, answer = (tuple(draw.integers(2, 300, draw.integers(2, 9)).tolist()) for _ in range(2))
            start, ids = len(ids + question), (*ids, *question, *answer, prompts.end)
            place = soft(len(ids) - start, prompts, generator) if turn != 1 else None
            lessons.append(
                lesson_of(f"{conversation}.{turn}", "answer", Prompt(ids, {"answer": (start, len(ids))}), place)
            )
        if conversation % 2:
            ids = (0, *question, 5, *answer, prompts.end)
            prompt = Prompt(ids, {"rationale": (len(question) + 2, len(ids))})
            rationale = lesson_of(f"{conversation}.{turn}", "rationale", prompt, soft(len(answer), prompts, generator))
            lessons[-1] = Lesson((*lessons[-1].sequences, *rationale.sequences))
    return lessons


def lesson_of(name: str, span: Span, prompt: Prompt, place: SoftPlace | None) -> Lesson:
    labelled = () if name.endswith("2") else (span,)
    return Lesson((TrainingSequence.of(prompt, name, labelled, {span: place} if place else {}),))


@pytest.mark.parametrize("name", FAMILIES)
def test_shared_turns_have_the_losses_and_gradients_of_separate_ones(name: str, prompts: Prompts) -> None:
    separate = conversations(prompts)
    shared = with_shared_turns(separate)
    assert [len(lesson.example_ids) for lesson in shared] == [*TURNS]
    counts = total_counts(separate)
    assert total_counts(shared) == counts
    assert all(counts[objective.span, objective.source] for objective in objectives().values())
    module = student_module(family_model(name).to(torch.float64), prompts)
    expected = loss_and_gradients(module, collate(separate, counts, 1, read))
    # Only GPT-2 computes in float64 throughout: norms, angles or states of the others are float32 for any dtype.
    tolerance = 1e-10 if name == "gpt2" else 1e-5
    assert_same(loss_and_gradients(module, collate(shared, counts, 1, read)), expected, tolerance)


def test_the_loss_of_shared_turns_is_the_plain_formula_and_has_no_other_positions(prompts: Prompts) -> None:
    separate, model = conversations(prompts), family_model("gpt2").to(torch.float64)
    shared = with_shared_turns(separate)
    module, counts = student_module(model, prompts), total_counts(separate)
    plain = plain_loss(model, separate, prompts.vocabulary_size).detach()
    batch = collate(shared, counts, 1, read)
    assert_same({"loss": loss_and_gradients(module, batch)["loss"]}, {"loss": plain}, 1e-7)  # targets are in float32
    assert len(batch.label_N) == len(collate(separate, counts, 1, read).label_N)
    assert len(batch.input_ids_BT) == len(TURNS) + sum(len(lesson.sequences) == 2 for lesson in separate)


def test_validation_counts_answers_and_not_sequences(prompts: Prompts) -> None:
    module = student_module(family_model("gpt2"), prompts)
    separate, tallies = conversations(prompts), []
    for lessons in (separate, with_shared_turns(separate)):
        batch = collate(lessons, {}, 1, read)
        with torch.no_grad():
            right_N = predicted_ids(module.hidden(batch), module.head())
            label_N = torch.where(batch.target_N % 2 == 0, right_N, (right_N + 1) % prompts.vocabulary_size)
            module.validation_step(replace(batch, label_N=label_N))
        tallies.append([float(value) for value in module._tallies["val/accuracy"]])
        module._tallies = {}
    (right, number), shared = tallies
    assert shared == [right, number]
    assert (
        0 < right < number == sum(target.is_labelled and target.span == "answer" for _, target in targets_of(separate))
    )
