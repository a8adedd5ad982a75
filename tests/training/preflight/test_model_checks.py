"""Preflight checks of the model and its losses: each planted bug is detected."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from distill.records import SoftTargets, SoftTargetsKey
from distill.training.preflight import PreflightInput
from distill.training.preflight.data_checks import _length
from distill.training.preflight.inputs import collated, plain, samples_of
from tests.conftest import objectives, student_module
from tests.training.preflight.conftest import LOSSES, findings_by_check, with_losses


def test_a_student_worse_than_guessing_is_a_warning(valid_input: PreflightInput) -> None:
    with torch.no_grad():
        valid_input.module.model.get_output_embeddings().weight *= 20
    finding = findings_by_check(valid_input)["loss at start"]
    assert (finding.passed, finding.is_fatal) == (False, False)


def test_a_cut_student_is_judged_by_the_model_with_all_layers(valid_input: PreflightInput) -> None:
    def spoiled(scale: float) -> Any:
        model = copy.deepcopy(valid_input.module.model)
        with torch.no_grad():
            model.get_output_embeddings().weight *= scale
        return model

    cut = replace(valid_input, module=student_module(spoiled(200), valid_input.prompts, *LOSSES))
    finding = findings_by_check(replace(cut, open_uncut=lambda: spoiled(1)))["loss at start"]
    assert finding.passed
    assert "with all layers" in finding.found
    # A model whose head does not belong to its tokenizer has all its layers, and warns nevertheless.
    finding = findings_by_check(replace(cut, open_uncut=lambda: spoiled(200)))["loss at start"]
    assert (finding.passed, finding.is_fatal) == (False, False)
    assert findings_by_check(cut)["loss at start"].passed is False


def test_a_wrong_tokenizer_is_a_warning_at_once(valid_input: PreflightInput) -> None:
    """A trained model is worse than guessing with another tokenizer, by less than a half."""
    model, batch = valid_input.module.model, samples_of(valid_input)[0].batch
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(20):
        optimizer.zero_grad()
        model(batch.input_ids_BT, attention_mask=batch.mask_BT, labels=batch.input_ids_BT).loss.backward()
        optimizer.step()
    assert findings_by_check(valid_input)["loss at start"].passed
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight.copy_(layer.weight.roll(7, 0))
    assert findings_by_check(valid_input)["loss at start"].passed is False


@pytest.mark.parametrize("limit", [0, -1])
def test_texts_longer_than_the_positions_of_the_student_stop_the_run(limit: int, valid_input: PreflightInput) -> None:
    """An attention window is no limit: a student reads longer texts with it, in training and when it is evaluated."""
    longest = max(
        len(part.ids) for lesson in valid_input.lessons for sequence in lesson.sequences for part in plain(sequence)
    )
    valid_input.module.model.config.update({"max_position_embeddings": longest + limit, "sliding_window": 4})
    finding = next(iter(_length(valid_input, [])))
    assert (finding.passed, finding.stops) == (limit == 0, limit != 0)
    assert finding.expected == f"at most {longest + limit} positions"
    assert f"{longest} tokens" in finding.found


def test_an_untrained_student_starts_near_the_uniform_loss(valid_input: PreflightInput) -> None:
    with torch.no_grad():
        valid_input.module.model.get_output_embeddings().weight.zero_()
    finding = findings_by_check(replace(valid_input, is_from_scratch=True))["loss at start"]
    assert finding.passed
    assert finding.found == "5.77 nats per token; ln V = 5.77"  # ln 320


def test_a_loss_without_gradient_stops_the_run(valid_input: PreflightInput) -> None:
    valid_input.module.model.requires_grad_(False)
    assert findings_by_check(valid_input)["gradients"].stops


def test_a_negligible_loss_is_a_warning(valid_input: PreflightInput) -> None:
    both = objectives("answer", "kl")
    losses = both | {"kl": replace(both["kl"], weight=1e-4)}
    finding = findings_by_check(with_losses(valid_input, losses))["balance"]
    assert (finding.passed, finding.is_fatal) == (False, False)
    assert "raise loss.kl.weight" in finding.remedy


def test_gradient_norms_are_those_of_the_training_loss(valid_input: PreflightInput) -> None:
    answer_only = with_losses(valid_input, objectives("answer"))
    batch = collated(answer_only, answer_only.lessons[:4], answer_only.prompts.end)
    logits_BTV = answer_only.module.model(batch.input_ids_BT, attention_mask=batch.mask_BT).logits
    is_used_N = batch.is_labelled_N & (batch.span_N == 0)
    logits_NV = logits_BTV[batch.sequence_N, batch.before_N][is_used_N, : answer_only.prompts.vocabulary_size]
    torch.nn.functional.cross_entropy(logits_NV, batch.label_N[is_used_N]).backward()
    norm = (
        torch.stack([p.grad.norm() for p in answer_only.module.parameters()]).norm()
        * answer_only.objectives["answer"].weight
    )
    answer_only.module.zero_grad()
    assert findings_by_check(answer_only)["gradients"].found == f"weighted answer {norm:.3g}"


def test_a_loss_without_targets_is_a_warning(valid_input: PreflightInput) -> None:
    finding = findings_by_check(with_losses(valid_input, objectives("answer", "rationale_kl")))["losses"]
    assert (finding.passed, finding.is_fatal) == (False, False)
    assert "rationale_kl" in finding.found


def test_nonfinite_weights_or_targets_stop_the_run(valid_input: PreflightInput) -> None:
    def read_with_nan(keys: Sequence[SoftTargetsKey]) -> SoftTargets:
        soft = valid_input.read(keys)
        return replace(soft, logprobs_E=np.where(np.arange(len(soft.logprobs_E)) == 0, np.nan, soft.logprobs_E))

    assert findings_by_check(replace(valid_input, read=read_with_nan))["finite"].stops
    with torch.no_grad():
        next(valid_input.module.model.parameters())[3, 5] = torch.nan
    assert findings_by_check(valid_input)["finite"].stops


def test_a_nonfinite_step_stops_the_run(valid_input: PreflightInput) -> None:
    kl = objectives("kl")
    assert findings_by_check(with_losses(valid_input, {"kl": replace(kl["kl"], weight=float("inf"))}))[
        "finite step"
    ].stops
