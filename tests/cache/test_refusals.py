"""Law 8 and half of law 12: a cache holds what was written, or says what is wrong with it."""

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

from distill.cache.store import _sealed, difference, drop_shard, nearest_difference
from distill.errors import CacheError
from tests.cache.conftest import FINGERPRINT, annotation, filled, key, opened, stored
from tests.conftest import shards


def test_a_torn_last_line_is_as_if_it_were_not_there(tmp_path: Path) -> None:
    filled(tmp_path, 1, 2, size=1)
    (manifest,) = tmp_path.glob("manifest-*")
    whole = manifest.read_bytes()
    for length in (len(whole) - 1, len(whole) - 20, whole.index(b"\n") + 2):
        manifest.write_bytes(whole[:length])
        assert key(1) in opened(tmp_path)
        assert key(2) not in opened(tmp_path)
    filled(tmp_path, 2)
    assert stored(opened(tmp_path).read(key(2))) == stored(annotation(2))


def test_every_flipped_bit_is_found_and_its_file_named(tmp_path: Path) -> None:
    filled(tmp_path, *range(1, 9))
    files = sorted(path for path in tmp_path.iterdir() if path.is_file() and not path.name.startswith("."))
    rng = np.random.default_rng(0)
    for number in range(1000):
        path = files[number % len(files)]
        content = path.read_bytes()
        place, bit = int(rng.integers(len(content))), 1 << int(rng.integers(8))
        path.write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
        try:
            problems = opened(tmp_path).check()
        except CacheError as error:
            problems = [str(error)]
        assert len(problems) == 1, (path.name, place, bit)
        assert path.name in problems[0] or "with other settings" in problems[0]
        path.write_bytes(content)
    assert opened(tmp_path).check() == []


def test_a_damaged_shard_is_refused_when_read_and_can_be_made_anew_alone(tmp_path: Path) -> None:
    filled(tmp_path, *range(1, 9))
    wanted = shards(tmp_path)
    damaged = sorted(wanted)[-1]
    (tmp_path / damaged).write_bytes(wanted[damaged][:-1] + b"x")
    store = opened(tmp_path)
    (problem,) = store.check()
    name = damaged.partition(".")[0]
    assert f"{damaged} is damaged" in problem
    assert f"rebuild={name}" in problem
    refused = 0
    for number in range(1, 9):
        try:
            assert stored(store.read(key(number))) == stored(annotation(number))
        except CacheError:
            refused += 1
    assert refused == 4
    drop_shard(tmp_path, name)
    missing = store_missing(tmp_path, range(1, 9))
    assert len(missing) == 4
    filled(tmp_path, *missing)
    assert shards(tmp_path) == wanted
    with pytest.raises(CacheError, match=r"no manifest in .* lists a shard 'abc'"):
        drop_shard(tmp_path, "abc")


def store_missing(folder: Path, numbers: Iterable[int]) -> list[int]:
    store = opened(folder)
    return [number for number in numbers if key(number) not in store]


@pytest.mark.parametrize("how", ["symlink", "missing", "directory", "elsewhere", "absolute", "no keys", "no number"])
def test_a_shard_that_is_no_plain_file_of_the_folder_is_refused(how: str, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    filled(folder, 1, 2, 3)
    (shard,), (manifest,) = folder.glob("*.parquet"), folder.glob("manifest-*")
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
        "no number": {"records": 1e300},
    }.get(how, {})
    manifest.write_bytes(_sealed(line))
    with pytest.raises(CacheError, match=r"not a regular file|invalid line for a shard"):
        opened(folder)


def lines_of(manifest: Path) -> list[dict[str, Any]]:
    return [json.loads(line)["line"] for line in manifest.read_text().splitlines()]


