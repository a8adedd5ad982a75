"""Law 11: all losses at once in the head equal the plain formula, in value and gradients. Law 4: T^2."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoConfig, AutoModelForCausalLM

from distill.losses.cross_entropy import CrossEntropy
from distill.losses.forward_kl import ForwardKL
from distill.losses.head import Head, Shape, Term, head_loss, predicted_ids
from distill.records import Entries
from tests.conftest import divergences

N, V, H = 12, 30, 6
LINEAR = Shape()
EVERY = pytest.mark.parametrize("divergence", divergences("labels", "soft").values(), ids=lambda d: type(d).__name__)


def head(num: int = N, *, spread: float = 1.0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Hidden states, weight and bias."""
    shapes = ((num, H), (V, H), (V,))
    return [(spread * torch.randn(*shape, dtype=torch.float64)).to(dtype).requires_grad_() for shape in shapes]


def soft_term(
    divergence: Any, k: int, temperature: float = 1.0, num: int = N, scale: float = 0.7, shift: int = 0
) -> Term:
    """A term on every other position, its targets from a random teacher."""
    is_used_N = torch.arange(num) % 2 == shift
    log_t_NV = (2 * torch.randn(num, V, dtype=torch.float64)).log_softmax(-1)
    top_NK, ids_NK = log_t_NV.topk(k, -1)
    tail_N = (1 - top_NK.exp().sum(-1)).clamp(min=0) if k < V else torch.zeros(num).double()
    return Term(divergence, rows(ids_NK, top_NK, tail_N), is_used_N, temperature, scale)


def rows(ids_NK: Tensor, log_t_NK: Tensor, tail_N: Tensor | None) -> Entries:
    """Equally many entries at each position."""
    num, k = ids_NK.shape
    position_E = torch.arange(num).repeat_interleave(k)
    return Entries(k * np.arange(1, num + 1), position_E, ids_NK.flatten(), log_t_NK.flatten(), tail_N)


def at_some(targets: Entries, is_there_N: Tensor) -> Entries:
    """The same, but for some positions nothing at all."""
    is_there_E = is_there_N[targets.position_E]
    ends_N = np.cumsum(np.bincount(targets.position_E[is_there_E], minlength=len(is_there_N)))
    some = (x[is_there_E] for x in (targets.position_E, targets.ids_E, targets.logprobs_E))
    return Entries(ends_N, *some, None if targets.tail_N is None else targets.tail_N * is_there_N)


def label_term(labels_N: Tensor, scale: float = 1.3, is_used_N: Tensor | None = None) -> Term:
    certain_N1 = torch.zeros(len(labels_N), 1).double()
    every_N = torch.ones(len(labels_N), dtype=torch.bool)
    targets = rows(labels_N.unsqueeze(-1), certain_N1, None)
    return Term(CrossEntropy(), targets, every_N if is_used_N is None else is_used_N, 1.0, scale)


def plain(inputs: list[Tensor], terms: list[Term], shape: Shape = LINEAR) -> Tensor:
    """The same total by the plain formula: whole softmax, then buckets, and autograd for the rest."""
    hidden_NH, weight_VH, bias_V = (x.double() for x in inputs)
    total = torch.zeros((), dtype=torch.float64)
    for term in terms:
        log_p_NV = (shape(hidden_NH @ weight_VH.T + bias_V) / term.temperature).log_softmax(-1)
        for place in term.is_used_N.nonzero().ravel().tolist():
            is_here_E = term.targets.position_E == place
            ids, log_q_V = term.targets.ids_E[is_here_E].long(), log_p_NV[place]
            log_q_B, log_t_B = log_q_V[ids], term.targets.logprobs_E[is_here_E]
            if term.targets.tail_N is not None:
                is_rest_V = torch.ones(V, dtype=torch.bool).scatter(0, ids, False)
                rest = (log_q_V.exp() * is_rest_V).sum().clamp(min=1e-9).log()
                log_q_B = torch.cat([log_q_B, rest.unsqueeze(0)])
                log_t_B = torch.cat([log_t_B, term.targets.tail_N[place].log().unsqueeze(0)])
            total = total + term.scale * term.temperature**2 * term.formula(log_q_B, log_t_B)[0].sum()
    return total


def assert_like_plain(inputs: list[Tensor], terms: list[Term], tolerance: float, shape: Shape = LINEAR) -> None:
    expected = plain(inputs, terms, shape)
    expected_gradients = torch.autograd.grad(expected, inputs)
    total, sums_L = head_loss(inputs[0], Head(*inputs[1:], shape), terms)
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


