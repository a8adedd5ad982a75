"""The manifests in a folder of their own: what a group costs does not grow with the cache; earlier layouts are read."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem
from omegaconf import DictConfig

from distill.annotation.annotation_job import open_annotation_job
from distill.annotation.fill import fill
from distill.cache.store import Store, drop_shard
from distill.records import Annotation, Request
from tests.cache.conftest import CODEC, FINGERPRINT, annotation, comparable, key, open_store, unsealed, write_records
from tests.conftest import CountingTeacher, shards


@pytest.fixture
def entries(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names that were listed since, of any folder."""
    names: list[str] = []
    scandir, listdir = os.scandir, os.listdir

    class Scanned:
        def __init__(self, path: Any) -> None:
            self._entries = scandir(path)

        def __iter__(self) -> Iterator[os.DirEntry[str]]:
            for entry in self._entries:
                names.append(entry.name)
                yield entry

        def __enter__(self) -> Scanned:
            return self

        def __exit__(self, *_: object) -> None:
            self._entries.close()

    def list_names(path: Any) -> list[str]:
        names.extend(listed := listdir(path))
        return listed

    monkeypatch.setattr(os, "scandir", Scanned)
    monkeypatch.setattr(os, "listdir", list_names)
    monkeypatch.setattr(os, "fsync", lambda _: None)
    return names


def earlier_layout(folder: Path) -> None:
    """Move the manifests to where they were before they had a folder."""
    for number, path in enumerate(sorted(folder.glob("manifests/*/*.jsonl"))):
        path.rename(folder / f"manifest-{number:012x}.jsonl")
    shutil.rmtree(folder / "manifests")


@pytest.mark.parametrize("num_shards", [1, 30])
@pytest.mark.parametrize("is_earlier", [False, True], ids=["", "earlier layout"])
def test_a_refresh_lists_the_writers_and_no_shards(
    num_shards: int, is_earlier: bool, entries: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill.cache.manifests._MAX_LINES", 4)
    write_records(tmp_path, *range(num_shards), size=1)
    if is_earlier:
        earlier_layout(tmp_path)
    store = open_store(tmp_path)
    with store.writing() as writer:
        writer.add([annotation(1000)])
        writer.flush()
        write_records(tmp_path, *range(2000, 2000 + num_shards), size=1)
        entries.clear()
        store.refresh()
        assert len(entries) == (2 if is_earlier else 3)  # one per writer
        assert len(store) == 2 * num_shards + 1


class ListingTeacher(CountingTeacher):
    """A teacher that counts the names listed before each call."""

    def __init__(self, teacher: Any, entries: list[str]) -> None:
        super().__init__(teacher)
        self._entries, self.num_listed = entries, list[int]()

    def annotate(self, requests: Sequence[Request]) -> list[Annotation]:
        self.num_listed.append(len(self._entries))
        return super().annotate(requests)


def test_annotating_a_group_lists_as_much_in_a_large_cache_as_in_a_small_one(
    configured: Callable[..., DictConfig], entries: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def listed_per_group(name: str, num_shards: int) -> list[int]:
        monkeypatch.setattr("distill.annotation.fill._NUM_LATENCY_REQUESTS", 0)
        options = ("teacher.group_size=1", "teacher.batch_size=1", f"cache.dir={configured().root}/{name}")
        job = open_annotation_job(configured(*options))
        with job.store.writing() as writer:
            for number in range(num_shards):
                writer.add([replace(annotation(number), targets={})])
                writer.flush()
        teacher = ListingTeacher(job.teacher, entries)
        fill(replace(job, teacher=teacher), {"answer": job.splits.train})
        steps = [after - before for before, after in zip(teacher.num_listed, teacher.num_listed[1:], strict=False)]
        assert len(steps) >= 9
        return steps

    small, large = listed_per_group("small", 1), listed_per_group("large", 30)
    assert sum(large) <= sum(small) <= 3 * len(small)  # the two writers of each cache


def test_a_refresh_of_a_url_lists_the_manifests_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"file://{tmp_path}/remote"
    store, other = (Store(tmp_path / machine, FINGERPRINT, CODEC, url=url) for machine in ("one", "two"))
    find, listed = LocalFileSystem.find, list[str]()

    def finding(self: LocalFileSystem, path: str, **options: Any) -> Any:
        result = find(self, path, **options)
        listed.extend(result)
        return result

    with store.writing() as writer, other.writing() as other_writer:
        for number in range(6):
            writer.add([annotation(number)])
            writer.flush()
        other_writer.add([annotation(9)])
        other_writer.flush()
        monkeypatch.setattr(LocalFileSystem, "find", finding)
        store.refresh()
    assert len(listed) == 2
    assert all("/manifests/" in path for path in listed)
    assert key(9) in store


def test_full_manifests_are_followed_by_further_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.cache.manifests._MAX_LINES", 2)
    other = write_records(tmp_path, 100)
    with open_store(tmp_path).writing() as writer:
        for number in range(7):
            writer.add([annotation(number)])
            writer.flush()
            other.refresh()
            assert comparable(other.read(key(number))) == comparable(annotation(number))
    manifests = list(tmp_path.glob("manifests/*/*.jsonl"))
    assert sorted(len(unsealed(path.read_bytes())) for path in manifests) == [1, 1, 2, 2, 2]
    assert len(open_store(tmp_path)) == 8


def test_a_file_deleted_between_others_hides_none_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.cache.manifests._MAX_LINES", 1)
    write_records(tmp_path, 0, 1, 2, size=1)
    (middle,) = tmp_path.glob("manifests/*/000001.jsonl")
    middle.unlink()
    store = open_store(tmp_path)
    assert [key(number) in store for number in range(3)] == [True, False, True]
    write_records(tmp_path, 1)
    store.refresh()
    assert len(store) == 3


def test_a_cache_of_the_earlier_layout_is_read_extended_and_repaired(tmp_path: Path) -> None:
    write_records(tmp_path, 0, 1, 2, size=1)
    earlier_layout(tmp_path)
    before = shards(tmp_path)
    assert comparable(open_store(tmp_path).read(key(1))) == comparable(annotation(1))
    write_records(tmp_path, 3)
    assert len(open_store(tmp_path)) == 4
    name = min(before).partition(".")[0]
    drop_shard(tmp_path, name)
    assert not any(file.partition(".")[0] == name for file in shards(tmp_path))
    store = open_store(tmp_path)
    assert len(store) == 3
    write_records(tmp_path, *(number for number in range(4) if key(number) not in store))
    assert shards(tmp_path).items() >= before.items()
    assert open_store(tmp_path).check() == []


def test_a_url_of_the_earlier_layout_is_read(tmp_path: Path) -> None:
    write_records(tmp_path / "remote", 0, 1, 2)
    earlier_layout(tmp_path / "remote")
    store = Store(tmp_path / "copy", FINGERPRINT, CODEC, url=f"file://{tmp_path}/remote")
    assert [comparable(store.read(key(n))) for n in range(3)] == [comparable(annotation(n)) for n in range(3)]
