"""Cut students of families whose layers differ by position: what is saved is the cut model, or the cut is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from distill.errors import ConfigError
from distill.prompts.tokenizers import load_tokenizer
from distill.students.causal_lm import open_student, weights_hash
from distill.students.layers import cut_layers, probe
from distill.students.saving import save_student
from tests.conftest import WHOLE_STUDENT
from tests.students.families import FAMILIES, make_family

IDS = torch.randint(2, 320, (2, 40), generator=torch.Generator().manual_seed(1))  # longer than GPT-Neo's window

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*fast path.*")

LAYER = re.compile(r"^((?:model|transformer|model.language_model|model.decoder|backbone)\.(?:layers|h)\.)(\d+)")

# The settings that have an entry per layer, as they are after the cut.
CUTS: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {
    ("llama", (3, 0)): {},
    ("smollm3", (0, 1, 3)): {"no_rope_layers": [1, 0, 0]},
    ("smollm3", (1, 3)): {"no_rope_layers": [0, 0]},
    ("diffllama", (0, 1)): {},
    ("deepseek_v3", (0, 1, 3)): {"first_k_dense_replace": 1},
    ("glm4_moe", (0, 2)): {"first_k_dense_replace": 1},
    ("qwen3_moe", (0, 1)): {"decoder_sparse_step": 2},
    ("qwen3_moe", (2, 3)): {"decoder_sparse_step": 2},
    ("qwen3_moe_listed", (0, 1, 3)): {"mlp_only_layers": [0, 2]},
    ("qwen3_moe_listed", (1, 2)): {"mlp_only_layers": []},
    ("qwen2_windowed", (0, 3)): {"layer_types": ["full_attention", "sliding_attention"]},
    ("gemma3", (1, 2, 3)): {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    ("gemma3_with_images", (0, 1, 3)): {"layer_types": ["sliding_attention", "full_attention", "full_attention"]},
    ("gpt_neo", (0, 1, 3)): {"attention_layers": ["global", "local", "local"]},
    ("gpt2_scaled", (0, 1)): {},
    ("opt", (0, 1, 3)): {},
    ("bart", (0, 3)): {"decoder_layers": 2},
    ("qwen3_next", (0, 1, 3)): {"layer_types": ["linear_attention", "full_attention", "full_attention"]},
    ("lfm2", (1, 2)): {"layer_types": ["full_attention", "conv"]},
    ("granite_hybrid", (0, 1, 3)): {"layer_types": ["linear_attention", "full_attention", "full_attention"]},
    ("mamba2", (0, 3)): {},
}
SLOW = ("bart", "granite_hybrid", "mamba2")
# Cuts that the configuration cannot express, and what the refusal names.
REFUSED = {
    ("diffllama", (0, 1, 3)): "lambda_init",
    ("deepseek_v3", (1, 2)): "first_k_dense_replace=1",
    ("deepseek_v3", (0, 0, 1)): "first_k_dense_replace=1",
    ("glm4_moe", (1, 3)): "first_k_dense_replace=1",
    ("qwen3_moe", (0, 1, 3)): "decoder_sparse_step=2",
    ("qwen2_moe", (1, 2)): "decoder_sparse_step=2",
    ("gpt2_scaled", (0, 1, 3)): "scale_attn_by_inverse_layer_idx",
    ("qwen3_next", (0, 2)): "one of every kind",
    ("lfm2", (0,)): "one of every kind",
    ("granite_hybrid", (0, 2)): "one of every kind",
}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize(
    ("family", "keep"),
    [pytest.param(*case, marks=[pytest.mark.slow] if case[0] in SLOW else []) for case in CUTS],
)
def test_a_cut_student_is_the_one_that_is_saved(family: str, keep: tuple[int, ...], tmp_path: Path) -> None:
    folder = make_family(tmp_path / "whole", family)
    student = open_student(folder, **WHOLE_STUDENT | {"keep_layers": keep})
    settings = student.config.get_text_config(decoder=True)
    for key, value in CUTS[family, keep].items():
        assert getattr(settings, key) == value, key
    whole = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for name, value in student.state_dict().items():
        assert torch.equal(value, whole[LAYER.sub(lambda match: f"{match[1]}{keep[int(match[2])]}", name)]), name
    saved = save_student(student, load_tokenizer(folder), tmp_path / "student", dtype=torch.float32, max_new_tokens=9)
    expected = logits(student)
    for opened in (saved.model, AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32)):
        assert torch.allclose(logits(opened), expected, atol=1e-5)
        assert weights_hash(opened) == weights_hash(student)


@pytest.mark.parametrize(("family", "keep"), REFUSED)
def test_a_cut_that_the_configuration_cannot_express_is_refused(
    family: str, keep: tuple[int, ...], tmp_path: Path
) -> None:
    folder = make_family(tmp_path, family)
    with pytest.raises(ConfigError, match=REFUSED[family, keep]) as caught:
        open_student(folder, **WHOLE_STUDENT | {"keep_layers": keep})
    assert "keep_layers=" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_window_that_a_short_text_does_not_reach_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_config(FAMILIES["gemma3"]())
    monkeypatch.setattr("distill.students.layers._cut_setting", lambda *_: None)  # layer_types stay as they are
    model.config.layer_types = ["sliding_attention", "full_attention"]
    with pytest.raises(ConfigError, match=r"sliding|attention_type|layer_type"):
        cut_layers(model, [1, 2])


def test_cutting_draws_no_random_numbers() -> None:
    model = AutoModelForCausalLM.from_config(FAMILIES["llama"]())
    state = torch.get_rng_state()
    cut = cut_layers(model, [0, 2])
    assert torch.equal(torch.get_rng_state(), state)
    assert probe(cut).shape == (2, 24, 352)
