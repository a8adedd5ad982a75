"""Preflight checks of the model and its losses: each planted bug is detected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from distill.records import SoftTargets, SoftTargetsKey
from distill.training.preflight import PreflightInput
from distill.training.preflight.inputs import collated
from tests.conftest import objectives
from tests.training.preflight.conftest import findings_by_check, with_losses


def test_a_student_worse_than_guessing_is_a_warning(valid_input: PreflightInput) -> None:
    with torch.no_grad():
        valid_input.module.model.get_output_embeddings().weight *= 20
    finding = findings_by_check(valid_input)["loss at start"]
    assert (finding.passed, finding.is_fatal) == (False, False)


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