HEADERS = {
    "huge header": (2**63, b"{}"),
    "header over the end": (10**6, b"{}"),
    "no object": (None, b"[1]"),
    "no JSON": (None, b"\xff{"),
    "nested": (None, b"[" * 100_000),
    "huge shape": (None, b'{"token": {"dtype": "I32", "shape": [1000000000000], "data_offsets": [0, 4]}}'),
    "two huge extents": (
        None,
        b'{"token": {"dtype": "I32", "shape": [4294967296, 4294967296], "data_offsets": [0, 0]}}',
    ),
    "negative": (None, b'{"token": {"dtype": "I32", "shape": [-1], "data_offsets": [8, 4]}}'),
    "over the end": (None, b'{"token": {"dtype": "I32", "shape": [999], "data_offsets": [0, 3996]}}'),
    "other type": (None, b'{"token": {"dtype": "PICKLE", "shape": [1], "data_offsets": [0, 4]}}'),
    "infinite": (None, b'{"token": {"dtype": "I32", "shape": [Infinity], "data_offsets": [0, 4]}}'),
    "lacks arrays": (None, b'{"token": {"dtype": "I32", "shape": [1], "data_offsets": [0, 4]}}'),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_hostile_file_is_refused_though_its_checksums_are_right(name: str, tmp_path: Path) -> None:
    filled(tmp_path, 1)
    (shard,), (manifest,) = tmp_path.glob("*.safetensors"), tmp_path.glob("manifest-*")
    length, header = HEADERS[name]
    content = (length or len(header)).to_bytes(8, "little") + header + bytes(16)
    shard.write_bytes(content)
    (line,) = lines_of(manifest)
    crcs = {"header": zlib.crc32(content[: 8 + len(header)]), "token": zlib.crc32(bytes(4))}
    line["crc32"] = crcs | {"parquet": line["crc32"]["parquet"]}
    line["bytes"]["safetensors"] = len(content)
    manifest.write_bytes(_sealed(line))
    with pytest.raises(CacheError, match=rf"{shard.name} is damaged"):
        opened(tmp_path).read(key(1))


@pytest.mark.parametrize(
    ("theirs", "names"),
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
def test_another_fingerprint_is_refused_key_by_key(theirs: dict[str, Any], names: list[str], tmp_path: Path) -> None:
    filled(tmp_path / "theirs", 1, fingerprint=FINGERPRINT | theirs)
    with pytest.raises(CacheError) as raised:
        opened(tmp_path / "theirs")
    assert all(name in str(raised.value) for name in names)
    assert len(difference(FINGERPRINT | theirs, FINGERPRINT)) == len(names)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "manifest.jsonl").write_text('{"format": 1, "fingerprint": {}}\n')
    nearest = nearest_difference(tmp_path / "ours", FINGERPRINT)
    assert nearest is not None
    assert nearest[0].name == "theirs"
    assert [line.strip() for line in nearest[1]] == names


@pytest.mark.parametrize("line", [b'{"format": 1, "fingerprint": {}}\n', _sealed({"format": 3, "fingerprint": {}})])
def test_another_format_is_refused_by_name(line: bytes, tmp_path: Path) -> None:
    (tmp_path / "manifest.jsonl").write_bytes(line)
    with pytest.raises(CacheError, match=r"has format (1|3), this version of distill reads format 2"):
        opened(tmp_path)


def test_no_file_of_a_cache_is_a_pickle_and_others_can_read_them(tmp_path: Path) -> None:
    filled(tmp_path, 1, 2)
    kinds = {path.suffix for path in tmp_path.iterdir() if path.is_file()}
    assert kinds == {".jsonl", ".safetensors", ".parquet"}
    assert json.loads((tmp_path / "manifest.jsonl").read_text())["line"]["fingerprint"] == FINGERPRINT
    (arrays,), (text,) = tmp_path.glob("*.safetensors"), tmp_path.glob("*.parquet")
    assert load_file(arrays)["token"].tolist() == [
        i for n in (1, 2) for t in annotation(n).targets.values() for i in t.token_ids
    ]
    assert pq.read_table(text)["key"].to_pylist() == [key(1), key(2)]
