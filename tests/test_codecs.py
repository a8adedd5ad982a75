"""Law 1 and its bytes: what each codec of conf/cache/ keeps, how well, in how much room, and right on average."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import codec, conf_names, divergences, grid, lessons, objectives, read
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distill.annotation.fill import open_source
from distill.cache import Codec, uniforms
from distill.cache.codecs import compact
from distill.cache.codecs.dense import Dense
from distill.cache.codecs.topk import TopK
from distill.errors import CacheError, ConfigError
from distill.evaluation.evaluate import _divergence
from distill.lessons.collate import collate, entries
from distill.lessons.curriculum import check_parts
from distill.losses.forward_kl import ForwardKL
from distill.losses.head import Head, Term, head_loss
from distill.prompts.cues import Prompts
from distill.records import SoftTargets, Target, spread

EVERY = pytest.mark.parametrize("name", conf_names("cache"))
PARTIAL = pytest.mark.parametrize("name", [name for name in conf_names("cache") if name != "dense"])
DRAWING = pytest.mark.parametrize("name", ["rs_kd", "sampled"])
SIZES = (49_152, 151_936, 262_144)


def zipf(kind: str, size: int, rows: int = 60) -> Tensor:
    """Log-probabilities of the shapes that a small chat model has: on what it wrote, or on prose.

    Power laws p ~ rank^-s, s from quantiles of a distribution that gives the measured mean entropy and top
    probability (1.2 nats and 0.68, 2.7 nats and 0.49); the ids are shuffled.
    """
    lowest, spread, power = {"chat": (1.3, 2.0, 1.0), "prose": (1.3, 0.5, 1.5)}[kind]
    quantile_N1 = ((torch.arange(rows) + 0.5) / rows).unsqueeze(-1)
    slope_N1 = lowest + spread * (-(1 - quantile_N1).log()) ** power
    ranked_NV = (-slope_N1 * torch.arange(1, size + 1).log()).log_softmax(-1)
    generator = torch.Generator().manual_seed(0)
    order_NV = torch.stack([torch.randperm(size, generator=generator) for _ in range(rows)])
    return torch.zeros(rows, size).scatter(-1, order_NV, ranked_NV)


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


def same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> bool:
    return {name: (a.dtype, a.shape, a.tobytes()) for name, a in left.items()} == {
        name: (a.dtype, a.shape, a.tobytes()) for name, a in right.items()
    }


def num_bytes(arrays: dict[str, np.ndarray]) -> int:
    return sum(array.nbytes for array in arrays.values())


# Every codec.


@EVERY
def test_a_codec_of_conf_keeps_the_protocol(name: str) -> None:
    assert isinstance(codec(name), Codec)
    assert codec(name).fingerprint()["codec"] == name


@EVERY
@pytest.mark.parametrize("size", [2, 40, 300])
@pytest.mark.parametrize("spread", [0.0, 2.0, 9.0])
def test_what_is_read_back_makes_the_same_bytes_again(name: str, size: int, spread: float) -> None:
    cut = codec(name).cut(random(23, size, spread), draws(23))
    arrays = codec(name).pack(cut)
    soft = codec(name).unpack(arrays)
    assert same(codec(name).pack(soft), arrays)
    assert np.array_equal(soft.ids_E, cut.ids_E)
    assert np.array_equal(soft.num_exact_N, cut.num_exact_N)
    assert np.array_equal(soft.num_N, cut.num_N)
    assert (soft.num_drawn_N is None) == (cut.num_drawn_N is None) == (codec(name).seed is None)
    assert np.abs(whole(soft, size) - whole(cut, size)).max() < (0 if name == "dense" else 0.02) + 1e-6


@PARTIAL
@pytest.mark.parametrize("size", SIZES)
def test_ids_of_every_size_of_vocabulary_come_back(name: str, size: int) -> None:
    likely = torch.tensor([0, 32_767, 32_768, size - 1, min(size - 1, 65_535), min(size - 1, 65_536)]).unique()
    log_p_NV = torch.full((9, size), -40.0)
    log_p_NV[:, likely] = 0.0
    soft = codec(name).cut(log_p_NV.log_softmax(-1), draws(9))
    arrays = codec(name).pack(soft)
    assert set(likely.tolist()) <= set(soft.ids_E.tolist())
    assert np.array_equal(codec(name).unpack(arrays).ids_E, soft.ids_E)
    num_ids = len(soft.ids_E)
    planes = sum(len(array) for axis, array in arrays.items() if axis.endswith("plane.bits"))
    least = {49_152: 0, 151_936: 2, 262_144: 2}[size] * math.ceil(num_ids / 8)
    assert least <= planes <= least + 2  # heads and draws have planes of their own


@EVERY
def test_a_records_bytes_do_not_depend_on_its_batch(name: str) -> None:
    log_p_NV, uniform_N = zipf("chat", 3000, 12), draws(12)
    together = codec(name).cut(log_p_NV, uniform_N)
    for rows in (slice(0, 1), slice(3, 8), slice(11, 12)):
        alone = codec(name).cut(log_p_NV[rows], uniform_N[rows])
        assert same(codec(name).pack(alone), codec(name).pack(together[rows]))
    order = torch.randperm(12)
    shuffled = codec(name).cut(log_p_NV[order], uniform_N[order])
    place = int((order == 5).nonzero())
    assert same(codec(name).pack(shuffled[place : place + 1]), codec(name).pack(together[5:6]))


@EVERY
@pytest.mark.parametrize("size", [90, 150_000])
def test_records_can_be_read_back_together(name: str, size: int) -> None:
    parts = [codec(name).pack(codec(name).cut(zipf("prose", size, rows), draws(rows))) for rows in (4, 1, 3, 9)]
    few = codec(name).cut(zipf("chat", 70, 2), draws(2))  # ids without high bits between others
    if name in ("rs_kd", "sampled"):
        parts.insert(1, codec(name).pack(few))
    together = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    lengths = {key.partition(".")[0]: np.array([len(part[key]) for part in parts]) for key in parts[0]}
    joined = SoftTargets.join([codec(name).unpack(part) for part in parts])
    found = codec(name).unpack(together, lengths)
    for field in ("ids_E", "logprobs_E", "tail_N", "num_exact_N", "num_N"):
        assert np.array_equal(getattr(found, field), getattr(joined, field))
    assert name == "dense" or (joined.ids_E.max() > 65_535) == (size > 65_535)


@DRAWING
@pytest.mark.parametrize("axis", ["head", "draw", "draw_plane", "plane"])
def test_records_whose_lengths_are_anothers_are_refused(name: str, axis: str) -> None:
    parts = [codec(name).pack(codec(name).cut(zipf("prose", 150_000, rows), draws(rows))) for rows in (4, 9)]
    together = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    lengths = {key.partition(".")[0]: np.array([len(part[key]) for part in parts]) for key in parts[0]}
    if axis in lengths:
        with pytest.raises(CacheError, match="does not fit together"):
            codec(name).unpack(together, lengths | {axis: lengths[axis][::-1]})


@EVERY
@pytest.mark.parametrize("how", ["missing", "one more", "another type", "shorter", "longer"])
def test_arrays_that_are_no_record_are_refused(name: str, how: str) -> None:
    arrays = codec(name).pack(codec(name).cut(zipf("prose", 70_000, 11), draws(11)))
    assert codec(name).unpack(arrays)
    for key, array in arrays.items():
        damaged = {
            "missing": {k: a for k, a in arrays.items() if k != key},
            "one more": arrays | {f"{key}_": array},
            "another type": arrays | {key: array.astype(np.int64)},
            "shorter": arrays | {key: array[:-1]},
            "longer": arrays | {key: np.concatenate([array, array[:1]])},
        }[how]
        if len(arrays) > 1 or how not in ("shorter", "longer"):  # a lone array is as long as it is
            with pytest.raises(CacheError, match=r"delete its cache|annotate anew"):
                codec(name).unpack(damaged)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("sampled", "position.num_draws", 65),
        ("sampled", "position.tail", 255),
        ("sampled", "position.num_exact", 0),
        ("rs_kd", "draw.count", 3),
    ],
)
def test_counts_that_cannot_be_are_refused(name: str, key: str, value: int) -> None:
    arrays = codec(name).pack(codec(name).cut(random(5, 70), draws(5)))
    damaged = arrays[key].copy()
    damaged[0] = value
    with pytest.raises(CacheError, match="does not fit together"):
        codec(name).unpack(arrays | {key: damaged})


@EVERY
def test_every_setting_is_in_the_fingerprint(name: str) -> None:
    kept = {"k": 9, "n": 50, "k_min": 3, "seed": 7, "temperature": 3.0}
    found = [codec(name).fingerprint()]
    for key, value in kept.items():
        if hasattr(codec(name), f"_{key}"):
            found.append(codec(name, **{key: value}).fingerprint())
    assert len(found) == {"dense": 1, "topk": 3, "rs_kd": 4, "sampled": 5}[name]
    assert all(one != other for one, other in itertools.combinations(found, 2))
    assert "stored" in found[0]


@PARTIAL
def test_targets_are_those_of_the_temperature_that_they_are_kept_at(name: str) -> None:
    log_p_NV, warm = random(7, 60), codec(name, temperature=2.0)
    expected = codec(name).cut((log_p_NV / 2).log_softmax(-1), draws(7))
    assert same(warm.pack(warm.cut(log_p_NV, draws(7))), codec(name).pack(expected))
    warm.check_temperature(2.0)
    with pytest.raises(ConfigError, match=r"cache\.codec\.temperature=1\.0"):
        warm.check_temperature(1.0)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("topk", {"k": 0}),
        ("sampled", {"n": 0}),
        ("sampled", {"n": 256}),
        ("sampled", {"k_min": -1}),
        ("sampled", {"temperature": 0.0}),
        ("rs_kd", {"n": 0}),
    ],
)
def test_settings_without_meaning_are_refused(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="codec"):
        codec(name, **settings)


# Bytes.


@settings(max_examples=60, deadline=None, database=None)
@given(ids=st.lists(st.integers(0, 2**18 - 1), max_size=40), highest=st.sampled_from([2**16, 2**17, 2**18]))
def test_ids_take_two_bytes_and_a_bit_for_each_higher_power_of_two(ids: list[int], highest: int) -> None:
    given_ids = np.array([i % highest for i in ids], np.int32)
    low, planes = compact.pack_ids(given_ids)
    assert np.array_equal(compact.unpack_ids(low, planes, np.array([len(ids)]), np.array([len(planes)])), given_ids)
    assert low.nbytes == 2 * len(ids)
    assert len(planes) <= math.ceil(len(ids) / 8) * {2**16: 0, 2**17: 1, 2**18: 2}[highest]


@pytest.mark.parametrize("planes", [[1], [129], [0], [255, 255], [128, 0], [128] * 16])
def test_planes_that_no_ids_have_are_refused(planes: list[int]) -> None:
    low, bits = np.zeros(3 if planes != [255, 255] else 0, np.uint16), np.array(planes, np.uint8)
    with pytest.raises(CacheError, match="high bits"):
        compact.unpack_ids(low, bits, np.array([len(low)]), np.array([len(bits)]))


def test_a_probability_is_the_fourth_root_of_its_ratio_and_a_tail_that_of_its_odds() -> None:
    soft = TopK(k=12, temperature=1.0).cut(random(40, 60, 4.0), draws(40))
    codes, odds_N = compact.pack_probabilities(soft)
    expected_codes, expected_odds = [], []
    for logprobs, tail in zip(grid(soft)[1].tolist(), soft.tail_N.tolist(), strict=True):
        p = [math.exp(logprob) for logprob in logprobs]
        expected_codes += [max(1, round(255 * (x / p[0]) ** 0.25)) for x in p[1:]]
        expected_odds.append(round(255 / (1 + (sum(p) / tail) ** 0.25)))
    assert codes.tolist() == expected_codes
    assert odds_N.tolist() == expected_odds
    back = TopK(k=12, temperature=1.0).unpack(TopK(k=12, temperature=1.0).pack(soft))
    for row, (code, odds) in enumerate(zip(np.reshape(expected_codes, (40, 11)), expected_odds, strict=True)):
        ratio = np.array([1.0, *(code / 255) ** 4])
        kept = (255 - odds) ** 4 / ((255 - odds) ** 4 + odds**4)
        assert np.allclose(np.exp(grid(back)[1][row]), kept * ratio / ratio.sum(), rtol=1e-5, atol=0)
        assert math.isclose(back.tail_N[row], 1 - kept, rel_tol=1e-5)


@pytest.mark.parametrize(("kept", "tail", "odds"), [(1.0, 1e-15, 1), (1e-15, 1.0, 254), (1.0, 0.0, 0)])
def test_what_is_not_zero_gets_the_least_code_and_not_that_of_zero(kept: float, tail: float, odds: int) -> None:
    soft = SoftTargets(np.arange(2), np.log([kept, kept * 1e-20]), np.array([tail]), np.array([2]))
    codes, odds_N = compact.pack_probabilities(soft)
    assert (codes.tolist(), odds_N.tolist()) == ([1], [odds])


def test_what_has_no_probability_is_not_kept_to_fill_a_head() -> None:
    log_p_NV = torch.tensor([[0.5, 0.0, 0.5, 0.0]]).log()
    soft = codec("sampled", k_min=4).cut(log_p_NV, draws(1))
    assert (soft.ids_E.tolist(), soft.num_exact_N.tolist()) == ([0, 2], [2])


@pytest.mark.parametrize("name", ["topk", "sampled"])
def test_a_zero_stays_a_zero_and_what_is_none_never_becomes_one(name: str) -> None:
    logits_NV = torch.full((3, 50), -torch.inf)
    logits_NV[0, [4, 30]] = 0.0  # all there is
    logits_NV[1, :] = torch.where(torch.arange(50) == 7, 0.0, -18.0)  # a tail of 1e-6 for topk
    logits_NV[2, 9] = 0.0
    back = codec(name).unpack(codec(name).pack(codec(name).cut(logits_NV.log_softmax(-1), draws(3))))
    assert back.tail_N[[0, 2]].tolist() == [0.0, 0.0]
    assert 0 < back.tail_N[1] < 2e-6
    p_NV = whole(back.buckets(), 50)
    assert np.allclose(p_NV[0, [4, 30]], 0.5)
    assert p_NV[[0, 2]].astype(bool).sum() == 3
    assert p_NV[2, 9] == 1
    assert (p_NV[1] > 0).sum() == (32 if name == "topk" else 1)


@pytest.mark.parametrize(("k", "most_bytes", "most_nats"), [(16, 48, 1.5e-4), (64, 200, 1e-4)])
@pytest.mark.parametrize("kind", ["chat", "prose", "flat"])
def test_rounding_costs_less_than_the_bar(k: int, most_bytes: int, most_nats: float, kind: str) -> None:
    log_p_NV = random(60, 5000, 0.5) if kind == "flat" else zipf(kind, SIZES[0])
    kept = TopK(k=k, temperature=1.0)
    soft = kept.cut(log_p_NV, draws(60))
    arrays = kept.pack(soft)
    back = kept.unpack(arrays)
    p_NB, q_NB = (np.concatenate([np.exp(grid(s)[1]), s.tail_N[:, None]], 1).astype(float) for s in (soft, back))
    divergence_N = np.where(p_NB > 0, p_NB * np.log(np.maximum(p_NB, 1e-30) / np.maximum(q_NB, 1e-30)), 0).sum(1)
    assert num_bytes(arrays) <= most_bytes * 60
    assert divergence_N.mean() < most_nats
    assert divergence_N.mean() < 5.1e-6 * (1 + k**0.5) + 4.1e-5  # what `compact` claims
    assert divergence_N.max() < 3 * (5.1e-6 * (1 + k**0.5) + 4.1e-5)


@pytest.mark.parametrize(("kind", "most", "entropy", "top"), [("chat", 30, 1.22, 0.68), ("prose", 60, 2.69, 0.49)])
def test_a_sampled_position_takes_few_bytes(kind: str, most: int, entropy: float, top: float) -> None:
    log_p_NV = zipf(kind, SIZES[0])
    assert abs(float(-(log_p_NV.exp() * log_p_NV).sum(-1).mean()) - entropy) < 0.1
    assert abs(float(log_p_NV.max(-1).values.exp().mean()) - top) < 0.06
    arrays = codec("sampled").pack(codec("sampled").cut(log_p_NV, draws(60)))
    assert num_bytes(arrays) / 60 <= most


# Draws.


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
def test_a_point_draws_the_token_in_whose_share_of_the_sum_it_lies(size: int) -> None:
    p_NV = random(20, size, 6.0).exp() * (torch.rand(20, size) < 0.7)
    p_NV[:, 0] += 1e-3
    points_NJ = torch.rand(20, 50, dtype=torch.float64)
    found_NJ = compact.Cumulative.of(p_NV).drawn(points_NJ)
    assert p_NV.gather(-1, found_NJ.clamp(max=size - 1))[found_NJ < size].min() > 0
    sums_NV = p_NV.double().numpy().cumsum(1)
    for row, points in enumerate(points_NJ.numpy()):
        wanted = np.searchsorted(sums_NV[row], points, side="right")
        is_clear = (np.abs(sums_NV[row] - points[:, None]) > 1e-6).all(1)  # sums are of float32
        assert np.array_equal(found_NJ[row].numpy()[is_clear], wanted[is_clear])
        assert is_clear.mean() > 0.9 or size > 1000


def on_a_grid(num: int) -> Tensor:
    """All the numbers that a position may get, evenly."""
    return (torch.arange(num, dtype=torch.float64) + 0.5) / num


def sampled_everywhere(log_p_V: Tensor, num: int, **settings: Any) -> tuple[SoftTargets, np.ndarray]:
    """One distribution cut with every number; the targets."""
    soft = codec("sampled", **settings).cut(log_p_V.expand(num, -1), on_a_grid(num))
    return soft, whole(soft, len(log_p_V))


@pytest.mark.parametrize("n", [1, 7, 64, 255])
@pytest.mark.parametrize("k_min", [0, 3, 60])
@pytest.mark.parametrize("spread", [0.3, 2.0])
def test_every_tail_token_is_in_with_probability_p_over_tau_and_every_other_exactly(
    n: int, k_min: int, spread: float
) -> None:
    log_p_V, num = random(1, 50, spread)[0], 2000
    soft, target_NV = sampled_everywhere(log_p_V, num, n=n, k_min=k_min)
    p_V = log_p_V.exp().numpy().astype(float)
    is_head_V = (p_V >= 1 / n) | (p_V.argsort()[::-1].argsort() < k_min)
    assert (soft.num_exact_N == is_head_V.sum()).all()
    assert np.allclose(target_NV[:, is_head_V], p_V[is_head_V], rtol=1e-6)
    assert np.allclose(np.unique(target_NV[:, ~is_head_V] * n).round(5), [0, 1][: 1 + (~is_head_V).any()]) or (
        is_head_V.all()
    )
    # A token is in for numbers in one stretch of p / tau, or in two where it goes over the end.
    assert np.abs((target_NV[:, ~is_head_V] > 0).mean(0) - n * p_V[~is_head_V]).max(initial=0) <= 2 / num
    assert np.allclose(soft.tail_N, p_V[~is_head_V].sum(), atol=1e-6)


@DRAWING
def test_a_token_without_probability_is_never_drawn(name: str) -> None:
    is_possible_V = torch.tensor([0, 0, 1, 0, 1, 1, 1, 0, 1, 1, 0, 0]).bool()
    log_p_NV = torch.where(is_possible_V, 0.0, -torch.inf).log_softmax(-1).expand(9, -1)
    lowest_and_highest = torch.tensor([0.0] * 4 + [1 - 2.0**-53] * 5, dtype=torch.float64)
    soft = codec(name, n=3).cut(log_p_NV, lowest_and_highest)
    assert is_possible_V[torch.from_numpy(soft.ids_E)].all()
    assert len(soft.ids_E) > 9


@pytest.mark.parametrize("n", [7, 64])
def test_the_noise_of_a_sampled_target_is_that_of_the_formula(n: int) -> None:
    log_p_V = random(1, 50)[0]
    _, target_NV = sampled_everywhere(log_p_V, 4000, n=n, k_min=4)
    p_V = log_p_V.exp().numpy().astype(float)
    tail = np.array([p for p in np.sort(p_V)[::-1][4:] if p < 1 / n])
    expected = (tail * (1 / n - tail)).sum()
    assert math.isclose(((target_NV - p_V) ** 2).sum(1).mean(), expected, rel_tol=0.01)
    assert expected <= tail.sum() / n
    assert (np.abs(target_NV.sum(1) - 1) < 1 / n).all()


def test_the_noise_of_random_sampling_is_that_of_the_formula() -> None:
    log_p_V, num = random(1, 50)[0], 4000
    target_NV = whole(codec("rs_kd", n=20).cut(log_p_V.expand(num, -1), draws(num)), 50)
    p_V = log_p_V.exp().numpy().astype(float)
    assert math.isclose(((target_NV - p_V) ** 2).sum(1).mean(), (1 - (p_V**2).sum()) / 20, rel_tol=0.05)
    assert np.allclose(target_NV.sum(1), 1)
    count_NV = np.rint(target_NV * 20)
    covariance = np.cov(count_NV[:, p_V.argsort()[-2:]].T)  # of a multinomial: -n p q
    assert math.isclose(covariance[0, 1], -20 * np.prod(np.sort(p_V)[-2:]), rel_tol=0.15)


@DRAWING
@pytest.mark.parametrize("spread", [0.3, 2.0])
def test_the_expected_target_that_is_read_back_is_the_teachers_distribution(name: str, spread: float) -> None:
    """Each token within 5 standard errors, and for `sampled` within the rounding of the head: 2 % of p, and 2e-4."""
    log_p_V, num = random(1, 40, spread)[0], 6000
    soft = codec(name, n=16).cut(log_p_V.expand(num, -1), draws(num))
    target_NV = whole(codec(name, n=16).unpack(codec(name, n=16).pack(soft)), 40)
    p_V = log_p_V.exp().numpy().astype(float)
    noise_V = target_NV.std(0) / math.sqrt(num)
    rounding_V = 0.02 * p_V + 2e-4 if name == "sampled" else 1e-6
    assert (np.abs(target_NV.mean(0) - p_V) < 5 * noise_V + rounding_V).all()
    assert noise_V.max() > 0
    assert np.abs(target_NV.sum(1) - 1).max() < (1 / 16 + 0.008 if name == "sampled" else 1e-6)


def gradients(soft: SoftTargets, logits_NV: Tensor) -> Tensor:
    """Gradient of the forward KL to each position's own logits."""
    targets = entries(np.ones(len(soft), bool), soft.for_training())
    term = Term(ForwardKL(), targets, torch.ones(len(soft), dtype=torch.bool), 1.0, 1.0)
    logits_NV = logits_NV.clone().requires_grad_()
    head_loss(logits_NV, Head(torch.eye(logits_NV.shape[1], dtype=logits_NV.dtype)), [term])[0].backward()
    assert logits_NV.grad is not None
    return logits_NV.grad


