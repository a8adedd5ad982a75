"""Makers that the tests of this folder share."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.cache import uniforms
from distill.records import SoftTargets
from tests.conftest import conf_names

EVERY = pytest.mark.parametrize("name", conf_names("cache"))


DRAWING = pytest.mark.parametrize("name", ["rs_kd", "sampled"])


def random(rows: int, size: int, spread: float = 2.0) -> Tensor:
    return (spread * torch.randn(rows, size)).log_softmax(-1)


def draws(rows: int, key: str = "record", seed: int = 0) -> Tensor:
    return torch.from_numpy(uniforms(key, rows, seed))


def whole(soft: SoftTargets, size: int) -> np.ndarray:
    """The target that a loss sees when it trains, as a row over the vocabulary."""
    target_NV = np.zeros((len(soft), size))
    reading = soft.for_training()
    for row, (ids, logprobs) in enumerate(reading.rows()):
        for token, logprob in zip(ids, logprobs, strict=True):
            target_NV[row, token] += math.exp(logprob)
    return target_NV


def on_a_grid(num: int) -> Tensor:
    """All the numbers that a position may get, evenly."""
    return (torch.arange(num, dtype=torch.float64) + 0.5) / num


def targets(**changes: Any) -> SoftTargets:
    """Two rows: two exact entries and a draw; one exact entry."""
    given_arrays: dict[str, Any] = {
        "ids_E": np.array([3, 1, 7, 2], np.int32),
        "logprobs_E": np.log([0.6, 0.3, 0.125, 0.9]).astype(np.float32),
        "tail_N": np.array([0.1, 0.1], np.float32),
        "num_exact_N": np.array([2, 1], np.int32),
        "num_drawn_N": np.array([1, 0], np.int32),
    }
    return SoftTargets(**given_arrays | changes)
