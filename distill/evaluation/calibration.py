"""Temperature scaling: one number that makes the probabilities of a classifier those of being right.

Guo et al. 2017, "On Calibration of Modern Neural Networks", section 4.2. No answer changes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from distill.reports.statistics import calibration_error

_BOUNDS = (math.log(0.05), math.log(20.0))


@dataclass(frozen=True)
class Calibration:
    """How far probabilities are from the frequency of being right: the expected calibration error, and Brier's score.

    Brier's score is the mean squared distance of the probabilities from 1 for the right class and 0 for the others.
    """

    ece: float
    brier: float

    @classmethod
    def of(cls, logprobs_NC: Float[np.ndarray, "N C"], label_N: Int[np.ndarray, "N"]) -> Calibration:
        """Measure the distributions of texts whose right classes are known."""
        p_NC = np.exp(logprobs_NC.astype(np.float64))
        is_right_N = p_NC.argmax(-1) == label_N
        one_hot_NC = np.eye(p_NC.shape[1])[label_N]
        ece = calibration_error(p_NC.max(-1).tolist(), is_right_N.tolist())
        return cls(ece, float(np.square(p_NC - one_hot_NC).sum(-1).mean()))


def best_temperature(logprobs_NC: Float[np.ndarray, "N C"], label_N: Int[np.ndarray, "N"]) -> float:
    """The temperature by which logits have to be divided for the right classes to be most likely, in [0.05, 20]."""

    def nats(log_temperature: float) -> float:
        scaled_NC = log_softmax(logprobs_NC.astype(np.float64) / math.exp(log_temperature), -1)
        return -float(scaled_NC[np.arange(len(label_N)), label_N].mean())

    return math.exp(minimize_scalar(nats, bounds=_BOUNDS, method="bounded", options={"xatol": 1e-6}).x)
