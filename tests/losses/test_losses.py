"""Laws 1 and 4: properties of every divergence that conf/loss/ names, on buckets."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from distill.app import config as configuration
from distill.errors import ConfigError
from distill.losses import Objective
from distill.losses.cross_entropy import CrossEntropy
from distill.losses.forward_kl import ForwardKL
from distill.losses.jensen_shannon import JensenShannon
from distill.losses.reverse_kl import ReverseKL
from distill.losses.skew_kl import SkewKL, SkewReverseKL
from distill.losses.total_variation import TotalVariation
from tests.conftest import compose, conf_names, divergences

EVERY_DIVERGENCE = pytest.mark.parametrize(
    "divergence", divergences("labels", "soft").values(), ids=lambda d: type(d).__name__
)
SOFT_DIVERGENCE = pytest.mark.parametrize("divergence", divergences("soft").values(), ids=lambda d: type(d).__name__)
V = 40


def logprobs(seed: int, rows: int = 16, spread: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(rows, V, generator=generator, dtype=torch.float64)).log_softmax(-1)


def buckets(log_p_NV: Tensor, ids_NK: Tensor) -> Tensor:
    """The kept log-probabilities and that of the tail."""
    is_kept_NV = torch.zeros_like(log_p_NV, dtype=torch.bool).scatter_(-1, ids_NK, True)
    tail_N1 = log_p_NV.masked_fill(is_kept_NV, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([log_p_NV.gather(-1, ids_NK), tail_N1], -1)


def excess(divergence: Any, log_q_NB: Tensor, log_t_NB: Tensor) -> Tensor:
    """The divergence above that of a perfect student."""
    return (divergence(log_q_NB, log_t_NB)[0] - divergence(log_t_NB, log_t_NB)[0]).sum(-1)


@EVERY_DIVERGENCE
@settings(max_examples=40, deadline=None, database=None)
@given(seed=st.integers(0, 10**6), k=st.integers(1, V - 1), spread=st.floats(0.01, 8))
def test_a_bucket_divergence_is_between_zero_and_the_full_divergence(
    divergence: Any, seed: int, k: int, spread: float
) -> None:
    log_q_NV, log_t_NV = logprobs(seed, spread=spread), logprobs(seed + 1, spread=spread)
    ids_NK = log_t_NV.topk(k, -1).indices
    bucket_excess_N = excess(divergence, buckets(log_q_NV, ids_NK), buckets(log_t_NV, ids_NK))
    assert (bucket_excess_N >= -1e-12).all()
    if log_t_NV.min() > np.log(1e-8):  # above the floor that ReverseKL states
        assert (bucket_excess_N <= excess(divergence, log_q_NV, log_t_NV) + 1e-12).all()


@SOFT_DIVERGENCE
@pytest.mark.parametrize("k", [1, 5, V - 1])
def test_equal_distributions_have_zero_divergence(divergence: Any, k: int) -> None:
    log_t_NV = logprobs(3)
    log_t_NB = buckets(log_t_NV, log_t_NV.topk(k, -1).indices)
    value_NB, slope_NB = divergence(log_t_NB, log_t_NB)
    assert value_NB.sum(-1).abs().max() < 1e-12
    # At the minimum every bucket's slope is the same multiple of its probability.
    assert torch.allclose(slope_NB / log_t_NB.exp(), slope_NB[:, :1] / log_t_NB[:, :1].exp(), atol=1e-12)


@EVERY_DIVERGENCE
def test_a_bucket_divergence_tends_to_the_full_one_as_more_is_kept(divergence: Any) -> None:
    log_q_NV, log_t_NV = logprobs(4, spread=1), logprobs(5, spread=1)
    order_NV = log_t_NV.argsort(-1, descending=True)
    excesses = [
        excess(divergence, buckets(log_q_NV, order_NV[:, :k]), buckets(log_t_NV, order_NV[:, :k])).sum()
        for k in range(1, V)
    ]
    assert all(at_k <= at_k_plus_1 + 1e-12 for at_k, at_k_plus_1 in itertools.pairwise(excesses))
    assert excesses[0] < 0.5 * excesses[-1]
    assert abs(excesses[-1] - excess(divergence, log_q_NV, log_t_NV).sum()) < 1e-9


@EVERY_DIVERGENCE
def test_a_slope_is_the_derivative_of_the_value(divergence: Any) -> None:
    log_q_NB = logprobs(6).requires_grad_()
    value_NB, slope_NB = divergence(log_q_NB, logprobs(7))
    (expected_NB,) = torch.autograd.grad(value_NB.sum(), log_q_NB)
    assert torch.allclose(slope_NB, expected_NB, atol=1e-12)


def test_values_are_those_of_torch() -> None:
    log_q_NV, log_t_NV, labels_N = logprobs(8), logprobs(9, spread=1), torch.arange(16)
    forward_N = kl_div(log_q_NV, log_t_NV, log_target=True, reduction="none").sum(-1)
    reverse_N = kl_div(log_t_NV, log_q_NV, log_target=True, reduction="none").sum(-1)
    certain_NV = torch.full_like(log_t_NV, -torch.inf).scatter(-1, labels_N.unsqueeze(-1), 0.0)
    label_N = cross_entropy(log_q_NV, labels_N, reduction="none")
    assert torch.allclose(ForwardKL()(log_q_NV, log_t_NV)[0].sum(-1), forward_N, atol=1e-12)
    assert torch.allclose(ReverseKL()(log_q_NV, log_t_NV)[0].sum(-1), reverse_N, atol=1e-12)
    assert torch.allclose(CrossEntropy()(log_q_NV, certain_NV)[0].sum(-1), label_N, atol=1e-12)


@pytest.mark.parametrize(
    ("mixture", "limit", "scale"),
    [
        (JensenShannon(beta=1e-7), ForwardKL(), 1e7),
        (JensenShannon(beta=1 - 1e-7), ReverseKL(), 1e7),
        (SkewKL(alpha=1e-7), ForwardKL(), 1),
        (SkewReverseKL(alpha=1e-7), ReverseKL(), 1),
    ],
)
def test_mixtures_tend_to_forward_and_reverse_kl(mixture: Any, limit: Any, scale: float) -> None:
    log_q_NV, log_t_NV = logprobs(11, spread=1), logprobs(12, spread=1)
    (value_NV, slope_NV), (limit_NV, limit_slope_NV) = (d(log_q_NV, log_t_NV) for d in (mixture, limit))
    assert torch.allclose(scale * value_NV.sum(-1), limit_NV.sum(-1), rtol=1e-4)
    by_logit_NV, expected_NV = (
        s - log_q_NV.exp() * s.sum(-1, keepdim=True) for s in (scale * slope_NV, limit_slope_NV)
    )
    assert torch.allclose(by_logit_NV, expected_NV, rtol=1e-4, atol=1e-6)


def test_divergences_of_two_coins_have_their_closed_form() -> None:
    """t = (3/4, 1/4), q = (1/4, 3/4), by hand."""
    log_t, log_q = torch.tensor([0.75, 0.25]).double().log(), torch.tensor([0.25, 0.75]).double().log()
    ln = math.log
    expected_values = {
        ForwardKL(): 0.5 * ln(3),
        ReverseKL(): 0.5 * ln(3),
        JensenShannon(beta=0.5): 0.75 * ln(1.5) - 0.25 * ln(2),
        SkewKL(alpha=0.5): 0.75 * ln(1.5) - 0.25 * ln(2),
        SkewReverseKL(alpha=0.5): 0.75 * ln(1.5) - 0.25 * ln(2),
        SkewKL(alpha=0.2): 0.75 * ln(0.75 / 0.35) + 0.25 * ln(0.25 / 0.65),
        SkewReverseKL(alpha=0.2): 0.25 * ln(0.25 / 0.65) + 0.75 * ln(0.75 / 0.35),
        JensenShannon(beta=0.25): 0.25 * (0.75 * ln(2) + 0.25 * ln(0.4)) + 0.75 * (0.25 * ln(2 / 3) + 0.75 * ln(1.2)),
        TotalVariation(): 0.5,
    }
    for divergence, value in expected_values.items():
        assert math.isclose(divergence(log_q, log_t)[0].sum(), value, rel_tol=1e-12), divergence


@pytest.mark.parametrize("weight", [0.0, 1.0, -0.1, 1.5])
@pytest.mark.parametrize("make", [SkewKL, SkewReverseKL, JensenShannon])
def test_a_mixture_weight_outside_0_and_1_is_refused(make: Any, weight: float) -> None:
    with pytest.raises(ConfigError, match=r"expected 0 < (alpha|beta) < 1"):
        make(weight)


@EVERY_DIVERGENCE
def test_buckets_with_zero_probability_give_no_nan(divergence: Any) -> None:
    log_zero = -torch.inf
    log_t_NB = torch.tensor([[0.0, log_zero, log_zero], [np.log(0.5), np.log(0.5), log_zero]], dtype=torch.float64)
    log_q_NB = torch.tensor([[log_zero, 0.0, log_zero], [0.0, -30.0, -20.7]], dtype=torch.float64)
    value_NB, slope_NB = divergence(log_q_NB[1:], log_t_NB[1:])
    assert value_NB.isfinite().all()
    assert slope_NB.isfinite().all()
    value_NB, slope_NB = divergence(log_q_NB[:1], log_t_NB[:1])
    assert not value_NB.isnan().any()
    assert not slope_NB.isnan().any()


@EVERY_DIVERGENCE
def test_exactly_divergences_without_rest_bucket_have_gradients_linear_in_the_target(divergence: Any) -> None:
    log_q_NB, log_s_NB, log_t_NB = (logprobs(seed) for seed in (13, 14, 15))
    slopes = [divergence(log_q_NB, log_u_NB)[1] for log_u_NB in (log_s_NB, log_t_NB)]
    mixed = divergence(log_q_NB, ((log_s_NB.exp() + log_t_NB.exp()) / 2).log())[1]
    assert torch.allclose(mixed, (slopes[0] + slopes[1]) / 2, atol=1e-12) == (not divergence.needs_rest)


LN = math.log
VALUES_AND_SLOPES_AT_ZERO: dict[Any, list[tuple[float, float]]] = {  # at (q, t) = (0, 0.3), (0.3, 0) and (0, 0)
    CrossEntropy(): [(math.inf, -0.3), (0, 0), (0, 0)],
    ForwardKL(): [(math.inf, -0.3), (0, 0), (0, 0)],
    ReverseKL(): [(0, 0), (0.3 * LN(0.3e9), 0.3 * LN(0.3e9) + 0.3), (0, 0)],  # t is at least 1e-9
    JensenShannon(beta=0.25): [(0.075 * LN(4), 0), (0.225 * LN(4 / 3), 0.225 * LN(4 / 3)), (0, 0)],
    SkewKL(alpha=0.2): [(0.3 * LN(5), 0), (0, 0), (0, 0)],
    SkewReverseKL(alpha=0.2): [(0, 0), (0.3 * LN(5), 0.3 * LN(5)), (0, 0)],
    TotalVariation(): [(0.15, 0), (0.15, 0.15), (0, 0)],
}


def test_the_limits_of_every_divergence_are_known() -> None:
    named = {type(divergence) for divergence in divergences("labels", "teacher", "soft").values()}
    assert named == {type(divergence) for divergence in VALUES_AND_SLOPES_AT_ZERO}


@pytest.mark.parametrize("divergence", VALUES_AND_SLOPES_AT_ZERO, ids=lambda d: type(d).__name__)
def test_values_and_slopes_at_probability_zero_are_their_limits(divergence: Any) -> None:
    q_B, t_B = torch.tensor([[0.0, 0.3, 0.0], [0.3, 0.0, 0.0]], dtype=torch.float64)
    value_B, slope_B = divergence(q_B.log(), t_B.log())
    actual = [*zip(value_B.tolist(), slope_B.tolist(), strict=True)]
    for pair, expected in zip(actual, VALUES_AND_SLOPES_AT_ZERO[divergence], strict=True):
        assert pair == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("weight", "temperature", "source"),
    [
        (-0.1, 1.0, "soft"),
        (1.0, 0.0, "soft"),
        (1.0, -0.1, "soft"),
        (1.0, 2.0, "labels"),
        (1.0, 0.5, "labels"),
        (1.0, 2.0, "teacher"),
    ],
)
def test_an_invalid_objective_is_refused(weight: float, temperature: float, source: Any) -> None:
    with pytest.raises(ConfigError):
        Objective(CrossEntropy(), "answer", source, weight, temperature)


@pytest.mark.parametrize(
    ("weight", "temperature", "source"), [(0.0, 1.0, "labels"), (0.1, 1.0, "teacher"), (1.0, 0.1, "soft")]
)
def test_a_loss_may_have_weight_zero_and_soft_targets_any_positive_temperature(
    weight: float, temperature: float, source: Any
) -> None:
    assert Objective(CrossEntropy(), "answer", source, weight, temperature).weight == weight


LOSSES = conf_names("loss")
PAIRS = [pytest.param(pair, marks=pytest.mark.slow, id="+".join(pair)) for pair in itertools.combinations(LOSSES, 2)]
ALONE = [pytest.param((name,), id=name) for name in LOSSES]


@pytest.mark.parametrize("names", [*ALONE, pytest.param(tuple(LOSSES), id="all"), *PAIRS])
def test_every_combination_of_losses_composes_and_builds(names: tuple[str, ...]) -> None:
    config = compose(f"loss=[{','.join(names)}]", "task=arithmetic", "teacher.model=x", "student.model=x")
    configuration.check(config)
    assert set(config.loss) == set(names)
    built = {name: configuration.build(node) for name, node in config.loss.items()}
    assert all(isinstance(objective, Objective) for objective in built.values())
