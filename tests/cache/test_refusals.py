"""Law 8: damaged, foreign or hostile caches are refused with the file and the reason."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from distill.cache.sealed import seal
from distill.cache.store import difference, drop_shard, nearest_difference
from distill.errors import CacheError
from tests.cache.conftest import FINGERPRINT, annotation, comparable, key, open_store, write_records
from tests.conftest import shards


def test_an_incomplete_last_line_is_ignored(tmp_path: Path) -> None:
    write_records(tmp_path, 1, 2, size=1)
    (manifest,) = tmp_path.glob("manifests/*/*")
    complete = manifest.read_bytes()
    for length in (len(complete) - 1, len(complete) - 20, complete.index(b"\n") + 2):
        manifest.write_bytes(complete[:length])
        assert key(1) in open_store(tmp_path)
        assert key(2) not in open_store(tmp_path)
    write_records(tmp_path, 2)
    assert comparable(open_store(tmp_path).read(key(2))) == comparable(annotation(2))


@pytest.mark.parametrize("num_bits", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_every_flipped_bit_is_detected_and_its_file_named(num_bits: int, tmp_path: Path) -> None:
    write_records(tmp_path, *range(1, 9))
    files = sorted(path for path in tmp_path.rglob("[!.]*") if path.is_file() and path.parent.name != "claims")
    rng = np.random.default_rng(0)
    for number in range(num_bits):
        path = files[number % len(files)]
        content = path.read_bytes()
        position, bit = int(rng.integers(len(content))), 1 << int(rng.integers(8))
        path.write_bytes(content[:position] + bytes([content[position] ^ bit]) + content[position + 1 :])
        try:
            problems = open_store(tmp_path).check()
        except CacheError as error:
            problems = [str(error)]
        assert len(problems) == 1, (path.name, position, bit)
        assert path.name in problems[0] or "with other settings" in problems[0]
        path.write_bytes(content)
    assert open_store(tmp_path).check() == []


def test_a_damaged_shard_is_refused_and_can_be_rebuilt_alone(tmp_path: Path) -> None:
    write_records(tmp_path, *range(1, 9))
    intact = shards(tmp_path)
    damaged = sorted(intact)[-1]
    (tmp_path / damaged).write_bytes(intact[damaged][:-1] + b"x")
    store = open_store(tmp_path)
    (problem,) = store.check()
    name = damaged.partition(".")[0]
    assert f"{damaged} is damaged" in problem
    assert f"rebuild={name}" in problem
    num_refused = 0
    for number in range(1, 9):
        try:
            assert comparable(store.read(key(number))) == comparable(annotation(number))
        except CacheError:
            num_refused += 1
    assert num_refused == 4
    drop_shard(tmp_path, name)
    missing = missing_from(tmp_path, range(1, 9))
    assert len(missing) == 4
    write_records(tmp_path, *missing)
    assert shards(tmp_path) == intact
    with pytest.raises(CacheError, match=r"no manifest in .* lists a shard 'abc'"):
        drop_shard(tmp_path, "abc")


def missing_from(folder: Path, numbers: Iterable[int]) -> list[int]:
    store = open_store(folder)
    return [number for number in numbers if key(number) not in store]


@pytest.mark.parametrize("how", ["symlink", "missing", "directory", "elsewhere", "absolute", "no keys", "huge number"])
def test_a_shard_must_be_a_regular_file_of_the_folder(how: str, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    write_records(folder, 1, 2, 3)
    (shard,), (manifest,) = folder.glob("*.parquet"), folder.glob("manifests/*/*")
    other = shutil.copy(shard, tmp_path / "other.parquet")
    (line,) = lines_of(manifest)
    if how in {"symlink", "missing", "directory"}:
        shard.unlink()
        if how != "missing":
            shard.symlink_to(other) if how == "symlink" else shard.mkdir()
    line |= {
        "elsewhere": {"shard": "../other"},
        "absolute": {"shard": str(tmp_path / "other")},
        "no keys": {"keys": ""},
        "huge number": {"records": 1e300},
    }.get(how, {})
    manifest.write_bytes(seal(line))
    with pytest.raises(CacheError, match=r"not a regular file|invalid line for a shard"):
        open_store(folder)


def lines_of(manifest: Path) -> list[dict[str, Any]]:
    return [json.loads(line)["line"] for line in manifest.read_text().splitlines()]


HEADERS = {
    "huge header": (2**63, b"{}"),
    "header beyond the end": (10**6, b"{}"),
    "a list": (None, b"[1]"),
    "invalid JSON": (None, b"\xff{"),
    "nested": (None, b"[" * 100_000),
    "huge shape": (None, b'{"token": {"dtype": "I32", "shape": [1000000000000], "data_offsets": [0, 4]}}'),
    "two huge extents": (
        None,
        b'{"token": {"dtype": "I32", "shape": [4294967296, 4294967296], "data_offsets": [0, 0]}}',
    ),
    "negative": (None, b'{"token": {"dtype": "I32", "shape": [-1], "data_offsets": [8, 4]}}'),
    "beyond the end": (None, b'{"token": {"dtype": "I32", "shape": [999], "data_offsets": [0, 3996]}}'),
    "other type": (None, b'{"token": {"dtype": "PICKLE", "shape": [1], "data_offsets": [0, 4]}}'),
    "infinite": (None, b'{"token": {"dtype": "I32", "shape": [Infinity], "data_offsets": [0, 4]}}'),
    "lacks arrays": (None, b'{"token": {"dtype": "I32", "shape": [1], "data_offsets": [0, 4]}}'),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_hostile_file_with_correct_checksums_is_refused(name: str, tmp_path: Path) -> None:
    write_records(tmp_path, 1)
    (shard,), (manifest,) = tmp_path.glob("*.safetensors"), tmp_path.glob("manifests/*/*")
    length, header = HEADERS[name]
    content = (length or len(header)).to_bytes(8, "little") + header + bytes(16)
    shard.write_bytes(content)
    (line,) = lines_of(manifest)
    crcs = {"header": zlib.crc32(content[: 8 + len(header)]), "token": zlib.crc32(bytes(4))}
    line["crc32"] = crcs | {"parquet": line["crc32"]["parquet"]}
    line["bytes"]["safetensors"] = len(content)
    manifest.write_bytes(seal(line))
    with pytest.raises(CacheError, match=rf"{shard.name} is damaged"):
        open_store(tmp_path).read(key(1))


@pytest.mark.parametrize(
    ("theirs", "differences"),
    [
        ({"teacher": {"weights": "xyz", "dtype": "float32"}}, ['teacher.weights: cache has "xyz", this run has "abc"']),
        ({"shots": ["one", "2"]}, ['shots[1]: cache has "2", this run has "two"']),
        ({"shots": ["one"]}, ['shots: cache has ["one"], this run has ["one", "two"]']),
        ({"codec": {}}, ["codec.k: cache has null, this run has 4"]),
        (
            {"codec": {"k": 5}, "more": 1},
            ["codec.k: cache has 5, this run has 4", "more: cache has 1, this run has null"],
        ),
    ],
)
def test_another_fingerprint_is_refused_with_all_differences(
    theirs: dict[str, Any], differences: list[str], tmp_path: Path
) -> None:
    write_records(tmp_path / "theirs", 1, fingerprint=FINGERPRINT | theirs)
    with pytest.raises(CacheError) as raised:
        open_store(tmp_path / "theirs")
    assert all(text in str(raised.value) for text in differences)
    assert len(difference(FINGERPRINT | theirs, FINGERPRINT)) == len(differences)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "manifest.jsonl").write_text('{"format": 1, "fingerprint": {}}\n')
    nearest = nearest_difference(tmp_path / "ours", FINGERPRINT)
    assert nearest is not None
    assert nearest[0].name == "theirs"
    assert [line.strip() for line in nearest[1]] == differences


@pytest.mark.parametrize(("length", "shown"), [(78, f'"{"x" * 78}"'), (79, f'"{"x" * 76}...')])
def test_a_difference_shows_up_to_80_characters_of_each_value(length: int, shown: str) -> None:
    assert difference({"a": "x" * length}, {"a": 1}) == [f"  a: cache has {shown}, this run has 1"]


@pytest.mark.parametrize(
    "line", [b'{"format": 1, "fingerprint": {}}\n', *(seal({"format": n, "fingerprint": {}}) for n in (2, 4))]
)
def test_another_format_is_refused(line: bytes, tmp_path: Path) -> None:
    (tmp_path / "manifest.jsonl").write_bytes(line)
    with pytest.raises(CacheError, match=r"has format (1|2|4), this version of distill reads format 3"):
        open_store(tmp_path)


def test_all_files_have_standard_formats_without_pickle(tmp_path: Path) -> None:
    write_records(tmp_path, 1, 2)
    suffixes = {path.suffix for path in tmp_path.iterdir() if path.is_file()}
    assert suffixes == {".jsonl", ".safetensors", ".parquet"}
    assert json.loads((tmp_path / "manifest.jsonl").read_text())["line"]["fingerprint"] == FINGERPRINT
    (arrays,), (text,) = tmp_path.glob("*.safetensors"), tmp_path.glob("*.parquet")
    assert load_file(arrays)["token"].tolist() == [
        i for n in (1, 2) for t in annotation(n).targets.values() for i in t.token_ids
    ]
    assert pq.read_table(text)["key"].to_pylist() == [key(1), key(2)]


def test_the_nearest_cache_is_searched_on_both_sides_of_ours_and_is_never_ours(tmp_path: Path) -> None:
    for name, more in (("a", {"b": 1}), ("m", {}), ("z", {"b": 1, "c": 2})):
        write_records(tmp_path / name, 1, fingerprint={**FINGERPRINT, **more})
    for extra, expected in (({}, "a"), ({"b": 1, "c": 2}, "z")):
        nearest = nearest_difference(tmp_path / "m", {**FINGERPRINT, **extra})
        assert nearest is not None
        assert nearest[0] == tmp_path / expected
