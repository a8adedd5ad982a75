"""Losses, gradients and weights that are not finite: seen before the step, never saved, blamed on their cause."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill.lessons.collate import collate
from distill.lessons.curriculum import build_curriculum, prepare
from distill.losses.head import head_loss
from distill.records import SoftTargets, SoftTargetsKey
from distill.training.fit import build_training, fit
from distill.training.module import NonFiniteLossError
from tests.conftest import compose, examples, lessons, read, student_module, tiny_overrides
from tests.training.conftest import Values, logged_losses, loss_and_gradients, open_whole_student, total_counts

RUN = ["loss=[answer,kl]", "batch_size=4", "trainer.max_steps=3", "validate_every=3", "checkpoint_every=1"]
RUN += ["teacher.num_rationales=0", "num_samples=0", "optim.schedule.num_warmup_steps=0"]
RUN += ["trainer.log_every_n_steps=1"]
Read = Callable[[Sequence[SoftTargetsKey]], SoftTargets]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of this module's runs, which share a cache."""
    return tmp_path_factory.mktemp("nonfinite")


@pytest.fixture
def first_gradients(root: Path, teacher_folder: Path, student_folder: Path) -> tuple[Values, float]:
    """The gradients of a step on all nine lessons, by name of the weight, and their norm."""
    prompts = prepare(compose(*tiny_overrides(root, teacher_folder, student_folder), *RUN), root).prompts
    module = student_module(open_whole_student(student_folder, torch.float32), prompts, "answer", "kl")
    nine_lessons = lessons(prompts, 9)
    values = loss_and_gradients(module, collate(nine_lessons, total_counts(nine_lessons), 0, read))
    gradients = {name.removeprefix("model."): value for name, value in values.items() if name != "loss"}
    return gradients, torch.stack([gradient.norm() for gradient in gradients.values()]).norm().item()


@pytest.fixture
def train(root: Path, tmp_path: Path, teacher_folder: Path, student_folder: Path) -> Callable[..., Any]:
    """Train a student in float32 on uneven lessons; return the student."""

    def train(*overrides: str, change: Callable[[Any], object] = lambda student: None, read: Read = read) -> Any:
        job = prepare(compose(*tiny_overrides(root, teacher_folder, student_folder), *RUN, *overrides), tmp_path)
        train, validation = (lessons(job.prompts, number) for number in (9, 4))
        student = open_whole_student(student_folder, torch.float32)
        change(student)
        curriculum = replace(build_curriculum(job), train=train, validation=validation, read=read)
        return fit(job, build_training(job, curriculum, student, [])).student

    return train


