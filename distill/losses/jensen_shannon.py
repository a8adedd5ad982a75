"""Generalized Jensen-Shannon divergence, bounded, between forward and reverse KL (GKD: arXiv 2306.13649)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from distill.errors import ConfigError


@dataclass(frozen=True)
class JensenShannon:
    """D = beta KL(t || m) + (1 - beta) KL(q || m), m = beta t + (1 - beta) q.

    D / beta tends to the forward KL as beta tends to 0, D / (1 - beta) to the reverse KL as beta tends to 1. Near
    these limits, a weight of 1 / beta or 1 / (1 - beta) keeps the scale of the gradient.
    """

    beta: float
    needs_rest: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Validate beta."""
        if not 0 < self.beta < 1:
            raise ConfigError(f"beta={self.beta}: expected 0 < beta < 1; use loss=kl or loss=reverse_kl for the limits")

    def __call__(
        self, log_q: Float[Tensor, "*buckets"], log_t: Float[Tensor, "*buckets"]
    ) -> tuple[Float[Tensor, "*buckets"], Float[Tensor, "*buckets"]]:
        """dD/d(log q) = (1 - beta) q log (q / m); all other terms cancel."""
        q, t = log_q.exp(), log_t.exp()
        log_m = (self.beta * t + (1 - self.beta) * q).log()
        teacher_part = torch.where(t > 0, self.beta * t * (log_t - log_m), 0)
        student_part = torch.where(q > 0, (1 - self.beta) * q * (log_q - log_m), 0)
        return teacher_part + student_part, student_part
