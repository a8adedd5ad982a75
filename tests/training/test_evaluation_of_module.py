"""Laws 2, 3, 5, 6: the student's loss through the real trainer, however a step is cut, padded or shared out.

Run as a script, this file is one process of a training run: `test_modules.py <folder> <overrides>`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distill.app import config as configuration
from distill.cache.codecs.dense import Dense
from distill.evaluation.answers import Evaluation
from distill.lessons.collate import collate
from distill.lessons.curriculum import prepare, teach
from distill.lessons.join import Lesson, TrainingSequence
from distill.losses.head import head_loss, predicted_ids
from distill.prompts.cues import Prompts
from distill.records import SPANS, Annotation, Batch, Example, Splits, Target
from distill.training.module import StudentModule
from tests.conftest import LAYOUT, compose, examples, keep, lessons, objectives, read, student_module, tiny_overrides
from tests.training.conftest import opened, plain_loss


def divergence_by_position(module: StudentModule, batch: Batch) -> dict[str, list[float]]:
    """Each loss's value at each position that it applies to."""
    with torch.no_grad():
        hidden_NH, head = module.hidden(batch), module.head()
        found = {}
        for name, term in module.terms(replace(batch, counts={})).items():
            used_N, places = torch.arange(len(term.is_used_N)), term.is_used_N.nonzero().ravel().tolist()
            single = [replace(term, is_used_N=used_N == place) for place in places]
            found[name] = [float(head_loss(hidden_NH, head, [t])[1]) for t in single]
    return found


# Not the codecs that draw: their targets are the teacher's on average only, and they refuse reverse KL.
@pytest.mark.parametrize(("cache", "rounding"), [("dense", 1e-5), ("topk", 3e-4)])
def test_a_student_equal_to_the_teacher_has_zero_kl_at_every_position(
    cache: str, rounding: float, teacher_folder: Path, tmp_path: Path
) -> None:
    same = tiny_overrides(tmp_path, teacher_folder, teacher_folder)
    same = [o for o in same if "cache" not in o and "num_shots" not in o]
    config = compose(*same, f"cache={cache}", "prompt.num_shots=0", "teacher.calibrate=0", "loss=[kl,reverse_kl]")
    job = prepare(config, tmp_path / "run")
    curriculum = teach(job)
    given = [*curriculum.train, *curriculum.validation]
    batch = collate(given, {}, 0, curriculum.read)
    module = student_module(opened(teacher_folder, torch.float32).eval(), job.prompts, "kl", "reverse_kl")
    found = divergence_by_position(module, batch)
    assert batch.soft is not None
    is_end_N = batch.label_N == job.prompts.end
    assert (is_end_N & batch.is_soft_N).sum() == len(given)
    for name in ("kl", "reverse_kl"):
        assert (
            len(found[name])
            == batch.is_soft_N.sum()
            == sum(c for lesson in given for (_, s), c in lesson.counts().items() if s == "soft")
        )
        assert max(map(abs, found[name])) < rounding


class Sevens:
    """A task in which every text holds the answer 7."""

    version = "1"
    choices: tuple[str, ...] = ()

    def splits(self) -> Splits:
        return Splits.disjoint((), (), ())

    def shots(self) -> Sequence[Example]:
        return ()

    def read_answer(self, text: str) -> str:
        return "7"

    def value(self, answer: str) -> str:
        return answer


@pytest.mark.parametrize("shots", [0, 2])
def test_rationale_and_following_answer_have_targets_at_their_positions(
    shots: int, prompts: Prompts, teacher_folder: Path
) -> None:
    shown = Prompts(prompts.tokenizer, LAYOUT, examples(shots), max_length=256, too_long="drop")
    kind = configuration.build(compose("teacher=causal_lm", "teacher.kind.dtype=float32").teacher.kind)
    teacher = kind(folder=teacher_folder, prompts=shown, codec=Dense(), task=Sevens(), calibration=(), max_new_tokens=9)
    teacher.load()
    asked = examples(7)
    made = teacher.annotate([shown.request(example, "rationale") for example in asked])
    given = []
    for example, annotation in zip(asked, made, strict=True):
        if not annotation.rationale:
            continue
        prompt = shown.rationale_prompt(example, annotation.rationale, "7")
        soft = {span: keep(target.soft) for span, target in annotation.targets.items() if target.soft is not None}
        given.append(Lesson(example.id, (TrainingSequence(prompt, frozenset(), soft),)))
        assert set(soft) == {"answer", "rationale"}
    assert len(given) >= 4
    module = student_module(opened(teacher_folder, torch.float32).eval(), prompts, "kl", "rationale_kl")
    found = divergence_by_position(module, collate(given, {}, 0, read))
    assert len(found["kl"]) == sum(len(prompts.answer_ids("7")) for _ in given)
    assert max(map(abs, found["kl"] + found["rationale_kl"])) < 1e-5


def test_evaluation_measures_zero_kl_for_the_teacher_itself(prompts: Prompts, teacher_folder: Path) -> None:
    kind = configuration.build(compose("teacher=causal_lm", "teacher.kind.dtype=float32").teacher.kind)
    settings = {"codec": Dense(), "task": Sevens(), "calibration": (), "max_new_tokens": 6}
    teacher, given = kind(folder=teacher_folder, prompts=prompts, **settings), examples(18)
    teacher.load()
    made = teacher.annotate([prompts.request(example, "answer") for example in given])
    left = {example.id: annotation for example, annotation in zip(given, made, strict=True)}
    assert len({len(annotation.targets["answer"].token_ids) for annotation in made}) > 1
    evaluation = Evaluation(opened(teacher_folder, torch.float32).eval(), prompts, Sevens(), "direct", 6)
    assert max(abs(prediction.kl) for prediction in evaluation.predict(given, left)) < 1e-5


