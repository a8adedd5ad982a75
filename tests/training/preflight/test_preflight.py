"""Preflight as a whole: it changes nothing in the run, and its table is readable."""

from __future__ import annotations

import random
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch

from distill.errors import ConfigError
from distill.lessons.loader import Arrangement, DistillData
from distill.students.causal_lm import open_student
from distill.training.fit import stop_on_failures
from distill.training.preflight import Finding, PreflightInput, _state_restored, example, preflight, table
from tests.conftest import WHOLE_STUDENT, make_model, student_module
from tests.training.preflight.conftest import LOSSES, failed_checks, findings_by_check


def train_two_steps(valid_input: PreflightInput, folder: Path, *, with_preflight: bool) -> dict[str, torch.Tensor]:
    """Train a student with dropout for two steps; return its weights."""
    lightning.seed_everything(0, verbose=False)
    module = student_module(open_student(folder, **WHOLE_STUDENT), valid_input.prompts, *LOSSES)
    data = DistillData(
        train=valid_input.lessons,
        validation=valid_input.lessons,
        read=valid_input.read,
        batch_size=4,
        microbatch_size=2,
        batch_unit="examples",
        arrangement=Arrangement(),
        num_steps=2,
        seed=0,
        padding_id=valid_input.prompts.end,
        num_workers=0,
    )
    module.model.train()
    module.model.model.layers[0].eval()
    modes = [part.training for part in module.modules()]
    random_states = torch.get_rng_state(), np.random.get_state()[1].tolist()
    if with_preflight:
        assert len(preflight(replace(valid_input, module=module))) == 21
    assert [part.training for part in module.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_states[0])
    assert np.random.get_state()[1].tolist() == random_states[1]
    assert all(weight.grad is None and weight.requires_grad for weight in module.parameters())
    module.train()
    trainer = lightning.Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        accumulate_grad_batches=2,
        limit_val_batches=0,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, data)
    return module.model.state_dict()


def test_random_states_modes_and_buffers_are_restored(valid_input: PreflightInput) -> None:
    def draw() -> list[Any]:
        return [random.random(), np.random.rand(), torch.rand(()).item()]

    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    expected = draw()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    model = valid_input.module.model.train()
    model.register_buffer("count", torch.zeros(2))
    with suppress(KeyError), _state_restored(model, torch.device("cpu")):
        draw()
        model.eval()
        model.count += 1
        raise KeyError
    assert draw() == expected
    assert model.training
    assert model.count.tolist() == [0, 0]


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:Trainer was configured with")
def test_preflight_does_not_change_training(valid_input: PreflightInput, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "dropout", seed=3, attention_dropout=0.5)
    plain, checked_first = (
        train_two_steps(valid_input, folder, with_preflight=with_preflight) for with_preflight in (False, True)
    )
    assert all(torch.equal(value, checked_first[name]) for name, value in plain.items())


def test_gradient_checkpointing_is_checked_too(valid_input: PreflightInput, student_folder: Path) -> None:
    model = open_student(student_folder, **WHOLE_STUDENT | {"gradient_checkpointing": True})
    model.load_state_dict(valid_input.module.model.state_dict())
    with_checkpointing = replace(valid_input, module=student_module(model, valid_input.prompts, *LOSSES))
    assert failed_checks(with_checkpointing) == set()
    assert findings_by_check(with_checkpointing)["gradients"].found == findings_by_check(valid_input)["gradients"].found


@pytest.mark.parametrize(
    ("passed", "is_fatal", "stops"),
    [(False, True, True), (False, False, False), (None, True, False), (True, True, False)],
)
def test_a_run_stops_on_a_fatal_check_that_failed_and_on_nothing_else(
    passed: bool | None, is_fatal: bool, stops: bool
) -> None:
    finding = Finding("shift", passed, "found", "expected", "Do this", is_fatal)
    with pytest.raises(ConfigError, match=r"shift: found; expected: expected\. Do this") if stops else nullcontext():
        stop_on_failures([finding])


def test_one_example_is_shown_as_the_student_sees_it(valid_input: PreflightInput) -> None:
    separate = next(lesson for lesson in valid_input.lessons if len(lesson.sequences) == 2)
    heading, *lines = example(replace(valid_input, lessons=[separate])).splitlines()
    assert "the student sees it" in heading
    assert lines[0].startswith("  Question: ")
    assert lines[1].startswith("  Answer:⟦ ")
    assert lines[1].endswith("</s>⟧")
    assert lines[2:4] == ["  --", lines[0]]
    assert lines[4].startswith("  Reason:⟦ ")
    assert example(replace(valid_input, lessons=[separate.branched()])).splitlines() == [heading, *lines]


def test_the_table_fits_a_terminal_and_puts_the_remedy_below_a_failure(valid_input: PreflightInput) -> None:
    findings = [*preflight(valid_input), Finding("mask", False, "a " * 60, "b " * 40, "do this " * 20, False)]
    lines = table(findings).splitlines()
    assert max(map(len, lines)) <= 110
    warning_line = next(i for i, line in enumerate(lines) if line.startswith("warn"))
    assert any("-> do this" in line for line in lines[warning_line:])
    assert not any("->" in line for line in lines[:warning_line])
