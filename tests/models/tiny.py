"""Tiny random models of every causal family of the installed transformers: a few rules shrink any configuration."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from distill.models.loading import MODEL_ERRORS
from tests.conftest import make_tokenizer

FAMILIES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
DEPTH, VOCABULARY = 4, 352
_SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "tie_word_embeddings": False}
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
_WIDTHS = ("hidden_size", "d_model", "n_embd", "attention_hidden_size", "mamba_d_ssm")
_NOT_SETTINGS = ("id2label", "label2id", "transformers_version", "architectures", "model_type", "dtype")
_FACTORS = r"conv|kernel|expand|pattern|factor|multiple"  # small numbers that stay
_RULES: list[tuple[str, int]] = [
    (r"vocab_size|hash_byte_group_vocab", VOCABULARY),
    (r"layers_per_stack", 1),
    (r"kv_shared_layers", 2),
    (r"shared_experts?$|dense_layers|dense_replace|nextn", 1),
    (r"(^|_)((hidden|encoder|decoder|n|num)_)*layers?$|^num_blocks$|^depth$", DEPTH),
    (r"_(id|ids|index)$", VOCABULARY - 1),
    (r"_period$", 2),
    (r"_offset$", 1),
    (r"n_groups?$|topk_group|expert_group|ngroups", 1),
    (
        r"max_position|n_positions|n_ctx|max_seq|context_length|max_(source|target)?_?(length|positions)|seq_len|chunksize",
        512,
    ),
    (r"sliding_window|window_(len|size)|attention_chunk", 8),
    (r"chunk_size", 16),
    (r"index_topk|budget", 64),
    (r"top_?k|experts_per_tok|moe_k$|num_selected", 2),
    (r"head_?dim|d_head|head_size|kv_channels|rotary_dim|d_kv|rope_dim", 8),
    (r"(key_value|kv|k|v|key|value)_?(n_)?heads|num_kv", 2),
    (r"heads?$|n_heads?$", 4),
    (r"experts", 4),
    (r"rank|d_state|state_size", 8),
    (r"intermediate|ffn|d_inner|ff_dim|d_ff", 48),
    (r"attention_hidden_size", 64),
    (r"hidden|d_model|n_embd|embd|emb|dim$|width|size$|d_ssm", 32),
]


def make_tiny(family: str, folder: Path) -> None:
    """Save a random model of a family and a tokenizer; raise one of MODEL_ERRORS if it cannot be built."""
    try:
        model = _built(family, fill_missing=False)
        model(torch.arange(3, 20).unsqueeze(0))
    except MODEL_ERRORS:
        model = _built(family, fill_missing=True)
    for parameter in model.parameters():
        if parameter.dim() > 1:  # far from the small weights with which all models compute nearly the same
            parameter.data.normal_(0, 0.15)
    model.save_pretrained(folder)
    make_tokenizer(folder)


def _built(family: str, *, fill_missing: bool) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(family, fill_missing=fill_missing), dtype=torch.float32).eval()


def tiny_config(family: str, *, fill_missing: bool) -> Any:
    """The default configuration of a family, shrunk; with `fill_missing`, numbers without a default get a small one."""
    kind = CONFIG_MAPPING[family]
    default = kind()
    settings = _shrunk(default.to_dict(), fill_missing)
    if is_dataclass(kind):  # others are derived from these
        names = {field.name for field in fields(kind)} | set(kind.attribute_map) | {"per_layer_config"}
        settings = {name: value for name, value in settings.items() if name in names}
    settings |= {name: value for name, value in _SPECIAL.items() if name in settings}
    return kind(**settings | ({"is_decoder": True} if hasattr(default, "is_decoder") else {}))


def _shrunk(settings: Mapping[str, Any], fill_missing: bool) -> dict[str, Any]:
    depth = next((settings[name] for name in _DEPTHS if _is_number(settings.get(name))), 0)
    depth = depth // settings.get("num_layers_per_stack", 1) if depth > DEPTH else depth
    kept = _kept_layers(settings, depth)
    small = {n: _small(n, v, depth, kept, fill_missing) for n, v in settings.items() if n not in _NOT_SETTINGS}
    return small | dict(_related(settings, small))


def _small(name: str, value: Any, depth: int, kept: list[int], fill_missing: bool) -> Any:
    if name == "per_layer_config" and isinstance(value, dict):
        layers = {f"{new:02}": value.get(f"{old:02}") for new, old in enumerate(kept)}
        return {index: _shrunk(layer, fill_missing) for index, layer in layers.items() if layer}
    if isinstance(value, dict) and name != "rope_parameters":
        return _shrunk(value, fill_missing)
    if fill_missing and name == "layer_types" and value in (None, ["linear_attention"] * depth):
        return [value[0] if value else "conv", "full_attention"] * (DEPTH // 2)
    if fill_missing and name.endswith("layer_indices") and value is None:
        return [1, 3]
    if isinstance(value, list) and depth and len(value) == depth:
        return [_number(name, value[index]) if _is_number(value[index]) else value[index] for index in kept]
    if isinstance(value, list) and name == "attention_types":  # [[kinds, repetitions]]
        return [[kinds, len(kept) // len(kinds)] for kinds, _ in value]
    if _is_number(value):
        return len(kept) if name in _DEPTHS and kept else _number(name, value)
    is_filled = re.search(r"num|^n_|heads|experts|head_dim|_k$|sliding_window$|size|budget|ratio", name)
    return _number(name, 1024) if value is None and fill_missing and is_filled and "id" not in name else value


def _number(name: str, value: int) -> int:
    if re.search(_FACTORS, name) and not re.search("vocab|head_?dim|heads", name):
        return value
    limit = next((limit for pattern, limit in _RULES if re.search(pattern, name)), 32 if value > 64 else value)
    is_depth = limit == DEPTH and "layer" in name
    return limit if is_depth and value > 0 else min(value, limit)


def _kept_layers(settings: Mapping[str, Any], depth: int) -> list[int]:
    """Layers of every kind, by all lists with an entry per layer; at least DEPTH."""
    if depth <= DEPTH:
        return list(range(DEPTH if depth else 0))
    lists = [value for value in settings.values() if isinstance(value, list) and len(value) == depth]
    kinds = [repr([each[index] for each in lists]) for index in range(depth)]
    first = [index for index in range(depth) if kinds[index] not in kinds[:index]][: 2 * DEPTH]
    rest = [index for index in range(depth) if index not in first][: max(0, DEPTH - len(first))]
    return sorted(first + rest)


def _related(settings: Mapping[str, Any], small: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield the numbers that follow from others: equal numbers of heads, and heads * head size = a width."""
    numbers = {name: value for name, value in settings.items() if _is_number(value)}
    heads = [name for name in numbers if re.search(r"heads?$|n_heads?$", name) and "d_head" not in name]
    widths = {numbers[name] * f: small[name] * f for name in _WIDTHS if name in numbers for f in (1, 2)}
    new = dict(small)
    for name in heads:
        for other in ("num_attention_heads", "n_head", "num_heads"):
            if re.search("key_value|kv", name) and numbers.get(other) == numbers[name]:
                new[name] = small[other]
                yield name, new[name]
    for size in (name for name in numbers if re.search(r"head_?dim|d_head|headdim", name)):
        for name in heads:
            if (numbers[name] * numbers[size]) in widths and ("mamba" in name) == ("mamba" in size):
                yield size, widths[numbers[name] * numbers[size]] // new[name]
    if numbers.get("attention_hidden_size") == numbers.get("hidden_size", -1):
        yield "attention_hidden_size", small["hidden_size"]
    if numbers.get("index_n_heads"):
        yield "index_n_heads", 16  # with few heads many tokens score zero, and it is arbitrary which are attended to


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
