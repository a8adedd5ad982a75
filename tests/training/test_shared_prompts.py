"""Laws 2, 3, 5, 6: the student's loss through the real trainer, however a step is cut, padded or shared out.

Run as a script, this file is one process of a training run: `test_modules.py <folder> <overrides>`.
"""

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
from distill.prompts.cues import Prompts
from tests.conftest import lessons, read, student_module
from tests.training.conftest import BATCH, counts_of, loss_and_gradients

SMALL = {"vocab_size": 352, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "head_dim": 8}


PLAIN_IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}


GPT2 = {"vocab_size": 352, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 160}


BLOOM = {"vocab_size": 352, "hidden_size": 32, "n_layer": 2, "n_head": 4}


FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, SMALL),
    "qwen2": (Qwen2Config, SMALL),
    "qwen3": (Qwen3Config, SMALL),
    "gemma": (GemmaConfig, SMALL),
    "gemma2": (Gemma2Config, SMALL | {"sliding_window": 128, "query_pre_attn_scalar": 8}),  # has no fused attention
    "gpt2": (GPT2Config, GPT2),
    "short window": (MistralConfig, SMALL | {"sliding_window": 16}),
    "slopes": (BloomConfig, BLOOM),
    "states": (MambaConfig, {"vocab_size": 352, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
}


TWO_SEQUENCES = {"short window", "slopes", "states"}


def of_family(name: str) -> Any:
    """A random model whose attention, and so whose mask, matters."""
    torch.manual_seed(0)
    config, settings = FAMILIES[name]
    model = AutoModelForCausalLM.from_config(config(**settings, **PLAIN_IDS, initializer_range=0.25))
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - TWO_SEQUENCES))
def test_a_shared_sequence_has_the_loss_and_gradients_of_two(name: str, dtype: torch.dtype, prompts: Prompts) -> None:
    given = lessons(prompts, BATCH)
    branched = [lesson.branched() for lesson in given]
    counts = counts_of(given)
    apart, one = (collate(part, counts, 1, read) for part in (given, branched))
    assert len(one.input_ids_BT) == BATCH < len(apart.input_ids_BT)
    module = student_module(of_family(name).to(dtype), prompts)
    module.model.train()  # some have dropout, under which nothing is alike
    assert module.sees_alike(apart, one)
    assert module.model.training
    module.model.eval()
    found, wanted = loss_and_gradients(module, one), loss_and_gradients(module, apart)
    assert set(found) == set(wanted)
    for key, value in wanted.items():
        # Rotary angles are computed in float32 whatever the model's type.
        assert (found[key] - value).abs().max() <= 1e-4 * value.abs().max(), key


@pytest.mark.parametrize("name", sorted(TWO_SEQUENCES))
def test_a_model_that_does_not_support_shared_prompts_is_detected(name: str, prompts: Prompts) -> None:
    given = lessons(prompts, 15)
    apart, one = (collate(part, {}, 1, read) for part in (given, [lesson.branched() for lesson in given]))
    module = student_module(of_family(name), prompts)
    assert not module.sees_alike(apart, one)
    assert module.sees_alike(apart, apart)


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - TWO_SEQUENCES))
def test_no_branch_attends_to_another(name: str, prompts: Prompts) -> None:
    (given,) = [lesson.branched() for lesson in lessons(prompts, 3) if len(lesson.sequences) > 1]
    batch, module = collate([given], {}, 1, read), student_module(of_family(name), prompts)
    prompt = given.sequences[0].prompt
    assert batch.branch_BT is not None
    branch_N = batch.branch_BT[0, batch.before_N]
    before_NH = module.hidden(batch)
    for branch, place in enumerate((prompt.branches[0] - 1, *prompt.branches)):
        changed_BT = batch.input_ids_BT.clone()
        changed_BT[0, place] = 300
        after_NH = module.hidden(replace(batch, input_ids_BT=changed_BT))
        has_moved_N = (before_NH != after_NH).any(1)
        assert torch.equal(has_moved_N, torch.ones_like(has_moved_N) if branch == 0 else branch_N == branch)
