"""Probabilities of a task's choices as whole answers, and the soft targets that agree with them.

A choice is scored with its end token, so that "good" and "good but slow" exclude each other. Calibration multiplies
the probability of each choice c by exp(o_c); a constraint leaves no probability to other texts:

    P'(y)  is proportional to  P(y) exp(o_c)  if the text y is the choice c,  else to P(y), constrained to 0

Soft targets are the next-token distributions of P'. After a beginning u that some choice has,

    P'(t | u)  is proportional to  P(t | u) [P(no choice | ut) + sum of P(c | ut) exp(o_c)]

with the sum over the choices that begin with ut, and without the first summand if constrained. After any other text
they are the model's own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

Place = tuple[int, tuple[int, ...]]  # a prompt's row in a batch, and the tokens read after it


@runtime_checkable
class Adjusting(Protocol):
    """Changes the next-token distributions of a batch of prompts, at some places."""

    def adjust(self, logprobs_NV: Float[Tensor, "N V"], places: Sequence[Place]) -> Float[Tensor, "N V"]:
        """Return the distributions at `places`, from those of the model."""
        ...


@dataclass(frozen=True)
class OwnAdjustments:
    """The adjustment of each prompt of a batch, for choices of its own."""

    by_row: Sequence[Adjustment]

    def adjust(self, logprobs_NV: Float[Tensor, "N V"], places: Sequence[Place]) -> Float[Tensor, "N V"]:
        """Return the distributions at `places`, from those of the model."""
        adjusted_NV = logprobs_NV.clone()
        for position, (row, beginning) in enumerate(places):
            at = slice(position, position + 1)
            adjusted_NV[at] = self.by_row[row].adjust(logprobs_NV[at], [(0, beginning)])
        return adjusted_NV


@dataclass(frozen=True)
class Adjustment:
    """How whole choices, given by their token ids, change the next-token distributions of a batch of prompts.

    `remaining` has for each choice the log-probability of its tokens from each of its positions on.
    """

    choices: tuple[tuple[int, ...], ...]
    offset_C: Float[Tensor, "C"]
    is_constrained: bool
    remaining: Sequence[Float[Tensor, "B _"]]

    @classmethod
    def of(
        cls,
        choices: tuple[tuple[int, ...], ...],
        offset_C: Float[Tensor, "C"],
        is_constrained: bool,
        token_logprobs: Sequence[Float[Tensor, "B _"]],
    ) -> Adjustment:
        """Sum the log-probabilities of each choice's tokens from its end."""
        sums = [logprobs_BT.flip(-1).cumsum(-1).flip(-1) for logprobs_BT in token_logprobs]
        remaining = [torch.cat([sum_BT, torch.zeros_like(sum_BT[:, :1])], -1) for sum_BT in sums]
        return cls(choices, offset_C, is_constrained, remaining)

    @property
    def score_BC(self) -> Float[Tensor, "B C"]:  # noqa: N802 - names of tensors end in their dimensions
        """Log-probabilities of the choices among themselves."""
        whole_BC = torch.stack([sum_BT[:, 0] for sum_BT in self.remaining], -1)
        return (whole_BC + self.offset_C).log_softmax(-1)

    def adjust(self, logprobs_NV: Float[Tensor, "N V"], places: Sequence[Place]) -> Float[Tensor, "N V"]:
        """Return the distributions at `places`, from those of the model."""
        adjusted_NV = logprobs_NV.clone()
        by_beginning = defaultdict[tuple[int, ...], list[tuple[int, int]]](list)
        for position, (row, beginning) in enumerate(places):
            by_beginning[beginning].append((position, row))
        for beginning, members in by_beginning.items():
            position_M, row_M = torch.tensor(members, device=logprobs_NV.device).T
            adjusted_NV[position_M] = self._after(beginning, logprobs_NV[position_M], row_M)
        return adjusted_NV

    def _after(
        self, beginning: tuple[int, ...], logprobs_MV: Float[Tensor, "M V"], row_M: Int[Tensor, "M"]
    ) -> Float[Tensor, "M V"]:
        """The distributions of prompts that go on with the same tokens."""
        length = len(beginning)
        by_token = defaultdict[int, list[int]](list)
        for index, choice in enumerate(self.choices):
            if len(choice) > length and choice[:length] == beginning:
                by_token[choice[length]].append(index)
        if not by_token:
            return logprobs_MV
        tokens, groups = list(by_token), by_token.values()
        gain_MK = torch.stack([self._gain(indices, length + 1, row_M) for indices in groups], -1)
        weight_MV = torch.full_like(logprobs_MV, -torch.inf) if self.is_constrained else logprobs_MV.clone()
        weight_MV[:, tokens] = logprobs_MV[:, tokens] + gain_MK
        return weight_MV.log_softmax(-1)

    def _gain(self, indices: Sequence[int], start: int, row_M: Int[Tensor, "M"]) -> Float[Tensor, "M"]:
        """Log of the factor by which the texts that begin like these choices, up to `start`, gain probability."""
        remaining_MC = torch.stack([self.remaining[index][row_M, start] for index in indices], -1)
        terms_MC = remaining_MC + self.offset_C[list(indices)]
        if not self.is_constrained:
            others_M1 = (1 - remaining_MC.exp().sum(-1, keepdim=True)).clamp(min=0).log()
            terms_MC = torch.cat([terms_MC, others_M1], -1)
        return terms_MC.logsumexp(-1)


def calibrated_offsets(score_NC: Float[Tensor, "N C"]) -> Float[Tensor, "C"]:
    """Offsets of choices that leave the median of these questions undecided, from log-probabilities of the choices.

    A question's scores are taken relative to their mean, so only differences between its choices count: with two
    choices, the median of their log-odds becomes 0. The score of a choice that a question does not have is NaN.
    """
    typical_C = (score_NC - score_NC.nanmean(-1, keepdim=True)).nanquantile(0.5, 0)
    return typical_C.mean() - typical_C