@DRAWING
def test_the_expected_gradient_of_the_forward_kl_is_that_to_the_whole_distribution(name: str) -> None:
    log_p_V, student_V, num = random(1, 40)[0], random(1, 40)[0].double(), 4000
    wanted_V = gradients(Dense().cut(log_p_V.unsqueeze(0), draws(1)), student_V.unsqueeze(0))[0]
    soft = codec(name, n=16).cut(log_p_V.expand(num, -1), on_a_grid(num) if name == "sampled" else draws(num))
    found_NV = gradients(soft, student_V.expand(num, -1))
    bound_V = 2 / num if name == "sampled" else 5 * found_NV.std(0) / math.sqrt(num)
    assert ((found_NV.mean(0) - wanted_V).abs() <= bound_V + 1e-6).all()
    assert (found_NV - wanted_V).abs().max() > 0.01  # a single draw is far from it


def test_a_row_without_a_draw_has_no_rest_bucket_in_training_either() -> None:
    log_p_NV = torch.tensor([[0.97, 0.02, 0.005, 0.005]]).log()
    soft = codec("sampled", n=64, k_min=1).cut(log_p_NV, torch.tensor([0.99], dtype=torch.float64))
    assert (soft.num_exact_N == soft.num_N).all()
    for found in (soft, codec("sampled").unpack(codec("sampled").pack(soft))):
        assert found.for_training().tail_N.tolist() == [0]
        assert math.isclose(found.buckets().tail_N[0], 0.01, rel_tol=0.1)


