"""Total variation distance: the largest difference in probability over all sets of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class TotalVariation:
    """D = 1/2 sum_b |q_b - t_b|, at most 1; its gradient does not shrink as the student approaches the teacher."""

    needs_rest: ClassVar[bool] = True

    def __call__(
        self, log_q: Float[Tensor, "*buckets"], log_t: Float[Tensor, "*buckets"]
    ) -> tuple[Float[Tensor, "*buckets"], Float[Tensor, "*buckets"]]:
        """dD/d(log q) = 1/2 q sign(q - t)."""
        q = log_q.exp()
        gap = q - log_t.exp()
        return gap.abs() / 2, q * gap.sign() / 2
