"""Tiny random models of families whose layers differ by their position."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig

from tests.conftest import make_tokenizer

_SIZES = {
    "vocab_size": 352,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.25,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "tie_word_embeddings": False,
}
_EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
_GROUPED = _EXPERTS | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
_LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2}
_LINEAR |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "shared_expert_intermediate_size": 16}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8}
_MIXED = ["mamba", "attention", "mamba", "attention"]
_VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
_VISION |= {"image_size": 28, "patch_size": 14}
_BART = {"encoder_layers": 4, "decoder_layers": 4, "encoder_attention_heads": 4, "decoder_attention_heads": 4}


def _gemma3(window: int = 300, **_: Any) -> dict[str, Any]:
    types = ["sliding_attention", "full_attention"] * 2
    return _SIZES | {"head_dim": 8, "sliding_window": window, "layer_types": types}


FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**_SIZES),
    "smollm3": lambda: transformers.SmolLM3Config(**_SIZES, no_rope_layer_interval=2),
    "diffllama": lambda: transformers.DiffLlamaConfig(**_SIZES),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(**_SIZES, **_GROUPED, **_LATENT),
    "glm4_moe": lambda: transformers.Glm4MoeConfig(**_SIZES, **_GROUPED, head_dim=8),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **_SIZES, **_EXPERTS, num_experts=4, head_dim=8, decoder_sparse_step=2
    ),
    "qwen3_moe_listed": lambda: transformers.Qwen3MoeConfig(
        **_SIZES, **_EXPERTS, num_experts=4, head_dim=8, mlp_only_layers=[0, 3]
    ),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **_SIZES, **_EXPERTS, num_experts=4, decoder_sparse_step=2, shared_expert_intermediate_size=16
    ),
    "qwen2_windowed": lambda: transformers.Qwen2Config(
        **_SIZES, use_sliding_window=True, sliding_window=300, max_window_layers=2
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(**_gemma3()),
    "gemma3_with_images": lambda: transformers.Gemma3Config(
        text_config=_gemma3(), vision_config=_VISION, mm_tokens_per_image=4, tie_word_embeddings=False
    ),
    "gpt_neo": lambda: transformers.GPTNeoConfig(
        vocab_size=352,
        hidden_size=32,
        num_layers=4,
        num_heads=4,
        attention_types=[[["global", "local"], 2]],
        window_size=8,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
    ),
    "gpt2_scaled": lambda: transformers.GPT2Config(
        vocab_size=352,
        n_embd=32,
        n_layer=4,
        n_head=4,
        n_positions=512,
        scale_attn_by_inverse_layer_idx=True,
        bos_token_id=0,
        eos_token_id=1,
    ),
    "opt": lambda: transformers.OPTConfig(**_SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "bart": lambda: transformers.BartConfig(
        vocab_size=352, d_model=32, **_BART, decoder_ffn_dim=32, max_position_embeddings=512
    ),
    "qwen3_next": lambda: transformers.Qwen3NextConfig(
        **_SIZES, **_EXPERTS, **_LINEAR, num_experts=4, head_dim=8, full_attention_interval=2
    ),
    "lfm2": lambda: transformers.Lfm2Config(**_SIZES, layer_types=["conv", "full_attention"] * 2),
    "granite_hybrid": lambda: transformers.GraniteMoeHybridConfig(
        **_SIZES, **_MAMBA, layer_types=_MIXED, shared_intermediate_size=16, num_local_experts=0
    ),
    "mamba2": lambda: transformers.Mamba2Config(
        vocab_size=352,
        hidden_size=32,
        num_hidden_layers=4,
        state_size=8,
        num_heads=8,
        head_dim=8,
        n_groups=1,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    ),
}


def make_family(folder: Path, name: str) -> Path:
    """Save a random model of four layers and its tokenizer."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(FAMILIES[name]()).save_pretrained(folder)
    make_tokenizer(folder)
    return folder
