"""A frozen teacher as a LightningModule that only predicts."""

from __future__ import annotations

from typing import Any, final

import lightning
import torch

from distill.annotation.positions import Positions
from distill.errors import CacheError
from distill.records import Annotation, Group
from distill.teachers import Teacher


@final
class TeacherModule(lightning.LightningModule):
    """A frozen teacher that is loaded, for `Trainer.predict` only.

    Its model is no submodule: a trainer would switch it to training mode, and move it away from its readers.
    """

    def __init__(self, teacher: Teacher, positions: Positions, batch_size: int) -> None:
        """`batch_size` requests pass through the model together."""
        super().__init__()
        self._teacher, self._positions, self._batch_size = teacher, positions, batch_size

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch

    def predict_step(self, batch: Group) -> list[Annotation]:
        starts = range(0, len(batch.requests), self._batch_size)
        batches = [self._teacher.annotate(batch.requests[start : start + self._batch_size]) for start in starts]
        annotations = [annotation for annotated in batches for annotation in annotated]
        if [annotation.key for annotation in annotations] != [request.key for request in batch.requests]:
            raise CacheError(
                f"the teacher returned {len(annotations)} annotations for {len(batch.requests)} requests, expected one "
                "per request in order; none of them is written"
            )
        return self._positions.reduced(batch.requests, annotations)
