"""The temperature of a trained classifier, fitted on the labels of validation before it is saved."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np

from distill.app.console import say
from distill.app.files import Json
from distill.evaluation.calibration import Calibration, best_temperature
from distill.evaluation.classes import ClassEvaluation
from distill.evaluation.kinds import AnyEvaluation
from distill.lessons.curriculum import Job
from distill.students.classifier import Classifier, divide_logits

_MIN_LABELS = 30  # fewer say too little about one number


def calibrated(job: Job, evaluation: AnyEvaluation) -> float | None:
    """Divide the logits of the evaluated classifier by the best temperature, and return it; None if it stays as it is.

    Another kind of student, or too few labelled validation examples, leave it as it is.
    """
    if not (isinstance(evaluation, ClassEvaluation) and isinstance(job.kind, Classifier) and job.kind.calibrate):
        return None
    logprobs_NC, label_N = evaluation.labelled(job.annotation_job.splits.validation)
    if len(label_N) < _MIN_LABELS:
        say(
            f"probabilities are not calibrated: validation has {len(label_N)} labels, at least {_MIN_LABELS} are needed"
        )
        return None
    temperature = best_temperature(logprobs_NC, label_N)
    divide_logits(evaluation.model, temperature)
    return temperature


def calibration_facts(job: Job, evaluation: AnyEvaluation, temperature: float) -> Json:
    """Return the temperature and, where test has labels, how well its probabilities fit with and without it."""
    assert isinstance(evaluation, ClassEvaluation)
    logprobs_NC, label_N = evaluation.labelled(job.annotation_job.splits.test)
    if not len(label_N):
        return {"temperature": temperature}
    before_NC = logprobs_NC * temperature
    before_NC -= np.logaddexp.reduce(before_NC, axis=1, keepdims=True)
    after, before = (asdict(Calibration.of(part_NC, label_N)) for part_NC in (logprobs_NC, before_NC))
    return {"temperature": temperature, **after, **{f"{name}_before": value for name, value in before.items()}}
