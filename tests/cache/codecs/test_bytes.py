"""Law 1, the bytes of each codec of conf/cache/: round trips, sizes, rounding errors and refusals."""

from __future__ import annotations

import itertools
import math

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
from tests.cache.codecs.conftest import ALL_CODECS, SAMPLING_CODECS, random_logprobs, training_rows, uniform_draws
from tests.conftest import codec, conf_names, grid

TRUNCATING_CODECS = pytest.mark.parametrize("name", [name for name in conf_names("cache") if name != "dense"])


SIZES = (49_152, 151_936, 262_144)


def zipf(kind: str, size: int, rows: int = 60) -> Tensor:
    """Log-probabilities shaped like those of a small chat model on its own text or on prose.

    Power laws p ~ rank^-s with shuffled ids. The quantiles of s reproduce the measured mean entropy and top
    probability: 1.2 nats and 0.68, 2.7 nats and 0.49.
    """
    lowest, scale, power = {"chat": (1.3, 2.0, 1.0), "prose": (1.3, 0.5, 1.5)}[kind]
    quantile_N1 = ((torch.arange(rows) + 0.5) / rows).unsqueeze(-1)
    slope_N1 = lowest + scale * (-(1 - quantile_N1).log()) ** power
    ranked_NV = (-slope_N1 * torch.arange(1, size + 1).log()).log_softmax(-1)
    generator = torch.Generator().manual_seed(0)
    order_NV = torch.stack([torch.randperm(size, generator=generator) for _ in range(rows)])
    return torch.zeros(rows, size).scatter(-1, order_NV, ranked_NV)


