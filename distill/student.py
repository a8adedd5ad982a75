"""The student: opened, cut down, partly frozen, saved as an ordinary Hugging Face folder."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill import models
from distill.records import ConfigError

_LAYER_LISTS = ("layers", "h", "blocks")


def open_student(
    folder: Path, *, keep_layers: Sequence[int] | None, freeze: Sequence[str], from_scratch: bool
) -> PreTrainedModel:
    """Open a model for training in float32.

    `keep_layers` are the indices of the layers that stay, None for all; parameters whose name holds one of
    `freeze` are not trained; `from_scratch` draws new weights for the folder's configuration.
    """
    model = models.load(folder, torch.float32, from_scratch=from_scratch)
    if keep_layers is not None:
        _cut_layers(model, keep_layers)
    unused = [part for part in freeze if not any(part in name for name, _ in model.named_parameters())]
    if unused:
        names = sorted({name.split(".")[1] for name, _ in model.named_parameters() if "." in name})
        raise ConfigError(f"student.freeze: no parameter's name holds {unused}; there are {names}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in freeze))
    return model


def _cut_layers(model: PreTrainedModel, keep_layers: Sequence[int]) -> None:
    body = model.base_model
    owner = next((name for name in _LAYER_LISTS if isinstance(getattr(body, name, None), nn.ModuleList)), None)
    if owner is None:
        raise ConfigError(f"{type(model).__name__} has no list of layers to cut; set student.keep_layers=null")
    layers = getattr(body, owner)
    if not keep_layers or not all(0 <= index < len(layers) for index in keep_layers):
        raise ConfigError(f"student.keep_layers={list(keep_layers)}: the model has layers 0 to {len(layers) - 1}")
    kept = nn.ModuleList([layers[index] for index in keep_layers])
    for position, layer in enumerate(kept):
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = position  # type: ignore[assignment]
    setattr(body, owner, kept)
    model.config.num_hidden_layers = len(kept)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[index] for index in keep_layers]


def weights_hash(model: nn.Module) -> str:
    """Hash of all parameters: two students that start alike have the same."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def save_student(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write weights (safetensors), configuration and tokenizer; the folder appears whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        whole = Path(temporary) / "model"
        model.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        if folder.exists():
            shutil.rmtree(folder)
        whole.rename(folder)


def size_bytes(folder: Path) -> int:
    """Size of a model folder's weights on disk."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
