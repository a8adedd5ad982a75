"""Skew Kullback-Leibler divergences, one distribution mixed into the other (DistiLLM: arXiv 2402.03898).

The mixture is positive wherever the other distribution is, so gradients stay bounded where those of a plain KL
diverge.
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
        """Validate alpha."""
        if not 0 < self.alpha < 1:
            raise ConfigError(f"alpha={self.alpha}: expected 0 < alpha < 1; use loss=kl or loss=reverse_kl for alpha=0")


@dataclass(frozen=True)
class SkewKL(_Skew):
    """D = KL(t || alpha t + (1 - alpha) q); tends to the forward KL as alpha tends to 0."""

    def __call__(
        self, log_q: Float[Tensor, "*buckets"], log_t: Float[Tensor, "*buckets"]
    ) -> tuple[Float[Tensor, "*buckets"], Float[Tensor, "*buckets"]]:
        """dD/d(log q) = -(1 - alpha) t q / m, where m is the mixture."""
        q, t = log_q.exp(), log_t.exp()
        m = self.alpha * t + (1 - self.alpha) * q
        value = torch.where(t > 0, t * (log_t - m.log()), 0)
        return value, torch.where(m > 0, -(1 - self.alpha) * t * q / m, 0)


@dataclass(frozen=True)
class SkewReverseKL(_Skew):
    """D = KL(q || (1 - alpha) t + alpha q); tends to the reverse KL as alpha tends to 0."""

    def __call__(
        self, log_q: Float[Tensor, "*buckets"], log_t: Float[Tensor, "*buckets"]
    ) -> tuple[Float[Tensor, "*buckets"], Float[Tensor, "*buckets"]]:
        """dD/d(log q) = q (log (q / m) + 1 - alpha q / m), where m is the mixture."""
        q, t = log_q.exp(), log_t.exp()
        m = (1 - self.alpha) * t + self.alpha * q
        value = torch.where(q > 0, q * (log_q - m.log()), 0)
        return value, torch.where(q > 0, value + q - self.alpha * q * q / m, 0)
