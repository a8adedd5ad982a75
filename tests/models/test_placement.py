"""Devices have one owner. Without a second device, a model that changes its type stands for one that moves."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from torch import nn

import distill
from distill.annotation.annotation_job import open_annotation_job
from distill.annotation.fill import fill, loaded
from distill.annotation.positions import ALL_POSITIONS
from distill.annotation.teacher_module import TeacherModule
from distill.evaluation.answers import Evaluation, speeds
from distill.lessons.curriculum import examples_to_annotate, prepare
from distill.models import loading, placement
from distill.models.batches import BatchLimit
from distill.prompts.rendering import Prompts
from distill.records import Example
from tests.conftest import LAYOUT, arithmetic
from tests.teachers.conftest import answer_requests, is_close, make_teacher

Configured = Callable[..., DictConfig]
OWNERS = {"models/placement.py", "app/machine.py"}  # the second one measures memory
QUESTIONS = [Example(f"What is {number} plus two?", "5") for number in range(3)]


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A device to which models move by becoming float64; the list says what came and went."""
    moves: list[str] = []
    plain = nn.Module.to

    def to(model: nn.Module, target: Any) -> nn.Module:
        if not isinstance(target, torch.device):
            return plain(model, target)
        moves.append(target.type)
        return plain(model, torch.float64 if target.type == "xpu" else torch.float32)

    monkeypatch.setattr(nn.Module, "to", to)
    monkeypatch.setattr(placement, "device", lambda: torch.device("xpu"))
    return moves


def dtypes_seen(model: nn.Module) -> list[torch.dtype]:
    """Types of the hidden states that a model computes from now on."""
    seen: list[torch.dtype] = []
    model.base_model.register_forward_hook(lambda *arguments: seen.append(arguments[-1].last_hidden_state.dtype))
    return seen


def test_only_the_owner_of_devices_names_one() -> None:
    root = Path(distill.__file__).parent
    naming_one = {str(path.relative_to(root)) for path in root.rglob("*.py") if "cuda" in path.read_text()}
    assert naming_one == OWNERS


@pytest.mark.parametrize(("rank", "index"), [("", 0), ("1", 1), ("5", 1)])
def test_each_process_of_a_machine_has_an_accelerator(rank: str, index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("xpu"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        monkeypatch.delenv("SLURM_LOCALID", raising=False)
        monkeypatch.setenv(name, rank)
        assert placement.device() == torch.device("xpu", index)


def test_a_model_is_back_where_it_was_after_it_ran_elsewhere(elsewhere: list[str]) -> None:
    model = nn.Linear(2, 2)
    seen: list[torch.dtype] = []
    with suppress(KeyError), placement.on_device(model):
        seen.append(model.weight.dtype)
        raise KeyError
    assert seen == [torch.float64]
    assert model.weight.dtype == torch.float32
    assert elsewhere == ["xpu", "cpu"]


def test_a_model_that_does_not_fit_runs_where_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def to(model: nn.Module, target: torch.device) -> nn.Module:
        if target.type == "xpu":
            raise torch.OutOfMemoryError
        return model

    monkeypatch.setattr(nn.Module, "to", to)
    with placement.on_device(nn.Linear(2, 2), torch.device("xpu")):
        pass
    assert "does not fit into the memory of xpu, so it runs on cpu" in capsys.readouterr().err


def test_a_trainer_that_moves_its_module_does_not_move_the_teacher(teacher_folder: Path, prompts: Prompts) -> None:
    teacher = make_teacher(teacher_folder, prompts)
    model = teacher.load()
    module = TeacherModule(teacher, ALL_POSITIONS, BatchLimit(2)).train().to("meta")
    assert not list(module.parameters())
    assert model.device == torch.device("cpu")
    assert not model.training


def test_readers_are_made_anew_after_their_model_has_moved(teacher_folder: Path, prompts: Prompts) -> None:
    prompts = Prompts(prompts.tokenizer, LAYOUT, arithmetic().shots(), max_length=256, too_long="drop")
    teacher = make_teacher(teacher_folder, prompts, *QUESTIONS, constrain=True)
    model = teacher.load()
    requests = answer_requests(prompts, QUESTIONS)
    before = teacher.annotate(requests)
    model.double()
    after = teacher.annotate(requests)
    model.float()
    again = teacher.annotate(requests)
    assert all(is_close(a, b, 1e-4) and is_close(a, c, 0) for a, b, c in zip(before, after, again, strict=True))


def test_annotation_runs_on_the_device_for_all_spans_and_the_measurement_of_speed(
    configured: Configured, tmp_path: Path, elsewhere: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = prepare(configured("loss=[kl,rationale]"), tmp_path / "run")
    seen: list[torch.dtype] = []
    load = job.annotation_job.teacher.load

    def watched() -> nn.Module:
        nonlocal seen
        model = load()
        seen = dtypes_seen(model)
        return model

    monkeypatch.setattr(job.annotation_job.teacher, "load", watched)
    fill(job.annotation_job, examples_to_annotate(job))
    assert set(seen) == {torch.float64}
    assert job.annotation_job.store.costs[0]["ms_per_example"] is not None


def test_evaluation_and_the_measurement_of_speed_run_on_the_device(
    student_folder: Path, prompts: Prompts, elsewhere: list[str]
) -> None:
    model = loading.load(student_folder, torch.float32)
    seen = dtypes_seen(model)
    evaluation = Evaluation(model, prompts, arithmetic(), "direct", 4)
    evaluation.predict(QUESTIONS, {})
    evaluation.rationales(QUESTIONS)
    speeds({"model": evaluation}, QUESTIONS)
    assert set(seen) == {torch.float64}
    assert model.dtype == torch.float32


@contextmanager
def without_automatic_collection() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def test_a_closed_teacher_is_out_of_memory_at_once(configured: Configured, tmp_path: Path) -> None:
    """Also when it is part of a cycle of references, which only a collection breaks."""
    job = open_annotation_job(configured())
    with without_automatic_collection():
        with loaded(job.teacher) as model:
            model.itself = [model]
            weight = weakref.ref(next(model.parameters()))
            del model
        assert weight() is None
