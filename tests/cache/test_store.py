"""Law 8: a cache returns what was written, in any order and from several processes."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.cache.index import Index
from distill.cache.store import difference
from distill.errors import CacheError
from distill.records import SoftTargets, Target
from tests.cache.conftest import annotation, comparable, key, open_store, request, write_records
from tests.conftest import shards


def test_records_are_read_as_written_in_any_order(tmp_path: Path) -> None:
    write_records(tmp_path, *range(60))
    store = open_store(tmp_path)
    assert len(store) == 60
    assert len(shards(tmp_path)) == 2 * 15
    assert store.check() == []
    for number in np.random.default_rng(0).permutation(60).tolist():
        assert comparable(store.read(key(number))) == comparable(annotation(number))


def test_soft_targets_of_many_records_equal_those_of_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.cache.store._MAX_OPEN_SHARDS", 3)  # of 15 shards
    store = write_records(tmp_path, *range(60))
    rng = np.random.default_rng(0)
    places = [(key(n), span) for n in range(60) for span in annotation(n).targets]
    for number in (1, 7, 40):
        sample = [places[k] for k in rng.permutation(len(places))[:number]]
        expected = SoftTargets.join([store.read(k).targets[span].soft for k, span in sample])
        together = store.soft_targets(sample)
        for field in ("ids_E", "logprobs_E", "tail_N", "num_exact_N"):
            assert np.array_equal(getattr(together, field), getattr(expected, field))
    with pytest.raises(CacheError, match="no soft targets for the rationale of record"):
        store.soft_targets([(key(1), "rationale")])
    with pytest.raises(CacheError, match="has no record"):
        store.soft_targets([(key(60), "answer")])


@pytest.mark.parametrize(("limit", "num_closed"), [(3, 12), (14, 1), (15, 0)])
def test_the_shard_that_was_read_the_longest_ago_is_closed_above_the_limit(
    limit: int, num_closed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[str] = []
    monkeypatch.setattr("distill.cache.store._MAX_OPEN_SHARDS", limit)
    monkeypatch.setattr("distill.cache.shard.Shard.close", lambda shard: closed.append(shard.name))
    store = write_records(tmp_path, *range(60))  # of 15 shards
    for number in range(0, 60, 4):
        store.read(key(number))
        store.read(key(0))  # whose shard stays open
    assert len(closed) == len(set(closed)) == num_closed


def test_reading_soft_targets_detects_damage(tmp_path: Path) -> None:
    write_records(tmp_path, 1)
    (shard,) = tmp_path.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(CacheError, match=f"{shard.name} is damaged"):
        open_store(tmp_path).soft_targets([(key(1), "answer")])


@settings(max_examples=50, deadline=None, database=None)
@given(
    blocks=st.lists(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=9), max_size=9),
    min_sorted=st.integers(0, 9),
)
def test_an_index_behaves_like_a_dictionary(blocks: list[list[tuple[int, int]]], min_sorted: int) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("distill.cache.index._MIN_SORTED", min_sorted)
        index, added = Index(), list[bytes]()
        for block in blocks:
            keys = [first.to_bytes(8, "big") + second.to_bytes(8, "big") for first, second in block]
            index.add(b"".join(keys))
            added += keys
            numbers = {key: number for number, key in enumerate(added)}
            possible = {
                first.to_bytes(8, "big") + second.to_bytes(8, "big") for first in range(4) for second in range(4)
            }
            queries = sorted(possible)
            assert index.find(b"".join(queries)).tolist() == [numbers.get(key, -1) for key in queries]
            assert [int(index.find(key)[0]) for key in queries] == [numbers.get(key, -1) for key in queries]
            assert len(index) == len(numbers)


def test_a_target_without_soft_targets_is_read_without(tmp_path: Path) -> None:
    without_soft = replace(annotation(1), targets={"rationale": Target((5, 6), None)})
    with open_store(tmp_path).writing() as writer:
        writer.add([without_soft])
    assert open_store(tmp_path).read(key(1)) == without_soft


def test_missing_requests_have_no_repeated_keys(tmp_path: Path) -> None:
    store = write_records(tmp_path, 1, 2)
    requests = [request(n) for n in (3, 1, 3, 2, 4)]
    assert [r.key for r in store.missing(requests)] == [key(3), key(4)]
    with pytest.raises(CacheError, match=f"has no record {key(3)}; annotate first"):
        store.read(key(3))


def test_an_interrupted_writer_writes_its_buffer(tmp_path: Path) -> None:
    def write_and_interrupt() -> None:
        with open_store(tmp_path).writing() as writer:
            writer.add([annotation(number) for number in range(30)])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_and_interrupt()
    write_records(tmp_path, *range(30, 40))
    store = open_store(tmp_path)
    assert [comparable(store.read(key(n))) for n in range(40)] == [comparable(annotation(n)) for n in range(40)]


def test_refresh_reads_what_another_process_wrote(tmp_path: Path) -> None:
    write_records(tmp_path, 1)
    store = open_store(tmp_path)
    write_records(tmp_path, 2)
    assert key(2) not in store
    store.refresh()
    assert comparable(store.read(key(2))) == comparable(annotation(2))


def test_temporary_files_may_vanish_while_the_folder_is_listed(tmp_path: Path) -> None:
    write_records(tmp_path, 1)
    (tmp_path / "claims").mkdir(exist_ok=True)
    (tmp_path / "claims" / ".gone.tmp").symlink_to("nowhere")  # listed, but does not exist
    assert len(write_records(tmp_path, 2)) == 2


def test_temporary_files_of_killed_writers_are_removed_and_those_of_live_ones_stay(tmp_path: Path) -> None:
    write_records(tmp_path, 1)
    old, young = tmp_path / ".old.tmp", tmp_path / "claims" / ".young.tmp"
    for path, age in ((old, 2 * 86_400), (young, 3600)):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
        os.utime(path, (time.time() - age,) * 2)
    write_records(tmp_path, 2)
    assert (old.exists(), young.exists()) == (False, True)


def test_what_all_records_share_is_made_once_and_kept_while_writing(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    assert store.recall("offsets", lambda: {"made": 1}) == {"made": 1}
    assert not (tmp_path / "manifest.offsets.json").exists()  # nothing is written yet that could depend on it
    with store.writing():
        assert store.recall("offsets", lambda: {"made": 2}) == {"made": 2}
    assert open_store(tmp_path).recall("offsets", lambda: {"made": 3}) == {"made": 2}


def test_fingerprints_differ_in_the_leaves_that_are_named() -> None:
    assert difference({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]}) == ["  a[1].b: cache has 2, this run has 3"]
    assert difference({"a": [1, 2]}, {"a": [1]}) == ["  a: cache has [1, 2], this run has [1]"]
    assert difference({"a": [1]}, {"a": [1, 2]}) == ["  a: cache has [1], this run has [1, 2]"]
    assert difference({"a": 1}, {"a": 1}) == []


def test_a_local_cache_is_located_at_its_folder(tmp_path: Path) -> None:
    assert open_store(tmp_path / "cache").location == str(tmp_path / "cache")
