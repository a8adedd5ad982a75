"""Measures of a free text: its likelihood along the gold text and the teacher's, its wording, its length."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NamedTuple

from distill.errors import ConfigError
from distill.tasks import Task

_WORD = re.compile(r"\w+")


class Likelihood(NamedTuple):
    """Cross-entropy along a text and KL(teacher || model), in nats, summed over its tokens with the end token.

    `accepted_low` and `accepted_high` are bounds of the number of tokens that the teacher would accept from the model.
    """

    nats: float
    num_tokens: int
    kl: float | None = None
    accepted_low: float | None = None
    accepted_high: float | None = None


class Wording(NamedTuple):
    """What a text shares with its best reference: chrF of characters and ROUGE-L of words, 0 to 100."""

    chrf: float
    rouge_l: float


@dataclass(frozen=True)
class TextMeasures:
    """How a model answers one question of free text; None where it was not measured.

    `gold` and `teacher` are the likelihoods of the gold text and of the teacher's, which have `gold_bytes` and
    `teacher_bytes`. `length` and `reference_length` count the tokens of the model's own text and of the gold text, or
    of the teacher's where there is no gold text, without their ends; `has_ended`: its own text ended by itself.
    `wording` and `teacher_wording` compare this text with the gold texts and the teacher's.
    """

    gold: Likelihood | None = None
    gold_bytes: int = 0
    teacher: Likelihood | None = None
    teacher_bytes: int = 0
    length: int | None = None
    reference_length: int = 0
    has_ended: bool | None = None
    wording: Wording | None = None
    teacher_wording: Wording | None = None

    def as_row(self) -> dict[str, Any]:
        """Return the measures as a part of a line of predictions.jsonl."""
        gold, teacher = self.gold, self.teacher
        return {
            "gold_nats": gold.nats if gold else None,
            "gold_tokens": gold.num_tokens if gold else None,
            "gold_bytes": self.gold_bytes,
            "teacher_nats": teacher.nats if teacher else None,
            "teacher_kl": teacher.kl if teacher else None,
            "teacher_tokens": teacher.num_tokens if teacher else None,
            "teacher_bytes": self.teacher_bytes,
            "length": self.length,
            "reference_length": self.reference_length,
            "has_ended": self.has_ended,
            "chrf": self.wording and self.wording.chrf,
            "teacher_chrf": self.teacher_wording and self.teacher_wording.chrf,
            "rouge_l": self.wording and self.wording.rouge_l,
            "teacher_rouge_l": self.teacher_wording and self.teacher_wording.rouge_l,
        }


def require_text_measures(task: Task) -> None:
    """Raise ConfigError if the task's answers cannot be compared."""
    if task.is_free_text and find_spec("sacrebleu") is None:
        raise ConfigError(
            "task.read.kind=text compares texts by chrF, for which sacrebleu is missing; pip install 'distill[text]'"
        )


def chrf(text: str, references: Sequence[str]) -> float:
    """Return chrF2 of a text against its best reference (Popović 2015), 0 to 100; spaces do not count."""
    from sacrebleu.metrics.chrf import CHRF

    return float(CHRF().sentence_score(text, list(references)).score)


def rouge_l(text: str, references: Sequence[str]) -> float:
    """Return the F-measure of the longest common subsequence of words (Lin 2004, "ROUGE"), 0 to 100.

    The words of any script count, whatever their case; not the marks between them. The best reference counts.
    """
    from torchmetrics.functional.text.rouge import rouge_score

    scores = rouge_score(text, [*references], rouge_keys="rougeL", normalizer=str.casefold, tokenizer=_WORD.findall)
    return 100 * float(scores["rougeL_fmeasure"])


def wording(text: str, references: Sequence[str]) -> Wording | None:
    """Compare the wording of a text with its references; None without any."""
    return Wording(chrf(text, references), rouge_l(text, references)) if references else None


def score_texts(measures: Sequence[TextMeasures]) -> dict[str, Any]:
    """Return a model's figures: cross-entropies and KL per token or byte of all texts, others as means over texts."""
    gold = [(m.gold, m) for m in measures if m.gold]
    teacher = [(m.teacher, m) for m in measures if m.teacher]
    closeness = {key: _per_token([read for read, _ in teacher], key) for key in ("kl", "accepted_low", "accepted_high")}
    written = [(m.length, m.reference_length) for m in measures if m.length is not None and m.reference_length]
    return {
        "num_examples": len(measures),
        "num_unmeasured": len(measures) - len(gold or teacher),
        "cross_entropy": _ratio((read.nats, read.num_tokens) for read, _ in gold),
        "cross_entropy_per_byte": _ratio((read.nats, m.gold_bytes) for read, m in gold),
        "teacher_cross_entropy": _ratio((read.nats, read.num_tokens) for read, _ in teacher),
        "teacher_cross_entropy_per_byte": _ratio((read.nats, m.teacher_bytes) for read, m in teacher),
        "kl": closeness["kl"],
        "acceptance_low": closeness["accepted_low"],
        "acceptance_high": closeness["accepted_high"],
        "chrf": _mean(m.wording and m.wording.chrf for m in measures),
        "teacher_chrf": _mean(m.teacher_wording and m.teacher_wording.chrf for m in measures),
        "rouge_l": _mean(m.wording and m.wording.rouge_l for m in measures),
        "teacher_rouge_l": _mean(m.teacher_wording and m.teacher_wording.rouge_l for m in measures),
        "length_ratio": _ratio(written),
        "ended": _mean(m.has_ended for m in measures),
    }


def _per_token(texts: Sequence[Likelihood], key: str) -> float | None:
    """Return a sum over texts per token, of those that have it."""
    pairs = ((getattr(text, key), text.num_tokens) for text in texts)
    return _ratio((total, number) for total, number in pairs if total is not None)


def _mean(values: Iterable[int | float | None]) -> float | None:
    return _ratio((value, 1) for value in values if value is not None)


def _ratio(pairs: Iterable[tuple[int | float, int]]) -> float | None:
    """Return the sum of the first over the sum of the second; None if that is 0."""
    listed = list(pairs)
    number = sum(part for _, part in listed)
    return math.fsum(total for total, _ in listed) / number if number else None
