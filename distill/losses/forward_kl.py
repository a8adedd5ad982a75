"""Forward Kullback-Leibler divergence, KL(teacher || student): the student covers what the teacher does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class ForwardKL:
    """D = sum_b t_b (log t_b - log q_b); on buckets a lower bound of the full divergence (data processing).

    Where draws stand for the rest t sums to 1 only on average; then the expected gradient is that of the full
    divergence, and the expected value lies above it by a number that no student can change.
    """

    needs_rest: ClassVar[bool] = False

    def __call__(
        self, log_q: Float[Tensor, "*buckets"], log_t: Float[Tensor, "*buckets"]
    ) -> tuple[Float[Tensor, "*buckets"], Float[Tensor, "*buckets"]]:
        """Buckets the teacher gives nothing to count nothing."""
        t = log_t.exp()
        return torch.where(t > 0, t * (log_t - log_q), 0), -t
