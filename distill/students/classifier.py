"""Students with a class head: encoders, or decoders, that answer with one of a task's choices in a single pass."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, final

import torch
from annotated_types import Gt
from jaxtyping import Float
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from distill.errors import ConfigError
from distill.losses import Objective
from distill.losses.head import Head
from distill.models.classifiers import (
    check_classifier,
    class_head,
    class_logits,
    features,
    labels_of,
    load_classifier,
    new_parameters,
    padding_of,
    text_limit,
)
from distill.models.dropout import copy_dropout
from distill.prompts.classes import ClassPrompts
from distill.prompts.rendering import Prompts, TooLong
from distill.prompts.tokenizers import load_tokenizer
from distill.records import Batch, Span
from distill.students import Changes
from distill.students.causal_lm import checkpoint_activations, freeze_parameters, inject_adapters
from distill.students.layers import cut_layers
from distill.students.rates import Rates, rates
from distill.students.saving import SavedStudent, save_model
from distill.tasks import Task

if TYPE_CHECKING:
    import peft


@dataclass(frozen=True)
class ClassSeam:
    """Before the head that makes the logits of the classes.

    `padding_id` is that of the model; `head_rate` the factor of the learning rate of the weights after the body, and
    `layer_decay` that from each layer of the body to the one below.
    """

    padding_id: int
    head_rate: float = 1.0
    layer_decay: float = 1.0

    def rates(self, model: Any) -> Rates:
        """Return the parameters of the body by layer, and those after it, which are new."""
        return rates(model, layer_decay=self.layer_decay, new=new_parameters(model), new_factor=self.head_rate)

    def hidden(self, model: Any, batch: Batch) -> Float[Tensor, "N H"]:
        """Return what the head reads of each text; the class behind a text is hidden from the model."""
        is_text_BT = batch.mask_BT.bool()
        is_text_BT[batch.sequence_N, batch.before_N + 1] = False
        # Some models count positions by comparing with their own padding id.
        ids_BT = batch.input_ids_BT.where(is_text_BT, self.padding_id)
        # As decoders do: an end token that is the padding token does not count.
        place_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        last_B = (place_T * (ids_BT != self.padding_id)).amax(1)
        features_BH = features(model, ids_BT[:, :-1], is_text_BT[:, :-1].long(), last_B)
        return features_BH[batch.sequence_N]

    def head(self, model: Any) -> Head:
        """Return the class head."""
        head = class_head(model)
        return Head(head.weight, head.bias)

    def plain_logits(self, model: Any, ids: Sequence[int], start: int, stop: int) -> Iterator[Float[Tensor, "M V"]]:
        """Yield the logits of a text that is read alone."""
        yield class_logits(model, [ids[:start]], self.padding_id).float()


def saved_classifier(folder: Path, max_length: int | None, too_long: TooLong) -> tuple[ClassPrompts, PreTrainedModel]:
    """Open a student that was saved, in float32, and what it reads; a text may have `max_length` tokens at most."""
    tokenizer, limits = load_tokenizer(folder, has_end=False), (max_length, text_limit(folder))
    limit = min((limit for limit in limits if limit is not None), default=tokenizer.model_max_length)
    sizes: Any = {"max_length": limit, "too_long": too_long, "padding_id": padding_of(folder)}
    prompts = ClassPrompts(tokenizer, labels_of(folder), **sizes)
    return prompts, load_classifier(folder, torch.float32, prompts.labels, prompts.end).eval()


@torch.no_grad()
def divide_logits(model: PreTrainedModel, temperature: float) -> None:
    """Divide the logits of the classes by a temperature, in the weights of the head."""
    head = class_head(model)
    for weight in (head.weight, head.bias):
        if weight is not None:
            weight.div_(temperature)


def _adapt(model: PreTrainedModel, lora: peft.LoraConfig) -> None:
    """Add adapters to the body in place; the weights after it are new, and trained whole."""
    new = {name for name, weight in model.named_parameters() if any(weight is other for other in new_parameters(model))}
    learned = [weight for name, weight in model.named_parameters() if name in new and weight.requires_grad]
    inject_adapters(model, lora)
    if not new <= {name for name, _ in model.named_parameters()}:
        raise ConfigError(
            "student.lora adapts the head of the classes, or what stands before it, which are new and trained whole; "
            "remove them from student.lora.target_modules, or list them in student.lora.exclude_modules"
        )
    for weight in learned:
        weight.requires_grad_(True)


@final
class Classifier:
    """A model with a class head, which learns the choices of its task."""

    prompts: ClassPrompts

    def __init__(
        self,
        *,
        folder: Path,
        teacher: Prompts,
        task: Task,
        first_span: Span,
        max_new_tokens: int,
        head_rate: Annotated[float, Gt(0)],
        calibrate: bool,
        layer_decay: Annotated[float, Gt(0)],
    ) -> None:
        """Texts may be as long as those of the `teacher`, and as the model can read.

        `head_rate` is the factor of the learning rate for the weights between the body and the classes, `layer_decay`
        that from each layer to the one below. `calibrate`: before the student is saved, its logits are divided by the
        temperature that fits the labels of validation.
        """
        if not task.choices:
            raise ConfigError(
                "student.kind: a class head needs a task whose questions all have the same choices; set task.choices, "
                "or choose a student that writes: student=causal_lm"
            )
        if first_span == "rationale":
            raise ConfigError("student.kind: a class head writes no reasoning; set task.answer_mode=direct")
        limit = min(teacher.max_length, text_limit(folder) or teacher.max_length)
        sizes: Any = {"max_length": limit, "too_long": teacher.too_long, "padding_id": padding_of(folder)}
        self.prompts = ClassPrompts(load_tokenizer(folder, has_end=False), task.choices, **sizes)
        self.seam = ClassSeam(self.prompts.end, head_rate, layer_decay)
        self.calibrate, self._folder = calibrate, folder

    def problems(self, objectives: Mapping[str, Objective]) -> list[str]:
        """Return the losses of what a classifier does not write."""
        return [
            f"loss.{name} is computed on rationales, and a student with a class head writes none; remove it"
            for name, objective in objectives.items()
            if objective.span == "rationale"
        ]

    def check_weights(self) -> None:
        """Raise ConfigError unless the files hold the weights of the body, and of the head if they have this one."""
        check_classifier(self._folder, self.prompts.labels, self.prompts.end)

    def open(self, changes: Changes) -> PreTrainedModel:
        """Load the model for training, in float32; the head is new unless the model has one for the same labels."""
        model = self._load(self._folder, changes.from_scratch, changes.dropout)
        if changes.keep_layers is not None:
            model = cut_layers(model, changes.keep_layers)
        freeze_parameters(model, changes.freeze)
        if changes.lora is not None:
            _adapt(model, changes.lora)
        if changes.gradient_checkpointing:
            checkpoint_activations(model)
        return model

    def save(self, model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> SavedStudent:
        """Save the student with its labels and its tokenizer, which cuts texts that are too long.

        Its configuration has the dropout of the model that it was made from.
        """
        copy_dropout(model.config, AutoConfig.from_pretrained(self._folder, trust_remote_code=False))
        return save_model(model, folder, dtype, complete=self._write_tokenizer, reopen=self._load)

    def check_reading(self, model: PreTrainedModel) -> None:
        """Return: that a batch is read as its texts alone was checked when the model was opened."""

    def _write_tokenizer(self, folder: Path) -> None:
        tokenizer = copy.deepcopy(self.prompts.tokenizer)
        tokenizer.model_max_length = self.prompts.max_length
        tokenizer.save_pretrained(folder)

    def _load(self, folder: Path, from_scratch: bool = False, dropout: float | None = None) -> PreTrainedModel:
        prompts = self.prompts
        model = load_classifier(
            folder, torch.float32, prompts.labels, prompts.end, from_scratch=from_scratch, dropout=dropout
        )
        embedding: Any = model.get_input_embeddings()
        num_tokens = max(prompts.tokenizer.get_vocab().values()) + 1
        if num_tokens > len(embedding.weight):
            raise ConfigError(
                f"the tokenizer of {folder} has {num_tokens} tokens, and the model embeds {len(embedding.weight)}; use "
                "the tokenizer that belongs to these weights"
            )
        return model
