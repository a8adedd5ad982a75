"""Preflight estimates of memory and disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.lessons.curriculum import build_curriculum, prepare
from distill.students.saving import save_student
from distill.training import checkpoints
from distill.training.fit import build_training, fit, open_job_student, preflight_input
from distill.training.preflight import PreflightInput, preflight
from distill.training.preflight.inputs import collated
from distill.training.preflight.resources import _measured_step, _states_per_weight, kept_bytes
from tests.conftest import compose, tiny_overrides


class MemoryHungrySGD(torch.optim.SGD):
    """An optimizer whose state has 2^48 elements per parameter, without allocating them."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                self.state[weight]["kept"] = torch.zeros(1).expand(2**48)


def test_missing_memory_or_disk_stops_the_run(valid_input: PreflightInput) -> None:
    assert {"memory", "disk"} <= {
        f.check for f in preflight(replace(valid_input, make_optimizer=MemoryHungrySGD)) if f.stops
    }


DISK_CASES = {
    "many": ["trainer.max_steps=5", "checkpoint_every=1"],
    "one": ["trainer.max_steps=2", "checkpoint_every=2"],
    "two": ["trainer.max_steps=3", "checkpoint_every=2"],
    "frozen": ["trainer.max_steps=5", "checkpoint_every=1", "student.freeze=[embed_tokens]"],
    "averaged": ["trainer.max_steps=5", "checkpoint_every=1", "callback=[ema]"],
    "best": ["trainer.max_steps=5", "checkpoint_every=1", "keep=best"],
    "plain": ["trainer.max_steps=5", "checkpoint_every=1", "optim.optimizer._target_=torch.optim.SGD"],
}


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[] if case in ("many", "averaged", "best") else pytest.mark.slow) for case in DISK_CASES],
)
def test_the_disk_that_a_run_needs_is_what_it_takes(
    case: str, tmp_path: Path, teacher_folder: Path, student_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [*tiny_overrides(tmp_path, teacher_folder, student_folder), *DISK_CASES[case], "loss=[answer]"]
    overrides += ["~optim.optimizer.betas"] if case == "plain" else []
    job = prepare(
        compose(*overrides, "validate_every=1", "batch_size=4", "trainer.log_every_n_steps=1"), tmp_path / "run"
    )
    training = build_training(job, build_curriculum(job), open_job_student(job), [])
    job.run_dir.mkdir()
    expected, folder, taken = kept_bytes(preflight_input(job, training)), job.run_dir / "checkpoints", list[int]()
    original_hash = checkpoints.sha256

    def recording_hash(path: Path) -> str:  # called when a checkpoint is written and no older one is removed yet
        taken.append(sum(file.stat().st_size for file in folder.glob("*.ckpt")))
        return original_hash(path)

    monkeypatch.setattr(checkpoints, "sha256", recording_hash)
    trained = fit(job, training)
    folder_of_student, settings = job.run_dir / "student", {"dtype": torch.float32, "max_new_tokens": 4}
    save_student(trained.student, job.prompts.tokenizer, folder_of_student, **settings)
    at_end = [*folder.glob("*.ckpt"), folder_of_student / "model.safetensors"]
    taken.append(sum(file.stat().st_size for file in at_end))
    # The headers of so small tensors take some percent more; one copy of the weights would be at least 11 %.
    assert expected <= max(taken) <= 1.09 * expected


def test_optimizer_states_are_counted(valid_input: PreflightInput) -> None:
    assert _states_per_weight(valid_input) == pytest.approx(2, abs=1e-4)  # AdamW: two moments, and a count
    assert _states_per_weight(replace(valid_input, make_optimizer=torch.optim.SGD)) == 0


def test_activations_grow_with_the_lessons(valid_input: PreflightInput) -> None:
    weights = sum(p.numel() * p.element_size() for p in valid_input.module.parameters())
    bytes_of_one, bytes_of_four = (
        _measured_step(valid_input, collated(valid_input, [valid_input.lessons[0]] * number, 1))[0] - weights
        for number in (1, 4)
    )
    assert bytes_of_four == pytest.approx(4 * bytes_of_one, rel=0.15)
    assert (
        bytes_of_four > 4 * sum(len(s.ids) for s in valid_input.lessons[0].sequences) * 32 * 4 * 2
    )  # hidden states, 2 layers
