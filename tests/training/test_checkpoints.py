"""A checkpoint is complete, of the same run, and enough to go on as if nothing had happened."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.app import preemption
from distill.errors import ConfigError, PreemptedError
from distill.lessons.loader import Arrangement
from distill.training import checkpoints as checkpoints_module
from distill.training.checkpoints import Checkpoints, WholeFiles, checked, last, newest, step_of
from distill.training.curves import Curves
from distill.training.fit import run_preflight
from distill.training.preflight import Finding
from tests.conftest import tiny_overrides
from tests.training.test_resume import Run, weights_equal

pytestmark = pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint")
RUN = ["loss=[answer]", "batch_size=4", "microbatch_size=2", "trainer.max_steps=4", "trainer.log_every_n_steps=1"]
RUN += ["validate_every=2", "checkpoint_every=1", "optim.optimizer.lr=0.01", "optim.schedule.num_warmup_steps=2"]
RUN += ["teacher.num_rationales=0", "num_samples=0"]
Start = Callable[..., Run]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture
def start(root: Path, tmp_path: Path, teacher_folder: Path, student_folder: Path) -> Start:
    def start(*overrides: str, name: str = "run") -> Run:
        return Run(tmp_path / name, *tiny_overrides(root, teacher_folder, student_folder), *RUN, *overrides)

    return start


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_a_resumed_run_takes_the_same_steps_to_the_same_weights(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints_module, "NUM_KEPT", 9)
    whole = start("validate_every=3", name="whole")
    weights = whole.fit()
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for file in (tmp_path / "whole" / "checkpoints").glob("step-00000002.*"):
        shutil.copy(file, tmp_path / "run" / "checkpoints")
    resumed = start("validate_every=3")
    assert weights_equal(resumed.fit(), weights)
    assert resumed.steps_seen == [seen for seen in whole.steps_seen if seen[0] >= 2]
    assert resumed.logged(0) == whole.logged(2)


def test_what_is_drawn_in_a_step_depends_on_seed_step_and_microbatch(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as dropout: a resumed run draws as the uninterrupted one does, and no two microbatches draw the same."""
    drawn: dict[str, list[int]] = {}
    seen: dict[str, list[tuple[str, ...]]] = {}
    for name, overrides in {"zero": [], "same": [], "one": ["seed=1"]}.items():
        run = start(*overrides, "trainer.max_steps=2", name=name)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "manual_seed", drawn.setdefault(name, []).append)
            run.fit()
        seen[name] = [ids for _, ids in run.steps_seen]
    assert drawn["zero"] == drawn["same"]
    assert seen["zero"] == seen["same"] != seen["one"]  # the order, too
    assert len({*drawn["zero"], *drawn["one"]}) == 8  # two runs of two steps of two microbatches


def test_a_check_that_failed_ends_the_run_before_training(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    run = start("trainer.max_steps=1")
    failed = Finding("shift", False, "found", "expected", "Do this", True)
    monkeypatch.setattr("distill.training.fit.preflight", lambda _: [failed])
    with pytest.raises(ConfigError, match="shift: found"):
        run_preflight(run.job, run.training)


def test_training_and_validation_read_their_own_split(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    run = start("trainer.max_steps=3", "validate_every=3")
    module, validation_step = run.training.module, run.training.module.validation_step
    validated: list[str] = []
    monkeypatch.setattr(module, "validation_step", lambda b: (validated.extend(b.example_ids), validation_step(b))[1])
    run.fit()
    splits = run.job.annotation_job.splits
    assert set(validated) == {example.id for example in splits.validation}
    trained = {id_ for _, ids in run.steps_seen for id_ in ids}
    assert trained <= {example.id for example in splits.train}


def test_the_order_and_the_balance_of_the_configuration_are_those_of_the_lessons(start: Start) -> None:
    run = start("order=short_first", "balance=answer", "trainer.max_steps=1")
    assert run.training.data._arrangement == Arrangement("short_first", "answer")


def test_the_newest_two_checkpoints_are_kept_and_the_last_step_is_one(start: Start, tmp_path: Path) -> None:
    start().fit()
    assert files(tmp_path / "run") == [f"step-0000000{step}.{end}" for step in (3, 4) for end in ("ckpt", "json")]
    start("checkpoint_every=100", name="rare").fit()
    assert step_of(last(tmp_path / "rare" / "checkpoints")) == 4


def test_a_damaged_checkpoint_is_passed_over_and_one_of_another_run_is_refused(start: Start, tmp_path: Path) -> None:
    run = start("trainer.max_steps=2")
    run.fit()
    folder, identity, warnings = tmp_path / "run" / "checkpoints", run.training.identity, list[str]()
    damaged = folder / "step-00000002.ckpt"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(bytes(content))
    assert not checked(damaged, identity)
    assert newest(folder, identity, warnings.append) == folder / "step-00000001.ckpt"
    assert warnings == [f"{damaged} is damaged; using the checkpoint before it"]
    with pytest.raises(ConfigError, match="seed was 0 and is now 1"):
        checked(folder / "step-00000001.ckpt", dict(identity) | {"seed": 1})


def test_a_checkpoint_that_cannot_be_written_whole_leaves_the_one_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "step-00000001.ckpt"
    WholeFiles().save_checkpoint({"step": 1}, path)

    def half(_: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half)
        with pytest.raises(OSError, match="No space left"):
            WholeFiles().save_checkpoint({"step": 2}, path)
    assert WholeFiles().load_checkpoint(path) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_run_that_stopped_early_does_not_go_on(start: Start) -> None:
    stopping = ["callback=[early_stopping]", "callback.early_stopping.patience=1", "optim.optimizer.lr=0.5"]
    stopping += ["validate_every=1", "trainer.max_steps=20"]
    first = start(*stopping)
    weights = first.fit()
    assert max(step for step, _ in first.steps_seen) < 19
    again = start(*stopping)
    assert weights_equal(again.fit(), weights)
    assert again.steps_seen == []


def test_a_stop_request_saves_the_step_that_is_complete(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start("checkpoint_every=100")
    monkeypatch.setattr(preemption, "is_stop_requested", lambda: len(run.steps_seen) >= 4)  # two microbatches a step
    with pytest.raises(PreemptedError, match="stopped on request after step 2"):
        run.fit()
    assert files(tmp_path / "run") == ["step-00000002.ckpt", "step-00000002.json"]


def test_the_time_of_the_earlier_parts_of_a_run_counts(tmp_path: Path) -> None:
    part = Checkpoints(tmp_path, every=1, identity={})
    part.load_state_dict({"seconds": 100.0})
    assert 100 <= part.state_dict()["seconds"] < 101
    assert part.seconds >= 100


def test_a_resumed_curve_has_the_rows_before_the_next_step(tmp_path: Path) -> None:
    curves = Curves(tmp_path)
    for step in range(4):
        curves.log_metrics({"train/answer": float(step)}, step=step)
    curves.save()
    resumed = Curves(tmp_path)
    resumed.resume(2)
    assert [int(row["step"]) for row in resumed.experiment.metrics] == [0, 1]
