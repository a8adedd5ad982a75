"""Time per answer: with its spread, and with a key of what decides it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from distill.evaluation.answers import Evaluation, model_row, saved_type, speeds
from distill.evaluation.architecture import architecture
from distill.lessons.curriculum import prepare
from distill.models import loading
from distill.records import Example


def key(folder: Path, work: object = (1, 2), dtype: torch.dtype = torch.float32, **changes: int) -> str:
    config = AutoConfig.from_pretrained(folder)
    for name, value in changes.items():
        setattr(config, name, value)
    config._name_or_path = f"a/place/{dtype}"
    return architecture(AutoModelForCausalLM.from_config(config).to(dtype), work)


def test_models_that_differ_in_weights_and_names_alone_share_an_architecture(student_folder: Path) -> None:
    first = key(student_folder)
    assert key(student_folder) == first  # other random weights
    assert key(student_folder, num_hidden_layers=1) != first
    assert key(student_folder, dtype=torch.bfloat16) != first
    assert key(student_folder, (1, 3)) != first


def test_speeds_have_a_spread_and_equal_keys_for_equal_models(
    student_folder: Path, configured: Callable[..., DictConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill.evaluation.answers._LATENCY_ROUNDS", 3)
    job = prepare(configured(), tmp_path / "run")
    model = loading.load(student_folder, torch.float32)
    evaluation = Evaluation(model, job.prompts, job.annotation_job.task, "direct", 6)
    rows = speeds({"one": evaluation, "two": evaluation}, job.annotation_job.splits.test[:2])
    assert rows["one"]["architecture"] == rows["two"]["architecture"]
    for row in rows.values():
        assert 0 < row["ms_fastest"] <= row["ms_per_example"] <= row["ms_slowest"]
    other = speeds({"one": evaluation}, job.annotation_job.splits.test[:1])["one"]
    assert other["architecture"] != rows["one"]["architecture"]  # other questions


def test_long_answers_are_timed_on_fewer_examples(
    student_folder: Path, configured: Callable[..., DictConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, model = prepare(configured(), tmp_path / "run"), loading.load(student_folder, torch.float32)
    evaluation = Evaluation(model, job.prompts, job.annotation_job.task, "direct", 5)
    first, *_ = test = job.annotation_job.splits.test[:3]
    assert evaluation.answering()(first) > 2

    def architecture_for(num_tokens: int, examples: Sequence[Example]) -> str:
        monkeypatch.setattr("distill.evaluation.answers._LATENCY_TOKENS", num_tokens)
        return str(speeds({"student": evaluation}, examples)["student"]["architecture"])

    assert architecture_for(2, test) == architecture_for(100, test[:1])
    assert architecture_for(100, test) != architecture_for(100, test[:1])


def test_models_that_write_answers_of_other_lengths_are_timed_apart(
    student_folder: Path, configured: Callable[..., DictConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill.evaluation.answers._LATENCY_ROUNDS", 3)
    job, model = prepare(configured(), tmp_path / "run"), loading.load(student_folder, torch.float32)
    short, long = (Evaluation(model, job.prompts, job.annotation_job.task, "direct", limit) for limit in (2, 5))
    rows = speeds({"short": short, "long": long}, job.annotation_job.splits.test[:1])
    assert rows["short"]["architecture"] != rows["long"]["architecture"]


def test_the_row_of_a_model_counts_its_parameters(
    student_folder: Path, configured: Callable[..., DictConfig], tmp_path: Path
) -> None:
    job, model = prepare(configured(), tmp_path / "run"), loading.load(student_folder, torch.float32)
    predictions = Evaluation(model, job.prompts, job.annotation_job.task, "direct", 6).predict(
        job.annotation_job.splits.test[:1], {}
    )
    row = model_row(predictions, model)
    weights = load_file(student_folder / "model.safetensors").values()
    assert (row["parameters"], row["dtype"]) == (sum(weight.numel() for weight in weights), "float32")


@pytest.mark.parametrize(
    ("text", "expected"), [(None, None), ("{}", None), ('{"torch_dtype": "bfloat16"}', "bfloat16")]
)
def test_the_type_of_a_saved_model_is_read_from_its_configuration(
    tmp_path: Path, text: str | None, expected: str | None
) -> None:
    if text:
        (tmp_path / "config.json").write_text(text)
    assert saved_type(tmp_path) == expected
