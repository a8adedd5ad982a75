"""Students: loading, removing layers, adapters, saving. Nothing here depends on teachers.

A new kind is a file in this package and one in conf/student/.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.losses import Objective
from distill.losses.head import Head
from distill.prompts.classes import ClassPrompts
from distill.prompts.rendering import Prompts
from distill.records import Batch

if TYPE_CHECKING:
    import peft

    from distill.students.saving import SavedStudent


@dataclass(frozen=True)
class Changes:
    """What becomes of a model before it trains.

    `keep_layers` has the indices of the layers to keep, None for all; parameters whose name contains an item of
    `freeze` are not trained; `from_scratch` initializes new weights from the folder's configuration. With `lora`,
    only adapters are trained, until they are merged. `dropout` is the probability of all of the model's dropout in
    training, None for those in its configuration, which the saved student has in any case. `gradient_checkpointing`
    recomputes activations in the backward pass instead of keeping them.
    """

    keep_layers: Sequence[int] | None = None
    freeze: Sequence[str] = ()
    from_scratch: bool = False
    lora: peft.LoraConfig | None = None
    dropout: float | None = None
    gradient_checkpointing: bool = False


@runtime_checkable
class Seam(Protocol):
    """How losses see a model: as hidden states of supervised positions, and a head that makes logits of them."""

    def rates(self, model: PreTrainedModel) -> list[tuple[list[nn.Parameter], float]]:
        """The parameters, and the factor of their learning rate."""
        ...

    def hidden(self, model: PreTrainedModel, batch: Batch) -> Float[Tensor, "N H"]:
        """The hidden state that predicts each supervised position."""
        ...

    def head(self, model: PreTrainedModel) -> Head:
        """The head, without the rows of no outcome."""
        ...

    def plain_logits(
        self, model: PreTrainedModel, ids: Sequence[int], start: int, stop: int
    ) -> Iterator[Float[Tensor, "M V"]]:
        """The logits that predict the tokens in [start, stop) of one sequence, as the model itself computes them.

        They come in parts of a few rows, since those of a long text would need much memory.
        """
        ...


@runtime_checkable
class StudentKind(Protocol):
    """A kind of student for one model folder and one task. No weights are loaded before `open`."""

    @property
    def prompts(self) -> Prompts | ClassPrompts:
        """What the student reads and learns."""
        ...

    @property
    def seam(self) -> Seam:
        """How losses see the student."""
        ...

    def problems(self, objectives: Mapping[str, Objective]) -> list[str]:
        """Why this student cannot learn from these losses."""
        ...

    def check_weights(self) -> None:
        """Raise ConfigError unless the model's files hold its weights; none is read."""
        ...

    def open(self, changes: Changes) -> PreTrainedModel:
        """Load the model for training, in float32."""
        ...

    def save(self, model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> SavedStudent:
        """Write the model in `dtype` with all that it needs to be used, and return it as reopened."""
        ...

    def check_reading(self, model: PreTrainedModel) -> None:
        """Raise ConfigError unless the model can be read in batches."""
        ...
