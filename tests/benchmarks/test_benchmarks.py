"""Every benchmark imports, and its smallest case runs."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import benchmarks
from benchmarks import cache, fidelity, heads, material, measure, pairs, peers, step, student_runs, students
from distill.cache.codecs.topk import TopK
from distill.records import SoftTargets
from tests.conftest import make_model

MODULES = sorted(path.stem for path in Path(benchmarks.__path__[0]).glob("*.py") if path.stem != "__init__")
on_tiny_models = pytest.mark.usefixtures("_tiny_material")


@pytest.mark.parametrize("name", MODULES)
def test_every_module_imports(name: str) -> None:
    if name == "peer_trl" and importlib.util.find_spec("trl") is None:
        pytest.skip("benchmarks/peer_trl.py runs in an environment with TRL")
    importlib.import_module(f"benchmarks.{name}")


def test_medians_do_not_count_the_first_repetition() -> None:
    ticks = itertools.accumulate([0, 100, 0, 1, 0, 3, 0, 2])  # start and end of each call
    assert measure.medians({"variant": lambda: None}, 3, clock=lambda: float(next(ticks))) == {"variant": 2.0}


def test_figures_are_printed_with_their_verdict_and_saved(
    saved_figures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bars = {"lower": 1.0, "higher": 3.0}
    measure.save("figures", [measure.Row(better, 2.0, bar, better) for better, bar in bars.items()])  # type: ignore[arg-type]
    assert capsys.readouterr().out.count("NOT met") == 2
    saved = json.loads((saved_figures / "figures.json").read_text())
    assert [(row["name"], row["value"], row["bar"]) for row in saved["rows"]] == [
        ("lower", 2.0, 1.0),
        ("higher", 2.0, 3.0),
    ]


def test_a_line_separator_inside_a_string_does_not_end_a_row(solutions_file: Path) -> None:
    examples = material.read_solutions(solutions_file)
    assert len(examples) == 48
    assert examples[3].question == "What is 3 and\u20283?"


def test_every_variant_of_the_head_runs() -> None:
    for variant in heads.HeadCase(num_positions=5, vocabulary=23, hidden=6, k=4).variants().values():
        variant()


def soft_targets(num_positions: int) -> SoftTargets:
    logprobs_NV = torch.randn(num_positions, 40).log_softmax(-1)
    return TopK(k=4, temperature=1.0).cut(logprobs_NV, torch.zeros(num_positions, dtype=torch.float64))


def test_readers_of_datasets_return_the_tensors_of_the_store(tmp_path: Path) -> None:
    records = [soft_targets(3) for _ in range(5)]
    codec = TopK(k=4, temperature=1.0)
    store = cache._store_records(tmp_path / "store", codec, records)
    stored = [store.soft_targets([(cache._record_key(index), "answer")]) for index in range(len(records))]
    expected = cache._training_tensors(store, [4, 0, 2])
    readers = peers.nested_lists(tmp_path / "records.arrow", stored)
    assert set(readers) == {"lists", "tensors"}
    for read in readers.values():
        assert all(torch.allclose(*both) for both in zip(read([4, 0, 2]), expected, strict=True))


def test_fidelity_is_measured_for_every_codec(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "_LARGE_VOCABULARY", 400)
    rows = list(fidelity.sizes("chat", [torch.randn(6, 300).log_softmax(-1)]))
    assert all(row.value >= 0 for row in rows)
    assert {row.name.split(",")[0] for row in rows if "bytes per token" in row.name} == {
        f"chat: {name}" for name in ("sampled", "topk k=16", "topk k=32", "topk k=64", "rs_kd n=64", "dense")
    }


def test_an_unknown_argument_prints_the_usage() -> None:
    for read in (step.Settings.read, cache.main, students.main):
        with pytest.raises(SystemExit, match=r"got: .*nothing=1"):
            read(["nothing=1"])


@pytest.mark.slow
@on_tiny_models
@pytest.mark.parametrize("case", ["step on solutions", "step on texts"])
def test_every_variant_of_a_step_runs(case: str, tmp_path: Path, solutions_file: Path) -> None:
    pair = pairs.PAIRS[case](tmp_path, solutions_file)
    pair = replace(pair, vocabulary_size=pair.teacher.config.vocab_size)  # the tiny head has padding rows
    for variant in pairs.step_variants(pair).values():
        variant()
    pair.save(tmp_path / "peer")
    assert (tmp_path / "peer" / "batch.safetensors").is_file()


@pytest.mark.slow
@on_tiny_models
def test_every_variant_of_turns_runs_and_their_sequences_are_shared(tmp_path: Path, solutions_file: Path) -> None:
    rows = {row.name: row.value for row in step._turn_rows(tmp_path, step.Settings(1, solutions_file))}
    tokens, _, time = rows
    assert "tokens" in tokens
    assert "time" in time
    assert 0.3 < rows[tokens] < 0.6


@pytest.mark.slow
@on_tiny_models
@pytest.mark.parametrize("case", pairs.TWO_TASKS)
def test_every_variant_of_two_tasks_runs(case: str, tmp_path: Path, solutions_file: Path) -> None:
    for variant in pairs.two_task_variants(case, tmp_path, solutions_file).values():
        variant()


@pytest.mark.slow
@on_tiny_models
@pytest.mark.filterwarnings("ignore")
def test_both_training_loops_time_their_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "_LOOP_STEPS", 6)
    for seconds in pairs.loop_step_seconds(tmp_path).values():
        assert len(seconds()) == 2
    assert 0 <= pairs.padding_fraction(tmp_path) < 1


@pytest.mark.slow
@on_tiny_models
def test_filling_and_reading_the_cache_is_measured(
    tmp_path: Path, solutions_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_RECORDS", 3 * cache._PER_SHARD)
    source = material.default_source(tmp_path)
    workload = material.default_workload(source, 4, 2)
    rows = list(cache.few_shot(tmp_path, workload, 1))
    rows += cache.generation(material.with_span(workload, "rationale"), 1)
    rows += cache.capture(tmp_path, source, material.read_solutions(solutions_file)[:4], 1)
    rows += cache.data_wait(source, workload.fill(tmp_path), workload.requests, 1)
    rows += cache.opening(tmp_path / "large", 1)
    assert len({row.name for row in rows}) == len(rows) > 15


@pytest.fixture
def tiny_students(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the models of `benchmarks.students` by a tiny one with as many layers."""
    folder = make_model(tmp_path / "model", seed=4, num_layers=30)
    monkeypatch.setattr(students.naming, "resolve", lambda name, root: folder)
    monkeypatch.setenv("DISTILL_ROOT", str(tmp_path))


@pytest.mark.slow
def test_students_of_every_arm_are_trained_once(
    tiny_students: None, solutions_file: Path, saved_figures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [f"data={solutions_file}", "num_steps=2", "batch_size=2", "num_held_out=3", "num_seeds=1"]
    students.main(arguments)
    notes = saved_figures / "benchmarks" / "students.jsonl"
    assert [json.loads(line)["arm"] for line in notes.read_text().split("\n") if line] == list(student_runs.ARMS)
    figures = (saved_figures / "students.json").read_text()
    monkeypatch.setattr(students, "_new_runs", None)  # no run is left to train
    notes.write_text(notes.read_text() + '\n{"settings": {"sha')  # an interrupted write
    students.main(arguments)
    assert (saved_figures / "students.json").read_text() == figures
