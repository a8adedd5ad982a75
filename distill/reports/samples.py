"""Which predictions and rationales the page shows."""

from __future__ import annotations

from typing import NamedTuple

from distill.reports.runs import Json, Run
from distill.reports.verdicts import Summary

NUM_SAMPLES, NUM_RATIONALES = 8, 12


class Outcome(NamedTuple):
    """Test examples of one kind: how many there are, and those shown."""

    title: str
    num: int
    shown: tuple[Json, ...]


def outcomes(summary: Summary) -> tuple[Run | None, list[Outcome]]:
    """Where student and teacher part and where both fail, in the order of the ids; of the run with most losses."""
    run = _sampled(summary)
    told = sorted(run.predictions if run else (), key=lambda line: str(line.get("id")))
    kinds = (
        ("Student right, teacher wrong", True, False),
        ("Teacher right, student wrong", False, True),
        ("Both wrong", False, False),
    )
    found = []
    for title, student, teacher in kinds:
        lines = [
            line for line in told if line.get("is_correct") is student and line.get("is_teacher_correct") is teacher
        ]
        found.append(Outcome(title, len(lines), tuple(lines[:NUM_SAMPLES])))
    return run, found


def reasoning(summary: Summary) -> tuple[list[str], list[tuple[list[str], Json]]]:
    """Rationales to look through: the filters, and each example with the filters that it passes.

    Test examples have the student's rationale beside the teacher's; training examples the teacher's and its fate.
    A filter holds at most a dozen of each kind, in the order of the ids.
    """
    run = _sampled(summary)
    keys = ("teacher_rationale", "student_rationale", "gold_rationale")
    lines = [line for line in (run.predictions if run else ()) if any(line.get(key) for key in keys)]
    tested = [(["right" if line.get("is_correct") is True else "wrong"], line) for line in lines]
    source = next((arm_run for arm_run in (run, *summary.runs) if arm_run and arm_run.rationales), None)
    written = [(_fate(line), _as_prediction(line)) for line in (source.rationales if source else ())]
    shown: list[tuple[list[str], Json]] = []
    room: dict[tuple[str, ...], int] = {}
    for marks, line in sorted([*tested, *written], key=lambda item: str(item[1].get("id"))):
        kind = (*marks, str(line.get("is_training")))
        room[kind] = room.get(kind, 0) + 1
        shown += [(marks, line)] if room[kind] <= NUM_RATIONALES else []
    held = {mark for found, _ in shown for mark in found}
    leading = [mark for mark in ("right", "wrong", "kept") if mark in held]
    return [*leading, *sorted(held - set(leading))], shown


def _sampled(summary: Summary) -> Run | None:
    arms = sorted(summary.trained, key=lambda arm: (arm.kind != "distilled", -len(arm.losses)))
    return next((run for arm in arms for run in arm.runs if run.predictions), None)


def _fate(line: Json) -> list[str]:
    is_right = line.get("answer") is not None and line.get("answer") == line.get("gold")
    reason = line.get("reason")
    return ["right" if is_right else "wrong", "kept" if reason is None else f"rejected: {reason}"]


def _as_prediction(line: Json) -> Json:
    names = {"answer": "teacher_answer", "rationale": "teacher_rationale", "confidence": "teacher_confidence"}
    return {**line, **{new: line.get(old) for old, new in names.items()}, "is_training": True}
