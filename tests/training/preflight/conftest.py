"""Makers that the tests of this folder share."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distill.lessons.curriculum import prepare, teach
from distill.losses import Objective
from distill.students.causal_lm import open_student
from distill.training.module import StudentModule
from distill.training.preflight import Finding, Plan, preflight
from tests.conftest import WHOLE_STUDENT, compose, objectives, student_module, tiny_overrides

LOSSES = ("answer", "kl", "rationale")


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, student_folder: Path) -> Plan:
    """What the train command would train: the tiny student on what the tiny teacher really left in a cache."""
    root = tmp_path_factory.mktemp("preflight")
    job = prepare(compose(*tiny_overrides(root, teacher_folder, student_folder)), root)
    curriculum = teach(job)
    return Plan(
        module=student_module(open_student(student_folder, **WHOLE_STUDENT), job.prompts, *LOSSES),
        objectives=objectives(*LOSSES),
        lessons=curriculum.train,
        read=curriculum.read,
        annotation=job.source.store.read,
        prompts=job.prompts,
        is_vocabulary_shared=job.is_vocabulary_shared,
        is_from_scratch=False,
        make_optimizer=torch.optim.AdamW,
        batch_size=8,
        microbatch_size=4,
        batch_unit="examples",
        num_steps=100,
        num_devices=1,
        run_dir=root,
        device=torch.device("cpu"),
        precision=nullcontext,
    )


@pytest.fixture
def sound(planned: Plan, student_folder: Path) -> Plan:
    """The plan with a student of the test's own."""
    model = open_student(student_folder, **WHOLE_STUDENT)
    return replace(planned, module=student_module(model, planned.prompts, *LOSSES))


def checked(plan: Plan) -> dict[str, Finding]:
    return {finding.check: finding for finding in preflight(plan)}


def failed(plan: Plan) -> set[str]:
    return {finding.check for finding in preflight(plan) if finding.passed is False}


def taught(plan: Plan, losses: dict[str, Objective]) -> Plan:
    """The plan with other losses."""
    module = StudentModule(
        plan.module.model,
        objectives=losses,
        vocabulary_size=plan.prompts.vocabulary_size,
        retemper=lambda entries, temperature: entries,
        make_optimizer=torch.optim.AdamW,
        make_schedule=lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer),
        seed=0,
    )
    return replace(plan, module=module, objectives=losses)
