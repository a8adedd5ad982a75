"""Law 1, the bucket and the sampled reading of soft targets, and the losses that may use each."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.annotation.annotation_job import open_annotation_job
from distill.cache.codecs.dense import Dense
from distill.errors import CacheError, ConfigError
from distill.evaluation.likelihoods import closeness_of
from distill.lessons.collate import collate, entries
from distill.lessons.curriculum import check_parts
from distill.losses.forward_kl import ForwardKL
from distill.losses.head import Head, Term, head_loss
from distill.prompts.rendering import Prompts
from distill.records import SoftTargets, Target, ragged_indices
from tests.cache.codecs.conftest import (
    ALL_CODECS,
    SAMPLING_CODECS,
    random_logprobs,
    targets,
    training_rows,
    uniform_draws,
    uniform_grid,
)
from tests.conftest import codec, lessons, objectives, read


def gradients(soft: SoftTargets, logits_NV: Tensor) -> Tensor:
    """Gradient of the forward KL with respect to each position's logits."""
    targets = entries(np.ones(len(soft), bool), soft.for_training())
    term = Term(ForwardKL(), targets, torch.ones(len(soft), dtype=torch.bool), 1.0, 1.0)
    logits_NV = logits_NV.clone().requires_grad_()
    head_loss(logits_NV, Head(torch.eye(logits_NV.shape[1], dtype=logits_NV.dtype)), [term])[0].backward()
    assert logits_NV.grad is not None
    return logits_NV.grad


@SAMPLING_CODECS
def test_the_expected_gradient_of_the_forward_kl_is_that_of_the_full_distribution(name: str) -> None:
    log_p_V, student_V, num = random_logprobs(1, 40)[0], random_logprobs(1, 40)[0].double(), 4000
    expected_V = gradients(Dense().cut(log_p_V.unsqueeze(0), uniform_draws(1)), student_V.unsqueeze(0))[0]
    soft = codec(name, n=16).cut(
        log_p_V.expand(num, -1), uniform_grid(num) if name == "sampled" else uniform_draws(num)
    )
    gradient_NV = gradients(soft, student_V.expand(num, -1))
    bound_V = 2 / num if name == "sampled" else 5 * gradient_NV.std(0) / math.sqrt(num)
    assert ((gradient_NV.mean(0) - expected_V).abs() <= bound_V + 1e-6).all()
    assert (gradient_NV - expected_V).abs().max() > 0.01  # single gradients differ


def test_a_row_without_samples_has_no_rest_bucket_in_training() -> None:
    log_p_NV = torch.tensor([[0.97, 0.02, 0.005, 0.005]]).log()
    soft = codec("sampled", n=64, k_min=1).cut(log_p_NV, torch.tensor([0.99], dtype=torch.float64))
    assert (soft.num_exact_N == soft.num_N).all()
    for reading in (soft, codec("sampled").unpack(codec("sampled").pack(soft))):
        assert reading.for_training().tail_N.tolist() == [0]
        assert math.isclose(reading.buckets().tail_N[0], 0.01, rel_tol=0.1)


@pytest.mark.parametrize("name", ["topk", "dense"])
def test_targets_without_samples_keep_their_rest_bucket(name: str) -> None:
    soft = codec(name).cut(random_logprobs(3, 60), uniform_draws(3))
    assert soft.for_training() is soft
    assert soft.buckets() is soft


def test_the_bucket_reading_of_a_sampled_target_is_the_cut_distribution() -> None:
    log_p_NV = random_logprobs(9, 300)
    soft = codec("sampled").cut(log_p_NV, uniform_draws(9))
    reading = soft.buckets()
    assert len(soft.ids_E) > len(reading.ids_E) == reading.num_exact_N.sum()
    for (ids, logprobs), tail, log_p_V in zip(reading.rows(), reading.tail_N, log_p_NV.numpy(), strict=True):
        assert np.allclose(logprobs, log_p_V[ids], atol=1e-6)
        assert math.isclose(np.exp(logprobs).sum() + tail, 1, abs_tol=1e-6)
    assert reading.num_drawn_N is None


