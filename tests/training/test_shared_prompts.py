"""A sequence with a shared prompt and branches gives the loss and gradients of separate sequences."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from distill.lessons.collate import collate
from distill.prompts.rendering import Prompts
from tests.cases import OWN_BATCHES, Case
from tests.conftest import case_lessons, lessons, read, student_module
from tests.training.conftest import BATCH, loss_and_gradients, total_counts

SMALL = {"vocab_size": 352, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "head_dim": 8}


SPECIAL_IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}


GPT2 = {"vocab_size": 352, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 160}


BLOOM = {"vocab_size": 352, "hidden_size": 32, "n_layer": 2, "n_head": 4}


FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, SMALL),
    "qwen2": (Qwen2Config, SMALL),
    "qwen3": (Qwen3Config, SMALL),
    "gemma": (GemmaConfig, SMALL),
    "gemma2": (Gemma2Config, SMALL | {"sliding_window": 128, "query_pre_attn_scalar": 8}),  # no fused attention
    "gpt2": (GPT2Config, GPT2),
    "short window": (MistralConfig, SMALL | {"sliding_window": 16}),
    "slopes": (BloomConfig, BLOOM),
    "states": (MambaConfig, {"vocab_size": 352, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
}


UNSUPPORTED = {"short window", "slopes", "states"}


def family_model(name: str) -> Any:
    """A random model with weights large enough for its attention mask to matter."""
    torch.manual_seed(0)
    config, settings = FAMILIES[name]
    model = AutoModelForCausalLM.from_config(config(**settings, **SPECIAL_IDS, initializer_range=0.25))
    return model.eval()


CASES = [("cues", name, dtype) for name in sorted(FAMILIES.keys() - UNSUPPORTED) for dtype in (32, 64)]
CASES += [(kind, "llama", 64) for kind in OWN_BATCHES[1:]]


@pytest.mark.parametrize(("case", "name", "bits"), CASES, indirect=["case"])
def test_a_shared_sequence_has_the_loss_and_gradients_of_two(name: str, bits: int, case: Case) -> None:
    all_lessons, prompts = case_lessons(case, BATCH), case.prompts
    branched = [lesson.branched() for lesson in all_lessons]
    counts = total_counts(all_lessons)
    separate_batch, shared_batch = (collate(some_lessons, counts, 1, read) for some_lessons in (all_lessons, branched))
    assert len(shared_batch.input_ids_BT) == BATCH < len(separate_batch.input_ids_BT)
    module = student_module(family_model(name).to(getattr(torch, f"float{bits}")), prompts)
    module.model.train()  # some have dropout, which the comparison must disable
    assert module.sees_alike(separate_batch, shared_batch)
    assert module.model.training
    module.model.eval()
    actual, expected = loss_and_gradients(module, shared_batch), loss_and_gradients(module, separate_batch)
    assert set(actual) == set(expected)
    for key, value in expected.items():
        # Rotary angles are computed in float32 for any dtype of the model.
        assert (actual[key] - value).abs().max() <= 1e-4 * value.abs().max(), key


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_a_model_that_does_not_support_shared_prompts_is_detected(name: str, prompts: Prompts) -> None:
    all_lessons = lessons(prompts, 15)
    separate_batch, shared_batch = (
        collate(some_lessons, {}, 1, read)
        for some_lessons in (all_lessons, [lesson.branched() for lesson in all_lessons])
    )
    module = student_module(family_model(name), prompts)
    assert not module.sees_alike(separate_batch, shared_batch)
    assert module.sees_alike(separate_batch, separate_batch)


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - UNSUPPORTED))
def test_no_branch_attends_to_another(name: str, prompts: Prompts) -> None:
    (lesson_with_branches,) = [lesson.branched() for lesson in lessons(prompts, 3) if len(lesson.sequences) > 1]
    batch, module = collate([lesson_with_branches], {}, 1, read), student_module(family_model(name), prompts)
    (sequence,) = lesson_with_branches.sequences
    assert batch.branch_BT is not None
    branch_N = batch.branch_BT[0, batch.before_N]
    before_NH = module.hidden(batch)
    for branch, position in enumerate((sequence.branches[0] - 1, *sequence.branches)):
        changed_BT = batch.input_ids_BT.clone()
        changed_BT[0, position] = 300
        after_NH = module.hidden(replace(batch, input_ids_BT=changed_BT))
        has_moved_N = (before_NH != after_NH).any(1)
        assert torch.equal(has_moved_N, torch.ones_like(has_moved_N) if branch == 0 else branch_N == branch)
