"""Cutting layers out of a model, in memory and in its configuration alike.

A configuration says what each layer is in several ways: a list with an entry per layer, a list of indices, a count
("the first k are dense"), a period ("every second one is sparse"). Lists are cut along with the layers. Counts and
periods cannot be, so the cut model is rebuilt from its cut configuration, as whoever opens it from disk will do, and
refused unless it computes the same.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from distill.errors import ConfigError
from distill.models.loading import MODEL_ERRORS

_DEPTHS = ("num_hidden_layers", "decoder_layers", "num_decoder_layers")  # or the names that attribute_map has for them
_INDICES = re.compile(r"(layers|idxs?|indices|indexes|layer_ids)$")  # mlp_only_layers, attn_layer_indices
_BY_POSITION = re.compile(
    r"layer(?!_?norm)|block_type|_types$|step$|interval|freq|period|pattern|first_k"
)  # of a count or period
_POSITIONS = ("layer_idx", "layer_id")  # of a module, which finds its layer's part of a cache by it
_NO_COMPUTATION = re.compile(r"^_|idx|index|layer_(id|number)|name|^training$")  # attributes, such as a module's place
_NUM_PROBED = 24  # tokens of the text on which two models are compared
_ROUNDING = 1e-5  # relative to the largest logit: float32 error of another order of summation
# What a model raises that cannot be built from its configuration, or that cannot compute.
BROKEN_MODEL = (*MODEL_ERRORS, StrictDataclassError)


def layers_of(model: PreTrainedModel) -> nn.ModuleList | None:
    """The model's list of layers, None if there is none or more than one."""
    places = list(_lists(model))
    return getattr(*places[0]) if len(places) == 1 else None


def cut_layers(model: PreTrainedModel, keep_layers: Sequence[int]) -> PreTrainedModel:
    """Return a new model of the layers with these indices, in this order, built from its own configuration.

    Raises ConfigError if the configuration cannot express these layers.
    """
    places = list(_lists(model))
    if len(places) != 1:
        raise ConfigError(f"{type(model).__name__} has no known list of layers to cut; set student.keep_layers=null")
    depth = len(getattr(*places[0]))
    if not keep_layers or not all(0 <= index < depth for index in keep_layers):
        raise ConfigError(f"student.keep_layers={list(keep_layers)}: the model has layers 0 to {depth - 1}")
    settings = ", ".join(f"{key}={value}" for key, value in _settings_by_position(model, depth).items())
    try:
        _cut_in_place(model, *places[0], keep_layers)
        rebuilt = _rebuilt(model)
        difference = _difference(model, rebuilt)
    except BROKEN_MODEL as error:
        difference = " ".join(str(error).split())[:200]
    if difference:
        raise ConfigError(
            f"student.keep_layers={list(keep_layers)}: a {type(model).__name__} of these layers, rebuilt from its "
            f"configuration, is another model ({difference}), since what a layer computes depends on its position"
            f"{f' ({settings})' if settings else ''}; keep other layers, such as the first ones and one of every kind, "
            "or set student.keep_layers=null"
        )
    return rebuilt


def probe(model: PreTrainedModel) -> Tensor:
    """Logits of a short text, the same for all models of one vocabulary, in float32."""
    embedding: Any = model.get_input_embeddings()
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(embedding.num_embeddings, (2, _NUM_PROBED), generator=generator).to(model.device)
    was_training = model.training
    try:
        with torch.inference_mode():
            logits_BTV: Tensor = model.eval()(ids_BT).logits
    finally:
        model.train(was_training)
    return logits_BTV.float()


def largest_difference(left: Tensor, right: Tensor) -> float:
    """Largest difference of two models' logits, 0 if it is within float32 rounding."""
    gap = float((left - right).abs().max())
    return 0.0 if gap <= _ROUNDING * float(right.abs().max()) else gap


def _lists(model: PreTrainedModel) -> Iterator[tuple[nn.Module, str]]:
    """Module and attribute of each list as long as the model has layers: the body's own, else those one level below."""
    body = model.base_model
    own = list(_lists_of(body, _depth(model)))
    below = (place for child in body.children() for place in _lists_of(child, _depth(model)))
    language = model.get_decoder() or body
    yield from own or _lists_of(language, _depth(model)) or below


def _lists_of(module: nn.Module, depth: int | None) -> list[tuple[nn.Module, str]]:
    lists = [(name, child) for name, child in module.named_children() if isinstance(child, nn.ModuleList)]
    return [(module, name) for name, child in lists if len(child) == depth]


