"""A frozen teacher as a LightningModule that only predicts."""

from __future__ import annotations

from typing import Any, final

import lightning
import numpy as np
import torch

from distill.annotation.positions import Positions
from distill.errors import CacheError
from distill.models.batches import BatchLimit
from distill.records import Annotation, Group
from distill.teachers import Teacher


@final
class TeacherModule(lightning.LightningModule):
    """A frozen teacher that is loaded, for `Trainer.predict` only.

    Its model is no submodule: a trainer would switch it to training mode, and move it away from its readers.
    """

    def __init__(self, teacher: Teacher, positions: Positions, batch_limit: BatchLimit) -> None:
        """Requests of similar lengths pass through the model together, as many as `batch_limit` allows."""
        super().__init__()
        self._teacher, self._positions, self._batch_limit = teacher, positions, batch_limit

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch

    def predict_step(self, batch: Group) -> list[Annotation]:
        batches = self._batch_limit.batches([self._teacher.num_tokens(request) for request in batch.requests])
        annotated = [self._teacher.annotate([batch.requests[place] for place in places]) for places in batches]
        order = [place for places in batches for place in places]
        annotations = [annotation for annotations in annotated for annotation in annotations]
        if [annotation.key for annotation in annotations] != [batch.requests[place].key for place in order]:
            raise CacheError(
                f"the teacher returned {len(annotations)} annotations for {len(batch.requests)} requests, expected one "
                "per request in order; none of them is written"
            )
        return self._positions.reduced(batch.requests, [annotations[index] for index in np.argsort(order)])