def changed(name: str, index: int, value: float) -> dict[str, np.ndarray]:
    array = getattr(targets(), name).copy()
    array[index] = value
    return {name: array}


@pytest.mark.parametrize(
    ("change", "condition"),
    [
        (changed("logprobs_E", 0, math.log(0.7)), "mass above 0"),
        (changed("tail_N", 0, 0.2), "mass above 0"),
        (changed("logprobs_E", 1, math.nan), "at most 0"),
        (changed("logprobs_E", 2, math.nan), "at most 0"),
        (changed("logprobs_E", 2, math.inf), "at most 0"),
        (changed("logprobs_E", 2, 0.01), "at most 0"),
        (changed("tail_N", 1, -0.01), "tails are probabilities"),
        (changed("tail_N", 1, math.nan), "tails are probabilities"),
        (changed("ids_E", 3, -1), "ids are not negative"),
        (changed("logprobs_E", 3, -np.inf) | {"tail_N": np.array([0.1, 0.0])}, "mass above 0"),
        ({"num_exact_N": np.array([3, 0]), "num_drawn_N": np.array([0, 1])}, "mass above 0"),
    ],
)
def test_invalid_distributions_are_refused(change: dict[str, np.ndarray], condition: str) -> None:
    targets().check()
    with pytest.raises(CacheError, match=f"violated:.*{condition}"):
        targets(**change).check()


@ALL_CODECS
def test_every_codec_refuses_invalid_distributions(name: str) -> None:
    soft = codec(name).cut(random_logprobs(4, 60), uniform_draws(4))
    with pytest.raises(CacheError, match="not written"):
        codec(name).pack(replace(soft, logprobs_E=soft.logprobs_E + 1))


def test_more_entries_than_the_rows_have_are_refused() -> None:
    with pytest.raises(CacheError, match="inconsistent shapes"):
        targets(num_drawn_N=None)


@pytest.mark.parametrize("name", ["topk", "sampled"])
def test_a_row_must_begin_with_its_most_probable_entry(name: str) -> None:
    soft = codec(name).cut(random_logprobs(4, 60), uniform_draws(4))
    is_first_E = np.diff(ragged_indices(soft.num_N)[0], prepend=-1) > 0
    with pytest.raises(CacheError, match="not the most probable"):
        codec(name).pack(replace(soft, logprobs_E=np.where(is_first_E, np.float32(-9), soft.logprobs_E)))


def test_targets_can_be_concatenated_and_selected_by_row() -> None:
    joined = SoftTargets.join([targets()[1:], targets(), targets()[:1]])
    assert joined.ids_E.tolist() == [2, 3, 1, 7, 2, 3, 1, 7]
    assert np.array_equal(joined.logprobs_E[1:5], targets().logprobs_E)
    assert (joined.num_exact_N.tolist(), joined.num_drawn_N.tolist()) == ([1, 2, 1, 2], [0, 1, 0, 1])
    assert joined.is_exact_E.tolist() == [True, True, True, False, True, True, True, False]
    joined.check()
    for part, ids in ((joined[1:3], [3, 1, 7, 2]), (joined[np.array([3, 0])], [3, 1, 7, 2]), (joined[4:], [])):
        assert part.ids_E.tolist() == ids
        assert part.num_N.tolist() == [3, 1][: len(part)]
    assert joined[1:3].buckets().ids_E.tolist() == [3, 1, 2]
    with pytest.raises(CacheError, match="two codecs"):
        SoftTargets.join([targets(), targets().buckets()])