def checkpoints(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints").glob("step-*.ckpt"))


def named(message: str) -> list[str]:
    """The examples that a message names."""
    return [example.id for example in examples(9) if example.id in message]


def test_an_infinite_gradient_stops_before_the_step_and_blames_no_example(train: Any, tmp_path: Path) -> None:
    def spoil(student: Any) -> None:
        student.lm_head.weight.register_hook(lambda gradient: gradient * math.inf)

    with pytest.raises(NonFiniteLossError) as raised:
        train(change=spoil)
    message = str(raised.value)
    assert "the norm of the gradient at step 0 is" in message
    assert "optim.optimizer.lr" in message
    assert "trainer.gradient_clip_val" in message
    assert not named(message)
    assert not checkpoints(tmp_path)


def test_an_update_that_overflows_is_not_saved(train: Any, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLossError) as raised:
        train("optim.optimizer.lr=1e39")
    assert "the weights are not finite after step 1" in str(raised.value)
    assert not checkpoints(tmp_path)


def test_the_last_update_is_checked_too(train: Any, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLossError, match="the weights are not finite after step 1"):
        train("optim.optimizer.lr=1e39", "trainer.max_steps=1", "validate_every=1")
    assert not checkpoints(tmp_path)


def test_broken_weights_are_not_blamed_on_examples(train: Any) -> None:
    def spoil(student: Any) -> None:
        student.lm_head.weight.data[5, 0] = torch.nan

    with pytest.raises(NonFiniteLossError, match=r"the weights are not finite at step 0: .*lm_head.weight") as raised:
        train(change=spoil)
    assert not named(str(raised.value))


def test_an_example_with_a_nonfinite_loss_is_named_alone(train: Any) -> None:
    num_calls = 0

    def spoil_second_call(module: Any, inputs: Any, output: Any) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 2:
            output.last_hidden_state = output.last_hidden_state * math.nan

    with pytest.raises(NonFiniteLossError, match="the loss at step 0 is nan on the examples") as raised:
        train(
            "microbatch_size=1",
            "share_prompt=false",
            change=lambda student: student.model.register_forward_hook(spoil_second_call),
        )
    assert len(named(str(raised.value))) == 1


def test_a_loss_that_is_not_finite_stops_before_the_step_also_where_its_gradient_is(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_infinite_total(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        total, sums_L = head_loss(*arguments)
        return total + math.inf, sums_L

    monkeypatch.setattr("distill.training.module.head_loss", with_infinite_total)
    with pytest.raises(NonFiniteLossError, match="the loss at step 0 is inf on the examples"):
        train("preflight=false")
    assert not checkpoints(tmp_path)


def test_soft_targets_that_are_not_finite_stop_before_the_step(train: Any, tmp_path: Path) -> None:
    def read_with_nan(keys: Sequence[SoftTargetsKey]) -> SoftTargets:
        soft = read(keys)
        return replace(soft, logprobs_E=np.full_like(soft.logprobs_E, np.nan))

    with pytest.raises(NonFiniteLossError, match="at step 0"):
        train(read=read_with_nan)
    assert not checkpoints(tmp_path)


ONE_STEP = ["batch_size=9", "microbatch_size=2", "trainer.max_steps=1", "validate_every=1"]
ONE_STEP += ["trainer.gradient_clip_val=0.01"]


def test_the_norm_of_the_gradient_is_logged_before_it_is_clipped(
    train: Any, tmp_path: Path, first_gradients: tuple[Values, float]
) -> None:
    train(*ONE_STEP)
    _, norm = first_gradients
    assert norm > 0.01
    assert logged_losses(tmp_path)[0]["train/grad_norm"] == pytest.approx(norm, rel=1e-5)


CLIPPED: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "norm": lambda gradient, norm: gradient * 0.01 / norm,
    "value": lambda gradient, norm: gradient.clamp(-0.01, 0.01),
}


@pytest.mark.parametrize("algorithm", CLIPPED)
def test_a_gradient_is_clipped_as_configured(
    algorithm: str, train: Any, student_folder: Path, first_gradients: tuple[Values, float]
) -> None:
    sgd = ["optim.optimizer._target_=torch.optim.SGD", "~optim.optimizer.betas", "optim.optimizer.weight_decay=0"]
    settings = [*ONE_STEP, *sgd, "optim.optimizer.lr=1.0", f"+trainer.gradient_clip_algorithm={algorithm}"]
    after = dict(train(*settings).named_parameters())
    gradients, norm = first_gradients
    for name, weight in open_whole_student(student_folder, torch.float32).named_parameters():
        expected = weight - CLIPPED[algorithm](gradients[name], norm)
        assert torch.allclose(after[name], expected, rtol=0, atol=1e-6), name


def test_a_loss_without_positions_in_a_step_is_left_out_of_the_curves(train: Any, tmp_path: Path) -> None:
    train("loss=[answer,rationale]", "batch_size=1", "trainer.max_steps=9", "microbatch_size=1", "validate_every=9")
    rows = logged_losses(tmp_path)
    losses = [(row.get("train/answer"), row.get("train/rationale")) for row in rows if "train/grad_norm" in row]
    assert len(losses) == 9
    # Of every three lessons one has no gold answer, and one has a rationale.
    assert sorted(answer is None for answer, _ in losses) == [False] * 6 + [True] * 3
    assert sorted(rationale is None for _, rationale in losses) == [False] * 3 + [True] * 6
    assert all(value > 0 for pair in losses for value in pair if value is not None)
