"""Laws 3, 5 and 6: the loss and its gradients equal the plain formula and ignore padding and batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from distill.lessons.collate import collate
from distill.prompts.rendering import Prompts
from tests.cases import OWN_BATCHES, Case
from tests.conftest import case_lessons, lessons, read, student_module
from tests.training.conftest import (
    BATCH,
    Values,
    assert_same,
    loss_and_gradients,
    open_whole_student,
    plain_loss,
    total_counts,
)

EVERY_KIND = pytest.mark.parametrize("case", OWN_BATCHES, indirect=True)


@pytest.mark.parametrize(
    ("case", "are_chosen"),
    [*((kind, False) for kind in OWN_BATCHES), ("cues", True), ("long answers", True)],
    indirect=["case"],
)
def test_the_loss_is_a_weighted_sum_of_means_over_each_losss_positions(
    are_chosen: bool, case: Case, student_folder: Path
) -> None:
    model, all_lessons = open_whole_student(student_folder), case_lessons(case, BATCH, are_chosen=are_chosen)
    expected = plain_loss(model, all_lessons, case.prompts.vocabulary_size)
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    expected_gradients = {f"model.{name}": g for (name, _), g in zip(model.named_parameters(), gradients, strict=True)}
    actual = loss_and_gradients(
        student_module(model, case.prompts), collate(all_lessons, total_counts(all_lessons), 0, read)
    )
    assert_same(actual, {"loss": expected.detach()} | expected_gradients, 1e-7)  # targets are stored in float32


@EVERY_KIND
@pytest.mark.parametrize("padding_id", [1, 319])
def test_loss_and_gradient_do_not_depend_on_the_padding_id(padding_id: int, case: Case, student_folder: Path) -> None:
    all_lessons = case_lessons(case, BATCH)
    module = student_module(open_whole_student(student_folder), case.prompts)
    actual = loss_and_gradients(module, collate(all_lessons, total_counts(all_lessons), padding_id, read))
    assert_same(actual, loss_and_gradients(module, collate(all_lessons, total_counts(all_lessons), 0, read)))


@EVERY_KIND
def test_loss_and_gradient_do_not_depend_on_the_padding_side(case: Case, student_folder: Path) -> None:
    all_lessons = case_lessons(case, BATCH)
    right = collate(all_lessons, total_counts(all_lessons), 0, read)
    shift_B = right.mask_BT.shape[1] - right.mask_BT.sum(1)
    ids_BT, mask_BT = (
        torch.stack([row.roll(int(shift)) for row, shift in zip(x, shift_B, strict=True)])
        for x in (right.input_ids_BT, right.mask_BT)
    )
    left = replace(right, input_ids_BT=ids_BT, mask_BT=mask_BT, before_N=right.before_N + shift_B[right.sequence_N])
    module = student_module(open_whole_student(student_folder), case.prompts)
    # Rotary positions are relative, but their angles are computed in float32.
    assert_same(loss_and_gradients(module, left), loss_and_gradients(module, right), 1e-5)


@EVERY_KIND
def test_loss_and_gradient_do_not_depend_on_the_batch(case: Case, student_folder: Path) -> None:
    all_lessons = case_lessons(case, BATCH)
    counts, module = total_counts(all_lessons), student_module(open_whole_student(student_folder), case.prompts)
    whole = loss_and_gradients(module, collate(all_lessons, counts, 0, read))
    for size in (1, 3):
        sums: Values = {}
        for start in range(0, BATCH, size):
            part = loss_and_gradients(module, collate(all_lessons[start : start + size], counts, 0, read))
            sums = {name: sums.get(name, 0) + value for name, value in part.items()}
        assert_same(sums, whole)


@pytest.mark.parametrize("change", ["prompt", "unsupervised"])
def test_a_token_is_predicted_from_earlier_tokens_only(change: str, prompts: Prompts, student_folder: Path) -> None:
    batch = collate(lessons(prompts, 3), {}, 0, read)
    module = student_module(open_whole_student(student_folder), prompts)
    row, position = int(batch.sequence_N[-1]), int(batch.before_N[-1]) - (3 if change == "prompt" else 0)
    changed_BT = batch.input_ids_BT.clone()
    changed_BT[row, position] = 300
    before_NH, after_NH = (module.hidden(b) for b in (batch, replace(batch, input_ids_BT=changed_BT)))
    has_moved_N = (before_NH - after_NH).abs().amax(1) > 1e-9
    assert torch.equal(has_moved_N, (batch.sequence_N == row) & (batch.before_N >= position))
    assert has_moved_N.any()


def test_padding_rows_of_the_students_head_do_not_change_the_loss(prompts: Prompts, student_folder: Path) -> None:
    all_lessons, model = lessons(prompts, BATCH), open_whole_student(student_folder)
    module, batch = student_module(model, prompts), collate(all_lessons, total_counts(all_lessons), 0, read)
    before = loss_and_gradients(module, batch)
    model.lm_head.weight.data[prompts.vocabulary_size :] += 50
    after = loss_and_gradients(module, batch)
    assert_same(after, before, 0.0)
    assert (after["model.lm_head.weight"][prompts.vocabulary_size :] == 0).all()


@pytest.mark.parametrize(("num_processes", "num_microbatches"), [(1, 1), (2, 1), (1, 4), (4, 2)])
def test_the_mean_over_processes_and_microbatches_is_undone(
    num_processes: int, num_microbatches: int, prompts: Prompts, student_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    all_lessons = lessons(prompts, BATCH)
    counts, module = total_counts(all_lessons), student_module(open_whole_student(student_folder), prompts)
    whole = loss_and_gradients(module, collate(all_lessons, counts, 0, read))
    trainer = SimpleNamespace(world_size=num_processes, accumulate_grad_batches=num_microbatches)
    trainer.global_step = trainer.global_rank = 0
    monkeypatch.setattr(type(module), "trainer", trainer)
    monkeypatch.setattr(type(module), "global_step", 0)
    monkeypatch.setattr(type(module), "global_rank", 0)
    module.zero_grad()
    size = BATCH // (num_processes * num_microbatches)
    for start in range(0, BATCH, size):
        loss = module.training_step(collate(all_lessons[start : start + size], counts, 0, read))
        # Lightning divides each microbatch by their number, DDP the sum of the gradients by the number of processes.
        (loss / num_microbatches / num_processes).backward()
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert_same(gradients, {name: value for name, value in whole.items() if name != "loss"})