@pytest.mark.parametrize("name", ["topk", "dense"])
def test_targets_without_draws_keep_their_rest_bucket(name: str) -> None:
    soft = codec(name).cut(random(3, 60), draws(3))
    assert soft.for_training() is soft
    assert soft.buckets() is soft


def test_the_bucket_reading_of_a_sampled_target_is_the_cut_distribution() -> None:
    log_p_NV = random(9, 300)
    soft = codec("sampled").cut(log_p_NV, draws(9))
    reading = soft.buckets()
    assert len(soft.ids_E) > len(reading.ids_E) == reading.num_exact_N.sum()
    for (ids, logprobs), tail, log_p_V in zip(reading.rows(), reading.tail_N, log_p_NV.numpy(), strict=True):
        assert np.allclose(logprobs, log_p_V[ids], atol=1e-6)
        assert math.isclose(np.exp(logprobs).sum() + tail, 1, abs_tol=1e-6)
    assert reading.num_drawn_N is None


# Records.


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


def changed(name: str, place: int, value: float) -> dict[str, np.ndarray]:
    array = getattr(targets(), name).copy()
    array[place] = value
    return {name: array}


@pytest.mark.parametrize(
    ("change", "law"),
    [
        (changed("logprobs_E", 0, math.log(0.7)), "no more than a whole"),
        (changed("tail_N", 0, 0.2), "no more than a whole"),
        (changed("logprobs_E", 1, math.nan), "-inf or a number"),
        (changed("logprobs_E", 2, math.nan), "-inf or a number"),
        (changed("logprobs_E", 2, math.inf), "-inf or a number"),
        (changed("logprobs_E", 2, 0.01), "-inf or a number"),
        (changed("tail_N", 1, -0.01), "a tail is a probability"),
        (changed("tail_N", 1, math.nan), "a tail is a probability"),
        (changed("ids_E", 3, -1), "an entry has an id"),
        (changed("logprobs_E", 3, -np.inf) | {"tail_N": np.array([0.1, 0.0])}, "says something"),
        ({"num_exact_N": np.array([3, 0]), "num_drawn_N": np.array([0, 1])}, "no more than a whole"),
    ],
)
def test_targets_that_are_no_distributions_are_not_written(change: dict[str, np.ndarray], law: str) -> None:
    targets().check()
    with pytest.raises(CacheError, match=f"broken:.*{law}"):
        targets(**change).check()


