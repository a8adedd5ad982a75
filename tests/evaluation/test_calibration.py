"""Temperature scaling: the right temperature is recovered, and no answer changes."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import log_softmax

from distill.evaluation.calibration import Calibration, best_temperature


def drawn(number: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and classes drawn from them after they are divided by `scale`."""
    generator = np.random.default_rng(0)
    logits_NC = generator.normal(0, 3, (number, 3))
    p_NC = np.exp(log_softmax(logits_NC / scale, -1))
    return log_softmax(logits_NC, -1), np.array([generator.choice(3, p=p_C) for p_C in p_NC])


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.5])
def test_the_temperature_that_drew_the_labels_is_found(scale: float) -> None:
    logprobs_NC, label_N = drawn(20_000, scale)
    assert best_temperature(logprobs_NC, label_N) == pytest.approx(scale, rel=0.03)


def test_calibration_is_that_of_its_definition() -> None:
    logprobs_NC = np.log([[0.8, 0.1, 0.1], [0.8, 0.1, 0.1], [0.2, 0.7, 0.1]])
    measured = Calibration.of(logprobs_NC, np.array([0, 1, 1]))
    # Bins [0.7, 0.8) and [0.8, 0.9): one right of one at 0.7, one of two at 0.8.
    assert measured.ece == pytest.approx((abs(1 - 0.7) + abs(1 - 1.6)) / 3)
    squares = [0.04 + 0.01 + 0.01, 0.64 + 0.81 + 0.01, 0.04 + 0.09 + 0.01]
    assert measured.brier == pytest.approx(sum(squares) / 3)


def test_probabilities_that_fit_have_a_smaller_error_and_score() -> None:
    logprobs_NC, label_N = drawn(20_000, 2.5)
    scaled_NC = log_softmax(logprobs_NC / best_temperature(logprobs_NC, label_N), -1)
    before, after = (Calibration.of(x_NC, label_N) for x_NC in (logprobs_NC, scaled_NC))
    assert after.ece < 0.02 < 0.15 < before.ece
    assert after.brier < before.brier
    assert (scaled_NC.argmax(-1) == logprobs_NC.argmax(-1)).all()
