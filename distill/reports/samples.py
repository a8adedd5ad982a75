"""Which predictions and rationales the page shows."""

from __future__ import annotations

from typing import NamedTuple

from distill.app.files import Json
from distill.reports.conclusion import best_verdict
from distill.reports.runs import Run
from distill.reports.verdicts import Summary

NUM_SAMPLES, NUM_RATIONALES = 8, 12


class Outcome(NamedTuple):
    """Test examples with one outcome: their number, and the examples shown."""

    title: str
    num: int
    shown: tuple[Json, ...]


def outcomes(summary: Summary) -> tuple[Run | None, list[Outcome]]:
    """Return a run and its test examples where student and teacher differ or both fail, in order of id."""
    run = _sampled(summary)
    predictions = sorted(run.predictions if run else (), key=lambda line: str(line.get("id")))
    if predictions and all(line.get("is_correct") is None for line in predictions):
        return run, [Outcome("Free texts", len(predictions), tuple(predictions[:NUM_SAMPLES]))]
    kinds = (
        ("Student right, teacher wrong", True, False),
        ("Teacher right, student wrong", False, True),
        ("Both wrong", False, False),
    )
    shown = []
    for title, student, teacher in kinds:
        lines = [
            line
            for line in predictions
            if line.get("is_correct") is student and line.get("is_teacher_correct") is teacher
        ]
        shown.append(Outcome(title, len(lines), tuple(lines[:NUM_SAMPLES])))
    return run, shown


def reasoning(summary: Summary) -> tuple[list[str], list[tuple[list[str], Json]]]:
    """Return the names of the filters, and examples with rationales and the filters that each passes.

    Test examples have the student's and the teacher's rationale; training examples have the teacher's, kept or
    rejected. At most `NUM_RATIONALES` examples per combination of filters are shown, in order of id.
    """
    run = _sampled(summary)
    keys = ("teacher_rationale", "student_rationale", "gold_rationale")
    lines = [line for line in (run.predictions if run else ()) if any(line.get(key) for key in keys)]
    test = [(_correctness(line), line) for line in lines]
    source = next((candidate for candidate in (run, *summary.runs) if candidate and candidate.rationales), None)
    train = [(_outcome(line), _as_prediction(line)) for line in (source.rationales if source else ())]
    shown: list[tuple[list[str], Json]] = []
    counts: dict[tuple[str, ...], int] = {}
    for marks, line in sorted([*test, *train], key=lambda item: str(item[1].get("id"))):
        kind = (*marks, str(line.get("is_training")))
        counts[kind] = counts.get(kind, 0) + 1
        shown += [(marks, line)] if counts[kind] <= NUM_RATIONALES else []
    used = {mark for marks, _ in shown for mark in marks}
    leading = [mark for mark in ("right", "wrong", "kept") if mark in used]
    return [*leading, *sorted(used - set(leading))], shown


def _sampled(summary: Summary) -> Run | None:
    """Return a run with predictions of the arm to prefer, or else of the most accurate one that has any."""
    best = best_verdict(summary.verdicts)
    others = sorted(summary.trained, key=lambda arm: (arm.kind != "distilled", -arm.score))
    arms = [best.arm, *others] if best else others
    return next((run for arm in arms for run in arm.runs if run.predictions), None)


def _correctness(line: Json) -> list[str]:
    return [] if line.get("is_correct") is None else ["right" if line.get("is_correct") is True else "wrong"]


def _outcome(line: Json) -> list[str]:
    """Marks of a training example's rationale; whether an answer is right is known for labelled examples only."""
    gold, answer, reason = line.get("gold"), line.get("answer"), line.get("reason")
    is_right = line.get("is_correct", answer is not None and answer == gold)  # earlier runs did not record it
    correctness = [] if gold is None else ["right" if is_right is True else "wrong"]
    return [*correctness, "kept" if reason is None else f"rejected: {reason}"]


def _as_prediction(line: Json) -> Json:
    names = {"answer": "teacher_answer", "rationale": "teacher_rationale", "confidence": "teacher_confidence"}
    return {**line, **{new: line.get(old) for old, new in names.items()}, "is_training": True}
