"""The student: cut, frozen, drawn anew, saved as a folder that everyone can open."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill.prompts import Prompts
from distill.records import ConfigError
from distill.student import open_student, save_student, size_bytes, weights_hash

PLAIN = {"keep_layers": None, "freeze": [], "from_scratch": False}
IDS = torch.tensor([[5, 60, 70, 80, 90, 1]])


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize("keep", [[0], [0, 2], [2, 0], [0, 1, 2]])
def test_kept_layers_are_those_of_the_model_in_the_order_given(keep: list[int], teacher_folder: Path) -> None:
    whole, cut = (open_student(teacher_folder, **PLAIN | {"keep_layers": k}) for k in (None, keep))
    assert cut.config.num_hidden_layers == len(cut.model.layers) == len(keep)
    for layer, index in zip(cut.model.layers, keep, strict=True):
        assert all(
            torch.equal(value, whole.model.layers[index].state_dict()[name])
            for name, value in layer.state_dict().items()
        )
    hidden_BTH = whole.model.embed_tokens(IDS)
    angles = whole.model.rotary_emb(hidden_BTH, torch.arange(IDS.shape[1]).unsqueeze(0))
    mask_TT = torch.full((IDS.shape[1],) * 2, -torch.inf).triu(1)[None, None]
    for index in keep:
        layer = whole.eval().model.layers[index]
        out = layer(hidden_BTH, attention_mask=mask_TT, position_embeddings=angles)
        hidden_BTH = out[0] if isinstance(out, tuple) else out
    assert torch.allclose(logits(cut), whole.lm_head(whole.model.norm(hidden_BTH)), atol=1e-4)


@pytest.mark.parametrize("keep", [[0, 2], [1]])
def test_a_cut_student_generates_with_its_cache_as_without(keep: list[int], teacher_folder: Path) -> None:
    cut = open_student(teacher_folder, **PLAIN | {"keep_layers": keep}).eval()
    written = [cut.generate(IDS, max_new_tokens=5, do_sample=False, use_cache=c, pad_token_id=1) for c in (True, False)]
    assert torch.equal(*written)


@pytest.mark.parametrize("keep", [[], [3], [-1], [0, 7]])
def test_layers_that_are_not_there_are_refused(keep: list[int], teacher_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"the model has layers 0 to 2"):
        open_student(teacher_folder, **PLAIN | {"keep_layers": keep})


def test_frozen_parts_are_those_named_and_a_wrong_name_is_refused(student_folder: Path) -> None:
    student = open_student(student_folder, **PLAIN | {"freeze": ["embed_tokens", "layers.0."]})
    for name, parameter in student.named_parameters():
        assert parameter.requires_grad == ("embed_tokens" not in name and "layers.0." not in name)
    with pytest.raises(ConfigError, match="no parameter's name holds"):
        open_student(student_folder, **PLAIN | {"freeze": ["embedings"]})


def test_a_student_from_scratch_has_the_shape_and_other_weights(student_folder: Path) -> None:
    old, new = (open_student(student_folder, **PLAIN | {"from_scratch": s}) for s in (False, True))
    assert {n: p.shape for n, p in old.named_parameters()} == {n: p.shape for n, p in new.named_parameters()}
    assert weights_hash(old) == weights_hash(open_student(student_folder, **PLAIN)) != weights_hash(new)


@pytest.mark.parametrize("keep", [None, [1]])
def test_a_saved_student_opens_anywhere_with_the_same_logits(
    keep: list[int] | None, student_folder: Path, prompts: Prompts, tmp_path: Path
) -> None:
    student = open_student(student_folder, **PLAIN | {"keep_layers": keep})
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.01)
    for _ in range(2):  # the second time over the first
        save_student(student, prompts.tokenizer, tmp_path / "student")
    assert [path.name for path in tmp_path.iterdir()] == ["student"]
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32)
    assert torch.equal(logits(opened), logits(student))
    assert weights_hash(opened) == weights_hash(student)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "student")
    assert tokenizer.get_vocab() == prompts.tokenizer.get_vocab()
    assert tokenizer("Two and two.").input_ids == prompts.tokenizer("Two and two.").input_ids
    assert size_bytes(tmp_path / "student") == pytest.approx(4 * sum(p.numel() for p in student.parameters()), rel=0.1)
    assert not [path for path in (tmp_path / "student").iterdir() if path.suffix in (".bin", ".pt", ".pkl")]
