"""A student's head with its losses, in isolation. Targets are random: they affect neither time nor memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.measure import Variant
from distill.losses.cross_entropy import CrossEntropy
from distill.losses.forward_kl import ForwardKL
from distill.losses.head import Head, Term, head_loss
from distill.records import Entries


@dataclass(frozen=True)
class HeadCase:
    """Hidden states of N positions before a head, with k kept entries per position."""

    num_positions: int
    vocabulary: int
    hidden: int
    k: int = 64

    def variants(self) -> dict[str, Variant]:
        """Ways to run forward and backward, each up to the gradients of hidden states and weight."""
        torch.manual_seed(0)
        n, v = self.num_positions, self.vocabulary
        hidden_NH = torch.randn(n, self.hidden, requires_grad=True)
        weight_VH = (torch.randn(v, self.hidden) / self.hidden**0.5).requires_grad_()
        label_N, ids_NK = torch.randint(v, (n,)), torch.randint(v, (n, self.k))
        kept_NK = torch.randn(n, self.k).log_softmax(-1) + np.log(0.9)
        is_used_N, position_N = torch.ones(n, dtype=torch.bool), torch.arange(n)
        labels = Entries(np.arange(1, n + 1), position_N, label_N, torch.zeros(n), None)
        position_E, ends_N = position_N.repeat_interleave(self.k), self.k * np.arange(1, n + 1)
        soft = Entries(ends_N, position_E, ids_NK.flatten(), kept_NK.flatten(), torch.full((n,), 0.1))
        terms = [
            Term(CrossEntropy(), labels, is_used_N, 1.0, 0.5 / n),
            Term(ForwardKL(), soft, is_used_N, 1.0, 0.5 / n),
        ]

        def with_gradients(loss: Callable[[], Tensor]) -> Variant:
            def run() -> None:
                hidden_NH.grad = weight_VH.grad = None
                loss().backward()

            return run

        def sparse() -> Tensor:
            log_q_NV = (hidden_NH @ weight_VH.T).log_softmax(-1)
            kept_q_NK = log_q_NV.gather(-1, ids_NK)
            tail_N = (1 - kept_q_NK.exp().sum(-1)).clamp(min=1e-9).log()
            kl = (kept_NK.exp() * (kept_NK - kept_q_NK)).sum() + (0.1 * (np.log(0.1) - tail_N)).sum()
            total: Tensor = 0.5 / n * (kl - log_q_NV.gather(-1, label_N.unsqueeze(-1)).sum())
            return total

        return {
            "ours": with_gradients(lambda: head_loss(hidden_NH, Head(weight_VH), terms)[0]),
            "CE alone": with_gradients(lambda: cross_entropy((hidden_NH @ weight_VH.T).float(), label_N)),
            "CE + sparse KL, full logits": with_gradients(sparse),
        }

    @property
    def weight_bytes(self) -> int:
        """Bytes of the head's weight, which are also those of its gradient."""
        return 4 * self.vocabulary * self.hidden


HEADS: Mapping[str, HeadCase] = {
    "head V=49152, 2048 positions": HeadCase(2048, 49152, 576),
    "head V=151936, 512 positions": HeadCase(512, 151936, 896),
    "head V=49152, 1024 positions": HeadCase(1024, 49152, 576),
    "head V=49152, 4096 positions": HeadCase(4096, 49152, 576),
}