@ALL_CODECS
def test_a_batch_holds_the_reading_for_training(name: str, prompts: Prompts) -> None:
    all_lessons = lessons(prompts, 7, codec=codec(name))
    targets = [target for lesson in all_lessons for sequence in lesson.sequences for target in sequence.targets]
    softs = [read([target.soft.place]) for target in targets]
    assert len(np.unique(np.concatenate([soft.num_N for soft in softs]))) > 1 or name in ("topk", "dense")
    batch = collate(all_lessons, {}, 0, read)
    assert batch.soft is not None
    expected = np.concatenate([training_rows(soft, prompts.vocabulary_size) for soft in softs])
    rows_NV = torch.zeros(len(batch.label_N), prompts.vocabulary_size).double()
    rows_NV[batch.soft.position_E.long(), batch.soft.ids_E.long()] = batch.soft.logprobs_E.double().exp()
    assert np.allclose(rows_NV[batch.is_soft_N], expected, rtol=1e-12)
    assert not rows_NV[~batch.is_soft_N].any()
    assert (batch.soft.tail_N is None) == (name in ("sampled", "rs_kd"))
    assert name != "topk" or bool((batch.soft.tail_N[batch.is_soft_N] > 0).all())


@ALL_CODECS
def test_agreement_is_measured_on_exact_entries_and_one_rest_bucket(name: str) -> None:
    log_q_NV, log_p_NV = random_logprobs(5, 300), random_logprobs(5, 300, 4.0)
    soft = codec(name).cut(log_p_NV, uniform_draws(5))
    closeness = closeness_of(log_q_NV, Target((1, 2, 3, 4, 5), soft))
    if name == "rs_kd":  # a single bucket of probability 1 for every model
        assert closeness is None
        return
    assert closeness is not None
    p_NV, q_NV = log_p_NV.exp().double(), log_q_NV.exp().double()
    total = 0.0
    for n, number in enumerate(soft.num_exact_N):
        is_kept_V = torch.zeros(300, dtype=torch.bool).scatter(0, p_NV[n].argsort(descending=True)[:number], True)
        pairs = [*zip(p_NV[n, is_kept_V], q_NV[n, is_kept_V], strict=True)]
        pairs.append((p_NV[n, ~is_kept_V].sum(), q_NV[n, ~is_kept_V].sum()))
        total += sum(float(p * (p / q).log()) for p, q in pairs if p > 0)
    assert len(set(soft.num_exact_N.tolist())) > 1 or name in ("topk", "dense")
    assert math.isclose(closeness.kl, total / 5, abs_tol=1e-4)


@ALL_CODECS
def test_a_loss_that_needs_a_rest_bucket_refuses_sampled_tails(name: str, configured: Any) -> None:
    job = replace(open_annotation_job(configured()), codec=codec(name))
    check_parts(objectives("answer", "kl", "rationale_kl"), job, job.codec, "direct")
    if codec(name).seed is None:
        check_parts(objectives(), job, job.codec, "direct")
        return
    with pytest.raises(ConfigError, match=r"loss\.reverse_kl needs .* set cache=topk"):
        check_parts(objectives(), job, job.codec, "direct")


def test_more_samples_than_n_per_position_are_refused() -> None:
    few, many = (codec("sampled", n=n, k_min=0) for n in (4, 5))
    flat_NV = torch.full((3, 70), -math.log(70))
    arrays = many.pack(many.cut(flat_NV, uniform_draws(3)))
    assert arrays["position.num_draws"].tolist() == [5, 5, 5]
    assert many.unpack(arrays)
    with pytest.raises(CacheError, match="are inconsistent"):
        few.unpack(arrays)


def test_agreement_of_a_row_does_not_depend_on_longer_rows() -> None:
    log_q_NV, log_p_NV = random_logprobs(5, 300), random_logprobs(5, 300, 4.0)
    log_q_NV[:, 0] += 8
    log_q_NV = log_q_NV.log_softmax(-1)
    log_p_NV[:, 0] = -30
    soft = codec("sampled").cut(log_p_NV.log_softmax(-1), uniform_draws(5))
    assert len(set(soft.num_exact_N.tolist())) > 1
    together = closeness_of(log_q_NV, Target((1, 2, 3, 4, 5), soft))
    alone = [closeness_of(log_q_NV[n : n + 1], Target((1,), soft[n : n + 1])) for n in range(5)]
    assert together == pytest.approx(np.mean(alone, axis=0), abs=1e-4)
