"""Learning rates: each layer has its factor, and no parameter is left out or in two groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from distill.errors import ConfigError
from distill.models.classifiers import load_classifier, new_parameters
from distill.students.rates import rates
from tests.students.encoders import LABELS, PADDING, make_encoder


def by_name(model: Any, **settings: Any) -> dict[str, float]:
    """The factor of each parameter, checked to be in one group."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    pairs = [(names[id(p)], factor) for parameters, factor in rates(model, **settings) for p in parameters]
    assert sorted(name for name, _ in pairs) == sorted(names.values())
    return dict(pairs)


def test_layers_of_an_encoder_learn_more_slowly_the_lower_they_are(tmp_path: Path) -> None:
    model = load_classifier(make_encoder(tmp_path), torch.float32, LABELS, PADDING)
    factors = by_name(model, layer_decay=0.5, new=new_parameters(model), new_factor=10.0)
    for name, factor in factors.items():
        expected = next((0.5 ** (2 - n) for n in range(3) if f"encoder.layer.{n}." in name), None)
        expected = expected or (0.125 if "embeddings" in name else 10.0)
        assert factor == expected, name


def test_layers_of_a_causal_model_learn_more_slowly_the_lower_they_are(student_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(student_folder)
    factors = by_name(model, layer_decay=0.5)
    assert factors["lm_head.weight"] == factors["model.norm.weight"] == 1
    assert factors["model.embed_tokens.weight"] == 0.25
    assert {f for name, f in factors.items() if "layers.0." in name} == {0.5}
    assert {f for name, f in factors.items() if "layers.1." in name} == {1.0}


def test_without_decay_all_parameters_are_one_group_in_their_order(student_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(student_folder)
    ((parameters, factor),) = rates(model, layer_decay=1.0)
    assert factor == 1
    assert [id(p) for p in parameters] == [id(p) for p in model.parameters()]


def test_a_model_without_a_list_of_layers_is_refused(tmp_path: Path) -> None:
    model = load_classifier(make_encoder(tmp_path, "ALBERT"), torch.float32, LABELS, PADDING)
    with pytest.raises(ConfigError, match=r"has no known list of layers; set student\.kind\.layer_decay=1"):
        rates(model, layer_decay=0.9)
    assert by_name(model, layer_decay=1.0)
