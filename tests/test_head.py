"""Law 11: all losses at once in the head equal the plain formula, in value and gradients. Law 4: T^2."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import divergences
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from distill.head import Term, head_loss, predicted_ids
from distill.losses.cross_entropy import CrossEntropy
from distill.losses.forward_kl import ForwardKL

N, V, H = 12, 30, 6
EVERY = pytest.mark.parametrize("divergence", divergences("labels", "soft").values(), ids=lambda d: type(d).__name__)


def head(num: int = N, *, spread: float = 1.0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Hidden states, weight and bias."""
    shapes = ((num, H), (V, H), (V,))
    return [(spread * torch.randn(*shape, dtype=torch.float64)).to(dtype).requires_grad_() for shape in shapes]


def soft_term(divergence: Any, k: int, temperature: float = 1.0, num: int = N, scale: float = 0.7) -> Term:
    """A term on every other position, its targets from a random teacher."""
    rows_M = torch.arange(0, num, 2)
    log_t_MV = (2 * torch.randn(len(rows_M), V, dtype=torch.float64)).log_softmax(-1)
    top_MK, ids_MK = log_t_MV.topk(k, -1)
    tail_M1 = (1 - top_MK.exp().sum(-1, keepdim=True)).clamp(min=0) if k < V else torch.zeros(len(rows_M), 1).double()
    return Term(divergence, rows_M, ids_MK, torch.cat([top_MK, tail_M1.log()], -1), temperature, scale)


def label_term(rows_M: Tensor, ids_M: Tensor, scale: float = 1.3) -> Term:
    certain_MB = torch.tensor([[0.0, -torch.inf]]).double().expand(len(rows_M), 2)
    return Term(CrossEntropy(), rows_M, ids_M.unsqueeze(-1), certain_MB, 1.0, scale)


def plain(inputs: list[Tensor], terms: list[Term]) -> Tensor:
    """The same total by the plain formula: whole softmax, then buckets, and autograd for the rest."""
    hidden_NH, weight_VH, bias_V = (x.double() for x in inputs)
    total = torch.zeros((), dtype=torch.float64)
    for term in terms:
        log_p_MV = ((hidden_NH @ weight_VH.T + bias_V) / term.temperature).log_softmax(-1)[term.rows_M]
        is_kept_MV = torch.zeros_like(log_p_MV, dtype=torch.bool).scatter_(-1, term.ids_MK, True)
        rest_M1 = log_p_MV.exp().masked_fill(is_kept_MV, 0).sum(-1, keepdim=True).clamp(min=1e-9).log()
        log_q_MB = torch.cat([log_p_MV.gather(-1, term.ids_MK), rest_M1], -1)
        total = total + term.scale * term.temperature**2 * term.formula(log_q_MB, term.log_t_MB)[0].sum()
    return total


def assert_like_plain(inputs: list[Tensor], terms: list[Term], tolerance: float) -> None:
    expected = plain(inputs, terms)
    expected_gradients = torch.autograd.grad(expected, inputs)
    total, sums_L = head_loss(*inputs, terms)
    gradients = torch.autograd.grad(total, inputs)
    assert abs(total - expected) <= tolerance * max(1, abs(expected))
    assert len(sums_L) == len(terms)
    for name, found, wanted in zip(("hidden", "weight", "bias"), gradients, expected_gradients, strict=True):
        gap = (found.double() - wanted.double()).abs().max()
        assert gap <= tolerance * max(1, wanted.abs().max()), f"gradient to {name} is off by {gap:.3g}"


@EVERY
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [1, 5, V])
def test_one_loss_in_the_head_equals_the_plain_formula(divergence: Any, k: int, temperature: float) -> None:
    assert_like_plain(head(), [soft_term(divergence, k, temperature)], 1e-10)


def test_many_losses_on_the_same_positions_equal_the_plain_formula() -> None:
    terms = [soft_term(d, k, t) for d in divergences("soft").values() for k in (1, 5) for t in (1.0, 2.0)]
    also_kept = label_term(terms[0].rows_M, terms[0].ids_MK[:, 0])
    everywhere = label_term(torch.arange(N), torch.arange(N) % V)
    assert_like_plain(head(), [*terms, also_kept, everywhere], 1e-10)