@EVERY
def test_every_codec_asks_whether_targets_are_distributions(name: str) -> None:
    soft = codec(name).cut(random(4, 60), draws(4))
    with pytest.raises(CacheError, match="are not written"):
        codec(name).pack(replace(soft, logprobs_E=soft.logprobs_E + 1))


def test_entries_that_are_more_than_their_rows_say_are_refused() -> None:
    with pytest.raises(CacheError, match="unlike shapes"):
        targets(num_drawn_N=None)


@pytest.mark.parametrize("name", ["topk", "sampled"])
def test_a_row_whose_first_entry_is_not_the_most_probable_is_not_packed(name: str) -> None:
    soft = codec(name).cut(random(4, 60), draws(4))
    is_first_E = np.diff(spread(soft.num_N)[0], prepend=-1) > 0
    with pytest.raises(CacheError, match="not the most probable"):
        codec(name).pack(replace(soft, logprobs_E=np.where(is_first_E, np.float32(-9), soft.logprobs_E)))


def test_joined_targets_stand_one_after_the_other_and_any_of_them_can_be_taken() -> None:
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


# Readers.


@EVERY
def test_a_batch_holds_the_reading_for_training(name: str, prompts: Prompts) -> None:
    given_lessons = lessons(prompts, 7, codec=codec(name))
    softs = [read([soft.place]) for lesson in given_lessons for s in lesson.sequences for soft in s.soft.values()]
    assert len(np.unique(np.concatenate([soft.num_N for soft in softs]))) > 1 or name in ("topk", "dense")
    batch = collate(given_lessons, {}, 0, read)
    assert batch.soft is not None
    wanted = np.concatenate([whole(soft, prompts.vocabulary_size) for soft in softs])
    found = torch.zeros(len(batch.label_N), prompts.vocabulary_size).double()
    found[batch.soft.position_E.long(), batch.soft.ids_E.long()] = batch.soft.logprobs_E.double().exp()
    assert np.allclose(found[batch.is_soft_N], wanted, rtol=1e-12)
    assert not found[~batch.is_soft_N].any()
    assert (batch.soft.tail_N is None) == (name in ("sampled", "rs_kd"))
    assert name != "topk" or bool((batch.soft.tail_N[batch.is_soft_N] > 0).all())


