"""What each codec keeps of a distribution: settings and their bounds, temperatures, and which tokens are exact."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from distill.cache.codecs.dense import Dense
from distill.cache.codecs.topk import TopK
from distill.errors import CacheError, ConfigError
from distill.lessons.collate import entries
from distill.records import SoftTargets
from tests.cache.codecs.conftest import random_logprobs, uniform_draws
from tests.conftest import codec, grid

V = 40


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("topk", {"k": 1}),
        ("topk", {"temperature": 0.1}),
        ("sampled", {"n": 1}),
        ("sampled", {"n": 255}),
        ("sampled", {"k_min": 0}),
        ("sampled", {"k_min": 255}),
        ("sampled", {"n": 255, "k_min": 255}),
        ("sampled", {"temperature": 0.1}),
        ("rs_kd", {"n": 1}),
        ("rs_kd", {"n": 255}),
        ("rs_kd", {"n": 256}),
        ("rs_kd", {"n": 65_535}),
        ("rs_kd", {"temperature": 0.1}),
    ],
)
def test_targets_of_extreme_settings_survive_their_bytes(name: str, settings: dict[str, Any]) -> None:
    flat_and_certain_NV = torch.zeros(2, 300)
    flat_and_certain_NV[1, 7] = 100.0
    extreme = codec(name, **settings)
    cut = extreme.cut(flat_and_certain_NV.log_softmax(-1), uniform_draws(2))
    read = extreme.unpack(extreme.pack(cut))
    assert np.array_equal(read.ids_E, cut.ids_E)
    assert np.array_equal(read.num_N, cut.num_N)
    assert np.array_equal(read.num_exact_N, cut.num_exact_N)
    assert np.allclose(np.exp(read.logprobs_E), np.exp(cut.logprobs_E), atol=1e-3)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("topk", {"k": 0}),
        ("topk", {"temperature": 0.0}),
        ("topk", {"temperature": -0.1}),
        ("sampled", {"n": 0}),
        ("sampled", {"n": 256}),
        ("sampled", {"k_min": -1}),
        ("sampled", {"k_min": 256}),
        ("sampled", {"temperature": 0.0}),
        ("sampled", {"temperature": -0.1}),
        ("rs_kd", {"n": 0}),
        ("rs_kd", {"n": 65_536}),
        ("rs_kd", {"temperature": 0.0}),
        ("rs_kd", {"temperature": -0.1}),
    ],
)
def test_settings_beyond_their_bounds_are_refused(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="codec"):
        codec(name, **settings)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [1, 7, V, 3 * V])
def test_top_k_keeps_full_softmax_probabilities_and_the_tail_mass(k: int, temperature: float) -> None:
    log_p_NV = random_logprobs(16, V, 3.0)
    full_NV = (log_p_NV / temperature).log_softmax(-1)
    soft = TopK(k=k, temperature=temperature).cut(log_p_NV, torch.zeros(16).double())
    ids_NK, logprobs_NK = grid(soft)
    kept_NK = full_NV.gather(-1, torch.from_numpy(ids_NK).long()).numpy()
    assert ids_NK.shape == (16, min(k, V))
    assert np.allclose(logprobs_NK, kept_NK, atol=1e-6)
    assert np.allclose(logprobs_NK[:, 0], full_NV.max(-1).values, atol=1e-6)
    assert np.allclose(np.exp(logprobs_NK).sum(-1) + soft.tail_N, 1, atol=1e-6)
    assert (soft.tail_N >= 0).all()
    if k == 1:
        assert (soft.tail_N > 0.05).any()


@pytest.mark.parametrize("name", ["topk", "sampled"])
def test_at_temperature_1_log_probabilities_are_kept_bit_by_bit(name: str) -> None:
    log_p_NV = random_logprobs(50, 300)
    assert not torch.equal(log_p_NV.log_softmax(-1), log_p_NV)  # normalizing once more would round once more
    soft = codec(name).cut(log_p_NV, uniform_draws(50)).buckets()
    row_E = np.repeat(np.arange(50), soft.num_N)
    assert np.array_equal(soft.logprobs_E, log_p_NV.numpy()[row_E, soft.ids_E])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
def test_dense_targets_at_a_temperature_are_the_softmax_at_that_temperature(temperature: float) -> None:
    logits_NV = 3 * torch.randn(8, V)
    soft = Dense().cut(logits_NV.log_softmax(-1), torch.zeros(8).double())
    Dense().check_temperature(temperature)
    is_soft_N = np.arange(10) > 1  # the first two positions have no soft targets
    targets = entries(is_soft_N, soft)
    retempered = Dense().at_temperature(targets, temperature)
    expected_NV = (logits_NV / temperature).log_softmax(-1)
    assert torch.allclose(retempered.logprobs_E.unflatten(0, (8, V)), expected_NV, atol=1e-5)
    assert (retempered is targets) == (temperature == 1)
    assert (soft.tail_N == 0).all()


def test_a_token_of_exactly_one_nth_is_exact() -> None:
    soft = codec("sampled", n=4, k_min=0).cut(torch.full((1, 4), -math.log(4)), uniform_draws(1))
    assert soft.num_exact_N.tolist() == [4]
    assert soft.num_N.tolist() == [4]


def test_the_draws_of_random_sampling_are_those_of_splitmix64() -> None:
    """From the seeds 0 and 2^62 + 2^12, of 0 and 1/4 + 2^-52; the first outputs for 0 are published."""
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC, 0x1B39896A51A8749B]
    others = [0xB474161F7F330C23, 0xFB5B916079E623C7, 0x420B07360A7EFECB, 0x226A6C0E1CB7E768, 0x1F461E4A4A3B19A9]
    uniform_N = torch.tensor([0.0, 0.25 + 2.0**-52], dtype=torch.float64)
    soft = codec("rs_kd", n=5).cut(torch.full((2, 1024), -math.log(1024)), uniform_N)
    for (ids, _), outputs in zip(soft.rows(), (published, others), strict=True):
        assert ids.tolist() == sorted(output >> 54 for output in outputs)  # the highest ten bits choose of 1024


def test_soft_targets_with_inconsistent_shapes_are_refused() -> None:
    with pytest.raises(CacheError, match="inconsistent shapes"):
        SoftTargets(np.zeros(6, np.int32), np.zeros(6, np.float32), np.zeros(2, np.float32), np.full(3, 2))
    with pytest.raises(CacheError, match="inconsistent shapes"):
        SoftTargets(np.zeros(6, np.int32), np.zeros(5, np.float32), np.zeros(3, np.float32), np.full(3, 2))