@pytest.mark.parametrize("num", [255, 256, 257, 513])
def test_positions_on_both_sides_of_a_chunk_border_equal_the_plain_formula(num: int) -> None:
    terms = [soft_term(ForwardKL(), 5, 2.0, num), label_term(torch.arange(num), torch.arange(num) % V)]
    assert_like_plain(head(num), terms, 1e-10)


@EVERY
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("num", [1, 7])
def test_an_entry_that_does_not_exist_is_no_bucket(divergence: Any, temperature: float, num: int) -> None:
    inputs = head()
    inputs[2].data[[0, V - 1]] += 3.0  # the student has mass where a wrong index would land
    exact = soft_term(divergence, 5, temperature)
    absent_M1 = torch.full_like(exact.ids_MK[:, :1], -1)
    log_t_MB = exact.log_t_MB
    padded = Term(
        divergence,
        exact.rows_M,
        torch.cat([exact.ids_MK, *[absent_M1] * num], -1),
        torch.cat([log_t_MB[:, :-1], *[torch.full_like(log_t_MB[:, :1], -torch.inf)] * num, log_t_MB[:, -1:]], -1),
        temperature,
        exact.scale,
    )
    assert_like_plain(inputs, [exact], 1e-10)
    found = [head_loss(*inputs, [term]) for term in (exact, padded)]
    assert torch.allclose(found[0][1], found[1][1], atol=1e-12)
    for one, other in zip(*(torch.autograd.grad(total, inputs) for total, _ in found), strict=True):
        assert torch.allclose(one, other, atol=1e-12)


@EVERY
def test_rows_of_different_lengths_equal_their_own_terms(divergence: Any) -> None:
    inputs, parts = head(), [soft_term(divergence, k) for k in (2, 6)]
    parts = [replace(part, rows_M=part.rows_M + shift) for shift, part in enumerate(parts)]
    short, long = parts
    absent_M4 = torch.full((len(short.rows_M), 4), -1)
    ids_MK = torch.cat([torch.cat([short.ids_MK, absent_M4], -1), long.ids_MK])
    log_t = short.log_t_MB
    widened_MB = torch.cat([log_t[:, :-1], torch.full(absent_M4.shape, -torch.inf), log_t[:, -1:]], -1)
    log_t_MB = torch.cat([widened_MB, long.log_t_MB])
    ragged = Term(divergence, torch.cat([short.rows_M, long.rows_M]), ids_MK, log_t_MB, 1.0, short.scale)
    expected = torch.autograd.grad(plain(inputs, parts), inputs)
    found = torch.autograd.grad(head_loss(*inputs, [ragged])[0], inputs)
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(found, expected, strict=True))


def test_autograd_agrees_with_finite_differences() -> None:
    terms = [soft_term(d, 3, 2.0, 3) for d in divergences("soft").values()]
    terms.append(label_term(torch.arange(3), torch.arange(3)))
    assert torch.autograd.gradcheck(lambda *inputs: head_loss(*inputs, terms)[0], head(3), fast_mode=True)


@pytest.mark.parametrize("frozen", [(), (0,), (1,), (2,), (1, 2)])
def test_a_frozen_head_changes_no_other_gradient(frozen: tuple[int, ...]) -> None:
    inputs, terms = head(), [soft_term(ForwardKL(), 5)]
    wanted = torch.autograd.grad(plain(inputs, terms), inputs)
    for index in frozen:
        inputs[index].requires_grad_(False)
    head_loss(*inputs, terms)[0].backward()
    for index, (tensor, gradient) in enumerate(zip(inputs, wanted, strict=True)):
        assert (tensor.grad is None) == (index in frozen)
        assert tensor.grad is None or torch.allclose(tensor.grad, gradient, atol=1e-10)


@EVERY
def test_the_value_is_the_same_where_no_gradient_is_wanted(divergence: Any) -> None:
    inputs, terms = head(), [soft_term(divergence, 5, 2.0)]
    total, sums_L = head_loss(*inputs, terms)
    with torch.no_grad():
        quiet, quiet_sums_L = head_loss(*inputs, terms)
    assert torch.equal(total, quiet)
    assert torch.equal(sums_L, quiet_sums_L)


@EVERY
@pytest.mark.parametrize("k", [1, 5, V])
def test_float32_is_within_1e_5_of_float64(divergence: Any, k: int) -> None:
    assert_like_plain(head(300, dtype=torch.float32), [soft_term(divergence, k, 2.0, 300)], 1e-5)


