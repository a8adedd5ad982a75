"""Law 1 and its bytes: what each codec of conf/cache/ keeps, how well, in how much room, and right on average."""

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

from distill.cache import Codec
from distill.cache.codecs import compact
from distill.cache.codecs.topk import TopK
from distill.errors import CacheError, ConfigError
from distill.records import SoftTargets
from tests.cache.codecs.conftest import DRAWING, EVERY, draws, random, whole
from tests.conftest import codec, conf_names, grid

PARTIAL = pytest.mark.parametrize("name", [name for name in conf_names("cache") if name != "dense"])


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


def same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> bool:
    return {name: (a.dtype, a.shape, a.tobytes()) for name, a in left.items()} == {
        name: (a.dtype, a.shape, a.tobytes()) for name, a in right.items()
    }


def num_bytes(arrays: dict[str, np.ndarray]) -> int:
    return sum(array.nbytes for array in arrays.values())


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
        with pytest.raises(CacheError, match="are inconsistent"):
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
            with pytest.raises(CacheError, match=r"annotate again"):
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
    with pytest.raises(CacheError, match="are inconsistent"):
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
