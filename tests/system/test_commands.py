"""The commands end to end, as a user starts them."""

from __future__ import annotations

import html
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill.errors import ConfigError
from distill.evaluation.answers import Evaluation
from distill.lessons.curriculum import build_curriculum, prepare
from distill.students.causal_lm import open_student, weights_hash
from distill.training.fit import build_training, fit
from tests.conftest import WHOLE_STUDENT, compose, environment, reviews, run, tiny_overrides

pytestmark = pytest.mark.slow


def only_run(root: Path, number: int = 1) -> Path:
    """The latest run folder."""
    folders = sorted((root / "runs").iterdir())
    assert len(folders) == number
    return folders[-1]


def test_a_run_saves_a_student_and_a_second_run_makes_no_teacher_call(
    tmp_path: Path, teacher_folder: Path, student_folder: Path
) -> None:
    tiny = [o for o in tiny_overrides(tmp_path, teacher_folder, student_folder) if "root=" not in o]
    tiny += ["student.model=" + str(teacher_folder), "student.keep_layers=[0,2]", "trainer.max_steps=4", "batch_size=4"]
    tiny += ["trainer.log_every_n_steps=1"]
    tiny += ["loss=[answer,kl,rationale]", "validate_every=2", "max_new_tokens=6"]
    first = run(tmp_path, *tiny)
    assert first.returncode == 0, first.stderr
    assert ", annotating " in first.stderr
    assert "Traceback" not in first.stderr
    folder = only_run(tmp_path)
    second = run(tmp_path, *tiny, "seed=1")
    assert second.returncode == 0, second.stderr
    assert "the teacher is not loaded (0 calls)" in second.stderr

    results: Any = json.loads((folder / "results.json").read_text())
    assert set(results["rows"]) == {"teacher", "before", "student"}
    assert results["rows"]["student"]["num_examples"] == 4
    run_facts = json.loads((folder / "run.json").read_text())
    assert run_facts["losses"] == ["answer", "kl", "rationale"]
    assert yaml.safe_load((folder / "config.yaml").read_text())["batch_size"] == 4
    assert (folder / "report.html").stat().st_size > 1000
    assert len((folder / "predictions.jsonl").read_text().splitlines()) == 4

    # Training the same configuration in this process gives the saved weights.
    config = OmegaConf.load(folder / "config.yaml")
    job = prepare(config, tmp_path / "again")
    trained = open_student(job.student_folder, **WHOLE_STUDENT | {"keep_layers": [0, 2]})
    start_hash = weights_hash(trained)
    fit(job, build_training(job, build_curriculum(job), trained, []))
    reopened = AutoModelForCausalLM.from_pretrained(folder / "student", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    ids = tokenizer("Question: How many?", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.allclose(reopened(ids).logits, trained.eval()(ids).logits, atol=1e-5)
    assert run_facts["start"] == start_hash != weights_hash(reopened)
    assert reopened.config.num_hidden_layers == 2


def test_a_lora_student_is_evaluated_as_saved(tmp_path: Path, teacher_folder: Path, student_folder: Path) -> None:
    tiny = [*tiny_overrides(tmp_path, teacher_folder, student_folder), "trainer.max_steps=3", "batch_size=4"]
    tiny += ["student.lora={_target_: peft.LoraConfig, r: 4, lora_alpha: 8, target_modules: all-linear}"]
    tiny += ["student.gradient_checkpointing=true", "optim.optimizer.lr=0.05", "optim.schedule.num_warmup_steps=0"]
    process = run(tmp_path, *tiny, "loss=[answer,kl]", "max_new_tokens=6")
    assert process.returncode == 0, process.stderr
    folder = only_run(tmp_path)
    saved_texts = [
        json.loads(line)["student_rationale"] for line in (folder / "predictions.jsonl").read_text().splitlines()
    ]
    job = prepare(OmegaConf.load(folder / "config.yaml"), tmp_path / "again")
    for model_folder, is_same in ((folder / "student", True), (student_folder, False)):
        model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
        evaluation = Evaluation(model, job.prompts, job.annotation_job.task, "direct", 6)
        assert (evaluation.rationales(job.annotation_job.splits.test) == saved_texts) == is_same


def test_a_student_of_another_vocabulary_uses_no_soft_targets(
    tmp_path: Path, teacher_folder: Path, student_folder: Path
) -> None:
    other = shutil.copytree(student_folder, tmp_path / "other")
    saved = json.loads((other / "tokenizer.json").read_text())
    vocabulary = saved["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(saved))
    tiny = [*tiny_overrides(tmp_path, teacher_folder, other)[1:], *reviews(tmp_path), "teacher.calibrate=0"]
    with pytest.raises(ConfigError, match="cannot share soft targets"):
        prepare(compose(*tiny, "loss=[answer,kl]"), tmp_path)
    short_run = ["loss=[answer]", "trainer.max_steps=2", "batch_size=4", "max_new_tokens=4", "num_samples=0"]
    process = run(tmp_path, *tiny, *short_run)
    assert process.returncode == 0, process.stderr
    rows = json.loads((only_run(tmp_path) / "results.json").read_text())["rows"]
    assert rows["student"]["agreement"] is not None
    assert rows["before"]["kl"] is rows["student"]["kl"] is None
    assert rows["bag_of_words"]["targets"] == {"labels": 6}


def test_a_reasoned_run_writes_its_reasoning(tmp_path: Path, teacher_folder: Path, student_folder: Path) -> None:
    tiny = [*tiny_overrides(tmp_path, teacher_folder, student_folder), "trainer.max_steps=2", "batch_size=4"]
    process = run(
        tmp_path, *tiny, "task.answer_mode=reasoned", "loss=[answer,rationale]", "max_new_tokens=6", "num_samples=2"
    )
    assert process.returncode == 0, process.stderr
    rows = [json.loads(line) for line in (only_run(tmp_path) / "predictions.jsonl").read_text().splitlines()]
    assert all(isinstance(row["student_rationale"], str) for row in rows)


def test_the_annotate_command_fills_the_cache_that_training_reads(
    tmp_path: Path, teacher_folder: Path, student_folder: Path
) -> None:
    tiny = [*tiny_overrides(tmp_path, teacher_folder, student_folder), "trainer.max_steps=1"]
    tiny = [option for option in tiny if not option.startswith("tracking")]
    train_only = ("student", "trainer", "loss")
    process = run(tmp_path, *(o for o in tiny if not o.startswith(train_only)), command="annotate")
    assert process.returncode == 0, process.stderr
    assert "records" in process.stdout


def test_a_configuration_error_is_one_message_and_exit_code_2(
    tmp_path: Path, teacher_folder: Path, student_folder: Path
) -> None:
    tiny = tiny_overrides(tmp_path, teacher_folder, student_folder)
    process = run(tmp_path, *tiny, "loss=[kl]", "loss.kl.temperature=2.0")
    assert process.returncode == 2
    assert "cache=dense" in process.stderr
    assert "Traceback" not in process.stderr
    assert process.stderr.count("Error") == 1


def test_a_sweep_ends_in_its_report(tmp_path: Path, teacher_folder: Path, student_folder: Path) -> None:
    tiny = [*tiny_overrides(tmp_path, teacher_folder, student_folder), "trainer.max_steps=2", "num_samples=0"]
    process = run(tmp_path, "-m", *tiny, "loss=[answer],[answer,teacher_answer]", "evaluate_before=false")
    assert process.returncode == 0, process.stderr
    (page,) = tmp_path.glob("sweeps/*/report.html")
    assert "labels + teacher's answers" in html.unescape(page.read_text())
    assert f"report  {page}" in process.stdout
    assert "over hard labels" in process.stdout


COUNT_STUDENTS = """
import atexit, gc, os
gc.disable()  # only the command itself collects garbage
from distill import train
from distill.app.command import command
from distill.training.module import StudentModule

def print_num_students():
    print("STUDENTS", sum(isinstance(item, StudentModule) for item in gc.get_objects()))

atexit.register(print_num_students)
command("train", train.main)
"""


def test_a_sweep_keeps_no_student_in_memory(tmp_path: Path, teacher_folder: Path, student_folder: Path) -> None:
    tiny = [*tiny_overrides(tmp_path, teacher_folder, student_folder), "trainer.max_steps=1", "num_samples=0"]
    line = [sys.executable, "-c", COUNT_STUDENTS, "-m", *tiny, "seed=0,1", "evaluate_before=false", "loss=[answer]"]
    process = subprocess.run(
        line, env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert process.returncode == 0, process.stderr
    assert "STUDENTS 0" in process.stdout


def test_preflight_trains_nothing_and_prints_its_findings(
    tmp_path: Path, teacher_folder: Path, student_folder: Path
) -> None:
    tiny = tiny_overrides(tmp_path, teacher_folder, student_folder)
    process = run(tmp_path, *tiny, "preflight=true")
    assert process.returncode == 0, process.stderr
    assert "self-KL" in process.stderr
    assert "preflight passed" in process.stdout
    folder = only_run(tmp_path)
    assert not (folder / "student").exists()
    assert "self-KL" in {line["check"] for line in json.loads((folder / "run.json").read_text())["preflight"]}


def test_a_failed_preflight_ends_the_run_before_training(
    tmp_path: Path, teacher_folder: Path, student_folder: Path
) -> None:
    tiny = tiny_overrides(tmp_path, teacher_folder, student_folder)
    process = run(tmp_path, *tiny, "student.freeze=[model,lm_head]")
    assert process.returncode == 2, process.stderr
    assert "Traceback" not in process.stderr
    assert "gradient" in process.stderr
    assert "steps of" not in process.stderr  # the first line of training
