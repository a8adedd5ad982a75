"""Progress of annotation and training: a bar in a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import lightning
from lightning.pytorch.callbacks import Callback, TQDMProgressBar

from distill.app.console import say
from distill.records import Annotation, Group, Request

CountTokens = Callable[[Sequence[Request], Sequence[Annotation]], tuple[int, int]]  # read and written
_NOT_SHOWN = ("train/grad_norm", "train/learning_rate")


def progress(unit: str, total: int, count_tokens: CountTokens | None = None) -> Callback:
    """A progress bar in a terminal, otherwise plain lines for a log."""
    return TQDMProgressBar() if sys.stderr.isatty() else ProgressLines(unit, total, count_tokens)


def token_speed(num_read: int, num_written: int, seconds: float) -> str:
    """Numbers of tokens, and how many are written per second, or read where none is written."""
    rate = f"({(num_written or num_read) / max(1e-9, seconds):,.0f}/s)"
    return f"{num_read:,} tokens read" + (f", {num_written:,} written {rate}" if num_written else f" {rate}")


@final
class ProgressLines(Callback):
    """Prints a line every few seconds: steps or records done, speed, time left, and a teacher's tokens."""

    def __init__(
        self, unit: str, total: int, count_tokens: CountTokens | None = None, every_seconds: float = 15
    ) -> None:
        """`unit` is the plural name of what `total` counts."""
        self._unit, self._total, self._every = unit, total, every_seconds
        self._count_tokens = count_tokens
        self._start = self._last = 0.0
        self._done = self._num_read = self._num_written = 0

    def on_predict_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._begin()

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._begin()

    def on_predict_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Group,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._done += len(batch.requests)
        if self._count_tokens:
            num_read, num_written = self._count_tokens(batch.requests, outputs)
            self._num_read, self._num_written = self._num_read + num_read, self._num_written + num_written
        self._print(self._total, {})

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._done = trainer.global_step
        logged: Mapping[str, float] = pl_module.logged  # type: ignore[assignment]
        self._print(self._total, {name: value for name, value in logged.items() if name not in _NOT_SHOWN})

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        values = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        line = ", ".join(f"{name} {value:.3f}" for name, value in values.items())
        say(f"  step {trainer.global_step}: {line}")

    def _begin(self) -> None:
        self._start = self._last = time.monotonic()
        self._done = self._num_read = self._num_written = 0

    def _print(self, total: int, losses: Mapping[str, float]) -> None:
        now = time.monotonic()
        if now - self._last < self._every and self._done < total:
            return
        self._last = now
        rate = self._done / max(1e-9, now - self._start)
        left = (total - self._done) / max(1e-9, rate)
        line = f"  {self._done} of {total} {self._unit}, {rate:.1f}/s, {left:.0f} s left"
        tokens = [token_speed(self._num_read, self._num_written, now - self._start)] if self._count_tokens else []
        say(
            ", ".join(
                [line, *tokens, *(f"{name.removeprefix('train/')} {value:.3f}" for name, value in losses.items())]
            )
        )
