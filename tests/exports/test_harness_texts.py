"""The harness generates the texts that the run generated."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from sacrebleu import corpus_chrf

from distill.exports.folder import export
from tests.conftest import environment
from tests.exports.conftest import MakeRun
from tests.exports.test_example import lines


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("lm_eval"), reason="pip install lm-eval to compare with it")
def test_the_harness_compares_the_students_texts_with_the_gold_ones(make_run: MakeRun, tmp_path: Path) -> None:
    chat = [
        {"messages": [{"role": role, "content": text.format(k)} for role, text in turns]}
        for k in range(40)
        for turns in [
            (("user", "What is {}?"), ("assistant", "It is {}."), ("user", "More?"), ("assistant", "And {}\n  - x."))
        ]
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in chat))
    chat_run = ("task=chat", f"task.path={path}", "prompt=chat", "prompt.num_shots=0")
    run_dir = make_run(*chat_run)
    message = export(run_dir, tmp_path / "out")
    assert "evaluates with lm-eval" in message
    line = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", "pretrained=.", "--device", "cpu"]
    line += ["--tasks", "distill_chat", "--include_path", "lm_eval", "--log_samples", "--output_path", "results"]
    settings = environment(HF_DATASETS_OFFLINE="1", HF_HOME=str(tmp_path / "home"))
    done = subprocess.run(line, cwd=tmp_path / "out", env=settings, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    results = json.loads(next((tmp_path / "out" / "results").rglob("results_*.json")).read_text())
    predictions = {row["id"]: row for row in lines(run_dir / "predictions.jsonl")}
    samples = {sample["doc"]["id"]: sample for sample in lines(next((tmp_path / "out" / "results").rglob("samples_*")))}
    written = {id_: sample["filtered_resps"][0].strip() for id_, sample in samples.items()}
    assert written == {id_: row["student_answer"] for id_, row in predictions.items()}
    assert len(set(written.values())) > 1
    pairs = [(written[id_], row["gold"]) for id_, row in predictions.items()]
    expected = corpus_chrf([text for text, _ in pairs], [[gold for _, gold in pairs]]).score
    assert results["results"]["distill_chat"]["chrf,none"] == pytest.approx(expected)
