"""Cross-entropy: the special case of one kept id, the label."""

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
        self, log_q: Float[Tensor, "*buckets"], log_t: Float[Tensor, "*buckets"]
    ) -> tuple[Float[Tensor, "*buckets"], Float[Tensor, "*buckets"]]:
        """Buckets without target mass contribute 0, even where the student's probability is 0."""
        t = log_t.exp()
        return -torch.where(t > 0, t * log_q, 0), -t
