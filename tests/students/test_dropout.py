"""Dropout as configured acts in training alone, and the saved student has that of the model that it was made from."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from distill.errors import ConfigError
from distill.lessons.curriculum import prepare
from distill.models import loading
from distill.models.classifiers import load_classifier
from distill.models.dropout import copy_dropout, set_dropout
from distill.students import Changes
from distill.training.fit import open_job_student
from tests.students.encoders import LABELS, PADDING, make_encoder
from tests.students.families import make_family

Load = Callable[..., PreTrainedModel]
CAUSAL, CLASSIFIERS = ("llama", "opt", "gpt_neo", "bart", "gemma3_with_images"), ("BERT", "DeBERTa-v2", "ModernBERT")


@pytest.fixture(scope="module", params=[*CAUSAL, *CLASSIFIERS])
def load(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Load:
    """Open a model of a family with a dropout, None for its own."""
    folder, family = tmp_path_factory.mktemp("model"), request.param
    if family in CLASSIFIERS:
        make_encoder(folder, family)
        return lambda p, **more: load_classifier(folder, torch.float32, LABELS, PADDING, dropout=p, **more)
    make_family(folder, family)
    return lambda p, **more: loading.load(folder, torch.float32, dropout=p, **more)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    result: Tensor = model(torch.arange(3, 19).unsqueeze(0)).logits
    return result


@pytest.mark.parametrize("from_scratch", [False, True])
def test_dropout_acts_in_training_and_not_in_evaluation(load: Load, from_scratch: bool) -> None:
    model = load(0.3, from_scratch=from_scratch).train()
    assert not torch.equal(logits(model), logits(model))
    model.eval()
    assert torch.equal(logits(model), logits(model))


def test_a_dropout_of_0_turns_off_that_of_the_configuration(load: Load) -> None:
    model = load(0.0).train()
    assert torch.equal(logits(model), logits(model))
    assert torch.equal(logits(model), logits(load(None).eval()))


def test_every_probability_is_set_and_restored_in_the_parts_of_a_configuration_too() -> None:
    source = AutoConfig.for_model("gemma3", text_config={"attention_dropout": 0.1})
    config = AutoConfig.for_model("gemma3")
    set_dropout(config, 0.5)
    assert (config.text_config.attention_dropout, config.vision_config.attention_dropout) == (0.5, 0.5)
    alone = copy.deepcopy(config.text_config)
    copy_dropout(config, source)
    assert (config.text_config.attention_dropout, config.vision_config.attention_dropout) == (0.1, 0.0)
    copy_dropout(alone, source)  # some models are opened from such a part
    assert alone.attention_dropout == 0.1


def test_a_probability_that_follows_another_still_does() -> None:
    config = AutoConfig.for_model("bert")
    set_dropout(config, 0.5)
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.5, 0.5)
    assert config.classifier_dropout is None


def test_other_settings_are_left_alone() -> None:
    config = AutoConfig.for_model("opt")
    before = config.to_dict()
    set_dropout(config, 0.5)
    after = config.to_dict()
    assert {key for key in before if before[key] != after[key]} == {"dropout", "attention_dropout"}


def test_a_model_without_dropout_is_refused(tmp_path: Path) -> None:
    make_family(tmp_path, "mamba2")
    with pytest.raises(ConfigError) as caught:
        loading.load(tmp_path, torch.float32, dropout=0.1)
    assert str(caught.value) == (
        "student.dropout=0.1: the configuration of a mamba2 model has no dropout; set student.dropout=null"
    )


def of_config(folder: Path) -> dict[str, Any]:
    settings = json.loads((folder / "config.json").read_text())
    return {key: value for key, value in settings.items() if "dropout" in key}


@pytest.mark.parametrize("more", [{}, {"keep_layers": [0, 1]}, {"from_scratch": True}])
def test_the_saved_student_has_the_dropout_of_its_source(
    more: dict[str, Any], tmp_path: Path, teacher_folder: Path, configured: Callable[..., Any]
) -> None:
    """The training has another one, which who opens the student must not find: it would train on with it."""
    job = prepare(configured("student.dropout=0.25", f"student.model={teacher_folder}"), tmp_path / "run")
    model = job.kind.open(Changes(dropout=0.25, **more))
    assert model.config.attention_dropout == 0.25
    saved = job.kind.save(model, tmp_path / "student", torch.float32)
    assert of_config(teacher_folder) == of_config(tmp_path / "student") == {"attention_dropout": 0.5}
    assert saved.model.config.attention_dropout == 0.5


def test_a_run_trains_with_its_dropout(tmp_path: Path, configured: Callable[..., Any]) -> None:
    model = open_job_student(prepare(configured("student.dropout=0.25"), tmp_path / "run")).train()
    assert not torch.equal(logits(model), logits(model))
