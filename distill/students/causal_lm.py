"""Causal language model students: loaded, cut, frozen or adapted, and merged."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedModel

from distill.errors import ConfigError
from distill.models import loading
from distill.students.layers import cut_layers

if TYPE_CHECKING:
    import peft

_NOT_MERGED = ("modules_to_save", "trainable_token_indices", "layer_replication")  # in LoraConfig


def open_student(
    folder: Path,
    *,
    keep_layers: Sequence[int] | None,
    freeze: Sequence[str],
    from_scratch: bool,
    lora: peft.LoraConfig | None,
    gradient_checkpointing: bool,
) -> PreTrainedModel:
    """Load a model for training in float32.

    `keep_layers` has the indices of the layers to keep, None for all; parameters whose name contains an item of
    `freeze` are not trained; `from_scratch` initializes new weights from the folder's configuration. With `lora`,
    only adapters are trained, until `merge_adapters`. `gradient_checkpointing` recomputes activations in the
    backward pass instead of keeping them.
    """
    model = loading.load(folder, torch.float32, from_scratch=from_scratch)
    _correct_tie(model)
    if keep_layers is not None:
        model = cut_layers(model, keep_layers)
    unused = [part for part in freeze if not any(part in name for name, _ in model.named_parameters())]
    if unused:
        names = sorted({name.split(".")[1] for name, _ in model.named_parameters() if "." in name})
        raise ConfigError(f"student.freeze: no parameter's name contains {unused}; the model has {names}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in freeze))
    if lora is not None:
        _adapt(model, lora)
    if gradient_checkpointing:
        _checkpoint(model)
    return model


def _correct_tie(model: PreTrainedModel) -> None:
    """Say in the configuration that the head has weights of its own where it has: some programs trust it, and tie."""
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        for config in (model.config, model.config.get_text_config(decoder=True)):
            config.tie_word_embeddings = False


def _adapt(model: PreTrainedModel, lora: peft.LoraConfig) -> None:
    """Add adapters to the model in place, and freeze all other parameters."""
    from peft import inject_adapter_in_model

    unmergeable = [name for name in _NOT_MERGED if getattr(lora, name, None)]
    if unmergeable:
        raise ConfigError(f"student.lora: {unmergeable} cannot be merged into the weights; remove them")
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    try:
        inject_adapter_in_model(lora, model)
    except ValueError as error:
        raise ConfigError(f"student.lora: {error}") from None
    is_tied = embedding.weight is head.weight
    if model.get_output_embeddings() is not head or (is_tied and model.get_input_embeddings() is not embedding):
        raise ConfigError(
            "student.lora adapts the output head or the embedding tied to it, but the loss reads that weight directly, "
            "without adapters. Remove them from student.lora.target_modules (all-linear excludes them), or list them "
            "in student.lora.exclude_modules"
        )


def merge_adapters(model: PreTrainedModel) -> None:
    """Merge all adapters into the weights in place, which leaves a standard model."""
    if not hasattr(model, "peft_config"):
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in reversed(list(model.named_modules())):  # inner adapters before those around them
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            model.set_submodule(name, layer.get_base_layer())
    del model.peft_config


def _checkpoint(model: PreTrainedModel) -> None:
    if not model.supports_gradient_checkpointing:
        raise ConfigError(
            f"{type(model).__name__} cannot recompute activations; set student.gradient_checkpointing=false"
        )
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)  # the older name
    enable({"use_reentrant": False})  # the reentrant kind gives no gradients if the input requires none


@contextmanager
def compiled(model: PreTrainedModel) -> Iterator[None]:
    """Run the body compiled in this context, for all batch sizes at once.

    Only in this context, since generation passes a cache of a different shape at every call, which would recompile.
    """
    body = model.base_model
    body.compile(dynamic=True)
    try:
        yield
    finally:
        body._compiled_call_impl = None  # torch has no public way to undo compile()


def weights_hash(model: nn.Module) -> str:
    """Hash of all parameters and buffers; students that start equal have the same hash."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
