"""Causal language model students: loaded, cut, frozen or adapted, and merged."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, final

import torch
from annotated_types import Gt
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from distill.errors import ConfigError
from distill.losses import Objective
from distill.losses.head import Head, Shape
from distill.models import loading
from distill.models.dropout import copy_dropout
from distill.models.reading import check_student_reading
from distill.prompts.rendering import Prompts, student_prompts
from distill.prompts.serving import served_tokenizer
from distill.records import Batch, Span
from distill.students import Changes
from distill.students.layers import cut_layers
from distill.students.rates import Rates, rates
from distill.students.saving import SavedStudent, save_student
from distill.tasks import Task

if TYPE_CHECKING:
    import peft

_PLAIN_ROWS = 64  # of logits that are in memory together
_NOT_MERGED = ("modules_to_save", "trainable_token_indices", "layer_replication")  # in LoraConfig


@final
class CausalLM:
    """A causal language model, which learns the tokens of answers and rationales."""

    def __init__(
        self,
        *,
        folder: Path,
        teacher: Prompts,
        task: Task,
        first_span: Span,
        max_new_tokens: int,
        layer_decay: Annotated[float, Gt(0)],
    ) -> None:
        """It is asked like its `teacher`, without shots. It writes the `first_span` first after a question.

        `layer_decay` is the factor of the learning rate from each layer to the one below.
        """
        self.prompts = student_prompts(teacher, folder)
        self.seam = TokenSeam(self.prompts.vocabulary_size, layer_decay)
        self._folder, self._first_span, self._max_new_tokens = folder, first_span, max_new_tokens

    def problems(self, objectives: Mapping[str, Objective]) -> list[str]:
        """Return no problem: every loss is one of tokens."""
        return []

    def check_weights(self) -> None:
        """Raise ConfigError unless the files hold exactly the weights of the model."""
        loading.check_weights(self._folder)

    def open(self, changes: Changes) -> PreTrainedModel:
        """Load the model for training, in float32."""
        return open_student(self._folder, **vars(changes))

    def save(self, model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> SavedStudent:
        """Save the student with its prompt as a chat template, and the dropout of the model that it was made from."""
        copy_dropout(model.config, AutoConfig.from_pretrained(self._folder, trust_remote_code=False))
        tokenizer = served_tokenizer(self.prompts, self._first_span)
        return save_student(
            model, tokenizer, folder, dtype=dtype, max_new_tokens=self._max_new_tokens, ends=self.prompts.ends
        )

    def check_reading(self, model: PreTrainedModel) -> None:
        """Raise ConfigError unless the model reads in batches what it reads alone."""
        check_student_reading(model, self.prompts.vocabulary_size)


@dataclass(frozen=True)
class TokenSeam:
    """Between body and language-model head of a causal model; head rows from `vocabulary_size` on are padding."""

    vocabulary_size: int
    layer_decay: float = 1.0

    def rates(self, model: Any) -> Rates:
        """Return the parameters by layer."""
        return rates(model, layer_decay=self.layer_decay)

    def hidden(self, model: Any, batch: Batch) -> Float[Tensor, "N H"]:
        """Return the hidden state that predicts each supervised position."""
        if batch.branch_BT is None:
            inputs = {"attention_mask": batch.mask_BT}
        else:
            mask_B1TT = branch_mask(batch.branch_BT, model.dtype)
            inputs = {"attention_mask": mask_B1TT, "position_ids": batch.position_BT}
        out = model.base_model(batch.input_ids_BT, **inputs, use_cache=False)
        hidden_NH: Tensor = out.last_hidden_state[batch.sequence_N, batch.before_N]
        return hidden_NH

    def head(self, model: Any) -> Head:
        """Return the language-model head without padding rows."""
        return Head.of(model, self.vocabulary_size)

    def plain_logits(self, model: Any, ids: Sequence[int], start: int, stop: int) -> Iterator[Float[Tensor, "M V"]]:
        """Yield the logits of a sequence that is read alone: no padding, branches or chunks."""
        ids_1T = torch.tensor([list(ids)], device=model.device)
        hidden_NH = model.base_model(ids_1T, use_cache=False).last_hidden_state[0, start - 1 : stop - 1]
        for hidden_MH in hidden_NH.split(_PLAIN_ROWS):
            yield Shape.of(model)(model.get_output_embeddings()(hidden_MH).float())[:, : self.vocabulary_size]


def branch_mask(branch_BT: Int[Tensor, "B T"], dtype: torch.dtype) -> Float[Tensor, "B 1 T T"]:
    """Return the additive attention mask: 0 where a token attends to another, else the dtype's minimum.

    A token attends to itself and to earlier tokens of branch 0 and of its own branch. Padding is on the right, so no
    token attends to it.
    """
    is_related_BTT = (branch_BT[:, None, :] == 0) | (branch_BT[:, None, :] == branch_BT[:, :, None])
    is_masked_BTT = ~is_related_BTT.tril()
    mask_BTT = torch.zeros(is_masked_BTT.shape, dtype=dtype, device=branch_BT.device)
    return mask_BTT.masked_fill_(is_masked_BTT, torch.finfo(dtype).min).unsqueeze(1)


def open_student(
    folder: Path,
    *,
    keep_layers: Sequence[int] | None,
    freeze: Sequence[str],
    from_scratch: bool,
    lora: peft.LoraConfig | None,
    dropout: float | None,
    gradient_checkpointing: bool,
) -> PreTrainedModel:
    """Load a causal model for training in float32, changed as `Changes` says."""
    model = loading.load(folder, torch.float32, from_scratch=from_scratch, dropout=dropout)
    _correct_tie(model)
    if keep_layers is not None:
        model = cut_layers(model, keep_layers)
    freeze_parameters(model, freeze)
    if lora is not None:
        _adapt(model, lora)
    if gradient_checkpointing:
        checkpoint_activations(model)
    return model


def freeze_parameters(model: nn.Module, freeze: Sequence[str]) -> None:
    """Train all parameters but those whose name contains an item of `freeze`."""
    unused = [part for part in freeze if not any(part in name for name, _ in model.named_parameters())]
    if unused:
        names = sorted({name.split(".")[1] for name, _ in model.named_parameters() if "." in name})
        raise ConfigError(f"student.freeze: no parameter's name contains {unused}; the model has {names}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in freeze))


def _correct_tie(model: PreTrainedModel) -> None:
    """Say in the configuration that the head has weights of its own where it has: some programs trust it, and tie."""
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        for config in (model.config, model.config.get_text_config(decoder=True)):
            config.tie_word_embeddings = False


def inject_adapters(model: PreTrainedModel, lora: peft.LoraConfig) -> None:
    """Add adapters to the model in place, and freeze all other parameters."""
    from peft import inject_adapter_in_model

    unmergeable = [name for name in _NOT_MERGED if getattr(lora, name, None)]
    if unmergeable:
        raise ConfigError(f"student.lora: {unmergeable} cannot be merged into the weights; remove them")
    try:
        inject_adapter_in_model(lora, model)
    except ValueError as error:
        raise ConfigError(f"student.lora: {error}") from None


def _adapt(model: PreTrainedModel, lora: peft.LoraConfig) -> None:
    """Add adapters that leave the head and its tied embedding alone."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    inject_adapters(model, lora)
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


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Let the backward pass recompute activations instead of keeping them."""
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
