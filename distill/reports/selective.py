"""Accuracy if only the most confident answers are used, and the other questions go elsewhere.

El-Yaniv and Wiener 2010, "On the Foundations of Noise-free Selective Classification" (risk-coverage curve).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from distill.app.files import Json
from distill.reports.arms import Arm
from distill.reports.measures import ACCURACY
from distill.reports.runs import Run, number

SHARES = (100, 90, 75, 50, 25)  # percent of the questions that are answered


class Selective(NamedTuple):
    """A model, and for each of `SHARES` its accuracy on the questions that it answers: a mean over seeds.

    `deviations` are the standard deviations over seeds; None with one seed.
    """

    arm: Arm
    accuracies: tuple[float, ...]
    deviations: tuple[float, ...] | None


def selective_accuracies(confidences: Sequence[float | None], is_correct: Sequence[bool]) -> tuple[float, ...]:
    """Return the accuracy of the most confident answers, for each of `SHARES` of the questions, rounded up.

    A question without a confidence comes last. Where only some questions of equal confidence are answered, the result
    is the mean over all choices of them, so the order of the questions does not matter.
    """
    values = np.array([-np.inf if value is None else value for value in confidences])
    _, group_N, size_G = np.unique(-values, return_inverse=True, return_counts=True)
    share_right_G = np.bincount(group_N, np.asarray(is_correct, np.float64)) / size_G
    num_right_N = np.cumsum(share_right_G[np.sort(group_N)])
    counts = [-(-share * len(values) // 100) for share in SHARES]
    return tuple(float(num_right_N[count - 1] / count) for count in counts)


def selective(arms: Sequence[Arm]) -> list[Selective]:
    """Return what each teacher and trained arm reaches on test; those without confidences are left out."""
    runs = [run for arm in arms if arm.measure is ACCURACY for run in arm.runs]
    latest = sorted(runs, key=lambda run: str(run.facts.get("started")), reverse=True)
    rows = []
    for arm in arms:
        if arm.kind == "teacher":  # the same in all its runs
            seeds = [_of_teacher(run) for run in latest if arm.settings.items() <= run.settings.items()]
            rows.append((arm, [known for known in seeds if known][:1]))
        elif arm.measure is ACCURACY:
            rows.append((arm, [known for run in arm.runs if (known := _of_student(run))]))
    return [_over_seeds(arm, seeds) for arm, seeds in rows if seeds]


def _of_student(run: Run) -> tuple[float, ...] | None:
    return _accuracies(run.predictions, "student_confidence", "is_correct")


def _of_teacher(run: Run) -> tuple[float, ...] | None:
    return _accuracies(run.predictions, "teacher_confidence", "is_teacher_correct")


def _accuracies(lines: Sequence[Json], confidence: str, is_right: str) -> tuple[float, ...] | None:
    """Return the accuracies by share of the questions that were judged; None if none has a confidence."""
    judged = [line for line in lines if line.get(is_right) is not None]
    confidences = [number(line.get(confidence)) for line in judged]
    if not any(value is not None for value in confidences):
        return None
    return selective_accuracies(confidences, [line[is_right] is True for line in judged])


def _over_seeds(arm: Arm, seeds: Sequence[tuple[float, ...]]) -> Selective:
    columns = list(zip(*seeds, strict=True))
    deviations = tuple(map(statistics.stdev, columns)) if len(seeds) > 1 else None
    return Selective(arm, tuple(map(statistics.fmean, columns)), deviations)
