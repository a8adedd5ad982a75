"""What a run evaluates is the student on its disk; what cannot be saved is refused before the teacher is asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from transformers import AutoModelForCausalLM

from distill.errors import ConfigError
from distill.evaluation.answers import Evaluation
from distill.lessons.curriculum import Job, prepare
from distill.students import saving
from distill.students.saving import SavedStudentError
from distill.training import job as training_job
from tests.conftest import reviews, run, tiny_overrides
from tests.students.families import make_family

Configured = Callable[..., DictConfig]
SHORT = ("loss=[answer]", "trainer.max_steps=2", "batch_size=4", "validate_every=2", "max_new_tokens=4")
SHORT += (
    "trainer.log_every_n_steps=1",
    "num_samples=0",
    "evaluate_before=false",
    "optim.optimizer.lr=0.01",
    "optim.schedule.num_warmup_steps=0",
)


def distilled(job: Job) -> tuple[Any, Any]:
    """The facts and results of a run in this process, whose student is checked first as in the command."""
    facts: dict[str, Any] = {}
    training_job.check_student(job)
    return facts, training_job.distill(job, [], facts)


def predicted(job: Job, folder: Path) -> list[Any]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    evaluation = Evaluation(model, job.prompts, job.annotation_job.task, "direct", 4)
    return [(p.answer, p.confidence) for p in evaluation.predict(job.annotation_job.splits.test, {})]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_figures_are_those_of_the_student_on_disk(
    dtype: str, configured: Configured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = [*reviews(tmp_path), "teacher.calibrate=0", "overlap.words=9"]
    job = prepare(configured(*task, *SHORT, f"student.save_dtype={dtype}"), tmp_path / "run")
    evaluated: list[Any] = []
    predict = Evaluation.predict

    def kept(self: Evaluation, *arguments: Any) -> Any:
        predictions = predict(self, *arguments)
        evaluated.append((self.model, arguments[0], predictions))
        return predictions

    monkeypatch.setattr(Evaluation, "predict", kept)
    trained: list[Any] = []
    fit = training_job.fit

    def keep_trained(job: Job, training: Any) -> Any:
        trained.append(training.module.model)
        return fit(job, training)

    monkeypatch.setattr(training_job, "fit", keep_trained)
    facts, results = distilled(job)
    assert facts["saved"]["dtype"] == dtype
    assert (facts["saved"]["rounding"] == 0) == (dtype == "float32")
    test = job.annotation_job.splits.test
    [(model, _, predictions)] = [measured for measured in evaluated if measured[1] is test]
    assert model is not trained[0]
    on_disk = AutoModelForCausalLM.from_pretrained(job.run_dir / "student", dtype=torch.float32).state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, on_disk[name]), name
    assert [(p.answer, p.confidence) for p in predictions] == predicted(job, job.run_dir / "student")
    assert results["rows"]["student"]["size_bytes"] == saving.size_bytes(job.run_dir / "student")


def test_a_run_whose_student_is_another_one_on_disk_stops_and_keeps_its_checkpoint(
    configured: Configured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = prepare(configured(*SHORT), tmp_path / "run")
    fit = training_job.fit

    def fit_and_change(job: Job, training: Any) -> Any:
        trained = fit(job, training)
        training.module.model.model.layers[0].self_attn.scaling *= 1.5
        return trained

    monkeypatch.setattr(training_job, "fit", fit_and_change)
    with pytest.raises(SavedStudentError, match=r"logits differ by up to \d"):
        distilled(job)
    assert list((job.run_dir / "checkpoints").glob("step-*.ckpt"))
    assert not (job.run_dir / "student").exists()
    assert not (job.run_dir / "results.json").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["student.keep_layers=[1,2]"], "first_k_dense_replace=1"),
        (["student.save_dtype=int4"], "student.save_dtype=int4: expected null or one of"),
    ],
)
def test_a_student_that_cannot_be_saved_is_refused_before_the_teacher_is_asked(
    overrides: list[str], message: str, configured: Configured, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_family(tmp_path / "source", "deepseek_v3")
    job = prepare(configured(f"student.model={source}", *SHORT, *overrides), tmp_path / "run")
    with pytest.raises(ConfigError, match=message):
        distilled(job)
    assert len(job.annotation_job.store) == 0
    assert "annotating" not in capsys.readouterr().err
    assert not list(job.run_dir.iterdir())


@pytest.mark.slow
def test_the_evaluate_command_repeats_the_accuracy_of_the_run(tmp_path: Path, teacher_folder: Path) -> None:
    source = make_family(tmp_path / "source", "deepseek_v3")
    tiny = [o for o in tiny_overrides(tmp_path, teacher_folder, source) if not o.startswith("task")]
    tiny += [*reviews(tmp_path), *SHORT, "teacher.calibrate=0", "student.keep_layers=[0,2]"]
    tiny += [f"task.examples.num_{name}=8" for name in ("labelled", "unlabelled", "validation", "test")]
    tiny += ["trainer.max_steps=20", "student.save_dtype=bfloat16"]
    done = run(tmp_path, *tiny, f"hydra.run.dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    student = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]["student"]
    again = [o for o in tiny if o.startswith(("task", "root"))] + [f"hydra.run.dir={tmp_path / 'again'}"]
    done = run(tmp_path, f"model={tmp_path / 'run' / 'student'}", "max_new_tokens=4", *again, command="evaluate")
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "again" / "evaluation.json").read_text())
    for key in ("accuracy", "generated_accuracy", "num_examples", "parameters", "size_bytes", "ece"):
        assert row[key] == student[key], key
