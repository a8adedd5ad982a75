"""Builders for the tests of annotation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from distill.annotation.rationales import RationaleFilter, filter_samples
from distill.app.config import CONF
from distill.records import Annotation, Example, FilteredRationale
from tests.conftest import tiny_overrides

SOUND = "First 40 and then 2 more make 42."


@functools.cache
def conf_values(name: str) -> dict[str, Any]:
    """The content of a file in conf/rationales/."""
    return yaml.safe_load((CONF / "rationales" / f"{name}.yaml").read_text())


def criteria(name: str = "all", **settings: Any) -> RationaleFilter:
    """The filter of a file in conf/rationales/, with some settings changed."""
    values = conf_values(name) | settings
    assert values.pop("_target_") == "distill.annotation.rationales.RationaleFilter"
    return RationaleFilter(**values)


def sample(answer: str | None, text: str = SOUND, *, is_truncated: bool = False, key: str = "") -> Annotation:
    """An annotation of a rationale request."""
    return Annotation(key, {}, answer, text, is_truncated=is_truncated)


def as_written(answer: str) -> str:
    """The value of an answer where only equal texts agree."""
    return answer


def filtered(
    samples: Sequence[Annotation],
    gold: str | None = None,
    direct: str | None = None,
    value: Callable[[str], str] = as_written,
    **settings: Any,
) -> list[FilteredRationale]:
    """The filtered rationales of a single example."""
    example = Example("How many?", gold)
    answers = {} if direct is None else {example.id: direct}
    return filter_samples([example], {example.id: samples}, answers, value, criteria(**settings))


def reasons(samples: Sequence[Annotation], *references: Any, **settings: Any) -> list[str | None]:
    """Why each rationale of a single example was rejected, None for kept ones."""
    return [rationale.reason for rationale in filtered(samples, *references, **settings)]


def reason_for(text: str, answer: str = "42", **settings: Any) -> str | None:
    """Why a text that led to the gold answer was rejected, None if it was kept."""
    (reason,) = reasons([sample(answer, text)], answer, **settings)
    return reason


def annotate_options(root: Path, teacher: Path, *more: str) -> list[str]:
    """Overrides of the annotate command for a tiny teacher, with the cache in root/cache."""
    excluded = ("root=", "student", "trainer", "tracking", "cache.codec")
    overrides = [o for o in tiny_overrides(root, teacher, teacher) if not o.startswith(excluded)]
    more = (*more, f"cache.dir={root / 'cache'}", "teacher.group_size=4", "teacher.batch_size=3")
    return [*overrides, "task.examples.num_unlabelled=40", "teacher.num_rationales=10", *more]
