"""Builders for the tests of the codecs."""

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

ALL_CODECS = pytest.mark.parametrize("name", conf_names("cache"))


SAMPLING_CODECS = pytest.mark.parametrize("name", ["rs_kd", "sampled"])


def random_logprobs(rows: int, size: int, spread: float = 2.0) -> Tensor:
    return (spread * torch.randn(rows, size)).log_softmax(-1)


def uniform_draws(rows: int, key: str = "record", seed: int = 0) -> Tensor:
    return torch.from_numpy(uniforms(key, rows, seed))


def training_rows(soft: SoftTargets, size: int) -> np.ndarray:
    """The targets of a training loss, as rows over the vocabulary."""
    target_NV = np.zeros((len(soft), size))
    reading = soft.for_training()
    for row, (ids, logprobs) in enumerate(reading.rows()):
        for token, logprob in zip(ids, logprobs, strict=True):
            target_NV[row, token] += math.exp(logprob)
    return target_NV


def uniform_grid(number: int) -> Tensor:
    """Evenly spaced numbers in [0, 1), to average over all draws of a position."""
    return (torch.arange(number, dtype=torch.float64) + 0.5) / number


def targets(**changes: Any) -> SoftTargets:
    """Two rows: two exact entries and a sample; one exact entry."""
    arrays: dict[str, Any] = {
        "ids_E": np.array([3, 1, 7, 2], np.int32),
        "logprobs_E": np.log([0.6, 0.3, 0.125, 0.9]).astype(np.float32),
        "tail_N": np.array([0.1, 0.1], np.float32),
        "num_exact_N": np.array([2, 1], np.int32),
        "num_drawn_N": np.array([1, 0], np.int32),
    }
    return SoftTargets(**arrays | changes)
