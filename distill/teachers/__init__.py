"""Teachers: ways to get annotations. A new kind is a file in this package and one in conf/teacher/."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import nn

from distill.app.files import Json
from distill.records import Annotation, Example, Request

Recall = Callable[[str, Callable[[], Json]], Json]  # the name of a record, and what makes it if there is none yet


@dataclass(frozen=True)
class Calibration:
    """The train questions on which a teacher's choices are calibrated, and the record of an earlier calibration.

    `number` is the number asked for; there may be fewer questions. With `recall`, the questions of the first
    calibration decide, however many examples are added later.
    """

    number: int
    questions: Sequence[Example]
    recall: Recall | None = None


@runtime_checkable
class Teacher(Protocol):
    """A frozen model or other origin of annotations. Nothing heavy is loaded before `load`."""

    gives_soft_targets: bool

    def fingerprint(self) -> dict[str, Any]:
        """Everything that affects the teacher's targets, as JSON values; computed without loading weights."""
        ...

    def backend(self) -> dict[str, str]:
        """What changes targets by rounding alone: versions of libraries, and the dtype in use."""
        ...

    def load(self) -> nn.Module:
        """Load the model and return it, for placement on a device."""
        ...

    def num_tokens(self, request: Request) -> int:
        """Number of tokens that a request takes in the model: those to read, and those that are written at most."""
        ...

    def annotate(self, requests: Sequence[Request]) -> list[Annotation]:
        """One annotation per request, in order; all requests of a call have the same span."""
        ...

    def close(self) -> None:
        """Release the model, to free its memory for a student."""
        ...
