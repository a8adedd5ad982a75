"""A model is opened whole or not at all: weights that the files lack, or hold under other names, stop."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill.annotation.fill import fill
from distill.errors import ConfigError
from distill.evaluation.job import evaluate
from distill.lessons.curriculum import examples_to_annotate, prepare
from distill.models import loading, naming
from distill.students.causal_lm import open_student
from tests.conftest import WHOLE_STUDENT, compose, counted, make_model

Weights = dict[str, Tensor]

INCOMPLETE: dict[str, tuple[Callable[[Weights], Weights], str]] = {
    "without the head": (
        lambda weights: {name: w for name, w in weights.items() if name != "lm_head.weight"},
        "1 weights of the model are missing in its files: lm_head.weight",
    ),
    "without an MLP": (
        lambda weights: {name: w for name, w in weights.items() if "layers.1.mlp" not in name},
        r"3 weights of the model are missing in its files: model.layers.1.mlp.down_proj.weight, ",
    ),
    "of a compiled model": (
        lambda weights: {f"_orig_mod.{name}": w for name, w in weights.items()},
        r"21 weights of the model are missing in its files: lm_head.weight, model.embed_tokens.weight, .* and 18 more; "
        r"21 weights in the files are not used by the model: _orig_mod.lm_head.weight, ",
    ),
    "of a classifier too": (
        lambda weights: weights | {"score.weight": torch.ones(5, 32)},
        "1 weights in the files are not used by the model: score.weight",
    ),
    "of another shape": (
        lambda weights: weights | {"model.norm.weight": torch.ones(5)},
        "1 weights have another shape than the model's: model.norm.weight",
    ),
}


def changed(folder: Path, change: Callable[[Weights], Weights]) -> Path:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return folder


@pytest.fixture(params=INCOMPLETE)
def incomplete(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    change, message = INCOMPLETE[request.param]
    return changed(make_model(tmp_path / "model", seed=1), change), message


def test_an_incomplete_model_is_not_opened(incomplete: tuple[Path, str]) -> None:
    folder, message = incomplete
    with pytest.raises(ConfigError, match=f"{folder} does not hold the weights of LlamaForCausalLM: {message}"):
        loading.load(folder, torch.float32)
    with pytest.raises(ConfigError, match=message):
        open_student(folder, **WHOLE_STUDENT)


def test_a_model_with_a_tied_head_or_without_weights_of_its_own_is_complete(tmp_path: Path) -> None:
    tied = make_model(tmp_path / "tied", seed=1, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(tied / "model.safetensors")
    loading.check_weights(tied)
    loading.load(tied, torch.float32)
    (tied / "model.safetensors").unlink()
    loading.load(tied, torch.float32, from_scratch=True)


def assert_refused_before_annotation(
    role: str, model: Path, message: str, configured: Callable[..., DictConfig], tmp_path: Path
) -> None:
    added = ["teacher@soft_teacher=causal_lm"] if role == "soft_teacher" else []
    config = configured("loss=[kl]", *added, f"{role}.model={model}")
    source, teacher = counted(config)
    with pytest.raises(ConfigError, match=message):
        fill(source, examples_to_annotate(prepare(config, tmp_path / "run")))
    assert not teacher.asked


@pytest.mark.parametrize("role", ["teacher", "soft_teacher", "student"])
def test_an_incomplete_model_of_any_role_stops_before_anything_is_annotated(
    role: str, configured: Callable[..., DictConfig], tmp_path: Path
) -> None:
    change, message = INCOMPLETE["of a compiled model"]
    folder = changed(make_model(tmp_path / "model", seed=1), change)
    assert_refused_before_annotation(role, folder, message, configured, tmp_path)


def test_an_incomplete_model_is_not_evaluated(incomplete: tuple[Path, str], tmp_path: Path) -> None:
    folder, message = incomplete
    with pytest.raises(ConfigError, match=message):
        evaluate(compose(f"model={folder}", "task=arithmetic", f"root={tmp_path}", name="evaluate"))


def test_a_gguf_file_that_transformers_cannot_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(ConfigError, match="cannot convert the GGUF file: "):
        naming._convert_gguf(tmp_path / "model.gguf", tmp_path / "converted")


def test_weights_that_a_gguf_file_lacks_stop_its_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers reads the file; here the folder that it reads instead lacks a head."""
    folder = changed(make_model(tmp_path / "model", seed=1), INCOMPLETE["without the head"][0])
    monkeypatch.setattr(naming, "from_files", lambda *_, **__: loading.from_files(folder))
    monkeypatch.setattr(naming.AutoTokenizer, "from_pretrained", lambda *_, **__: None)
    with pytest.raises(ConfigError, match=r"missing in its files: lm_head\.weight"):
        naming._convert_gguf(tmp_path / "model.gguf", tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


def quantized(folder: Path, method: str) -> Path:
    """A model whose configuration says that its weights are quantized."""
    settings = json.loads((make_model(folder, seed=1) / "config.json").read_text())
    details = {"load_in_4bit": True} if method == "bitsandbytes" else {"bits": 4, "group_size": 128}
    settings["quantization_config"] = {"quant_method": method, **details}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors", "hqq"])
def test_a_quantized_model_whose_package_is_missing_is_refused_in_one_sentence(method: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"its weights are quantized \({method}\), and .*can be a teacher") as caught:
        loading.load(quantized(tmp_path / "model", method), torch.float32)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("role", "message"),
    [
        ("teacher", "quantized .gptq., and .*optimum"),
        ("soft_teacher", "quantized .gptq., and .*optimum"),
        ("student", "student.model=.* is quantized .gptq., and quantized weights cannot be trained"),
    ],
)
def test_a_quantized_model_of_any_role_stops_before_anything_is_annotated(
    role: str, message: str, configured: Callable[..., DictConfig], tmp_path: Path
) -> None:
    assert_refused_before_annotation(role, quantized(tmp_path / "model", "gptq"), message, configured, tmp_path)


@pytest.mark.parametrize(
    "damage",
    [{"num_hidden_layers": "two"}, {"hidden_act": "unheard-of"}, {"num_attention_heads": 5}, {"rope_parameters": 7}],
    ids=str,
)
def test_a_broken_configuration_is_refused_in_one_sentence(damage: dict[str, object], tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", seed=1)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | damage))
    with pytest.raises(ConfigError, match=r"does not (open as a causal language model|hold the weights of)"):
        loading.load(folder, torch.float32)


def test_weights_that_are_not_numbers_are_refused(tmp_path: Path) -> None:
    folder = changed(
        make_model(tmp_path / "model", seed=1),
        lambda weights: weights | {"model.norm.weight": torch.full((32,), torch.nan)},
    )
    with pytest.raises(ConfigError, match=r"weights that are not finite: model\.norm\.weight\. Replace them"):
        loading.load(folder, torch.float32)
