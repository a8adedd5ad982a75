"""Preflight checks of data: a valid run passes, and each planted bug is detected."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill.lessons.collate import collate
from distill.lessons.curriculum import build_curriculum, prepare
from distill.lessons.join import Lesson
from distill.records import Annotation, Batch, Example, RowCounts, SoftTargets, SoftTargetsKey
from distill.students import causal_lm as modules
from distill.students.causal_lm import TokenSeam
from distill.training.fit import build_training, open_job_student, preflight_input
from distill.training.module import StudentModule
from distill.training.preflight import PreflightInput, data_checks, preflight
from distill.training.preflight.inputs import samples_of
from tests.conftest import compose, objectives, reviews, tiny_overrides, with_targets
from tests.training.preflight.conftest import failed_checks, findings_by_check, with_losses


def test_a_correct_run_passes_every_check(valid_input: PreflightInput) -> None:
    findings = preflight(valid_input)
    assert [finding.check for finding in findings if finding.passed is not True] == []
    assert len(findings) == 21


def test_a_correct_run_with_shared_prompts_passes_every_check(valid_input: PreflightInput) -> None:
    lessons = [lesson.branched() for lesson in valid_input.lessons]
    assert any(lesson.sequences[0].branches for lesson in lessons)
    assert failed_checks(replace(valid_input, lessons=lessons)) == set()


def test_self_kl_detects_hidden_states_shifted_by_one(
    valid_input: PreflightInput, monkeypatch: pytest.MonkeyPatch
) -> None:
    original_hidden = StudentModule.hidden

    def shifted_hidden(self: StudentModule, batch: Batch) -> Any:
        return original_hidden(self, replace(batch, before_N=batch.before_N - 1))

    monkeypatch.setattr(StudentModule, "hidden", shifted_hidden)
    findings = findings_by_check(valid_input)
    assert findings["self-KL"].stops
    assert findings["labels"].passed


def test_self_kl_detects_padding_rows_in_the_head(valid_input: PreflightInput) -> None:
    model = valid_input.module.model
    rows = len(model.get_output_embeddings().weight)
    assert rows > valid_input.prompts.vocabulary_size
    module = StudentModule(
        model,
        objectives=valid_input.objectives,
        seam=TokenSeam(rows),
        retemper=lambda entries, temperature: entries,
        make_optimizer=torch.optim.AdamW,
        make_schedule=lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer),
        seed=0,
    )
    assert findings_by_check(replace(valid_input, module=module))["self-KL"].stops


def test_labels_shifted_by_one_are_detected(valid_input: PreflightInput, monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted_collate(lessons: Sequence[Lesson], *rest: Any) -> Batch:
        batch = collate(lessons, *rest)
        return replace(batch, before_N=batch.before_N - 1)

    monkeypatch.setattr("distill.training.preflight.inputs.collate", shifted_collate)
    findings = findings_by_check(valid_input)
    assert findings["labels"].stops
    assert "self-KL" not in findings  # the model does not run on invalid data


def confident_targets(preflight_input: PreflightInput, shift: int) -> Callable[[Sequence[SoftTargetsKey]], SoftTargets]:
    """Soft targets that give probability 0.9 to the token of the text `shift` positions further on."""

    def read(keys: Sequence[SoftTargetsKey]) -> SoftTargets:
        token_ids = [np.roll(preflight_input.annotation(key).targets[span].token_ids, -shift) for key, span in keys]
        ids_E = np.concatenate(token_ids).astype(np.int32)
        number = len(ids_E)
        num_N = np.ones(number, np.int32)
        return SoftTargets(ids_E, np.full(number, np.log(0.9), np.float32), np.full(number, 0.1, np.float32), num_N)

    return read


def test_soft_targets_shifted_by_one_are_detected(valid_input: PreflightInput) -> None:
    assert findings_by_check(replace(valid_input, read=confident_targets(valid_input, 0)))["shift"].passed
    assert findings_by_check(replace(valid_input, read=confident_targets(valid_input, 1)))["shift"].stops
    assert findings_by_check(replace(valid_input, read=confident_targets(valid_input, -1)))["shift"].stops


def test_attention_to_padding_is_detected(valid_input: PreflightInput, monkeypatch: pytest.MonkeyPatch) -> None:
    def left_padding_without_mask(lessons: Sequence[Lesson], *rest: Any) -> Batch:
        batch = collate(lessons, *rest)
        pad_B = (1 - batch.mask_BT).sum(1)
        rows = [row.roll(int(pad)) for row, pad in zip(batch.input_ids_BT, pad_B, strict=True)]
        before_N = batch.before_N + pad_B[batch.sequence_N]
        return replace(batch, input_ids_BT=torch.stack(rows), mask_BT=torch.ones_like(batch.mask_BT), before_N=before_N)

    monkeypatch.setattr("distill.training.preflight.inputs.collate", left_padding_without_mask)
    findings = findings_by_check(valid_input)
    assert findings["labels"].passed
    assert findings["mask"].stops


def test_attention_to_neighbours_is_detected(valid_input: PreflightInput, monkeypatch: pytest.MonkeyPatch) -> None:
    original_hidden = StudentModule.hidden

    def mixed_hidden(self: StudentModule, batch: Batch) -> Any:
        hidden_NH = original_hidden(self, batch)
        return hidden_NH + hidden_NH.mean(0) / 2

    monkeypatch.setattr(StudentModule, "hidden", mixed_hidden)
    finding = findings_by_check(valid_input)["mask"]
    assert finding.stops
    assert "change by 0e+00 with padding" in finding.found


def test_branches_that_attend_to_padding_are_detected(
    valid_input: PreflightInput, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_mask(branch_BT: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(len(branch_BT), 1, branch_BT.shape[1], branch_BT.shape[1], dtype=dtype)

    monkeypatch.setattr(modules, "branch_mask", open_mask)
    findings = findings_by_check(replace(valid_input, lessons=[lesson.branched() for lesson in valid_input.lessons]))
    assert findings["mask"].stops
    assert findings["self-KL"].stops


def test_ids_beyond_the_vocabulary_are_detected_before_the_model_runs(valid_input: PreflightInput) -> None:
    def read_with_larger_ids(keys: Sequence[SoftTargetsKey]) -> SoftTargets:
        soft = valid_input.read(keys)
        return replace(soft, ids_E=soft.ids_E + valid_input.prompts.vocabulary_size)

    findings = findings_by_check(replace(valid_input, read=read_with_larger_ids))
    assert findings["vocabulary"].stops
    assert "self-KL" not in findings


def test_the_first_id_behind_the_vocabulary_is_beyond_it(valid_input: PreflightInput) -> None:
    def read_with_one_larger_id(keys: Sequence[SoftTargetsKey]) -> SoftTargets:
        soft = valid_input.read(keys)
        return replace(soft, ids_E=np.append(soft.ids_E[:-1], valid_input.prompts.vocabulary_size))

    assert findings_by_check(replace(valid_input, read=read_with_one_larger_id))["vocabulary"].stops


def test_an_unshared_vocabulary_fails_if_a_loss_reads_soft_targets(valid_input: PreflightInput) -> None:
    unshared = replace(valid_input, is_vocabulary_shared=False)
    assert findings_by_check(unshared)["vocabulary"].stops
    assert findings_by_check(with_losses(unshared, objectives("answer", "rationale")))["vocabulary"].passed


def test_a_target_that_the_teacher_did_not_read_is_detected(valid_input: PreflightInput) -> None:
    def reversed_annotation(key: str) -> Annotation:
        annotation = valid_input.annotation(key)
        reversed_targets = {
            span: replace(target, token_ids=tuple(reversed(target.token_ids)))
            for span, target in annotation.targets.items()
        }
        return replace(annotation, targets=reversed_targets)

    assert findings_by_check(replace(valid_input, annotation=reversed_annotation))["template"].stops


def test_tokens_that_do_not_decode_to_the_teachers_text_are_detected(valid_input: PreflightInput) -> None:
    unlabelled = [with_targets(lesson, is_labelled=False) for lesson in valid_input.lessons]
    keys = {target.soft.place[0] for target in _targets(valid_input) if target.soft}
    texts = {key: valid_input.prompts.text(valid_input.annotation(key).targets["answer"].token_ids) for key in keys}
    kl = with_losses(replace(valid_input, lessons=unlabelled), objectives("kl"))
    matching = replace(kl, annotation=lambda key: replace(valid_input.annotation(key), answer=texts[key]))
    assert findings_by_check(matching)["template"].passed
    mismatched = replace(kl, annotation=lambda key: replace(valid_input.annotation(key), answer=texts[key] + "0"))
    assert findings_by_check(mismatched)["template"].stops


def test_the_words_of_another_teacher_need_not_be_those_of_the_teacher_that_scored_them(
    tmp_path: Path, teacher_folder: Path, student_folder: Path
) -> None:
    """Both choose among the same choices, and differ; only the words of the first are learned."""
    scorer = [f"soft_teacher.{name}" for name in (f"model={student_folder}", "kind.dtype=float32", "calibrate=0")]
    tiny = tiny_overrides(tmp_path, teacher_folder, student_folder)[6:]
    sizes = ["task.examples.num_labelled=2", "task.examples.num_unlabelled=20", "task.examples.num_validation=2"]
    options = [*reviews(tmp_path), *sizes, "task.examples.num_test=2", "teacher@soft_teacher=causal_lm", *scorer]
    job = prepare(compose(*tiny, *options, "teacher.calibrate=5", "loss=[kl]"), tmp_path / "run")
    inputs = preflight_input(job, build_training(job, build_curriculum(job), open_job_student(job), []))
    texts = {
        inputs.annotation(s.targets[0].soft.place[0]).answer != lesson.answer
        for lesson in inputs.lessons
        for s in lesson.sequences
    }
    assert texts == {True, False}
    for has_second_teacher in (True, False):
        changed = replace(inputs, has_second_teacher=has_second_teacher)
        findings = [finding for check in data_checks.OF_TOKENS for finding in check(changed, samples_of(changed))]
        assert [finding.check for finding in findings if finding.stops] == ([] if has_second_teacher else ["template"])


def _changed(inputs: PreflightInput, change: Callable[[str], str]) -> Callable[[str], Example]:
    return lambda id_: replace(inputs.example(id_), question=change(inputs.example(id_).question))


def test_a_label_that_the_tokenizer_cannot_write_is_detected(valid_input: PreflightInput) -> None:
    prompts = copy.copy(valid_input.prompts)
    prompts.encode = lambda text: valid_input.prompts.encode(text.replace("²", ""))
    label = "12²"
    examples = lambda id_: replace(valid_input.example(id_), answer=label)  # noqa: E731
    finding = findings_by_check(replace(valid_input, prompts=prompts, example=examples))["text"]
    assert finding.passed is False
    assert "'12²' is read back as '12'" in finding.found


@pytest.mark.parametrize("change", [str.lower, lambda text: text.replace("many", "many "), lambda text: text + "²"])
def test_a_prompt_that_is_not_its_text_is_detected(change: Callable[[str], str], valid_input: PreflightInput) -> None:
    changed = replace(valid_input, example=_changed(valid_input, change))
    finding = findings_by_check(changed)["text"]
    assert finding.passed is False
    assert "is read back as" in finding.found


def test_a_question_that_was_cut_is_its_text(valid_input: PreflightInput) -> None:
    prompts = copy.copy(valid_input.prompts)
    prompts.too_long = "cut"
    changed = replace(valid_input, prompts=prompts, example=_changed(valid_input, lambda text: f"{text} And so on."))
    assert findings_by_check(changed)["text"].passed


def test_a_target_after_another_cue_is_detected(valid_input: PreflightInput) -> None:
    layout = replace(valid_input.prompts.layout, answer_cue="Result:")
    other_prompts = type(valid_input.prompts)(
        valid_input.prompts.tokenizer, layout, (), max_length=256, too_long="drop"
    )
    assert findings_by_check(replace(valid_input, prompts=other_prompts))["template"].stops


def test_an_answer_without_its_end_token_is_detected(valid_input: PreflightInput) -> None:
    def without_end(lesson: Lesson) -> Lesson:
        sequences = []
        for sequence in lesson.sequences:
            targets = (replace(target, stop=target.stop - 1, soft=None) for target in sequence.targets)
            sequences.append(replace(sequence, targets=tuple(targets)))
        return Lesson(tuple(sequences))

    label_losses = with_losses(valid_input, objectives("answer", "rationale"))
    assert findings_by_check(label_losses)["end"].passed
    assert findings_by_check(replace(label_losses, lessons=[without_end(lesson) for lesson in label_losses.lessons]))[
        "end"
    ].stops


def test_little_captured_mass_is_a_warning_for_losses_that_read_the_rest(valid_input: PreflightInput) -> None:
    captured = float(
        np.mean(
            [1 - valid_input.read([target.soft.place]).tail_N.mean() for target in _targets(valid_input) if target.soft]
        )
    )
    assert captured < 0.5
    finding = findings_by_check(with_losses(valid_input, objectives("reverse_kl")))["captured mass"]
    assert (finding.passed, finding.is_fatal) == (False, False)
    assert "cache.codec.k" in finding.remedy
    assert findings_by_check(with_losses(valid_input, objectives("kl")))["captured mass"].passed
    confident = with_losses(replace(valid_input, read=confident_targets(valid_input, 0)), objectives("reverse_kl"))
    assert findings_by_check(confident)["captured mass"].found.startswith("0.900")


def _targets(preflight_input: PreflightInput) -> list[Any]:
    sequences = (sequence for lesson in preflight_input.lessons for sequence in lesson.sequences)
    return [target for sequence in sequences for target in sequence.targets]


@pytest.mark.parametrize(
    ("kept", "lost", "is_fatal"),
    [
        (1, {"empty": 59}, True),
        (1, {"unmatched": 59}, True),
        (1, {"empty": 9}, True),  # few texts, but hardly anything else is left
        (100, {"truncated": 200}, True),  # labelled rows are learned, no answer of the teacher is
        (100, {"truncated": 10}, False),
        (100, {"too long": 2000}, False),
        (12, {"unreadable": 6}, False),
    ],
)
def test_a_run_stops_if_nearly_all_answers_of_the_teacher_are_lost(
    kept: int, lost: dict[str, int], is_fatal: bool, valid_input: PreflightInput
) -> None:
    labelled = [with_targets(lesson, is_labelled=True) for lesson in valid_input.lessons]
    rows = valid_input.rows | {"train": RowCounts(kept + sum(lost.values()), lost, kept)}
    finding, *_ = data_checks._lost(replace(valid_input, lessons=labelled, rows=rows), [])
    assert finding.stops == is_fatal
    assert ("teacher.kind.max_new_tokens" in finding.remedy) == ("truncated" in lost)
    rationales = {"rationales": RowCounts(60, {"truncated": 58, "disagrees": 1}, 1)}
    _, finding = data_checks._lost(replace(valid_input, rows=valid_input.rows | rationales), [])
    assert finding.stops