@EVERY
def test_agreement_is_measured_on_the_exact_entries_and_the_rest(name: str) -> None:
    log_q_NV, log_p_NV = random(5, 300), random(5, 300, 4.0)
    soft = codec(name).cut(log_p_NV, draws(5))
    found = _divergence(log_q_NV, Target((1, 2, 3, 4, 5), soft))
    if name == "rs_kd":  # one bucket, in which all models are alike
        assert found is None
        return
    p_NV, q_NV = log_p_NV.exp().double(), log_q_NV.exp().double()
    total = 0.0
    for n, number in enumerate(soft.num_exact_N):
        is_kept_V = torch.zeros(300, dtype=torch.bool).scatter(0, p_NV[n].argsort(descending=True)[:number], True)
        pairs = [*zip(p_NV[n, is_kept_V], q_NV[n, is_kept_V], strict=True)]
        pairs.append((p_NV[n, ~is_kept_V].sum(), q_NV[n, ~is_kept_V].sum()))
        total += sum(float(p * (p / q).log()) for p, q in pairs if p > 0)
    assert len(set(soft.num_exact_N.tolist())) > 1 or name in ("topk", "dense")
    assert math.isclose(found, total / 5, abs_tol=1e-4)


@EVERY
def test_a_loss_that_needs_a_rest_bucket_is_refused_where_draws_stand_for_it(name: str, configured: Any) -> None:
    source = replace(open_source(configured()), codec=codec(name))
    check_parts(objectives("answer", "kl", "rationale_kl"), source, "direct")
    if codec(name).seed is None:
        check_parts(objectives(), source, "direct")
        return
    with pytest.raises(ConfigError, match=r"loss\.reverse_kl needs .* set cache=topk"):
        check_parts(objectives(), source, "direct")


