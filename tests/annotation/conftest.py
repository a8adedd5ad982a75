"""Makers that the tests of this folder share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from distill.annotation.rationales import Checks, check
from distill.app.config import CONF
from distill.records import Annotation, CheckedRationale, Example
from tests.conftest import tiny_overrides

SOUND = "First 40 and then 2 more make 42."


@functools.cache
def values(name: str) -> dict[str, Any]:
    """What a file in conf/rationales/ says."""
    return yaml.safe_load((CONF / "rationales" / f"{name}.yaml").read_text())


def checks(name: str = "all", **settings: Any) -> Checks:
    """The checks of a file in conf/rationales/, some of them changed."""
    given = values(name) | settings
    assert given.pop("_target_") == "distill.annotation.rationales.Checks"
    return Checks(**given)


def said(answer: str | None, text: str = SOUND, *, cut_off: bool = False, key: str = "") -> Annotation:
    """What a teacher left for a request of a rationale."""
    return Annotation(key, {}, answer, text, is_truncated=cut_off)


def same(answer: str) -> str:
    """Answers are the same where they read the same."""
    return answer


def judged(
    samples: Sequence[Annotation],
    gold: str | None = None,
    direct: str | None = None,
    value: Callable[[str], str] = same,
    **settings: Any,
) -> list[CheckedRationale]:
    """One example's rationales, checked."""
    example = Example("How many?", gold)
    answers = {} if direct is None else {example.id: direct}
    return check([example], {example.id: samples}, answers, value, checks(**settings))


def reasons(*given: Any, **settings: Any) -> list[str | None]:
    """Of one example's rationales."""
    return [one.reason for one in judged(*given, **settings)]


def alone(text: str, answer: str = "42", **settings: Any) -> str | None:
    """What is wrong with a text that led to the gold answer."""
    (reason,) = reasons([said(answer, text)], answer, **settings)
    return reason


def tiny(root: Path, teacher: Path, *more: str) -> list[str]:
    """The annotate command for a tiny teacher, its cache in root/cache."""
    skipped = ("root=", "student", "trainer", "tracking", "cache.codec")
    kept = [o for o in tiny_overrides(root, teacher, teacher) if not o.startswith(skipped)]
    more = (*more, f"cache.dir={root / 'cache'}", "teacher.group_size=4", "teacher.batch_size=3")
    return [*kept, "task.examples.num_unlabelled=40", "teacher.num_rationales=10", *more]
