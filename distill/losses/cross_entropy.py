"""Cross-entropy: the case of one kept id, the label."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class CrossEntropy:
    """D = -sum_b t_b log q_b."""

    needs_rest: ClassVar[bool] = False

    def __call__(
        self, log_q_MB: Float[Tensor, "M B"], log_t_MB: Float[Tensor, "M B"]
    ) -> tuple[Float[Tensor, "M"], Float[Tensor, "M B"]]:
        """Buckets the target gives nothing to count nothing, also where the student gives them nothing."""
        t_MB = log_t_MB.exp()
        return -torch.where(t_MB > 0, t_MB * log_q_MB, 0).sum(-1), -t_MB
