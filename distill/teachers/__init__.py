"""Teachers: ways to get an Annotation. A new kind is one file here and one in conf/teacher/."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from torch import nn

from distill.records import Annotation, Request


@runtime_checkable
class Teacher(Protocol):
    """A frozen source of annotations. Nothing heavy is loaded before `load`."""

    gives_soft_targets: bool

    def fingerprint(self) -> dict[str, Any]:
        """All that decides the teacher's targets, as plain JSON values; computed without loading weights."""
        ...

    def load(self) -> nn.Module:
        """Open the model; the result is what a device is chosen for."""
        ...

    def annotate(self, requests: Sequence[Request]) -> list[Annotation]:
        """One annotation per request, in order; requests of one call share a span."""
        ...

    def close(self) -> None:
        """Let go of the model, so that a student has the memory."""
        ...