def equal_arrays(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> bool:
    return {name: (a.dtype, a.shape, a.tobytes()) for name, a in left.items()} == {
        name: (a.dtype, a.shape, a.tobytes()) for name, a in right.items()
    }


def num_bytes(arrays: dict[str, np.ndarray]) -> int:
    return sum(array.nbytes for array in arrays.values())


@ALL_CODECS
def test_every_codec_of_conf_implements_the_protocol(name: str) -> None:
    assert isinstance(codec(name), Codec)
    assert codec(name).fingerprint()["part"] == type(codec(name)).__name__


@ALL_CODECS
@pytest.mark.parametrize("size", [2, 40, 300])
@pytest.mark.parametrize("spread", [0.0, 2.0, 9.0])
def test_decoded_targets_encode_to_the_same_bytes(name: str, size: int, spread: float) -> None:
    cut = codec(name).cut(random_logprobs(23, size, spread), uniform_draws(23))
    arrays = codec(name).pack(cut)
    soft = codec(name).unpack(arrays)
    assert equal_arrays(codec(name).pack(soft), arrays)
    assert np.array_equal(soft.ids_E, cut.ids_E)
    assert np.array_equal(soft.num_exact_N, cut.num_exact_N)
    assert np.array_equal(soft.num_N, cut.num_N)
    assert (soft.num_drawn_N is None) == (cut.num_drawn_N is None) == (codec(name).seed is None)
    assert np.abs(training_rows(soft, size) - training_rows(cut, size)).max() < (0 if name == "dense" else 0.02) + 1e-6


@TRUNCATING_CODECS
@pytest.mark.parametrize("size", SIZES)
def test_ids_of_all_vocabulary_sizes_survive(name: str, size: int) -> None:
    likely = torch.tensor([0, 32_767, 32_768, size - 1, min(size - 1, 65_535), min(size - 1, 65_536)]).unique()
    log_p_NV = torch.full((9, size), -40.0)
    log_p_NV[:, likely] = 0.0
    soft = codec(name).cut(log_p_NV.log_softmax(-1), uniform_draws(9))
    arrays = codec(name).pack(soft)
    assert set(likely.tolist()) <= set(soft.ids_E.tolist())
    assert np.array_equal(codec(name).unpack(arrays).ids_E, soft.ids_E)
    num_ids = len(soft.ids_E)
    planes = sum(len(array) for axis, array in arrays.items() if axis.endswith("plane.bits"))
    least = {49_152: 0, 151_936: 2, 262_144: 2}[size] * math.ceil(num_ids / 8)
    assert least <= planes <= least + 2  # heads and samples have separate planes


@ALL_CODECS
def test_a_records_bytes_do_not_depend_on_its_batch(name: str) -> None:
    log_p_NV, uniform_N = zipf("chat", 3000, 12), uniform_draws(12)
    together = codec(name).cut(log_p_NV, uniform_N)
    for rows in (slice(0, 1), slice(3, 8), slice(11, 12)):
        alone = codec(name).cut(log_p_NV[rows], uniform_N[rows])
        assert equal_arrays(codec(name).pack(alone), codec(name).pack(together[rows]))
    order = torch.randperm(12)
    shuffled = codec(name).cut(log_p_NV[order], uniform_N[order])
    index = int((order == 5).nonzero())
    assert equal_arrays(codec(name).pack(shuffled[index : index + 1]), codec(name).pack(together[5:6]))


@ALL_CODECS
@pytest.mark.parametrize("size", [90, 150_000])
def test_concatenated_records_decode_like_single_ones(name: str, size: int) -> None:
    parts = [codec(name).pack(codec(name).cut(zipf("prose", size, rows), uniform_draws(rows))) for rows in (4, 1, 3, 9)]
    small = codec(name).cut(zipf("chat", 70, 2), uniform_draws(2))  # a record without high bits between others
    if name in ("rs_kd", "sampled"):
        parts.insert(1, codec(name).pack(small))
    together = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    lengths = {key.partition(".")[0]: np.array([len(part[key]) for part in parts]) for key in parts[0]}
    joined = SoftTargets.join([codec(name).unpack(part) for part in parts])
    decoded = codec(name).unpack(together, lengths)
    for field in ("ids_E", "logprobs_E", "tail_N", "num_exact_N", "num_N"):
        assert np.array_equal(getattr(decoded, field), getattr(joined, field))
    assert name == "dense" or (joined.ids_E.max() > 65_535) == (size > 65_535)


@SAMPLING_CODECS
@pytest.mark.parametrize("axis", ["head", "draw", "draw_plane", "plane"])
def test_swapped_lengths_are_refused(name: str, axis: str) -> None:
    parts = [codec(name).pack(codec(name).cut(zipf("prose", 150_000, rows), uniform_draws(rows))) for rows in (4, 9)]
    together = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    lengths = {key.partition(".")[0]: np.array([len(part[key]) for part in parts]) for key in parts[0]}
    if axis in lengths:
        with pytest.raises(CacheError, match="are inconsistent"):
            codec(name).unpack(together, lengths | {axis: lengths[axis][::-1]})


@ALL_CODECS
@pytest.mark.parametrize("how", ["missing", "additional", "another type", "shorter", "longer"])
def test_arrays_of_no_record_are_refused(name: str, how: str) -> None:
    arrays = codec(name).pack(codec(name).cut(zipf("prose", 70_000, 11), uniform_draws(11)))
    assert codec(name).unpack(arrays)
    for key, array in arrays.items():
        damaged = {
            "missing": {k: a for k, a in arrays.items() if k != key},
            "additional": arrays | {f"{key}_": array},
            "another type": arrays | {key: array.astype(np.int64)},
            "shorter": arrays | {key: array[:-1]},
            "longer": arrays | {key: np.concatenate([array, array[:1]])},
        }[how]
        if len(arrays) > 1 or how not in ("shorter", "longer"):  # a single array has no other length to match
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
def test_impossible_counts_are_refused(name: str, key: str, value: int) -> None:
    arrays = codec(name).pack(codec(name).cut(random_logprobs(5, 70), uniform_draws(5)))
    damaged = arrays[key].copy()
    damaged[0] = value
    with pytest.raises(CacheError, match="are inconsistent"):
        codec(name).unpack(arrays | {key: damaged})


@ALL_CODECS
def test_every_setting_is_in_the_fingerprint(name: str) -> None:
    settings = {"k": 9, "n": 50, "k_min": 3, "seed": 7, "temperature": 3.0}
    fingerprints = [codec(name).fingerprint()]
    for key, value in settings.items():
        if hasattr(codec(name), f"_{key}"):
            fingerprints.append(codec(name, **{key: value}).fingerprint())
    assert len(fingerprints) == {"dense": 1, "topk": 3, "rs_kd": 4, "sampled": 5}[name]
    assert all(a != b for a, b in itertools.combinations(fingerprints, 2))
    assert "stored" in fingerprints[0]


@TRUNCATING_CODECS
def test_targets_have_the_codecs_temperature(name: str) -> None:
    log_p_NV, warm = random_logprobs(7, 60), codec(name, temperature=2.0)
    expected = codec(name).cut((log_p_NV / 2).log_softmax(-1), uniform_draws(7))
    assert equal_arrays(warm.pack(warm.cut(log_p_NV, uniform_draws(7))), codec(name).pack(expected))


@TRUNCATING_CODECS
def test_truncated_targets_refuse_a_temperature_whose_normaliser_they_lack(name: str) -> None:
    warm = codec(name, temperature=2.0)
    warm.check_temperature(2.0)
    for other in (1.0, 4.0):
        with pytest.raises(ConfigError, match=rf"cache\.codec\.temperature={other}"):
            warm.check_temperature(other)


@settings(max_examples=60, deadline=None, database=None)
@given(ids=st.lists(st.integers(0, 2**18 - 1), max_size=40), highest=st.sampled_from([2**16, 2**17, 2**18]))
def test_ids_take_two_bytes_and_a_bit_per_higher_power_of_two(ids: list[int], highest: int) -> None:
    id_array = np.array([i % highest for i in ids], np.int32)
    low, planes = compact.pack_ids(id_array)
    assert np.array_equal(compact.unpack_ids(low, planes, np.array([len(ids)]), np.array([len(planes)])), id_array)
    assert low.nbytes == 2 * len(ids)
    assert len(planes) <= math.ceil(len(ids) / 8) * {2**16: 0, 2**17: 1, 2**18: 2}[highest]


@pytest.mark.parametrize("planes", [[1], [129], [0], [255, 255], [128, 0], [128] * 16])
def test_impossible_planes_are_refused(planes: list[int]) -> None:
    low, bits = np.zeros(3 if planes != [255, 255] else 0, np.uint16), np.array(planes, np.uint8)
    with pytest.raises(CacheError, match="high bits"):
        compact.unpack_ids(low, bits, np.array([len(low)]), np.array([len(bits)]))


def test_codes_are_fourth_roots_of_ratios_and_of_odds() -> None:
    soft = TopK(k=12, temperature=1.0).cut(random_logprobs(40, 60, 4.0), uniform_draws(40))
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
def test_small_values_do_not_round_to_zero(kept: float, tail: float, odds: int) -> None:
    soft = SoftTargets(np.arange(2), np.log([kept, kept * 1e-20]), np.array([tail]), np.array([2]))
    codes, odds_N = compact.pack_probabilities(soft)
    assert (codes.tolist(), odds_N.tolist()) == ([1], [odds])


def test_tokens_without_probability_are_not_kept_to_fill_k_min() -> None:
    log_p_NV = torch.tensor([[0.5, 0.0, 0.5, 0.0]]).log()
    soft = codec("sampled", k_min=4).cut(log_p_NV, uniform_draws(1))
    assert (soft.ids_E.tolist(), soft.num_exact_N.tolist()) == ([0, 2], [2])


@pytest.mark.parametrize("name", ["topk", "sampled"])
def test_zeros_and_only_zeros_decode_to_zero(name: str) -> None:
    logits_NV = torch.full((3, 50), -torch.inf)
    logits_NV[0, [4, 30]] = 0.0  # the whole mass
    logits_NV[1, :] = torch.where(torch.arange(50) == 7, 0.0, -18.0)  # a tail of 1e-6 for topk
    logits_NV[2, 9] = 0.0
    back = codec(name).unpack(codec(name).pack(codec(name).cut(logits_NV.log_softmax(-1), uniform_draws(3))))
    assert back.tail_N[[0, 2]].tolist() == [0.0, 0.0]
    assert 0 < back.tail_N[1] < 2e-6
    p_NV = training_rows(back.buckets(), 50)
    assert np.allclose(p_NV[0, [4, 30]], 0.5)
    assert p_NV[[0, 2]].astype(bool).sum() == 3
    assert p_NV[2, 9] == 1
    assert (p_NV[1] > 0).sum() == (32 if name == "topk" else 1)


@pytest.mark.parametrize(("k", "max_bytes", "max_nats"), [(16, 48, 1.5e-4), (64, 200, 1e-4)])
@pytest.mark.parametrize("kind", ["chat", "prose", "flat"])
def test_rounding_errors_are_within_their_bounds(k: int, max_bytes: int, max_nats: float, kind: str) -> None:
    log_p_NV = random_logprobs(60, 5000, 0.5) if kind == "flat" else zipf(kind, SIZES[0])
    kept = TopK(k=k, temperature=1.0)
    soft = kept.cut(log_p_NV, uniform_draws(60))
    arrays = kept.pack(soft)
    back = kept.unpack(arrays)
    p_NB, q_NB = (np.concatenate([np.exp(grid(s)[1]), s.tail_N[:, None]], 1).astype(float) for s in (soft, back))
    divergence_N = np.where(p_NB > 0, p_NB * np.log(np.maximum(p_NB, 1e-30) / np.maximum(q_NB, 1e-30)), 0).sum(1)
    assert num_bytes(arrays) <= max_bytes * 60
    assert divergence_N.mean() < max_nats
    assert divergence_N.mean() < 5.1e-6 * (1 + k**0.5) + 4.1e-5  # the bound in `compact`
    assert divergence_N.max() < 3 * (5.1e-6 * (1 + k**0.5) + 4.1e-5)


@pytest.mark.parametrize(("kind", "max_bytes", "entropy", "top"), [("chat", 30, 1.22, 0.68), ("prose", 60, 2.69, 0.49)])
def test_a_sampled_position_takes_few_bytes(kind: str, max_bytes: int, entropy: float, top: float) -> None:
    log_p_NV = zipf(kind, SIZES[0])
    assert abs(float(-(log_p_NV.exp() * log_p_NV).sum(-1).mean()) - entropy) < 0.1
    assert abs(float(log_p_NV.max(-1).values.exp().mean()) - top) < 0.06
    arrays = codec("sampled").pack(codec("sampled").cut(log_p_NV, uniform_draws(60)))
    assert num_bytes(arrays) / 60 <= max_bytes


@pytest.mark.parametrize(
    ("weights", "num_N"), [((0.5, 0.375), (2,)), ((1.0, 1.0), (2, 0)), ((0.5, 0.5), (1, 1)), ((1.0, 0.5), (1, 1))]
)
def test_draws_that_are_not_all_of_each_position_are_refused(
    weights: tuple[float, ...], num_N: tuple[int, ...]
) -> None:
    tail_N, none_N = np.ones(len(num_N), np.float32), np.zeros(len(num_N), np.int64)
    logprobs_E = np.log(np.array(weights, np.float32))
    soft = SoftTargets(np.array([3, 7]), logprobs_E, tail_N, none_N, np.array(num_N))
    with pytest.raises(CacheError, match=r"expected .* samples per position and nothing else"):
        codec("rs_kd").pack(soft)


def test_exact_entries_are_not_packed_as_draws() -> None:
    number = np.array([1, 1])
    soft = SoftTargets(np.array([3, 7]), np.zeros(2, np.float32), np.zeros(2, np.float32), number, 0 * number)
    with pytest.raises(CacheError, match=r"expected .* samples per position and nothing else"):
        codec("rs_kd").pack(soft)
