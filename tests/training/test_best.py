"""The student of the best validation: kept, said, resumed, with averaged, adapted and early stopped students."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from omegaconf import DictConfig

from distill.errors import ConfigError
from distill.lessons.curriculum import build_curriculum, prepare
from distill.students.causal_lm import open_student
from distill.training import checkpoints as checkpoints_module
from distill.training.best import Measure, measure_of
from distill.training.fit import Trained, build_training, fit
from distill.training.settings import check_settings
from tests.conftest import WHOLE_STUDENT, compose, lessons, read, tiny_overrides
from tests.training.conftest import logged_losses

pytestmark = pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint")
# The student learns its lessons by heart within a few large steps, so validation is best in the middle.
RUN = ["loss=[answer,kl]", "batch_size=4", "trainer.max_steps=9", "validate_every=2", "checkpoint_every=1"]
RUN += ["teacher.num_rationales=0", "num_samples=0", "optim.schedule.num_warmup_steps=0", "optim.optimizer.lr=0.05"]
RUN += ["trainer.log_every_n_steps=1"]
Values = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("best")


class Run:
    """A run in a folder, with the weights and the measured value at every validation."""

    def __init__(self, config: DictConfig, folder: Path, student: Any = None) -> None:
        self.job = prepare(config, folder)
        made = lessons(self.job.prompts, 13)
        curriculum = replace(build_curriculum(self.job), train=made[:9], validation=made[9:], read=read)
        student = student or open_student(self.job.student_folder, **WHOLE_STUDENT)
        self.training = build_training(self.job, curriculum, student, [])
        self.validated: dict[int, tuple[float, Values]] = {}
        module, end = self.training.module, self.training.module.validation_step

        def recording_step(batch: Any) -> None:
            end(batch)
            value = float(module.validation_means()[self.training.best._measure.metric])
            self.validated[module.global_step] = (value, copied(module.model))

        module.validation_step = recording_step  # type: ignore[method-assign]

    def fit(self) -> Trained:
        return fit(self.job, self.training)

    def best_step(self) -> int:
        return min(self.validated, key=lambda step: self.validated[step][0])


def copied(model: Any) -> Values:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def is_same(left: Values, right: Values) -> bool:
    return left.keys() == right.keys() and all(torch.equal(weight, right[name]) for name, weight in left.items())


@pytest.fixture
def run(root: Path, tmp_path: Path, teacher_folder: Path, student_folder: Path) -> Callable[..., Run]:
    def run(*overrides: str, name: str = "run") -> Run:
        config = compose(*tiny_overrides(root, teacher_folder, student_folder), *RUN, *overrides)
        return Run(config, tmp_path / name)

    return run


STOPPING = ["callback=[early_stopping]", "callback.early_stopping.patience=2"]


def test_early_stopping_keeps_the_best_student_and_says_which(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    stopped = run(*STOPPING, "trainer.max_steps=40")
    trained = stopped.fit()
    best, steps = stopped.best_step(), max(stopped.validated)
    assert best < steps < 40
    value, weights = stopped.validated[best]
    assert is_same(copied(trained.student), weights)
    assert not is_same(copied(trained.student), stopped.validated[steps][1])
    assert trained.facts == {
        "steps": steps,
        "kept_step": best,
        "best_step": best,
        "metric": "val/answer",
        "best": pytest.approx(value),
    }
    message = f"keeping the student of step {best} of {steps}, the best on validation: val/answer {value:.4g}"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("keep", ["best", "last", "null"])
def test_without_early_stopping_the_last_student_is_kept_unless_asked(
    keep: str, run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = run(f"keep={keep}", "trainer.max_steps=20")
    trained = ran.fit()
    best, last = ran.best_step(), max(ran.validated)
    assert best < last == 20
    kept = best if keep == "best" else last
    assert is_same(copied(trained.student), ran.validated[kept][1])
    assert (trained.facts["kept_step"], trained.facts["best_step"]) == (kept, best)
    message = capsys.readouterr().err
    assert (f"validation was best at step {best} of 20" in message) == (keep != "best")


def test_the_weighted_loss_is_compared_without_early_stopping(run: Any) -> None:
    ran = run("keep=best", "loss.kl.weight=3.0")
    facts = ran.fit().facts
    losses = {row["val/loss"]: row for row in logged_losses(ran.job.run_dir) if "val/loss" in row}
    row = losses[min(losses)]
    assert facts["best"] == pytest.approx(row["val/answer"] + 3 * row["val/kl"], rel=1e-5)


def test_an_averaged_student_is_kept_as_it_was_validated(run: Any) -> None:
    averaged = run("callback=[ema]", "callback.ema.update_starting_at_step=2", "keep=best", "trainer.max_steps=20")
    trained = averaged.fit()
    best = averaged.best_step()
    assert 2 < best < 20
    assert is_same(copied(trained.student), averaged.validated[best][1])


def test_only_trained_weights_are_kept(run: Any) -> None:
    frozen = run("keep=best")
    frozen.training.module.model.model.embed_tokens.requires_grad_(False)
    trained = frozen.fit()
    assert is_same(copied(trained.student), frozen.validated[frozen.best_step()][1])
    assert "model.embed_tokens.weight" not in frozen.training.best.weights
    assert "lm_head.weight" in frozen.training.best.weights


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [["keep=best"], STOPPING], ids=["best", "stopped"])
def test_a_run_resumed_at_any_step_keeps_the_same_student(
    overrides: list[str], run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints_module, "NUM_KEPT", 100)
    whole = run(*overrides, "trainer.max_steps=12", name="whole")
    trained = whole.fit()
    steps = trained.facts["steps"]
    for step in (1, trained.facts["kept_step"], trained.facts["kept_step"] + 1, steps - 1, steps):
        (tmp_path / f"from-{step}" / "checkpoints").mkdir(parents=True, exist_ok=True)
        for file in (tmp_path / "whole" / "checkpoints").glob(f"step-{step:08d}.*"):
            shutil.copy(file, tmp_path / f"from-{step}" / "checkpoints" / file.name)
        resumed = run(*overrides, "trainer.max_steps=12", name=f"from-{step}").fit()
        assert is_same(copied(resumed.student), copied(trained.student)), step
        assert resumed.facts == trained.facts, step


def test_a_checkpoint_that_kept_nothing_is_not_resumed_to_keep_the_best(run: Any) -> None:
    run("trainer.max_steps=2").fit()
    with pytest.raises(ConfigError, match='keep was null and is now "val/loss"'):
        run("keep=best").fit()


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["keep=best", "validate_every=100"], "keep needs a validation, but validate_every=100 is more than"),
        ([*STOPPING, "loss=[kl]"], "callback.early_stopping compares validations by val/answer"),
        ([*STOPPING, "callback.early_stopping.monitor=val/typo"], "val/typo, which is not measured"),
        (
            [*STOPPING, "callback.early_stopping.monitor=val/accuracy"],
            "mode=min keeps the worst student by val/accuracy; set callback.early_stopping.mode=max",
        ),
        ([*STOPPING, "callback.early_stopping.mode=max"], "mode=max keeps the worst student by val/answer"),
    ],
)
def test_a_choice_without_its_measurement_is_refused_before_the_teacher_is_asked(
    overrides: list[str], problem: str, root: Path, teacher_folder: Path, student_folder: Path
) -> None:
    with pytest.raises(ConfigError, match=problem):
        check_settings(compose(*tiny_overrides(root, teacher_folder, student_folder), *RUN, *overrides))


def test_a_choice_without_validation_lessons_is_refused(
    root: Path, tmp_path: Path, teacher_folder: Path, student_folder: Path
) -> None:
    job = prepare(compose(*tiny_overrides(root, teacher_folder, student_folder), *RUN, "keep=best"), tmp_path)
    curriculum = replace(build_curriculum(job), validation=[])
    with pytest.raises(ConfigError, match=r"keep compares validations by val/loss, which is not measured; measured: -"):
        build_training(job, curriculum, open_student(job.student_folder, **WHOLE_STUDENT), [])


@pytest.mark.parametrize("mode", ["min", "max"])
def test_validations_are_compared_as_early_stopping_compares_them(mode: Any) -> None:
    assert measure_of({}) == Measure("val/loss", "min")
    assert measure_of({"stop": EarlyStopping("val/accuracy", mode=mode)}) == Measure("val/accuracy", mode)


@pytest.mark.parametrize(
    ("mode", "expected"), [("min", [True, True, False, False]), ("max", [True, False, False, True])]
)
def test_only_finite_values_that_are_strictly_better_count(mode: Any, expected: list[bool]) -> None:
    measure = Measure("val/answer", mode)
    assert [measure.is_better(*pair) for pair in ((1.0, None), (1.0, 2.0), (2.0, 2.0), (3.0, 2.0))] == expected
    assert not any(measure.is_better(value, best) for value in (math.nan, math.inf, -math.inf) for best in (None, 1.0))