def test_half_precision_states_are_computed_in_float32() -> None:
    inputs, terms = head(dtype=torch.bfloat16), [soft_term(ForwardKL(), 5)]
    with torch.autocast("cpu", torch.bfloat16):
        total, sums_L = head_loss(*inputs, terms)
    assert total.dtype == sums_L.dtype == torch.float32
    assert torch.equal(total, head_loss(*(x.float() for x in inputs), terms)[0])


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_certain_teachers_and_certain_students_give_no_nan(divergence: Any, dtype: Any, spread: float) -> None:
    inputs = head(spread=spread, dtype=dtype)
    one_hot_MB = torch.tensor([[0.0, -torch.inf, -torch.inf]]).expand(N, 3)
    ids_MK = torch.stack([torch.arange(N), torch.arange(N) + 1], -1)
    total, _ = head_loss(*inputs, [Term(divergence, torch.arange(N), ids_MK, one_hot_MB, 1.0, 1.0)])
    total.backward()
    assert total.isfinite()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in inputs)


@EVERY
def test_a_student_sure_of_the_kept_tokens_gets_an_accurate_gradient_in_float32(divergence: Any) -> None:
    hidden_NH, weight_VH = torch.eye(4, H), torch.zeros(V, H)
    weight_VH[:4, :4] = 40 * torch.eye(4)  # each position gives its own token all but 1e-17
    ids_MK = torch.stack([torch.arange(4), torch.arange(4) + 4], -1)
    log_t_MB = torch.tensor([[0.7, 0.2, 0.1]]).log().expand(4, 3)
    term = Term(divergence, torch.arange(4), ids_MK, log_t_MB, 1.0, 1.0)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        bias_V = torch.zeros(V, dtype=dtype, requires_grad=True)
        head_loss(hidden_NH.to(dtype), weight_VH.to(dtype), bias_V, [term])[0].backward()
        gradients.append(bias_V.grad.double())
    assert torch.allclose(*gradients, atol=1e-4), f"off by {(gradients[0] - gradients[1]).abs().max():.3g}"


@pytest.mark.parametrize("temperature", [2.0, 4.0])
def test_temperature_leaves_the_size_of_gradients_as_it_is(temperature: float) -> None:
    """For logits near to uniform T^2 undoes what T takes away (Hinton et al. 2015, section 2)."""
    student_NV, teacher_NV = 0.01 * torch.randn(2, N, V, dtype=torch.float64)
    norms = {}
    for t in (1.0, temperature):
        log_t_NV = (teacher_NV / t).log_softmax(-1)
        log_t_NB = torch.cat([log_t_NV, torch.full((N, 1), -torch.inf)], -1)
        every_NV = torch.arange(V).expand(N, V)
        hidden_NV = student_NV.clone().requires_grad_()
        term = Term(ForwardKL(), torch.arange(N), every_NV, log_t_NB, t, 1.0)
        total, _ = head_loss(hidden_NV, torch.eye(V, dtype=torch.float64), None, [term])
        total.backward()
        direct_NV = student_NV.clone().requires_grad_()
        log_q_NV = (direct_NV / t).log_softmax(-1)
        direct = t**2 * kl_div(log_q_NV, log_t_NV, log_target=True, reduction="sum")
        direct.backward()
        assert torch.allclose(total, direct, atol=1e-12)
        assert torch.allclose(hidden_NV.grad, direct_NV.grad, atol=1e-12)
        norms[t] = hidden_NV.grad.norm()
    assert abs(norms[temperature] / norms[1.0] - 1) < 0.02


def test_a_label_term_is_the_cross_entropy_of_torch_in_sums() -> None:
    inputs, labels_N = head(), torch.randint(V, (N,))
    total, sums_L = head_loss(*inputs, [label_term(torch.arange(N), labels_N, scale=0.25)])
    expected = cross_entropy(inputs[0] @ inputs[1].T + inputs[2], labels_N, reduction="sum")
    assert torch.allclose(sums_L[0], expected)
    assert torch.allclose(total, expected / 4)


def test_the_predicted_ids_are_the_largest_logits() -> None:
    inputs = head(300)
    expected_N = (inputs[0] @ inputs[1].T + inputs[2]).argmax(-1)
    assert torch.equal(predicted_ids(*inputs), expected_N)