def _depth(model: PreTrainedModel) -> int | None:
    config = model.config.get_text_config(decoder=True)
    return next((value for name in reversed(_DEPTHS) if isinstance(value := getattr(config, name, None), int)), None)


def _cut_in_place(model: PreTrainedModel, parent: nn.Module, name: str, keep: Sequence[int]) -> None:
    layers = getattr(parent, name)
    kept = nn.ModuleList([layers[index] for index in keep])
    for position, layer in enumerate(kept):
        for module in layer.modules():
            for attribute in _POSITIONS:
                if isinstance(getattr(module, attribute, None), int):
                    setattr(module, attribute, position)
    setattr(parent, name, kept)
    _cut_config(model.config.get_text_config(decoder=True), len(layers), keep)


def _cut_config(config: Any, depth: int, keep: Sequence[int]) -> None:
    for key, value in config.to_dict().items():
        if (cut := _cut_setting(key, value, depth, keep)) is not None:
            setattr(config, key, cut)
    for name in _DEPTHS:
        if getattr(config, name, None) == depth:
            setattr(config, name, len(keep))


def _cut_setting(key: str, value: Any, depth: int, keep: Sequence[int]) -> Any:
    """The setting for the kept layers; None if it does not list layers."""
    if isinstance(value, str) and "pattern" in key and len(value) == depth:  # a letter per layer
        return "".join(value[index] for index in keep)
    if not isinstance(value, list | tuple) or not value or "token_id" in key or key == "architectures":
        return None
    is_indices = all(type(item) is int and 0 <= item < depth for item in value) and len(set(value)) == len(value)
    if _INDICES.search(key) and is_indices and (len(value) != depth or depth > 2):  # two layers: [0, 1] are flags
        return [position for position, index in enumerate(keep) if index in value]
    return [value[index] for index in keep] if len(value) == depth else None


def _settings_by_position(model: PreTrainedModel, depth: int) -> Mapping[str, Any]:
    """The configuration's counts, periods and other settings of layers that are no list with an entry per layer."""
    config = model.config.get_text_config(decoder=True)
    depths = {config.attribute_map.get(name, name) for name in _DEPTHS}
    settings = {key: value for key, value in config.to_dict().items() if _BY_POSITION.search(key) and key not in depths}
    return {key: value for key, value in settings.items() if _is_by_position(value, depth)}


def _is_by_position(value: Any, depth: int) -> bool:
    if isinstance(value, list | tuple):
        return 0 < len(value) != depth
    return isinstance(value, int) and value > 0


def _rebuilt(model: PreTrainedModel) -> PreTrainedModel:
    """Build the model anew from its configuration as it is saved, and load its weights into it."""
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        config = AutoConfig.from_pretrained(Path(folder), trust_remote_code=False)
    config._attn_implementation = model.config._attn_implementation  # not saved, and there is no public setter
    with torch.random.fork_rng(devices=[]):
        rebuilt = type(model)(config)
    missing, unused = rebuilt.load_state_dict(model.state_dict(), strict=False)
    if missing or unused:
        raise ValueError(
            f"{len(missing)} weights are missing and {len(unused)} unused, such as {[*missing, *unused][0]}"
        )
    if hasattr(model, "generation_config"):
        rebuilt.generation_config = model.generation_config
    rebuilt.base_model_prefix = model.base_model_prefix  # that of some families is set when they are opened
    rebuilt.train(model.training)
    return rebuilt


def _difference(cut: PreTrainedModel, rebuilt: PreTrainedModel) -> str:
    """What the layers of the two models compute differently; empty if nothing."""
    # A short text does not show the width of an attention window; the modules' own attributes do.
    ours, theirs = (layers.named_modules() for model in (cut, rebuilt) if (layers := layers_of(model)) is not None)
    pairs = zip(ours, theirs, strict=True)
    differing = [f"layers.{name}.{key}" for (name, left), (_, right) in pairs for key in _differing(left, right)]
    if differing:
        return f"{differing[0]} differs"
    gap = largest_difference(probe(rebuilt), probe(cut))
    return f"logits differ by {gap:.2g}" if gap else ""


def _differing(left: nn.Module, right: nn.Module) -> list[str]:
    """Names of the plain attributes that differ, other than those that only tell a module's place."""
    ours, theirs = (
        {key: value for key, value in vars(module).items() if isinstance(value, bool | int | float | str | None)}
        for module in (left, right)
    )
    names = [key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key)]
    return sorted(key for key in names if not _NO_COMPUTATION.search(key))
