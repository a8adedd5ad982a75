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
EVERY_DIVERGENCE = pytest.mark.parametrize(
    "divergence", divergences("labels", "soft").values(), ids=lambda d: type(d).__name__
)


def head_inputs(num: int = N, *, spread: float = 1.0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Hidden states, weight and bias."""
    shapes = ((num, H), (V, H), (V,))
    return [(spread * torch.randn(*shape, dtype=torch.float64)).to(dtype).requires_grad_() for shape in shapes]


def soft_term(
    divergence: Any, k: int, temperature: float = 1.0, num: int = N, scale: float = 0.7, shift: int = 0
) -> Term:
    """A term on every second position, with targets from a random teacher."""
    is_used_N = torch.arange(num) % 2 == shift
    log_t_NV = (2 * torch.randn(num, V, dtype=torch.float64)).log_softmax(-1)
    top_NK, ids_NK = log_t_NV.topk(k, -1)
    tail_N = (1 - top_NK.exp().sum(-1)).clamp(min=0) if k < V else torch.zeros(num).double()
    return Term(divergence, make_entries(ids_NK, top_NK, tail_N), is_used_N, temperature, scale)


def make_entries(ids_NK: Tensor, log_t_NK: Tensor, tail_N: Tensor | None) -> Entries:
    """Entries of K ids at each position."""
    num, k = ids_NK.shape
    position_E = torch.arange(num).repeat_interleave(k)
    return Entries(k * np.arange(1, num + 1), position_E, ids_NK.flatten(), log_t_NK.flatten(), tail_N)


def keep_positions(targets: Entries, is_kept_N: Tensor) -> Entries:
    """The same targets, without entries at other positions."""
    is_kept_E = is_kept_N[targets.position_E]
    ends_N = np.cumsum(np.bincount(targets.position_E[is_kept_E], minlength=len(is_kept_N)))
    kept_fields = (x[is_kept_E] for x in (targets.position_E, targets.ids_E, targets.logprobs_E))
    return Entries(ends_N, *kept_fields, None if targets.tail_N is None else targets.tail_N * is_kept_N)


def label_term(labels_N: Tensor, scale: float = 1.3, is_used_N: Tensor | None = None) -> Term:
    certain_N1 = torch.zeros(len(labels_N), 1).double()
    all_N = torch.ones(len(labels_N), dtype=torch.bool)
    targets = make_entries(labels_N.unsqueeze(-1), certain_N1, None)
    return Term(CrossEntropy(), targets, all_N if is_used_N is None else is_used_N, 1.0, scale)


def plain_loss(inputs: list[Tensor], terms: list[Term], shape: Shape = LINEAR) -> Tensor:
    """The same total by the plain formula: full softmax, buckets, and autograd."""
    hidden_NH, weight_VH, bias_V = (x.double() for x in inputs)
    total = torch.zeros((), dtype=torch.float64)
    for term in terms:
        log_p_NV = (shape(hidden_NH @ weight_VH.T + bias_V) / term.temperature).log_softmax(-1)
        for position in term.is_used_N.nonzero().ravel().tolist():
            is_at_position_E = term.targets.position_E == position
            ids, log_q_V = term.targets.ids_E[is_at_position_E].long(), log_p_NV[position]
            log_q_B, log_t_B = log_q_V[ids], term.targets.logprobs_E[is_at_position_E]
            if term.targets.tail_N is not None:
                is_tail_V = torch.ones(V, dtype=torch.bool).scatter(0, ids, False)
                tail_logprob = (log_q_V.exp() * is_tail_V).sum().clamp(min=1e-9).log()
                log_q_B = torch.cat([log_q_B, tail_logprob.unsqueeze(0)])
                log_t_B = torch.cat([log_t_B, term.targets.tail_N[position].log().unsqueeze(0)])
            total = total + term.scale * term.temperature**2 * term.formula(log_q_B, log_t_B)[0].sum()
    return total


def assert_equals_plain_loss(inputs: list[Tensor], terms: list[Term], tolerance: float, shape: Shape = LINEAR) -> None:
    expected = plain_loss(inputs, terms, shape)
    expected_gradients = torch.autograd.grad(expected, inputs)
    total, sums_L = head_loss(inputs[0], Head(*inputs[1:], shape), terms)
    gradients = torch.autograd.grad(total, inputs)
    assert abs(total - expected) <= tolerance * max(1, abs(expected))
    assert len(sums_L) == len(terms)
    for name, gradient, expected_gradient in zip(
        ("hidden", "weight", "bias"), gradients, expected_gradients, strict=True
    ):
        difference = (gradient.double() - expected_gradient.double()).abs().max()
        assert difference <= tolerance * max(1, expected_gradient.abs().max()), (
            f"gradient to {name} differs by {difference:.3g}"
        )


@EVERY_DIVERGENCE
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [1, 5, V])
def test_one_loss_in_the_head_equals_the_plain_formula(divergence: Any, k: int, temperature: float) -> None:
    assert_equals_plain_loss(head_inputs(), [soft_term(divergence, k, temperature)], 1e-10)


@EVERY_DIVERGENCE
@pytest.mark.parametrize("shape", [Shape(softcap=2.0), Shape(scale=0.3), Shape(scale=3.0, softcap=1.5)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_capped_and_scaled_logits_equal_the_plain_formula(divergence: Any, shape: Shape, temperature: float) -> None:
    terms = [soft_term(divergence, 5, temperature), label_term(torch.arange(N) % V)]
    assert_equals_plain_loss(head_inputs(spread=2.0), terms, 1e-10, shape)


def tiny_model(kind: str) -> Any:
    """A random model with padding rows in its head and, if its kind has them, capped or scaled logits."""
    settings = {"vocab_size": V + 4, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings |= {"intermediate_size": 16, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
    settings_by_kind: dict[str, dict[str, Any]] = {
        "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2},
        "gemma2": {"final_logit_softcapping": 0.4},
        "cohere": {"logit_scale": 0.0625},
        "granite": {"logits_scaling": 8.0},
        "phi": {"tie_word_embeddings": False},  # its head has a bias
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(settings | settings_by_kind.get(kind, {})))
    model = AutoModelForCausalLM.from_config(config).double().eval()  # without dropout
    for parameter in model.parameters():  # no parameter stays at its initial 0 or 1
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "cohere", "granite", "phi", "qwen3"])
def test_the_loss_of_a_real_model_has_the_gradients_of_its_own_logits(kind: str) -> None:
    model, ids_BT = tiny_model(kind), torch.randint(1, V, (2, 7))
    logits = model(ids_BT).logits
    logits_NV, label_N = logits[:, :-1, :V].flatten(0, 1), ids_BT[:, 1:].flatten()
    cross_entropy(logits_NV, label_N, reduction="sum").backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    hidden_NH = model.base_model(ids_BT).last_hidden_state[:, :-1].flatten(0, 1)
    head_loss(hidden_NH, Head.of(model, V), [label_term(label_N, scale=1.0)])[0].backward()
    assert len(expected) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, expected[name], atol=1e-9), name
    assert Shape.of(model) != Shape() or kind not in ("gemma2", "cohere", "granite")


def test_many_losses_on_the_same_positions_equal_the_plain_formula() -> None:
    terms = [soft_term(d, k, t) for d in divergences("soft").values() for k in (1, 5) for t in (1.0, 2.0)]
    label_among_kept = label_term(terms[0].targets.ids_E, is_used_N=terms[0].is_used_N)
    at_all_positions = label_term(torch.arange(N) % V)
    assert_equals_plain_loss(head_inputs(), [*terms, label_among_kept, at_all_positions], 1e-10)


@pytest.mark.parametrize("num", [31, 32, 33, 65])
def test_positions_on_both_sides_of_a_chunk_border_equal_the_plain_formula(
    num: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill.losses.head._CPU_CHUNK_BYTES", 32 * V * 8)
    monkeypatch.setattr("distill.losses.head._MIN_ROWS", 1)
    ragged = soft_term(ForwardKL(), 5, 2.0, num)
    ragged = replace(ragged, targets=keep_positions(ragged.targets, torch.arange(num) % 3 < 2))
    terms = [soft_term(ForwardKL(), 5, 2.0, num), ragged, label_term(torch.arange(num) % V)]
    assert_equals_plain_loss(head_inputs(num), terms, 1e-10)


@EVERY_DIVERGENCE
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_unused_positions_without_targets_contribute_nothing(divergence: Any, temperature: float) -> None:
    inputs, with_all_targets = head_inputs(), soft_term(divergence, 5, temperature)
    with_used_targets = replace(
        with_all_targets, targets=keep_positions(with_all_targets.targets, with_all_targets.is_used_N)
    )
    assert_equals_plain_loss(inputs, [with_used_targets], 1e-10)
    losses = [head_loss(inputs[0], Head(*inputs[1:]), [term]) for term in (with_all_targets, with_used_targets)]
    assert torch.allclose(losses[0][1], losses[1][1], atol=1e-12)
    for left, right in zip(*(torch.autograd.grad(total, inputs) for total, _ in losses), strict=True):
        assert torch.allclose(left, right, atol=1e-12)


@EVERY_DIVERGENCE
def test_positions_with_different_numbers_of_entries_equal_their_own_terms(divergence: Any) -> None:
    inputs, parts = head_inputs(), [soft_term(divergence, k, shift=shift) for shift, k in enumerate((2, 6))]
    parts = [replace(part, targets=keep_positions(part.targets, part.is_used_N)) for part in parts]
    position_E, order = torch.cat([part.targets.position_E for part in parts]).sort(stable=True)
    ids_E, log_t_E = (torch.cat([getattr(p.targets, name) for p in parts])[order] for name in ("ids_E", "logprobs_E"))
    ends_N = sum(part.targets.ends_N for part in parts)
    tail_N = sum(part.targets.tail_N for part in parts)
    joined = Entries(ends_N, position_E, ids_E, log_t_E, tail_N)
    ragged = Term(divergence, joined, torch.ones(N, dtype=torch.bool), 1.0, parts[0].scale)
    assert len(set(np.diff(ends_N))) == 2
    assert_equals_plain_loss(inputs, [ragged], 1e-10)
    expected = torch.autograd.grad(plain_loss(inputs, parts), inputs)
    gradients = torch.autograd.grad(head_loss(inputs[0], Head(*inputs[1:]), [ragged])[0], inputs)
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(gradients, expected, strict=True))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_sampled_targets_have_no_rest_bucket(temperature: float) -> None:
    """Sampled targets sum to 1 only on average, so that the gradient is sum(t) q - t."""
    inputs, term = head_inputs(), soft_term(ForwardKL(), 5, temperature)
    sampled = replace(term, targets=replace(term.targets, tail_N=None))
    assert_equals_plain_loss(inputs, [sampled, label_term(torch.arange(N))], 1e-10)


def test_autograd_agrees_with_finite_differences() -> None:
    terms = [soft_term(d, 3, 2.0, 3) for d in divergences("soft").values()]
    terms.append(label_term(torch.arange(3)))
    for shape in (Shape(), Shape(0.5, 2.0)):
        inputs = head_inputs(3)
        total, _ = head_loss(inputs[0], Head(*inputs[1:], shape), terms)
        gradients = torch.autograd.grad(total, inputs, retain_graph=True)
        for index, gradient in enumerate(gradients):
            step = 1e-6 * torch.randn_like(gradient)
            totals = []
            for sign in (1, -1):
                moved = [x + sign * step if index == other else x for other, x in enumerate(inputs)]
                totals.append(head_loss(moved[0], Head(*moved[1:], shape), terms)[0])
            assert torch.allclose((totals[0] - totals[1]) / 2, (gradient * step).sum(), rtol=1e-5)
        with pytest.raises(RuntimeError, match="already differentiated"):
            torch.autograd.grad(total, inputs)


@pytest.mark.parametrize("frozen", [(), (0,), (1,), (2,), (1, 2)])
def test_a_frozen_head_does_not_change_other_gradients(frozen: tuple[int, ...]) -> None:
    inputs, terms = head_inputs(), [soft_term(ForwardKL(), 5)]
    expected = torch.autograd.grad(plain_loss(inputs, terms), inputs)
    for index in frozen:
        inputs[index].requires_grad_(False)
    head_loss(inputs[0], Head(*inputs[1:]), terms)[0].backward()
    for index, (tensor, gradient) in enumerate(zip(inputs, expected, strict=True)):
        assert (tensor.grad is None) == (index in frozen)
        assert tensor.grad is None or torch.allclose(tensor.grad, gradient, atol=1e-10)


@pytest.mark.parametrize("factor", [0.0, 0.5, -3.0])
def test_gradients_of_a_multiple_of_the_loss_are_that_multiple(factor: float) -> None:
    inputs, terms = head_inputs(), [soft_term(ForwardKL(), 5), label_term(torch.arange(N))]
    expected = torch.autograd.grad(factor * plain_loss(inputs, terms), inputs)
    gradients = torch.autograd.grad(factor * head_loss(inputs[0], Head(*inputs[1:]), terms)[0], inputs)
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(gradients, expected, strict=True))


@EVERY_DIVERGENCE
def test_the_value_is_the_same_without_gradients(divergence: Any) -> None:
    inputs, terms = head_inputs(), [soft_term(divergence, 5, 2.0)]
    total, sums_L = head_loss(inputs[0], Head(*inputs[1:]), terms)
    with torch.no_grad():
        total_without_grad, sums_without_grad_L = head_loss(inputs[0], Head(*inputs[1:]), terms)
    assert torch.equal(total, total_without_grad)
    assert torch.equal(sums_L, sums_without_grad_L)


@EVERY_DIVERGENCE
@pytest.mark.parametrize("k", [1, 5, V])
def test_float32_is_within_1e_5_of_float64(divergence: Any, k: int) -> None:
    assert_equals_plain_loss(head_inputs(300, dtype=torch.float32), [soft_term(divergence, k, 2.0, 300)], 1e-5)


def test_half_precision_states_are_computed_in_float32() -> None:
    inputs, terms = head_inputs(dtype=torch.bfloat16), [soft_term(ForwardKL(), 5)]
    with torch.autocast("cpu", torch.bfloat16):
        total, sums_L = head_loss(inputs[0], Head(*inputs[1:]), terms)
    assert total.dtype == sums_L.dtype == torch.float32
    assert torch.equal(total, head_loss(inputs[0].float(), Head(*(x.float() for x in inputs[1:])), terms)[0])


@EVERY_DIVERGENCE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_probabilities_of_one_give_no_nan(divergence: Any, dtype: Any, spread: float) -> None:
    inputs = head_inputs(spread=spread, dtype=dtype)
    one_hot_NK = torch.tensor([[0.0, -torch.inf]]).expand(N, 2)
    targets = make_entries(torch.stack([torch.arange(N), torch.arange(N) + 1], -1), one_hot_NK, torch.zeros(N))
    total, _ = head_loss(
        inputs[0], Head(*inputs[1:]), [Term(divergence, targets, torch.ones(N, dtype=torch.bool), 1.0, 1.0)]
    )
    total.backward()
    assert total.isfinite()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in inputs)


@EVERY_DIVERGENCE
def test_the_gradient_is_accurate_in_float32_when_the_rest_is_nearly_empty(divergence: Any) -> None:
    hidden_NH, weight_VH = torch.eye(4, H), torch.zeros(V, H)
    weight_VH[:4, :4] = 40 * torch.eye(4)  # each position gives its own token all mass but 1e-17
    ids_NK = torch.stack([torch.arange(4), torch.arange(4) + 4], -1)
    targets = make_entries(ids_NK, torch.tensor([[0.7, 0.2]]).log().expand(4, 2), torch.full((4,), 0.1))
    term = Term(divergence, targets, torch.ones(4, dtype=torch.bool), 1.0, 1.0)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        bias_V = torch.zeros(V, dtype=dtype, requires_grad=True)
        head_loss(hidden_NH.to(dtype), Head(weight_VH.to(dtype), bias_V), [term])[0].backward()
        gradients.append(bias_V.grad.double())
    assert torch.allclose(*gradients, atol=1e-4), f"differs by {(gradients[0] - gradients[1]).abs().max():.3g}"


@pytest.mark.parametrize("temperature", [2.0, 4.0])
def test_temperature_keeps_the_scale_of_gradients(temperature: float) -> None:
    """For nearly uniform logits T^2 compensates the scale that T removes (Hinton et al. 2015, section 2)."""
    student_NV, teacher_NV = 0.01 * torch.randn(2, N, V, dtype=torch.float64)
    norms = {}
    for t in (1.0, temperature):
        log_t_NV = (teacher_NV / t).log_softmax(-1)
        targets = make_entries(torch.arange(V).expand(N, V), log_t_NV, torch.zeros(N))
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
    inputs, labels_N = head_inputs(), torch.randint(V, (N,))
    total, sums_L = head_loss(inputs[0], Head(*inputs[1:]), [label_term(labels_N, scale=0.25)])
    expected = cross_entropy(inputs[0] @ inputs[1].T + inputs[2], labels_N, reduction="sum")
    assert torch.allclose(sums_L[0], expected)
    assert torch.allclose(total, expected / 4)


@pytest.mark.parametrize("num", [0, N])
def test_without_targets_all_gradients_are_zero(num: int) -> None:
    inputs = head_inputs(num)
    nan_blocks = [
        torch.full((V, H), torch.nan, dtype=torch.float64) for _ in range(9)
    ]  # uninitialized memory may reuse these
    del nan_blocks
    terms = [] if num else [soft_term(ForwardKL(), 5, num=0), label_term(torch.zeros(0, dtype=torch.int64))]
    total, sums_L = head_loss(inputs[0], Head(*inputs[1:]), terms)
    assert total == 0
    assert len(sums_L) == len(terms)
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(total, inputs))


def test_no_positions_give_no_predictions() -> None:
    inputs = head_inputs(0)
    assert predicted_ids(inputs[0], Head(*inputs[1:])).tolist() == []


def test_predicted_ids_are_the_largest_logits() -> None:
    inputs = head_inputs(300)
    expected_N = (inputs[0] @ inputs[1].T + inputs[2]).argmax(-1)
    assert torch.equal(predicted_ids(inputs[0], Head(*inputs[1:])), expected_N)
