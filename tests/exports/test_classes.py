"""An exported student with a class head: its example, its card, and its ONNX files as onnxruntime runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from distill.errors import ConfigError
from distill.evaluation.job import evaluate
from distill.exports import onnx
from distill.exports.folder import ONLY_WEIGHTS, Files, export
from distill.models.classifiers import class_logits, load_classifier
from distill.training.job import train
from tests.conftest import compose, environment
from tests.exports.conftest import MakeRun
from tests.students.encoders import LABELS, PADDING, make_body, make_encoder
from tests.students.test_classifier import overrides

pytestmark = pytest.mark.slow  # torch's exporter takes seconds, and a run is trained


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path) -> Path:
    """The run of a tiny encoder."""
    root = tmp_path_factory.mktemp("run")
    config = compose(*overrides(root, teacher_folder, make_body(root / "body"), "task.examples.num_test=10"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distill.app.config.run_dir", lambda: root / "run")
        patch.setattr("distill.app.config.sweep_name", lambda: None)
        train(config)
    return root / "run"


def files(**changes: Any) -> Files:
    return replace(Files(("safetensors", "onnx"), (), 200, 0.01, Path(), onnx.KINDS), **changes)


def predictions(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "predictions.jsonl").read_text().splitlines()]


def test_the_example_answers_as_the_run_did_with_transformers_alone(run_dir: Path, tmp_path: Path) -> None:
    usage = export(run_dir, tmp_path / "out", ONLY_WEIGHTS)
    assert str(tmp_path / "out" / "example.py") in usage
    rows = predictions(run_dir)
    command = [sys.executable, "-P", str(tmp_path / "out" / "example.py"), *(row["question"] for row in rows)]
    alone = environment(PYTHONPATH="")
    done = subprocess.run(command, env=alone, capture_output=True, text=True, cwd=tmp_path, check=True)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["answer"] for answer in answers] == [row["student_answer"] for row in rows]
    confidence = [answer["probabilities"][answer["answer"]] for answer in answers]
    assert confidence == pytest.approx([row["student_confidence"] for row in rows], abs=1e-3)


def test_the_card_says_that_it_classifies_and_names_the_classes(run_dir: Path, tmp_path: Path) -> None:
    export(run_dir, tmp_path / "out", files())
    card = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["pipeline_tag"] == "text-classification"
    assert "- Choices: negative, positive" in card
    assert "`student.int8.onnx`" in card
    code = card.split("```python\n")[2].split("```")[0].replace('"."', repr(str(tmp_path / "out")))
    code = code.replace('"student.', f'"{tmp_path}/out/student.')
    outputs: dict[str, Any] = {}
    exec(code.replace("session.run(", "logits = session.run("), outputs)  # the card's own lines
    assert np.isfinite(outputs["logits"][0]).all()


def test_files_answer_in_onnxruntime_as_the_student_and_are_measured(run_dir: Path, tmp_path: Path) -> None:
    export(run_dir, tmp_path / "out", files(max_loss=1.0))
    plain, rounded = json.loads((tmp_path / "out" / "export.json").read_text())["files"]
    rows = predictions(run_dir)
    accuracy = sum(row["is_correct"] for row in rows) / len(rows)
    assert plain["accuracy"] == plain["student_accuracy"] == rounded["student_accuracy"] == accuracy
    assert (plain["agreement"], plain["num_examples"]) == (1, len(rows))
    assert plain["kl"] < 1e-9 < rounded["kl"]
    assert rounded["size_bytes"] < plain["size_bytes"] == (tmp_path / "out" / plain["file"]).stat().st_size
    assert (tmp_path / "out" / "export.json").read_text().count("onnxruntime ") == 2


@pytest.mark.parametrize("family", ["RoBERTa", "DeBERTa-v2", "Qwen3"])
def test_a_file_computes_what_the_model_does_for_texts_of_any_length_and_number(family: str, tmp_path: Path) -> None:
    model = load_classifier(make_encoder(tmp_path, family), torch.float32, LABELS, PADDING).eval()
    onnx.write(model, tmp_path / "student.onnx", "float32")
    engine = onnx.OnnxClassifier(tmp_path / "student.onnx")
    texts = [list(range(5, 5 + length)) for length in (1, 3, 17, 40)]
    with torch.no_grad():
        alone = torch.cat([class_logits(model, [ids], PADDING) for ids in texts])
    assert np.abs(np.stack([engine.logits(ids) for ids in texts]) - alone.numpy()).max() < 1e-5
    ids_BT, mask_BT = np.full((4, 40), PADDING), np.zeros((4, 40), np.int64)
    for row, ids in enumerate(texts):
        ids_BT[row, : len(ids)], mask_BT[row, : len(ids)] = ids, 1
    (together,) = engine._session.run(None, {"input_ids": ids_BT, "attention_mask": mask_BT})
    assert np.abs(together - alone.numpy()).max() < 1e-5


def test_a_file_that_loses_too_much_does_not_stay(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"student\.float32\.onnx loses more than max_loss=-1\.0 and was removed"):
        export(run_dir, tmp_path / "out", files(onnx=("float32",), max_loss=-1.0))
    assert not list((tmp_path / "out").glob("*.onnx"))
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_file_that_cannot_be_opened_is_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    with pytest.raises(ConfigError, match=r"onnxruntime cannot open broken\.onnx"):
        onnx.OnnxClassifier(tmp_path / "broken.onnx")


def test_formats_of_other_students_are_refused(run_dir: Path, tmp_path: Path, make_run: MakeRun) -> None:
    with pytest.raises(ConfigError, match="format=gguf is not supported for a student that has a class head"):
        export(run_dir, tmp_path / "out", files(formats=("gguf",)))
    with pytest.raises(ConfigError, match="format=onnx is not supported for a student that writes text"):
        export(make_run(), tmp_path / "out", files())
    assert not (tmp_path / "out").exists()


def test_the_evaluate_command_finds_the_accuracy_of_the_run(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = yaml.safe_load((run_dir / "config.yaml").read_text())["task"]["examples"]
    task = [f"task.examples.{key}={saved[key]}" for key in ("file", "num_labelled", "num_unlabelled")]
    task += [f"task.examples.{key}={saved[key]}" for key in ("num_validation", "num_test")]
    monkeypatch.setattr("distill.app.config.run_dir", lambda: tmp_path)
    config = compose(f"model={run_dir / 'student'}", *task, name="evaluate")
    rows = predictions(run_dir)
    assert evaluate(config) == sum(row["is_correct"] for row in rows) / len(rows)
    assert "generated accuracy" not in capsys.readouterr().out
    other = make_encoder(tmp_path / "other", labels=("bad", "good"))
    config.model = str(other)
    with pytest.raises(ConfigError, match="has the classes bad, good, and the task the choices negative, positive"):
        evaluate(config)
