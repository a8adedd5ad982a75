"""The best validation of a run: which step it was, and the student's weights at that step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, final

import lightning
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from torch import Tensor, nn

from distill.training.sharding import whole_weights

_CLEARLY = 0.05  # relative difference of the last validation from the best one
Mode = Literal["min", "max"]


@dataclass(frozen=True)
class Measure:
    """What validations are compared by: a logged metric, and whether its minimum or maximum is best."""

    metric: str
    mode: Mode

    def is_better(self, value: float, best: float | None) -> bool:
        """Whether a value is finite and better than the best one so far."""
        if not math.isfinite(value):
            return False
        return best is None or (value < best if self.mode == "min" else value > best)


WEIGHTED_LOSS = Measure("val/loss", "min")  # what is trained, on validation


def measure_of(callbacks: Mapping[str, Any]) -> Measure:
    """Return what a run's early stopping monitors, or the weighted sum of its losses without early stopping."""
    for part in callbacks.values():
        if isinstance(part, EarlyStopping):
            return Measure(part.monitor, "max" if part.mode == "max" else "min")
    return WEIGHTED_LOSS


@final
class BestValidation(Callback):
    """Notes the step of the best validation and, if asked to, keeps the student's trained weights of that step.

    It must come before callbacks that exchange the weights for the time of a validation. The weights are part of
    every checkpoint, so that a resumed run keeps the same student.
    """

    def __init__(self, measure: Measure, *, keeps_weights: bool) -> None:
        """With `keeps_weights`, a copy of the trained weights stays in the memory of the host."""
        self._measure, self.keeps_weights = measure, keeps_weights
        self.step: int | None = None
        self.value: float | None = None
        self.last_value = math.nan
        self.weights: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the best validation so far."""
        return {"step": self.step, "value": self.value, "last_value": self.last_value, "weights": self.weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best validation of the earlier parts of the run."""
        self.step, self.value, self.weights = state_dict["step"], state_dict["value"], state_dict["weights"]
        self.last_value = state_dict["last_value"]

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Compare this validation with the best one, while the validated weights are in the student."""
        measured: Any = pl_module.validation_means().get(self._measure.metric)  # type: ignore[operator]
        if trainer.sanity_checking or measured is None:
            return
        # The first process decides for all: rounding may differ between devices.
        self.last_value = float(trainer.strategy.broadcast(float(measured)))
        if self._measure.is_better(self.last_value, self.value):
            self.step, self.value = trainer.global_step, self.last_value
            if self.keeps_weights:
                self.weights = _trained(pl_module)

    def facts(self, steps: int) -> dict[str, Any]:
        """Return what run.json says about the `steps` of a run."""
        kept = self.step if self.keeps_weights and self.step is not None else steps
        best = {"best_step": self.step, "metric": self._measure.metric, "best": self.value}
        return {"steps": steps, "kept_step": kept, **best}

    def message(self, steps: int) -> str | None:
        """Say which step is kept, or that an earlier one was clearly better on validation."""
        metric, value = self._measure.metric, self.value
        if value is None:
            return f"no validation had a finite {metric}; the last student is kept" if self.keeps_weights else None
        values = f"{metric} {value:.4g}, {self.last_value:.4g} at the last validation"
        if self.keeps_weights:
            return f"keeping the student of step {self.step} of {steps}, the best on validation: {values}"
        is_worse = abs(self.last_value - value) > _CLEARLY * abs(value)
        return f"validation was best at step {self.step} of {steps}: {values}; keep=best keeps it" if is_worse else None

    def restore(self, student: nn.Module) -> None:
        """Put the kept weights into the student."""
        parameters = dict(student.named_parameters())
        with torch.no_grad():
            for name, weight in self.weights.items():
                parameters[name].copy_(weight)


def _trained(module: Any) -> dict[str, Tensor]:
    names = {name for name, parameter in module.model.named_parameters() if parameter.requires_grad}
    return {name: weight.detach().cpu().clone() for name, weight in whole_weights(module).items() if name in names}
