"""Preflight: it passes what is sound, finds each bug that is planted here, and leaves no trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from distill.lessons.collate import collate
from distill.lessons.join import Lesson
from distill.records import Annotation, Batch, Place, SoftTargets
from distill.training import module as modules
from distill.training.module import StudentModule
from distill.training.preflight import Plan, preflight
from tests.conftest import objectives
from tests.training.preflight.conftest import checked, failed, taught


def test_a_correct_run_passes_every_check(sound: Plan) -> None:
    findings = preflight(sound)
    assert [finding.check for finding in findings if finding.passed is not True] == []
    assert len(findings) == 17


def test_a_correct_run_with_shared_prompts_passes_every_check(sound: Plan) -> None:
    lessons = [lesson.branched() for lesson in sound.lessons]
    assert any(lesson.sequences[0].prompt.branches for lesson in lessons)
    assert failed(replace(sound, lessons=lessons)) == set()


def test_self_kl_detects_hidden_states_shifted_by_one(sound: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    right = StudentModule.hidden

    def early(self: StudentModule, batch: Batch) -> Any:
        return right(self, replace(batch, before_N=batch.before_N - 1))

    monkeypatch.setattr(StudentModule, "hidden", early)
    found = checked(sound)
    assert found["self-KL"].stops
    assert found["labels"].passed


def test_self_kl_detects_padding_rows_in_the_head(sound: Plan) -> None:
    model = sound.module.model
    rows = len(model.get_output_embeddings().weight)
    assert rows > sound.prompts.vocabulary_size
    module = StudentModule(
        model,
        objectives=sound.objectives,
        vocabulary_size=rows,
        retemper=lambda entries, temperature: entries,
        make_optimizer=torch.optim.AdamW,
        make_schedule=lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer),
        seed=0,
    )
    assert checked(replace(sound, module=module))["self-KL"].stops


def test_labels_shifted_by_one_are_detected(sound: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(lessons: Sequence[Lesson], *rest: Any) -> Batch:
        batch = collate(lessons, *rest)
        return replace(batch, before_N=batch.before_N - 1)

    monkeypatch.setattr("distill.training.preflight.inputs.collate", late)
    found = checked(sound)
    assert found["labels"].stops
    assert "self-KL" not in found  # nothing is run that cannot work


def sure(plan: Plan, by: int) -> Callable[[Sequence[Place]], SoftTargets]:
    """Soft targets that give nine tenths to a token of the text, `by` places from their own."""

    def read(places: Sequence[Place]) -> SoftTargets:
        targets = [np.roll(plan.annotation(key).targets[span].token_ids, -by) for key, span in places]
        ids_E = np.concatenate(targets).astype(np.int32)
        number = len(ids_E)
        each_N = np.ones(number, np.int32)
        return SoftTargets(ids_E, np.full(number, np.log(0.9), np.float32), np.full(number, 0.1, np.float32), each_N)

    return read


def test_soft_targets_shifted_by_one_are_detected(sound: Plan) -> None:
    assert checked(replace(sound, read=sure(sound, 0)))["shift"].passed
    assert checked(replace(sound, read=sure(sound, 1)))["shift"].stops
    assert checked(replace(sound, read=sure(sound, -1)))["shift"].stops


def test_attention_to_padding_is_detected(sound: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def on_the_left(lessons: Sequence[Lesson], *rest: Any) -> Batch:
        batch = collate(lessons, *rest)
        pad_B = (1 - batch.mask_BT).sum(1)
        rows = [row.roll(int(pad)) for row, pad in zip(batch.input_ids_BT, pad_B, strict=True)]
        before_N = batch.before_N + pad_B[batch.sequence_N]
        return replace(batch, input_ids_BT=torch.stack(rows), mask_BT=torch.ones_like(batch.mask_BT), before_N=before_N)

    monkeypatch.setattr("distill.training.preflight.inputs.collate", on_the_left)
    found = checked(sound)
    assert found["labels"].passed
    assert found["mask"].stops


def test_attention_to_neighbours_is_detected(sound: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    right = StudentModule.hidden

    def mixed(self: StudentModule, batch: Batch) -> Any:
        hidden_NH = right(self, batch)
        return hidden_NH + hidden_NH.mean(0) / 2

    monkeypatch.setattr(StudentModule, "hidden", mixed)
    found = checked(sound)["mask"]
    assert found.stops
    assert "change by 0e+00 with padding" in found.found


def test_branches_that_attend_to_padding_are_detected(sound: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_mask(branch_BT: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(len(branch_BT), 1, branch_BT.shape[1], branch_BT.shape[1], dtype=dtype)

    monkeypatch.setattr(modules, "branch_mask", open_mask)
    found = checked(replace(sound, lessons=[lesson.branched() for lesson in sound.lessons]))
    assert found["mask"].stops
    assert found["self-KL"].stops


def test_ids_beyond_the_vocabulary_are_detected_before_the_model_runs(sound: Plan) -> None:
    def foreign(places: Sequence[Place]) -> SoftTargets:
        soft = sound.read(places)
        return replace(soft, ids_E=soft.ids_E + sound.prompts.vocabulary_size)

    found = checked(replace(sound, read=foreign))
    assert found["vocabulary"].stops
    assert "self-KL" not in found


def test_an_unshared_vocabulary_fails_if_a_loss_reads_soft_targets(sound: Plan) -> None:
    apart = replace(sound, is_vocabulary_shared=False)
    assert checked(apart)["vocabulary"].stops
    assert checked(taught(apart, objectives("answer", "rationale")))["vocabulary"].passed


def test_a_target_that_the_teacher_did_not_read_is_detected(sound: Plan) -> None:
    def other(key: str) -> Annotation:
        annotation = sound.annotation(key)
        turned = {
            span: replace(target, token_ids=tuple(reversed(target.token_ids)))
            for span, target in annotation.targets.items()
        }
        return replace(annotation, targets=turned)

    assert checked(replace(sound, annotation=other))["template"].stops


def test_tokens_that_do_not_decode_to_the_teachers_text_are_detected(sound: Plan) -> None:
    unlabelled = [
        Lesson(lesson.example_id, tuple(replace(s, labelled=frozenset[Any]()) for s in lesson.sequences))
        for lesson in sound.lessons
    ]
    told = {
        key: lesson for lesson in unlabelled for s in lesson.sequences for key, _ in [p.place for p in s.soft.values()]
    }
    texts = {key: sound.prompts.text(sound.annotation(key).targets["answer"].token_ids) for key in told}
    kl = taught(replace(sound, lessons=unlabelled), objectives("kl"))
    same = replace(kl, annotation=lambda key: replace(sound.annotation(key), answer=texts[key]))
    assert checked(same)["template"].passed
    other = replace(kl, annotation=lambda key: replace(sound.annotation(key), answer=texts[key] + "0"))
    assert checked(other)["template"].stops


def test_a_target_after_another_cue_is_detected(sound: Plan) -> None:
    layout = replace(sound.prompts.layout, answer_cue="Result:")
    other = type(sound.prompts)(sound.prompts.tokenizer, layout, (), max_length=256, too_long="drop")
    assert checked(replace(sound, prompts=other))["template"].stops


def test_an_answer_without_its_end_token_is_detected(sound: Plan) -> None:
    def endless(lesson: Lesson) -> Lesson:
        sequences = []
        for sequence in lesson.sequences:
            spans = {name: (start, stop - 1) for name, (start, stop) in sequence.prompt.spans.items()}
            sequences.append(replace(sequence, prompt=replace(sequence.prompt, spans=spans), soft={}))
        return Lesson(lesson.example_id, tuple(sequences))

    labels = taught(sound, objectives("answer", "rationale"))
    assert checked(labels)["end"].passed
    assert checked(replace(labels, lessons=[endless(lesson) for lesson in labels.lessons]))["end"].stops


def test_little_captured_mass_is_a_warning_for_losses_that_read_the_rest(sound: Plan) -> None:
    kept = float(np.mean([1 - sound.read([p.place]).tail_N.mean() for s in _sequences(sound) for p in s.soft.values()]))
    assert kept < 0.5
    found = checked(taught(sound, objectives("reverse_kl")))["captured mass"]
    assert (found.passed, found.is_fatal) == (False, False)
    assert "cache.codec.k" in found.remedy
    assert checked(taught(sound, objectives("kl")))["captured mass"].passed
    nearly = taught(replace(sound, read=sure(sound, 0)), objectives("reverse_kl"))
    assert checked(nearly)["captured mass"].found.startswith("0.900")


def _sequences(plan: Plan) -> list[Any]:
    return [sequence for lesson in plan.lessons for sequence in lesson.sequences]
