"""Preflight: it passes what is sound, finds each bug that is planted here, and leaves no trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from distill.records import Place, SoftTargets
from distill.training.preflight import Plan
from distill.training.preflight.inputs import collated
from tests.conftest import objectives
from tests.training.preflight.conftest import checked, taught


def test_a_student_worse_than_guessing_is_a_warning(sound: Plan) -> None:
    with torch.no_grad():
        sound.module.model.get_output_embeddings().weight *= 20
    found = checked(sound)["loss at start"]
    assert (found.passed, found.is_fatal) == (False, False)


def test_an_untrained_student_starts_near_the_uniform_loss(sound: Plan) -> None:
    with torch.no_grad():
        sound.module.model.get_output_embeddings().weight.zero_()
    found = checked(replace(sound, is_from_scratch=True))["loss at start"]
    assert found.passed
    assert found.found == "5.77 nats per token; ln V = 5.77"  # ln 320


def test_a_loss_without_gradient_stops_the_run(sound: Plan) -> None:
    sound.module.model.requires_grad_(False)
    assert checked(sound)["gradients"].stops


def test_a_negligible_loss_is_a_warning(sound: Plan) -> None:
    both = objectives("answer", "kl")
    losses = both | {"kl": replace(both["kl"], weight=1e-4)}
    found = checked(taught(sound, losses))["balance"]
    assert (found.passed, found.is_fatal) == (False, False)
    assert "raise loss.kl.weight" in found.remedy


def test_gradient_norms_are_those_of_the_training_loss(sound: Plan) -> None:
    alone = taught(sound, objectives("answer"))
    batch = collated(alone, alone.lessons[:4], alone.prompts.end)
    logits_BTV = alone.module.model(batch.input_ids_BT, attention_mask=batch.mask_BT).logits
    is_used_N = batch.is_labelled_N & (batch.span_N == 0)
    logits_NV = logits_BTV[batch.sequence_N, batch.before_N][is_used_N, : alone.prompts.vocabulary_size]
    torch.nn.functional.cross_entropy(logits_NV, batch.label_N[is_used_N]).backward()
    norm = torch.stack([p.grad.norm() for p in alone.module.parameters()]).norm() * alone.objectives["answer"].weight
    alone.module.zero_grad()
    assert checked(alone)["gradients"].found == f"weighted answer {norm:.3g}"


def test_a_loss_without_targets_is_a_warning(sound: Plan) -> None:
    found = checked(taught(sound, objectives("answer", "rationale_kl")))["losses"]
    assert (found.passed, found.is_fatal) == (False, False)
    assert "rationale_kl" in found.found


def test_nonfinite_weights_or_targets_stop_the_run(sound: Plan) -> None:
    def broken(places: Sequence[Place]) -> SoftTargets:
        soft = sound.read(places)
        return replace(soft, logprobs_E=np.where(np.arange(len(soft.logprobs_E)) == 0, np.nan, soft.logprobs_E))

    assert checked(replace(sound, read=broken))["finite"].stops
    with torch.no_grad():
        next(sound.module.model.parameters())[3, 5] = torch.nan
    assert checked(sound)["finite"].stops


def test_a_nonfinite_step_stops_the_run(sound: Plan) -> None:
    kl = objectives("kl")
    assert checked(taught(sound, {"kl": replace(kl["kl"], weight=float("inf"))}))["finite step"].stops
