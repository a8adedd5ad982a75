"""Losses: one formula each, on probabilities in buckets.

At a supervised position the vocabulary falls into kept ids and one bucket for all the rest. A divergence is a sum
over buckets: it sees the student's and the teacher's log-probability of each and returns what that bucket adds, and
its slope; the head sums, and makes logit gradients of that. It knows neither its weight nor where a target came
from. A new loss is one file here and one in conf/loss/.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from distill.errors import ConfigError
from distill.records import Span


@runtime_checkable
class Divergence(Protocol):
    """A sum over buckets of a function of the two probabilities, least where the distributions are equal.

    `needs_rest` says that it reads the rest bucket as what it is, also where the student alone has something
    there; so it is not linear in the target, and draws cannot stand for the rest.
    """

    needs_rest: ClassVar[bool]

    def __call__(
        self, log_q: Float[Tensor, "*buckets"], log_t: Float[Tensor, "*buckets"]
    ) -> tuple[Float[Tensor, "*buckets"], Float[Tensor, "*buckets"]]:
        """What each bucket adds to D, and its slope dD/d(log q), where each q moves by itself."""
        ...


@dataclass(frozen=True)
class Objective:
    """One term of the training loss: a divergence, where it applies and how much it counts.

    `source` names what it learns from: `labels` (tokens that are given), `teacher` (the teacher's answer as if it
    were a label, where there is none) or `soft` (the teacher's distributions). `temperature` divides the logits of
    student and teacher, and the term is multiplied by its square (Hinton et al. 2015, section 2). It has nothing to
    do with sampling.
    """

    divergence: Divergence
    span: Span
    source: Literal["labels", "teacher", "soft"]
    weight: float
    temperature: float

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        if self.weight < 0 or self.temperature <= 0:
            raise ConfigError(
                f"a loss has weight={self.weight} and temperature={self.temperature}; "
                "the weight must not be negative and the temperature must be positive"
            )
        if self.source != "soft" and self.temperature != 1:
            raise ConfigError(f"a loss on {self.source} has temperature 1; temperature belongs to soft targets")
