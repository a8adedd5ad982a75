"""Tiny random models with a class head, of the families that people take as classifiers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AlbertConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    MPNetConfig,
    Qwen3Config,
    RobertaConfig,
    XLNetConfig,
)

from distill.prompts.classes import ClassPrompts
from distill.prompts.tokenizers import load_tokenizer
from tests.conftest import make_tokenizer

LABELS = ("negative", "positive")
PADDING = 1  # the end token of the tiny tokenizer, which has no padding token
_COMMON = {"vocab_size": 352, "pad_token_id": PADDING, "bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.2}
_SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
_SPECIAL = {"cls_token_id": 0, "sep_token_id": 1}
FAMILIES: dict[str, Any] = {
    "BERT": (BertConfig, _SIZES),
    "RoBERTa": (RobertaConfig, _SIZES),
    "DistilBERT": (DistilBertConfig, {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48}),
    "DeBERTa-v2": (DebertaV2Config, _SIZES | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    "ModernBERT": (ModernBertConfig, _SIZES | _SPECIAL | {"local_attention": 8}),
    "ModernBERT, mean": (ModernBertConfig, _SIZES | _SPECIAL | {"classifier_pooling": "mean"}),
    "ELECTRA": (ElectraConfig, _SIZES | {"embedding_size": 32}),
    "ALBERT": (AlbertConfig, _SIZES | {"embedding_size": 16}),
    "MPNet": (MPNetConfig, _SIZES),
    "GPT-2": (GPT2Config, {"n_embd": 32, "n_layer": 3, "n_head": 4}),
    "Llama": (LlamaConfig, _SIZES | {"num_key_value_heads": 2}),
    "Qwen3": (Qwen3Config, _SIZES | {"num_key_value_heads": 2, "head_dim": 8}),
}
# Reads padding on the right as a part of the text.
UNSUPPORTED = {"XLNet": (XLNetConfig, {"d_model": 32, "n_layer": 3, "n_head": 4, "d_inner": 48})}


def make_encoder(folder: Path, family: str = "BERT", *, labels: tuple[str, ...] = LABELS, **settings: Any) -> Path:
    """Save a random model of a family with a head for these labels, and a tokenizer."""
    kind, sizes = (FAMILIES | UNSUPPORTED)[family]
    config = kind(**_COMMON | sizes | settings)
    config.id2label, config.label2id = dict(enumerate(labels)), {label: i for i, label in enumerate(labels)}
    torch.manual_seed(3)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def make_body(folder: Path, family: str = "BERT") -> Path:
    """The same model as it is published by those who train the body: without a head for classes."""
    make_encoder(folder, family)
    AutoModelForSequenceClassification.from_pretrained(folder).base_model.save_pretrained(folder)
    return folder


def class_prompts(folder: Path, **settings: Any) -> ClassPrompts:
    """Prompts for a model of this file."""
    return ClassPrompts(load_tokenizer(folder), LABELS, **{"max_length": 128, "too_long": "drop"} | settings)
