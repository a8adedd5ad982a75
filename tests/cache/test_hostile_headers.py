"""Law 8: hostile headers of a shard's arrays, with correct checksums, are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill.errors import CacheError
from tests.cache.conftest import Files, entry, read_all, replace_arrays, split_header, with_header, write_files

# Changes of a header's entries; originally length.answer has offsets [16, 24], token [32, ...].
HOSTILE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no dimension": lambda e: e | {"token": entry("I32", [], 32, 36)},
    "two dimensions": lambda e: e | {"token": e["token"] | {"shape": [*e["token"]["shape"], 1]}},
    "lengths of two dimensions": lambda e: e | {"length.answer": e["length.answer"] | {"shape": [1, 2]}},
    "ends of two dimensions": lambda e: e | {"end.position": e["end.position"] | {"shape": [2, 1]}},
    "a hundred dimensions": lambda e: e | {"more": entry("U8", [1] * 100, 0, 1)},
    "a huge extent": lambda e: e | {"more": entry("U8", [0, 10**30], 0, 0)},
    "a huge number": lambda e: e | {"more": entry("U8", [10**4000], 0, 1)},
    "a shape of type string": lambda e: e | {"more": entry("U8", "4", 0, 4)},
    "a shape of type object": lambda e: e | {"more": entry("U8", {"4": 0}, 0, 4)},
    "offsets of type string": lambda e: e | {"more": entry("U8", [4], "0", "4")},
    "fractional offsets": lambda e: e | {"more": entry("U8", [4], 0.5, 4.5)},
    "NaN offsets": lambda e: e | {"more": entry("U8", [4], float("nan"), 4)},
    "one offset": lambda e: e | {"more": entry("U8", [4], 0)},
    "three offsets": lambda e: e | {"more": entry("U8", [4], 0, 4, 8)},
    "overlapping": lambda e: e | {"more": entry("U8", [4], 0, 4)},
    "the same bytes twice": lambda e: e | {"token": e["position.id"] | {"dtype": "I32", "shape": [24]}},
    "floating-point lengths": lambda e: e | {"length.answer": e["length.answer"] | {"dtype": "F32"}},
    "floating-point ids": lambda e: e | {"token": e["token"] | {"dtype": "F32"}},
    "ends of type uint8": lambda e: e | {"end.position": e["end.position"] | {"dtype": "U8", "shape": [16]}},
    "a dtype of type list": lambda e: e | {"more": entry(["U8"], [4], 0, 4)},  # type: ignore[arg-type]
    "an entry of type list": lambda e: e | {"more": []},
    "an array called header": lambda e: e | {"header": entry("U8", [4], 0, 4)},
    "an array called parquet": lambda e: e | {"parquet": entry("U8", [4], 0, 4)},
    "an axis without a name": lambda e: e | {".more": entry("U8", [4], 0, 4)},
    "an axis without ends": lambda e: e | {"more.more": entry("U8", [4], 0, 4)},
    "no lengths": lambda e: {name: value for name, value in e.items() if name != "length.answer"},
    "no tokens": lambda e: {name: value for name, value in e.items() if name != "token"},
    "no ends": lambda e: {name: value for name, value in e.items() if name != "end.position"},
    "no arrays of the codec": lambda e: {n: v for n, v in e.items() if n.split(".")[0] in ("length", "token")},
    "one array of the codec": lambda e: {n: v for n, v in e.items() if n != "position.code"},
    "an array of the codec of another shape": lambda e: e | {"position.id": e["position.id"] | {"shape": [6, 8]}},
    "an array of the codec of another type": lambda e: e | {"position.id": e["position.id"] | {"dtype": "F16"}},
    "metadata": lambda e: {"__metadata__": {"a": "b"}} | e,
    "a list": lambda e: [e],
    "a number": lambda e: 1e999,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_refused(name: str, single_shard: Files, tmp_path: Path) -> None:
    write_files(tmp_path / "cache", single_shard)
    (arrays,) = (content for file, content in single_shard.items() if file.endswith(".safetensors"))
    entries, data = split_header(arrays)
    replace_arrays(tmp_path / "cache", with_header(json.dumps(HOSTILE[name](entries)).encode(), data))
    with pytest.raises(CacheError, match=r"damaged|expected|are inconsistent"):
        read_all(tmp_path / "cache", 5, 8)


BRACKETS = b'{"token": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"


@pytest.mark.parametrize("header", [BRACKETS, b'{"a": 1, ' * 50_000, b"9" * 100_000, b'"\\ud800"', b"{}", b""])
def test_a_header_that_lists_no_arrays_is_refused(header: bytes, single_shard: Files, tmp_path: Path) -> None:
    write_files(tmp_path / "cache", single_shard)
    replace_arrays(tmp_path / "cache", with_header(header, bytes(64)))
    with pytest.raises(CacheError, match="is damaged"):
        read_all(tmp_path / "cache", 5)


def test_a_repeated_array_name_is_refused(single_shard: Files, tmp_path: Path) -> None:
    write_files(tmp_path / "cache", single_shard)
    (arrays,) = (content for file, content in single_shard.items() if file.endswith(".safetensors"))
    entries, data = split_header(arrays)
    header = json.dumps(entries).encode()
    replace_arrays(tmp_path / "cache", with_header(b'{"token": {}, ' + header[1:], data))
    with pytest.raises(CacheError, match="is damaged"):
        read_all(tmp_path / "cache", 5)
