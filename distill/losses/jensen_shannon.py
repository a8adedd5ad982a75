"""Generalized Jensen-Shannon divergence, bounded and between the KLs (GKD: Agarwal et al. 2024, arXiv 2306.13649)."""

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

    D / beta goes to the forward KL as beta goes to 0, D / (1 - beta) to the reverse KL as it goes to 1: near the
    ends a weight of 1 / beta or 1 / (1 - beta) keeps the size of the gradient.
    """

    beta: float
    needs_rest: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse what is no mixture."""
        if not 0 < self.beta < 1:
            raise ConfigError(f"beta={self.beta}: a mixture lies between 0 and 1; at the ends are ForwardKL, ReverseKL")

    def __call__(
        self, log_q: Float[Tensor, "*buckets"], log_t: Float[Tensor, "*buckets"]
    ) -> tuple[Float[Tensor, "*buckets"], Float[Tensor, "*buckets"]]:
        """dD/d(log q) = (1 - beta) q log (q / m); the rest of the derivative cancels."""
        q, t = log_q.exp(), log_t.exp()
        log_m = (self.beta * t + (1 - self.beta) * q).log()
        of_teacher = torch.where(t > 0, self.beta * t * (log_t - log_m), 0)
        of_student = torch.where(q > 0, (1 - self.beta) * q * (log_q - log_m), 0)
        return of_teacher + of_student, of_student