@pytest.mark.parametrize("divergence", divergences("labels", "soft").values(), ids=lambda d: type(d).__name__)
def test_a_divergence_that_needs_no_rest_bucket_has_a_slope_that_is_linear_in_the_target(divergence: Any) -> None:
    log_q_NB, one_NB, other_NB = (random(4, 9).double() for _ in range(3))
    slopes = [divergence(log_q_NB, log_t_NB)[1] for log_t_NB in (one_NB, other_NB)]
    mixed = divergence(log_q_NB, ((one_NB.exp() + other_NB.exp()) / 2).log())[1]
    assert torch.allclose(mixed, (slopes[0] + slopes[1]) / 2, atol=1e-12) == (not divergence.needs_rest)


def test_more_draws_than_were_made_at_a_position_are_refused() -> None:
    few, many = (codec("sampled", n=n, k_min=0) for n in (4, 5))
    flat_NV = torch.full((3, 70), -math.log(70))
    arrays = many.pack(many.cut(flat_NV, draws(3)))
    assert arrays["position.num_draws"].tolist() == [5, 5, 5]
    assert many.unpack(arrays)
    with pytest.raises(CacheError, match="does not fit together"):
        few.unpack(arrays)


def test_a_row_agrees_the_same_beside_longer_ones() -> None:
    log_q_NV, log_p_NV = random(5, 300), random(5, 300, 4.0)
    log_q_NV[:, 0] += 8
    log_q_NV = log_q_NV.log_softmax(-1)
    log_p_NV[:, 0] = -30
    soft = codec("sampled").cut(log_p_NV.log_softmax(-1), draws(5))
    assert len(set(soft.num_exact_N.tolist())) > 1
    together = _divergence(log_q_NV, Target((1, 2, 3, 4, 5), soft))
    alone = [_divergence(log_q_NV[n : n + 1], Target((1,), soft[n : n + 1])) for n in range(5)]
    assert math.isclose(together, sum(alone) / 5, abs_tol=1e-4)