def test_an_unreadable_teacher_answer_is_wrong_and_agrees_with_nothing(prompts: Prompts, student_folder: Path) -> None:
    given = [Example("One?", "7"), Example("Two?", "7"), Example("Three?", "7"), Example("Four?", "7")]
    said = {given[0].id: "7", given[1].id: "8", given[2].id: None}
    teacher = {id_: Annotation("", {}, answer) for id_, answer in said.items()}
    evaluation = Evaluation(opened(student_folder, torch.float32).eval(), prompts, Sevens(), "direct", 6)
    found = evaluation.predict(given, teacher)
    assert [prediction.is_teacher_correct for prediction in found] == [True, False, False, None]
    assert [prediction.agrees is None for prediction in found] == [False, False, True, True]


def test_an_answer_is_correct_only_if_all_its_tokens_are(prompts: Prompts, student_folder: Path) -> None:
    model = opened(student_folder, torch.float32).eval()
    module = student_module(model, prompts, "answer")
    batch = collate(lessons(prompts, 12), {}, 0, read)
    is_answer_N = (batch.span_N == SPANS.index("answer")) & batch.is_labelled_N
    with torch.no_grad():
        likeliest_N = predicted_ids(module.hidden(batch), module.head())
    answered = batch.sequence_N[is_answer_N].unique().tolist()
    # All tokens of the first answer are made right, of the second but the last, of the others none.
    label_N = torch.where(batch.sequence_N == answered[0], likeliest_N, likeliest_N + 1)
    second = ((batch.sequence_N == answered[1]) & is_answer_N).nonzero().squeeze(-1)
    label_N[second[:-1]] = likeliest_N[second[:-1]]
    with torch.no_grad():
        module.validation_step(replace(batch, label_N=label_N.clamp(max=prompts.vocabulary_size - 1)))
    right, number = module._tallies["val/accuracy"]
    assert (float(right), float(number)) == (1, len(answered))
    assert len(second) > 1


def test_validation_means_do_not_depend_on_the_batches(prompts: Prompts, student_folder: Path) -> None:
    module, given = student_module(opened(student_folder).eval(), prompts), lessons(prompts, 12)
    found = []
    for size in (12, 5, 1):
        with torch.no_grad():
            for start in range(0, len(given), size):
                module.validation_step(collate(given[start : start + size], {}, 0, read))
        found.append({name: float(total / number) for name, (total, number) in module._tallies.items()})
        module._tallies = {}
    assert set(found[0]) == {"val/accuracy", *(f"val/{name}" for name in objectives())}
    assert all(means == pytest.approx(found[0], rel=1e-6) for means in found[1:])
    weighted = sum(objective.weight * found[0][f"val/{name}"] for name, objective in objectives().items())
    assert weighted == pytest.approx(plain_loss(module.model, given, prompts.vocabulary_size).item(), rel=1e-5)


def test_a_loss_without_validation_positions_is_not_logged(
    prompts: Prompts, student_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = student_module(opened(student_folder, torch.float32).eval(), prompts, "answer", "kl", "rationale")
    logged_: dict[str, Any] = {}
    monkeypatch.setattr(module, "log_dict", lambda values, **_: logged_.update(values))
    monkeypatch.setattr(type(module), "trainer", SimpleNamespace(world_size=1))
    plain_answers = [lesson for lesson in lessons(prompts, 12) if lesson.counts()["rationale", "labels"] == 0]
    with torch.no_grad():
        module.validation_step(collate(plain_answers, {}, 0, read))
    module.on_validation_epoch_end()
    assert set(logged_) == {"val/answer", "val/kl", "val/accuracy", "step"}
    assert all(math.isfinite(value) for value in logged_.values())


def test_evaluation_uses_the_current_weights(prompts: Prompts, student_folder: Path) -> None:
    shown = Prompts(prompts.tokenizer, LAYOUT, examples(2), max_length=256, too_long="drop")
    model, asked, task = opened(student_folder, torch.float32), examples(5), Sevens()
    task.choices = ("7", "2")
    evaluation = Evaluation(model, shown, task, "direct", 6)
    before = evaluation.predict(asked, {})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.flip(0))
    after = evaluation.predict(asked, {})
    assert after == Evaluation(model, shown, task, "direct", 6).predict(asked, {})
    assert [p.choice_probabilities for p in after] != [p.choice_probabilities for p in before]


def test_padding_rows_of_the_head_do_not_change_validation_or_evaluation(
    prompts: Prompts, student_folder: Path
) -> None:
    model, asked, ids = opened(student_folder, torch.float32).eval(), examples(5), prompts.answer_ids("7")
    batch, module = collate(lessons(prompts, 12), {}, 0, read), student_module(model, prompts)
    with torch.no_grad():
        batch = replace(batch, label_N=predicted_ids(module.hidden(batch), module.head()))
    log_t_NV = torch.randn(len(ids), prompts.vocabulary_size).log_softmax(-1)
    target = Target(ids, Dense().cut(log_t_NV, torch.zeros(len(ids), dtype=torch.float64)))
    teacher = {example.id: Annotation("", {"answer": target}, "7") for example in asked}

    def measured() -> list[Any]:
        with torch.no_grad():
            module.validation_step(batch)
        tallies = {name: [float(number) for number in tally] for name, tally in module._tallies.items()}
        module._tallies = {}
        evaluation = Evaluation(model, prompts, Sevens(), "direct", 6)
        return [tallies, evaluation.predict(asked, teacher), evaluation.rationales(asked)]

    before = measured()
    model.lm_head.weight.data[prompts.vocabulary_size :] += 50
    assert measured() == before
    assert before[0]["val/accuracy"] == [8, 8]
    assert all(prediction.kl for prediction in before[1])
