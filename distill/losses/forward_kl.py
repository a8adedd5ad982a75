"""Forward Kullback-Leibler divergence, KL(teacher || student): the student covers all modes of the teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class ForwardKL:
    """D = sum_b t_b (log t_b - log q_b); on buckets a lower bound of the full divergence (data processing inequality).

    With sampled entries, t sums to 1 only in expectation. The expected gradient is then that of the full divergence,
    and the expected value exceeds it by a constant that does not depend on the student.
    """

    needs_rest: ClassVar[bool] = False

    def __call__(
        self, log_q: Float[Tensor, "*buckets"], log_t: Float[Tensor, "*buckets"]
    ) -> tuple[Float[Tensor, "*buckets"], Float[Tensor, "*buckets"]]:
        """Buckets without teacher mass contribute 0."""
        t = log_t.exp()
        return torch.where(t > 0, t * (log_t - log_q), 0), -t
