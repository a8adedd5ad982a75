"""The student: opened, cut down, partly frozen or adapted, saved as an ordinary Hugging Face folder."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.errors import ConfigError
from distill.models import loading

if TYPE_CHECKING:
    import peft

_LAYER_LISTS = ("layers", "h", "blocks")
_NOT_MERGED = ("modules_to_save", "trainable_token_indices", "layer_replication")  # what LoraConfig has beside LoRA


def open_student(
    folder: Path,
    *,
    keep_layers: Sequence[int] | None,
    freeze: Sequence[str],
    from_scratch: bool,
    lora: peft.LoraConfig | None,
    gradient_checkpointing: bool,
) -> PreTrainedModel:
    """Open a model for training in float32.

    `keep_layers` are the indices of the layers that stay, None for all; parameters whose name holds one of
    `freeze` are not trained; `from_scratch` draws new weights for the folder's configuration. With `lora` its
    adapters alone are trained, until `merge_adapters`. `gradient_checkpointing` computes activations a second
    time in the backward pass instead of keeping them.
    """
    model = loading.load(folder, torch.float32, from_scratch=from_scratch)
    if keep_layers is not None:
        _cut_layers(model, keep_layers)
    unused = [part for part in freeze if not any(part in name for name, _ in model.named_parameters())]
    if unused:
        names = sorted({name.split(".")[1] for name, _ in model.named_parameters() if "." in name})
        raise ConfigError(f"student.freeze: no parameter's name holds {unused}; there are {names}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in freeze))
    if lora is not None:
        _adapt(model, lora)
    if gradient_checkpointing:
        _checkpoint(model)
    return model


def _adapt(model: PreTrainedModel, lora: peft.LoraConfig) -> None:
    """Put adapters into the model in place, and freeze all else."""
    from peft import inject_adapter_in_model

    given = [name for name in _NOT_MERGED if getattr(lora, name, None)]
    if given:
        raise ConfigError(f"student.lora: {given} cannot be merged into the weights; leave them out")
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    try:
        inject_adapter_in_model(lora, model)
    except ValueError as error:
        raise ConfigError(f"student.lora: {error}") from None
    is_tied = embedding.weight is head.weight
    if model.get_output_embeddings() is not head or (is_tied and model.get_input_embeddings() is not embedding):
        raise ConfigError(
            "student.lora adapts the output head, or the embedding whose weight it shares; the loss reads that weight "
            "as it is. Leave them out of student.lora.target_modules (all-linear does), or name them in "
            "student.lora.exclude_modules"
        )


def merge_adapters(model: PreTrainedModel) -> None:
    """Add each adapter to the weight that it adapts, in place; what remains is an ordinary model."""
    if not hasattr(model, "peft_config"):
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in reversed(list(model.named_modules())):  # of two around one layer the inner one first
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            model.set_submodule(name, layer.get_base_layer())
    del model.peft_config


def _checkpoint(model: PreTrainedModel) -> None:
    if not model.supports_gradient_checkpointing:
        raise ConfigError(f"{type(model).__name__} keeps all activations; set student.gradient_checkpointing=false")
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)  # its older name
    enable({"use_reentrant": False})  # the reentrant kind loses the gradients behind an input that needs none


def layer_list(model: PreTrainedModel) -> str | None:
    """The name by which the model's body has its layers, if it is a known one."""
    body = model.base_model
    return next((name for name in _LAYER_LISTS if isinstance(getattr(body, name, None), nn.ModuleList)), None)


def _cut_layers(model: PreTrainedModel, keep_layers: Sequence[int]) -> None:
    body, owner = model.base_model, layer_list(model)
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


@contextmanager
def compiled(model: PreTrainedModel) -> Iterator[None]:
    """Meanwhile the body runs compiled, for all sizes of batch at once.

    Not for ever: generation passes a cache, of another shape at each call, and would be compiled over and over.
    """
    body = model.base_model
    body.compile(dynamic=True)
    try:
        yield
    finally:
        body._compiled_call_impl = None  # torch has no public way back


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
