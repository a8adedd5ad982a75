"""Law 8 and half of law 12: a cache holds what was written, or says what is wrong with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.cache.index import Index
from distill.errors import CacheError
from distill.records import SoftTargets, Target
from tests.cache.conftest import annotation, filled, key, opened, request, stored
from tests.conftest import shards


def test_records_come_back_as_they_were_written_in_any_order(tmp_path: Path) -> None:
    filled(tmp_path, *range(60))
    store = opened(tmp_path)
    assert len(store) == 60
    assert len(shards(tmp_path)) == 2 * 15
    assert store.check() == []
    for number in np.random.default_rng(0).permutation(60).tolist():
        assert stored(store.read(key(number))) == stored(annotation(number))


def test_soft_targets_of_many_records_are_those_of_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.cache.store._MAX_OPEN_SHARDS", 3)  # of 15 shards
    store = filled(tmp_path, *range(60))
    rng = np.random.default_rng(0)
    places = [(key(n), span) for n in range(60) for span in annotation(n).targets]
    for number in (1, 7, 40):
        chosen = [places[k] for k in rng.permutation(len(places))[:number]]
        wanted = SoftTargets.join([store.read(k).targets[span].soft for k, span in chosen])
        found = store.soft_targets(chosen)
        for field in ("ids_E", "logprobs_E", "tail_N", "num_exact_N"):
            assert np.array_equal(getattr(found, field), getattr(wanted, field))
    with pytest.raises(CacheError, match="no soft targets for the rationale of record"):
        store.soft_targets([(key(1), "rationale")])
    with pytest.raises(CacheError, match="has no record"):
        store.soft_targets([(key(60), "answer")])


def test_damage_is_found_by_whoever_reads_only_soft_targets(tmp_path: Path) -> None:
    filled(tmp_path, 1)
    (shard,) = tmp_path.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(CacheError, match=f"{shard.name} is damaged"):
        opened(tmp_path).soft_targets([(key(1), "answer")])


@settings(max_examples=50, deadline=None, database=None)
@given(
    blocks=st.lists(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=9), max_size=9),
    few=st.integers(0, 9),
)
def test_an_index_is_a_dictionary(blocks: list[list[tuple[int, int]]], few: int) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("distill.cache.index._MIN_SORTED", few)
        index, added = Index(), list[bytes]()
        for block in blocks:
            keys = [first.to_bytes(8, "big") + second.to_bytes(8, "big") for first, second in block]
            index.add(b"".join(keys))
            added += keys
            wanted = {each: number for number, each in enumerate(added)}
            every = {first.to_bytes(8, "big") + second.to_bytes(8, "big") for first in range(4) for second in range(4)}
            asked = sorted(every)
            assert index.find(b"".join(asked)).tolist() == [wanted.get(each, -1) for each in asked]
            assert [int(index.find(each)[0]) for each in asked] == [wanted.get(each, -1) for each in asked]
            assert len(index) == len(wanted)


def test_a_target_without_soft_targets_stays_so(tmp_path: Path) -> None:
    bare = replace(annotation(1), targets={"rationale": Target((5, 6), None)})
    with opened(tmp_path).writing() as writer:
        writer.add([bare])
    assert opened(tmp_path).read(key(1)) == bare


def test_what_is_missing_is_asked_for_once(tmp_path: Path) -> None:
    store = filled(tmp_path, 1, 2)
    asked = [request(n) for n in (3, 1, 3, 2, 4)]
    assert [r.key for r in store.missing(asked)] == [key(3), key(4)]
    with pytest.raises(CacheError, match=f"has no record {key(3)}; annotate first"):
        store.read(key(3))


def test_a_writer_that_fails_keeps_what_it_had(tmp_path: Path) -> None:
    def interrupted() -> None:
        with opened(tmp_path).writing() as writer:
            writer.add([annotation(number) for number in range(30)])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    filled(tmp_path, *range(30, 40))
    store = opened(tmp_path)
    assert [stored(store.read(key(n))) for n in range(40)] == [stored(annotation(n)) for n in range(40)]


def test_another_process_sees_what_was_written_meanwhile(tmp_path: Path) -> None:
    filled(tmp_path, 1)
    watching = opened(tmp_path)
    filled(tmp_path, 2)
    assert key(2) not in watching
    watching.refresh()
    assert stored(watching.read(key(2))) == stored(annotation(2))


def test_what_a_live_process_is_writing_may_vanish_while_the_folder_is_looked_through(tmp_path: Path) -> None:
    filled(tmp_path, 1)
    (tmp_path / "claims").mkdir(exist_ok=True)
    (tmp_path / "claims" / ".gone.tmp").symlink_to("nowhere")  # listed, and not there
    assert len(filled(tmp_path, 2)) == 2
