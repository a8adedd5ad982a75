"""Fixtures and helpers shared by the tests of this folder."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distill.lessons.curriculum import build_curriculum, prepare
from distill.losses import Objective
from distill.students.causal_lm import open_student
from distill.training.module import StudentModule
from distill.training.preflight import Finding, PreflightInput, preflight
from tests.conftest import WHOLE_STUDENT, compose, objectives, student_module, tiny_overrides

LOSSES = ("answer", "kl", "rationale")


@pytest.fixture(scope="module")
def shared_input(
    tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, student_folder: Path
) -> PreflightInput:
    """The preflight input of a real run: the tiny student on a cache filled by the tiny teacher."""
    root = tmp_path_factory.mktemp("preflight")
    job = prepare(compose(*tiny_overrides(root, teacher_folder, student_folder)), root)
    curriculum = build_curriculum(job)
    return PreflightInput(
        module=student_module(open_student(student_folder, **WHOLE_STUDENT), job.prompts, *LOSSES),
        objectives=objectives(*LOSSES),
        lessons=curriculum.train,
        rows=curriculum.rows,
        read=curriculum.read,
        annotation=job.annotation_job.store.read,
        has_second_teacher=False,
        example={example.id: example for example in job.annotation_job.splits.train}.__getitem__,
        prompts=job.prompts,
        seam=job.kind.seam,
        is_vocabulary_shared=job.is_vocabulary_shared,
        is_from_scratch=False,
        open_uncut=None,
        make_optimizer=torch.optim.AdamW,
        batch_size=8,
        microbatch_size=4,
        batch_unit="examples",
        num_steps=100,
        checkpoint_every=10,
        is_averaged=False,
        keeps_best=False,
        num_devices=1,
        run_dir=root,
        device=torch.device("cpu"),
        precision=nullcontext,
    )


@pytest.fixture
def valid_input(shared_input: PreflightInput, student_folder: Path) -> PreflightInput:
    """The preflight input with a new student, which a test may change."""
    model = open_student(student_folder, **WHOLE_STUDENT)
    with torch.no_grad():
        model.get_output_embeddings().weight *= 0.1  # no worse than guessing, as a trained model
    return replace(shared_input, module=student_module(model, shared_input.prompts, *LOSSES))


def findings_by_check(preflight_input: PreflightInput) -> dict[str, Finding]:
    return {finding.check: finding for finding in preflight(preflight_input)}


def failed_checks(preflight_input: PreflightInput) -> set[str]:
    return {finding.check for finding in preflight(preflight_input) if finding.passed is False}


def with_losses(preflight_input: PreflightInput, losses: dict[str, Objective]) -> PreflightInput:
    """The preflight input with other losses."""
    module = StudentModule(
        preflight_input.module.model,
        objectives=losses,
        seam=preflight_input.seam,
        retemper=lambda entries, temperature: entries,
        make_optimizer=torch.optim.AdamW,
        make_schedule=lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer),
        seed=0,
    )
    return replace(preflight_input, module=module, objectives=losses)
