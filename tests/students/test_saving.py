"""A student on disk: the one that was trained, in its type, told truly by its configuration, without false settings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from distill.errors import ConfigError
from distill.prompts.rendering import Prompts
from distill.students import saving
from distill.students.causal_lm import merge_adapters, open_student
from distill.students.saving import (
    SavedStudent,
    SavedStudentError,
    save_student,
    saved_dtype,
    size_bytes,
    write_greedy_settings,
)
from tests.conftest import PADDED_ROWS, WHOLE_STUDENT, make_model

FLOAT32 = torch.float32


def save(model: Any, prompts: Prompts, folder: Path, dtype: torch.dtype = FLOAT32) -> SavedStudent:
    return save_student(model, prompts.tokenizer, folder, dtype=dtype, max_new_tokens=9)


def source_in(dtype: torch.dtype, folder: Path) -> Path:
    """A model folder whose weights have this type."""
    make_model(folder, seed=4)
    AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).save_pretrained(folder)
    return folder


def settings(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_student_is_saved_in_the_type_of_its_source(dtype: torch.dtype, prompts: Prompts, tmp_path: Path) -> None:
    source = source_in(dtype, tmp_path / "source")
    assert saved_dtype(None, source) == dtype
    student = open_student(source, **WHOLE_STUDENT)
    with torch.no_grad():
        student.lm_head.weight.add_(1e-3)  # no longer a number of the type
    trained = student.lm_head.weight.clone()
    saved = save(student, prompts, tmp_path / "student", saved_dtype(None, source))
    files = load_file(tmp_path / "student" / "model.safetensors")
    assert {value.dtype for value in files.values()} == {dtype}
    assert torch.equal(files["lm_head.weight"], trained.to(dtype))
    assert settings(tmp_path / "student")["dtype"] == saved.dtype == str(dtype).removeprefix("torch.")
    assert size_bytes(tmp_path / "student") == pytest.approx(size_bytes(source), rel=0.02)
    assert torch.equal(saved.model.lm_head.weight, trained.to(dtype).float())  # it is evaluated as it is on disk
    assert (saved.rounding == 0) == (dtype == FLOAT32)
    assert saved.rounding < 0.05


def test_the_type_of_a_source_is_that_of_most_of_its_weights(tmp_path: Path) -> None:
    few, most = torch.zeros(3, dtype=torch.float32), torch.zeros(9, dtype=torch.bfloat16)
    save_file({"norm": few, "other_norm": few.clone(), "layer": most}, tmp_path / "model.safetensors")
    assert saved_dtype(None, tmp_path) == torch.bfloat16


def test_the_type_can_be_set_and_unknown_types_are_refused(student_folder: Path) -> None:
    assert saved_dtype("bfloat16", student_folder) == torch.bfloat16
    with pytest.raises(ConfigError, match=r"student.save_dtype=int8: expected null or one of float32, bfloat16"):
        saved_dtype("int8", student_folder)


def test_weights_that_the_type_cannot_hold_stop_the_run(student_folder: Path, prompts: Prompts, tmp_path: Path) -> None:
    student = open_student(student_folder, **WHOLE_STUDENT)
    with torch.no_grad():
        student.model.embed_tokens.weight.mul_(1e6)
    with pytest.raises(SavedStudentError, match="save_dtype=float32"):
        save(student, prompts, tmp_path / "student", torch.float16)
    assert not list(tmp_path.iterdir())


def with_another_scale(model: Any) -> None:
    """Compute in memory what the configuration does not say."""
    model.model.layers[1].self_attn.scaling *= 1.5


def with_another_position(model: Any) -> None:
    model.model.rotary_emb.inv_freq.mul_(0.5)


@pytest.mark.parametrize("change", [with_another_scale, with_another_position])
def test_a_student_that_is_another_one_on_disk_is_not_saved(
    change: Callable[[Any], None], student_folder: Path, prompts: Prompts, tmp_path: Path
) -> None:
    student = open_student(student_folder, **WHOLE_STUDENT)
    change(student)
    with pytest.raises(SavedStudentError, match=r"cannot be saved and reopened: .*differ by up to \d"):
        save(student, prompts, tmp_path / "student")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_that_lose_a_weight_on_the_way_are_noticed(
    dtype: torch.dtype, student_folder: Path, prompts: Prompts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(model: Any, folder: Path, dtype: torch.dtype) -> None:
        changed = {name: value.to(dtype) for name, value in model.state_dict().items()}
        changed["model.norm.weight"] = changed["model.norm.weight"] * 1.01
        model.save_pretrained(folder, state_dict=changed)

    monkeypatch.setattr(saving, "_write", write)
    with pytest.raises(SavedStudentError, match="logits differ by up to"):
        save(open_student(student_folder, **WHOLE_STUDENT), prompts, tmp_path / "student", dtype)


@pytest.mark.parametrize("is_merged", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_of_its_own_is_not_said_to_be_tied(
    is_merged: bool, dtype: torch.dtype, prompts: Prompts, tmp_path: Path
) -> None:
    source = make_model(tmp_path / "source", seed=4)
    (source / "config.json").write_text(json.dumps(settings(source) | {"tie_word_embeddings": True}))
    lora = {"lora": _lora()} if is_merged else {}
    student = open_student(source, **WHOLE_STUDENT | lora)
    merge_adapters(student)
    save(student, prompts, tmp_path / "student", dtype)
    assert settings(tmp_path / "student")["tie_word_embeddings"] is False
    assert "lm_head.weight" in load_file(tmp_path / "student" / "model.safetensors")


def _lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=2, target_modules="all-linear")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tied_head_is_saved_once(dtype: torch.dtype, prompts: Prompts, tmp_path: Path) -> None:
    source = make_model(tmp_path / "source", seed=4, tie_word_embeddings=True)
    save(open_student(source, **WHOLE_STUDENT), prompts, tmp_path / "student", dtype)
    assert settings(tmp_path / "student")["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load_file(tmp_path / "student" / "model.safetensors")


def test_the_saved_student_generates_greedily_to_its_own_end(prompts: Prompts, tmp_path: Path) -> None:
    source = make_model(tmp_path / "source", seed=4)
    sampling = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9, eos_token_id=[7, 9], repetition_penalty=1.3)
    sampling.save_pretrained(source)
    save(open_student(source, **WHOLE_STUDENT), prompts, tmp_path / "student")
    written = json.loads((tmp_path / "student" / "generation_config.json").read_text())
    assert written["eos_token_id"] == prompts.end
    assert written["do_sample"] is False
    assert written["max_new_tokens"] == 9
    assert not {"temperature", "top_p", "repetition_penalty"} & {k for k, v in written.items() if v is not None}
    size = prompts.vocabulary_size
    assert written["suppress_tokens"] == list(range(size, size + PADDED_ROWS))


def test_the_template_of_another_tokenizer_does_not_remain(prompts: Prompts, tmp_path: Path) -> None:
    source = make_model(tmp_path / "source", seed=4)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = "{% for message in messages %}<|user|>{{ message.content }}{% endfor %}"
    model = open_student(source, **WHOLE_STUDENT)
    save_student(model, tokenizer, tmp_path / "student", dtype=FLOAT32, max_new_tokens=9)
    tokenizer.chat_template = None
    write_greedy_settings(tmp_path / "student", tokenizer, 9)
    saved = AutoTokenizer.from_pretrained(tmp_path / "student")
    assert saved.chat_template is None
    assert saved("Two and two.").input_ids == tokenizer("Two and two.").input_ids
