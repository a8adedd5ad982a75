"""Reverse Kullback-Leibler divergence, KL(student || teacher): the student concentrates on modes of the teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

_FLOOR = -20.723265836946414  # log 1e-9: a bucket without teacher mass has a large, finite cost


@dataclass(frozen=True)
class ReverseKL:
    """D = sum_b q_b (log q_b - log t_b), with t_b clamped to at least 1e-9."""

    needs_rest: ClassVar[bool] = True

    def __call__(
        self, log_q: Float[Tensor, "*buckets"], log_t: Float[Tensor, "*buckets"]
    ) -> tuple[Float[Tensor, "*buckets"], Float[Tensor, "*buckets"]]:
        """dD/d(log q) = q (log q - log t + 1)."""
        q = log_q.exp()
        ratio = torch.where(q > 0, log_q, 0) - log_t.clamp(min=_FLOOR)
        return q * ratio, q * (ratio + 1)
