"""The samples of codecs: uniform, independent, and unbiased with the noise of the formulas."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.cache import uniforms
from distill.cache.codecs import compact
from distill.records import SoftTargets
from tests.cache.codecs.conftest import SAMPLING_CODECS, random_logprobs, training_rows, uniform_draws, uniform_grid
from tests.conftest import codec


def test_uniforms_are_the_hash_of_seed_key_and_position() -> None:
    first = uniforms("a key", 5, 3)
    assert np.array_equal(uniforms("a key", 9, 3)[:5], first)
    others = np.concatenate([first, uniforms("a key", 5, 4), uniforms("another", 5, 3), uniforms("a key/", 5, 3)])
    assert len(set(others.tolist())) == 20
    assert ((others >= 0) & (others < 1)).all()
    # blake2b, 8 bytes, of "3/a key/0": as `b2sum -l 64` prints it, the little end first.
    assert first[0] == (int.from_bytes(bytes.fromhex("144ef9fa56dfda77"), "little") >> 11) / 2**53


def test_uniforms_are_uniform_and_independent() -> None:
    u = np.concatenate([uniforms(f"key {number}", 100, 0) for number in range(200)])
    counts = np.histogram(u, 50, (0, 1))[0]
    assert ((counts - 400) ** 2 / 400).sum() < 49 + 5 * math.sqrt(2 * 49)  # chi-square, 5 standard deviations
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 5 / math.sqrt(len(u))
    assert abs(np.corrcoef(u[:-100], u[100:])[0, 1]) < 5 / math.sqrt(len(u))


@pytest.mark.parametrize("size", [1, 63, 64, 65, 3000])
def test_a_point_samples_the_token_whose_interval_contains_it(size: int) -> None:
    p_NV = random_logprobs(20, size, 6.0).exp() * (torch.rand(20, size) < 0.7)
    p_NV[:, 0] += 1e-3
    points_NJ = torch.rand(20, 50, dtype=torch.float64)
    ids_NJ = compact.Cumulative.from_probabilities(p_NV).sample(points_NJ)
    assert p_NV.gather(-1, ids_NJ.clamp(max=size - 1))[ids_NJ < size].min() > 0
    sums_NV = p_NV.double().numpy().cumsum(1)
    for row, points in enumerate(points_NJ.numpy()):
        expected = np.searchsorted(sums_NV[row], points, side="right")
        is_clear = (np.abs(sums_NV[row] - points[:, None]) > 1e-6).all(1)  # far from rounding errors of float32 sums
        assert np.array_equal(ids_NJ[row].numpy()[is_clear], expected[is_clear])
        assert is_clear.mean() > 0.9 or size > 1000


def sampled_on_grid(log_p_V: Tensor, num: int, **settings: Any) -> tuple[SoftTargets, np.ndarray]:
    """Cut a distribution with numbers on a grid; return the soft targets and their rows."""
    soft = codec("sampled", **settings).cut(log_p_V.expand(num, -1), uniform_grid(num))
    return soft, training_rows(soft, len(log_p_V))


@pytest.mark.parametrize("n", [1, 7, 64, 255])
@pytest.mark.parametrize("k_min", [0, 3, 60])
@pytest.mark.parametrize("spread", [0.3, 2.0])
def test_tail_tokens_are_sampled_with_probability_p_over_tau_and_others_kept(n: int, k_min: int, spread: float) -> None:
    log_p_V, num = random_logprobs(1, 50, spread)[0], 2000
    soft, target_NV = sampled_on_grid(log_p_V, num, n=n, k_min=k_min)
    p_V = log_p_V.exp().numpy().astype(float)
    is_head_V = (p_V >= 1 / n) | (p_V.argsort()[::-1].argsort() < k_min)
    assert (soft.num_exact_N == is_head_V.sum()).all()
    assert np.allclose(target_NV[:, is_head_V], p_V[is_head_V], rtol=1e-6)
    assert np.allclose(np.unique(target_NV[:, ~is_head_V] * n).round(5), [0, 1][: 1 + (~is_head_V).any()]) or (
        is_head_V.all()
    )
    # A token is selected by the numbers of one interval of length p / tau, or of two if it wraps around.
    assert np.abs((target_NV[:, ~is_head_V] > 0).mean(0) - n * p_V[~is_head_V]).max(initial=0) <= 2 / num
    assert np.allclose(soft.tail_N, p_V[~is_head_V].sum(), atol=1e-6)


@SAMPLING_CODECS
def test_a_token_without_probability_is_never_sampled(name: str) -> None:
    is_possible_V = torch.tensor([0, 0, 1, 0, 1, 1, 1, 0, 1, 1, 0, 0]).bool()
    log_p_NV = torch.where(is_possible_V, 0.0, -torch.inf).log_softmax(-1).expand(9, -1)
    lowest_and_highest = torch.tensor([0.0] * 4 + [1 - 2.0**-53] * 5, dtype=torch.float64)
    soft = codec(name, n=3).cut(log_p_NV, lowest_and_highest)
    assert is_possible_V[torch.from_numpy(soft.ids_E)].all()
    assert len(soft.ids_E) > 9


@pytest.mark.parametrize("n", [7, 64])
def test_the_noise_of_sampled_targets_agrees_with_the_formula(n: int) -> None:
    log_p_V = random_logprobs(1, 50)[0]
    _, target_NV = sampled_on_grid(log_p_V, 4000, n=n, k_min=4)
    p_V = log_p_V.exp().numpy().astype(float)
    tail = np.array([p for p in np.sort(p_V)[::-1][4:] if p < 1 / n])
    expected = (tail * (1 / n - tail)).sum()
    assert math.isclose(((target_NV - p_V) ** 2).sum(1).mean(), expected, rel_tol=0.01)
    assert expected <= tail.sum() / n
    assert (np.abs(target_NV.sum(1) - 1) < 1 / n).all()


def test_the_noise_of_random_sampling_agrees_with_the_formula() -> None:
    log_p_V, num = random_logprobs(1, 50)[0], 4000
    target_NV = training_rows(codec("rs_kd", n=20).cut(log_p_V.expand(num, -1), uniform_draws(num)), 50)
    p_V = log_p_V.exp().numpy().astype(float)
    assert math.isclose(((target_NV - p_V) ** 2).sum(1).mean(), (1 - (p_V**2).sum()) / 20, rel_tol=0.05)
    assert np.allclose(target_NV.sum(1), 1)
    count_NV = np.rint(target_NV * 20)
    covariance = np.cov(count_NV[:, p_V.argsort()[-2:]].T)  # of a multinomial: -n p q
    assert math.isclose(covariance[0, 1], -20 * np.prod(np.sort(p_V)[-2:]), rel_tol=0.15)


@SAMPLING_CODECS
@pytest.mark.parametrize("spread", [0.3, 2.0])
def test_the_expected_decoded_target_is_the_teachers_distribution(name: str, spread: float) -> None:
    """To within 5 standard errors, plus for `sampled` the rounding of the head: 2 % of p, and 2e-4."""
    log_p_V, num = random_logprobs(1, 40, spread)[0], 6000
    soft = codec(name, n=16).cut(log_p_V.expand(num, -1), uniform_draws(num))
    target_NV = training_rows(codec(name, n=16).unpack(codec(name, n=16).pack(soft)), 40)
    p_V = log_p_V.exp().numpy().astype(float)
    noise_V = target_NV.std(0) / math.sqrt(num)
    rounding_V = 0.02 * p_V + 2e-4 if name == "sampled" else 1e-6
    assert (np.abs(target_NV.mean(0) - p_V) < 5 * noise_V + rounding_V).all()
    assert noise_V.max() > 0
    assert np.abs(target_NV.sum(1) - 1).max() < (1 / 16 + 0.008 if name == "sampled" else 1e-6)