@EVERY
@pytest.mark.parametrize("shape", [Shape(softcap=2.0), Shape(scale=0.3), Shape(scale=3.0, softcap=1.5)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_capped_and_scaled_logits_equal_the_plain_formula(divergence: Any, shape: Shape, temperature: float) -> None:
    terms = [soft_term(divergence, 5, temperature), label_term(torch.arange(N) % V)]
    assert_like_plain(head(spread=2.0), terms, 1e-10, shape)


def tiny(kind: str) -> Any:
    """A model of this kind with random weights, padded rows in its head, and a shape where the kind has one."""
    size = {"vocab_size": V + 4, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    size |= {"intermediate_size": 16, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
    special: dict[str, dict[str, Any]] = {
        "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2},
        "gemma2": {"final_logit_softcapping": 0.4},
        "cohere": {"logit_scale": 0.0625},
        "granite": {"logits_scaling": 8.0},
        "phi": {"tie_word_embeddings": False},  # its head has a bias
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(size | special.get(kind, {})))
    model = AutoModelForCausalLM.from_config(config).double().eval()  # without dropout
    for parameter in model.parameters():  # nothing is left at 0 or 1
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "cohere", "granite", "phi", "qwen3"])
def test_the_loss_of_a_real_model_has_the_gradients_of_its_own_logits(kind: str) -> None:
    model, ids_BT = tiny(kind), torch.randint(1, V, (2, 7))
    out = model(ids_BT).logits
    before, label_N = out[:, :-1, :V].flatten(0, 1), ids_BT[:, 1:].flatten()
    cross_entropy(before, label_N, reduction="sum").backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    hidden_NH = model.base_model(ids_BT).last_hidden_state[:, :-1].flatten(0, 1)
    head_loss(hidden_NH, Head.of(model, V), [label_term(label_N, scale=1.0)])[0].backward()
    assert len(wanted) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, wanted[name], atol=1e-9), name
    assert Shape.of(model) != Shape() or kind not in ("gemma2", "cohere", "granite")


def test_many_losses_on_the_same_positions_equal_the_plain_formula() -> None:
    terms = [soft_term(d, k, t) for d in divergences("soft").values() for k in (1, 5) for t in (1.0, 2.0)]
    also_kept = label_term(terms[0].targets.ids_E, is_used_N=terms[0].is_used_N)
    everywhere = label_term(torch.arange(N) % V)
    assert_like_plain(head(), [*terms, also_kept, everywhere], 1e-10)


@pytest.mark.parametrize("num", [31, 32, 33, 65])
def test_positions_on_both_sides_of_a_chunk_border_equal_the_plain_formula(
    num: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill.losses.head._CPU_CHUNK_BYTES", 32 * V * 8)
    monkeypatch.setattr("distill.losses.head._MIN_ROWS", 1)
    ragged = soft_term(ForwardKL(), 5, 2.0, num)
    ragged = replace(ragged, targets=at_some(ragged.targets, torch.arange(num) % 3 < 2))
    terms = [soft_term(ForwardKL(), 5, 2.0, num), ragged, label_term(torch.arange(num) % V)]
    assert_like_plain(head(num), terms, 1e-10)


@EVERY
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_unused_positions_without_targets_contribute_nothing(divergence: Any, temperature: float) -> None:
    inputs, everywhere = head(), soft_term(divergence, 5, temperature)
    there = replace(everywhere, targets=at_some(everywhere.targets, everywhere.is_used_N))
    assert_like_plain(inputs, [there], 1e-10)
    found = [head_loss(inputs[0], Head(*inputs[1:]), [term]) for term in (everywhere, there)]
    assert torch.allclose(found[0][1], found[1][1], atol=1e-12)
    for one, other in zip(*(torch.autograd.grad(total, inputs) for total, _ in found), strict=True):
        assert torch.allclose(one, other, atol=1e-12)


@EVERY
def test_positions_with_different_numbers_of_entries_equal_their_own_terms(divergence: Any) -> None:
    inputs, parts = head(), [soft_term(divergence, k, shift=shift) for shift, k in enumerate((2, 6))]
    parts = [replace(part, targets=at_some(part.targets, part.is_used_N)) for part in parts]
    position_E, order = torch.cat([part.targets.position_E for part in parts]).sort(stable=True)
    ids_E, log_t_E = (torch.cat([getattr(p.targets, name) for p in parts])[order] for name in ("ids_E", "logprobs_E"))
    ends_N = sum(part.targets.ends_N for part in parts)
    tail_N = sum(part.targets.tail_N for part in parts)
    together = Entries(ends_N, position_E, ids_E, log_t_E, tail_N)
    ragged = Term(divergence, together, torch.ones(N, dtype=torch.bool), 1.0, parts[0].scale)
    assert len(set(np.diff(ends_N))) == 2
    assert_like_plain(inputs, [ragged], 1e-10)
    expected = torch.autograd.grad(plain(inputs, parts), inputs)
    found = torch.autograd.grad(head_loss(inputs[0], Head(*inputs[1:]), [ragged])[0], inputs)
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_sampled_targets_have_no_rest_bucket(temperature: float) -> None:
    """Their sum is 1 on average only, so that the gradient is sum(t) q - t."""
    inputs, term = head(), soft_term(ForwardKL(), 5, temperature)
    drawn = replace(term, targets=replace(term.targets, tail_N=None))
    assert_like_plain(inputs, [drawn, label_term(torch.arange(N))], 1e-10)


def test_autograd_agrees_with_finite_differences() -> None:
    terms = [soft_term(d, 3, 2.0, 3) for d in divergences("soft").values()]
    terms.append(label_term(torch.arange(3)))
    for shape in (Shape(), Shape(0.5, 2.0)):
        inputs = head(3)
        total, _ = head_loss(inputs[0], Head(*inputs[1:], shape), terms)
        gradients = torch.autograd.grad(total, inputs, retain_graph=True)
        for place, gradient in enumerate(gradients):
            step = 1e-6 * torch.randn_like(gradient)
            ends = []
            for sign in (1, -1):
                moved = [x + sign * step if place == other else x for other, x in enumerate(inputs)]
                ends.append(head_loss(moved[0], Head(*moved[1:], shape), terms)[0])
            assert torch.allclose((ends[0] - ends[1]) / 2, (gradient * step).sum(), rtol=1e-5)
        with pytest.raises(RuntimeError, match="already differentiated"):
            torch.autograd.grad(total, inputs)


@pytest.mark.parametrize("frozen", [(), (0,), (1,), (2,), (1, 2)])
def test_a_frozen_head_does_not_change_other_gradients(frozen: tuple[int, ...]) -> None:
    inputs, terms = head(), [soft_term(ForwardKL(), 5)]
    wanted = torch.autograd.grad(plain(inputs, terms), inputs)
    for index in frozen:
        inputs[index].requires_grad_(False)
    head_loss(inputs[0], Head(*inputs[1:]), terms)[0].backward()
    for index, (tensor, gradient) in enumerate(zip(inputs, wanted, strict=True)):
        assert (tensor.grad is None) == (index in frozen)
        assert tensor.grad is None or torch.allclose(tensor.grad, gradient, atol=1e-10)


@EVERY
def test_the_value_is_the_same_without_gradients(divergence: Any) -> None:
    inputs, terms = head(), [soft_term(divergence, 5, 2.0)]
    total, sums_L = head_loss(inputs[0], Head(*inputs[1:]), terms)
    with torch.no_grad():
        quiet, quiet_sums_L = head_loss(inputs[0], Head(*inputs[1:]), terms)
    assert torch.equal(total, quiet)
    assert torch.equal(sums_L, quiet_sums_L)


@EVERY
@pytest.mark.parametrize("k", [1, 5, V])
def test_float32_is_within_1e_5_of_float64(divergence: Any, k: int) -> None:
    assert_like_plain(head(300, dtype=torch.float32), [soft_term(divergence, k, 2.0, 300)], 1e-5)


def test_half_precision_states_are_computed_in_float32() -> None:
    inputs, terms = head(dtype=torch.bfloat16), [soft_term(ForwardKL(), 5)]
    with torch.autocast("cpu", torch.bfloat16):
        total, sums_L = head_loss(inputs[0], Head(*inputs[1:]), terms)
    assert total.dtype == sums_L.dtype == torch.float32
    assert torch.equal(total, head_loss(inputs[0].float(), Head(*(x.float() for x in inputs[1:])), terms)[0])


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_probabilities_of_one_give_no_nan(divergence: Any, dtype: Any, spread: float) -> None:
    inputs = head(spread=spread, dtype=dtype)
    one_hot_NK = torch.tensor([[0.0, -torch.inf]]).expand(N, 2)
    targets = rows(torch.stack([torch.arange(N), torch.arange(N) + 1], -1), one_hot_NK, torch.zeros(N))
    total, _ = head_loss(
        inputs[0], Head(*inputs[1:]), [Term(divergence, targets, torch.ones(N, dtype=torch.bool), 1.0, 1.0)]
    )
    total.backward()
    assert total.isfinite()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in inputs)


@EVERY
def test_the_gradient_is_accurate_in_float32_when_the_rest_is_nearly_empty(divergence: Any) -> None:
    hidden_NH, weight_VH = torch.eye(4, H), torch.zeros(V, H)
    weight_VH[:4, :4] = 40 * torch.eye(4)  # each position gives its own token all but 1e-17
    ids_NK = torch.stack([torch.arange(4), torch.arange(4) + 4], -1)
    targets = rows(ids_NK, torch.tensor([[0.7, 0.2]]).log().expand(4, 2), torch.full((4,), 0.1))
    term = Term(divergence, targets, torch.ones(4, dtype=torch.bool), 1.0, 1.0)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        bias_V = torch.zeros(V, dtype=dtype, requires_grad=True)
        head_loss(hidden_NH.to(dtype), Head(weight_VH.to(dtype), bias_V), [term])[0].backward()
        gradients.append(bias_V.grad.double())
    assert torch.allclose(*gradients, atol=1e-4), f"off by {(gradients[0] - gradients[1]).abs().max():.3g}"


@pytest.mark.parametrize("temperature", [2.0, 4.0])
def test_temperature_keeps_the_scale_of_gradients(temperature: float) -> None:
    """For logits near to uniform T^2 undoes what T takes away (Hinton et al. 2015, section 2)."""
    student_NV, teacher_NV = 0.01 * torch.randn(2, N, V, dtype=torch.float64)
    norms = {}
    for t in (1.0, temperature):
        log_t_NV = (teacher_NV / t).log_softmax(-1)
        targets = rows(torch.arange(V).expand(N, V), log_t_NV, torch.zeros(N))
        hidden_NV = student_NV.clone().requires_grad_()
        term = Term(ForwardKL(), targets, torch.ones(N, dtype=torch.bool), t, 1.0)
        total, _ = head_loss(hidden_NV, Head(torch.eye(V, dtype=torch.float64)), [term])
        total.backward()
        direct_NV = student_NV.clone().requires_grad_()
        log_q_NV = (direct_NV / t).log_softmax(-1)
        direct = t**2 * kl_div(log_q_NV, log_t_NV, log_target=True, reduction="sum")
        direct.backward()
        assert torch.allclose(total, direct, atol=1e-12)
        assert torch.allclose(hidden_NV.grad, direct_NV.grad, atol=1e-12)
        norms[t] = hidden_NV.grad.norm()
    assert abs(norms[temperature] / norms[1.0] - 1) < 0.02


def test_a_label_term_equals_torchs_summed_cross_entropy() -> None:
    inputs, labels_N = head(), torch.randint(V, (N,))
    total, sums_L = head_loss(inputs[0], Head(*inputs[1:]), [label_term(labels_N, scale=0.25)])
    expected = cross_entropy(inputs[0] @ inputs[1].T + inputs[2], labels_N, reduction="sum")
    assert torch.allclose(sums_L[0], expected)
    assert torch.allclose(total, expected / 4)


@pytest.mark.parametrize("num", [0, N])
def test_without_targets_all_gradients_are_zero(num: int) -> None:
    inputs = head(num)
    junk = [torch.full((V, H), torch.nan, dtype=torch.float64) for _ in range(9)]  # what new memory may hold
    del junk
    terms = [] if num else [soft_term(ForwardKL(), 5, num=0), label_term(torch.zeros(0, dtype=torch.int64))]
    total, sums_L = head_loss(inputs[0], Head(*inputs[1:]), terms)
    assert total == 0
    assert len(sums_L) == len(terms)
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(total, inputs))


def test_no_positions_give_no_predictions() -> None:
    inputs = head(0)
    assert predicted_ids(inputs[0], Head(*inputs[1:])).tolist() == []


def test_predicted_ids_are_the_largest_logits() -> None:
    inputs = head(300)
    expected_N = (inputs[0] @ inputs[1].T + inputs[2]).argmax(-1)
    assert torch.equal(predicted_ids(inputs[0], Head(*inputs[1:])), expected_N)
