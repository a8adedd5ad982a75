"""Losses: one formula each, on probabilities in buckets.

At each supervised position the vocabulary is divided into the kept ids and one bucket for the rest. A divergence is
a sum over these buckets. It receives the student's and the teacher's log-probability of each bucket and returns the
bucket's value and slope; the head sums the values and turns the slopes into logit gradients. A divergence knows
neither its weight nor where its target came from. A new loss is one file here and one in conf/loss/.
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
    """A sum over buckets of a function of both probabilities, minimal where the distributions are equal.

    `needs_rest` is False if the slopes are linear in the target. Only then can sampled entries, which equal the
    target on average, replace the rest bucket.
    """

    needs_rest: ClassVar[bool]

    def __call__(
        self, log_q: Float[Tensor, "*buckets"], log_t: Float[Tensor, "*buckets"]
    ) -> tuple[Float[Tensor, "*buckets"], Float[Tensor, "*buckets"]]:
        """Return each bucket's value and its slope dD/d(log q), each q taken as a free variable."""
        ...


@dataclass(frozen=True)
class Objective:
    """One term of the training loss: a divergence, the span and targets it reads, and its weight.

    `source` names the targets: `labels` (gold tokens), `teacher` (the teacher's answer as a label, where there is no
    gold one) or `soft` (the teacher's distributions). `temperature` divides the logits of student and teacher, and
    the term is multiplied by its square (Hinton et al. 2015, section 2). It is not the sampling temperature.
    `label` is its plain name in reports.
    """

    divergence: Divergence
    span: Span
    source: Literal["labels", "teacher", "soft"]
    weight: float
    temperature: float
    label: str | None = None

    def __post_init__(self) -> None:
        """Validate weight and temperature."""
        if self.weight < 0 or self.temperature <= 0:
            raise ConfigError(
                f"a loss has weight={self.weight} and temperature={self.temperature}; "
                "the weight must not be negative and the temperature must be positive"
            )
        if self.source != "soft" and self.temperature != 1:
            raise ConfigError(
                f"a loss with source={self.source} must have temperature=1; only soft targets have a temperature"
            )
