"""Free texts of several lines through the whole command, checked by plain forward passes and sacrebleu."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from sacrebleu import sentence_chrf
from transformers import AutoModelForCausalLM

from distill.lessons.curriculum import prepare
from distill.prompts.rendering import Prompts
from distill.records import Example
from tests.conftest import run, tiny_overrides

pytestmark = pytest.mark.slow
NUM_ROWS, NUM_TEST = 30, 6


def overrides(root: Path, teacher: Path, student: Path) -> list[str]:
    """A task of texts whose teacher's words are recorded and scored by a second teacher."""
    rows = [
        {
            "question": f"Describe house {k}.",
            "answer": f"House {k} is old.\n\n  - It has {k} rooms.\n  - It is small.",
            "teacher_answer": f"An old house,\nwith {k} rooms",
        }
        for k in range(NUM_ROWS)
    ]
    path = root / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny = [o for o in tiny_overrides(root, teacher, student) if not o.startswith(("task", "teacher", "root"))]
    tiny += ["task=jsonl", f"task.path={path}", "task.read.kind=text", f"task.examples.num_test={NUM_TEST}"]
    tiny += ["task.examples.num_validation=4", "task.examples.num_labelled=20", "prompt.num_shots=0"]
    tiny += ["teacher=recorded", f"teacher.kind.files=[{path}]", "teacher.kind.rationale=null"]
    tiny += ["teacher@soft_teacher=causal_lm", f"soft_teacher.model={teacher}", "soft_teacher.kind.dtype=float32"]
    return [*tiny, "trainer.max_steps=8", "validate_every=2", "batch_size=4", "max_new_tokens=8"]


@torch.no_grad()
def plain_nats(model: Any, prompts: Prompts, question: str, answer: str) -> float:
    before = [*prompts.prefix("answer"), *prompts.question(Example(question), "answer")]
    ids = prompts.answer_ids(answer)
    logits_TV = model(torch.tensor([[*before, *ids]])).logits[0, len(before) - 1 : -1, : prompts.vocabulary_size]
    return -float(logits_TV.double().log_softmax(-1)[range(len(ids)), ids].sum())


def test_texts_are_taught_and_measured_by_their_likelihood(
    tmp_path: Path, teacher_folder: Path, student_folder: Path
) -> None:
    sweep = ["-m", "loss=[answer],[answer,kl]", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    done = run(tmp_path, *sweep, *overrides(tmp_path, teacher_folder, student_folder))
    assert done.returncode == 0, done.stderr
    assert "accuracy" not in done.stdout
    assert "nats per byte" in done.stdout
    folders = sorted(path.parent for path in (tmp_path / "sweep").glob("*/run.json"))
    assert len(folders) == 2
    for folder in folders:
        check_run(folder, tmp_path)
    report = (tmp_path / "sweep" / "report.md").read_text()
    assert "accuracy" not in report.replace(str(tmp_path), "")
    assert "cross-entropy, nats per byte" in report
    assert "recovers" not in report


def losses_of(folder: Path) -> list[str]:
    losses: list[str] = json.loads((folder / "run.json").read_text())["losses"]
    return losses


def check_run(folder: Path, root: Path) -> None:
    rows = json.loads((folder / "results.json").read_text())["rows"]
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == NUM_TEST
    assert not any("accuracy" in key for row in rows.values() for key in row)
    assert "val/accuracy" not in (folder / "metrics.csv").read_text()
    prompts = prepare(OmegaConf.load(folder / "config.yaml"), root / "again").prompts
    student = AutoModelForCausalLM.from_pretrained(folder / "student", dtype=torch.float32).eval()
    for line in lines:
        assert line["gold"].count("\n") == 3
        assert line["gold_nats"] == pytest.approx(
            plain_nats(student, prompts, line["question"], line["gold"]), rel=1e-4
        )
        nats = plain_nats(student, prompts, line["question"], line["teacher_answer"])
        assert line["teacher_nats"] == pytest.approx(nats, rel=1e-4)
        # A second teacher scores the teacher's words only for a loss that learns from it.
        assert (line["teacher_kl"] is not None) == ("kl" in losses_of(folder))
        assert 0 <= line["rouge_l"] <= 100
        assert line["chrf"] == sentence_chrf(line["student_answer"] or "", [line["gold"]]).score
        assert line["is_correct"] is None
    row, num_bytes = rows["student"], sum(len(line["gold"].encode()) for line in lines)
    total = math.fsum(line["gold_nats"] for line in lines)
    assert row["cross_entropy_per_byte"] == pytest.approx(total / num_bytes)
    assert row["cross_entropy"] < rows["before"]["cross_entropy"]
    if row["kl"] is not None:
        kl = math.fsum(line["teacher_kl"] for line in lines)
        assert row["kl"] == pytest.approx(kl / sum(line["teacher_tokens"] for line in lines))
    assert row["validation_cross_entropy_per_byte"] > 0
    chrfs = [sentence_chrf(line["teacher_answer"], [line["gold"]]).score for line in lines]
    assert rows["teacher"]["chrf"] == pytest.approx(math.fsum(chrfs) / len(chrfs))
