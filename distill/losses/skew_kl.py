"""Skew Kullback-Leibler divergences (DistiLLM: Ko et al. 2024, arXiv 2402.03898): one side is mixed into the other.

A mixture is nowhere 0 where the other side is not, so gradients stay bounded where a plain divergence explodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from distill.errors import ConfigError


@dataclass(frozen=True)
class _Skew:
    alpha: float
    needs_rest: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse what is no share."""
        if not 0 < self.alpha < 1:
            raise ConfigError(f"alpha={self.alpha}: a mixture lies between 0 and 1; without it: ForwardKL, ReverseKL")


@dataclass(frozen=True)
class SkewKL(_Skew):
    """D = KL(t || alpha t + (1 - alpha) q); the forward KL as alpha goes to 0."""

    def __call__(
        self, log_q: Float[Tensor, "*buckets"], log_t: Float[Tensor, "*buckets"]
    ) -> tuple[Float[Tensor, "*buckets"], Float[Tensor, "*buckets"]]:
        """dD/d(log q) = -(1 - alpha) t q / m, m being the mixture."""
        q, t = log_q.exp(), log_t.exp()
        m = self.alpha * t + (1 - self.alpha) * q
        value = torch.where(t > 0, t * (log_t - m.log()), 0)
        return value, torch.where(m > 0, -(1 - self.alpha) * t * q / m, 0)


@dataclass(frozen=True)
class SkewReverseKL(_Skew):
    """D = KL(q || (1 - alpha) t + alpha q); the reverse KL as alpha goes to 0."""

    def __call__(
        self, log_q: Float[Tensor, "*buckets"], log_t: Float[Tensor, "*buckets"]
    ) -> tuple[Float[Tensor, "*buckets"], Float[Tensor, "*buckets"]]:
        """dD/d(log q) = q (log (q / m) + 1 - alpha q / m), m being the mixture."""
        q, t = log_q.exp(), log_t.exp()
        m = (1 - self.alpha) * t + self.alpha * q
        value = torch.where(q > 0, q * (log_q - m.log()), 0)
        return value, torch.where(q > 0, value + q - self.alpha * q * q / m, 0)
