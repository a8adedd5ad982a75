"""Law 8: hostile manifests with correct checksums are refused, and lead to no file outside the cache."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.cache.store import nearest_difference
from distill.errors import CacheError
from tests.cache.conftest import (
    FINGERPRINT,
    Files,
    annotation,
    comparable,
    fuzzed,
    odd_values,
    read_all,
    sealed,
    unsealed,
    write_files,
)

TRICKS = {
    "above": "../{name}",
    "above and back": "../cache/{name}",
    "absolute": "{outside}/{name}",
    "here": "./{name}",
    "with a null byte": "{name}\0",
    "with a newline": "{name}\n",
    "long": "a" * 300,
    "upper": "ABCDEF0123456789",
    "wide digits": "０１２３４５６７８９abcdef",
    "other dots": "․․/{name}",
    "empty": "",
    "a dot": ".",
    "a drive": "C:{name}",
    "another slash": "..\\{name}",
    "home": "~/{name}",
}


@pytest.mark.parametrize("trick", TRICKS)
def test_an_invalid_shard_name_opens_no_other_file(trick: str, single_shard: Files, tmp_path: Path) -> None:
    """The files that the name leads to exist and are valid."""
    folder, outside = tmp_path / "cache", tmp_path / "outside"
    write_files(folder, single_shard)
    (manifest,) = folder.glob("manifests/*/*")
    (line,) = unsealed(manifest.read_bytes())
    outside.mkdir()
    for suffix in ("safetensors", "parquet"):
        shard = folder / f"{line['shard']}.{suffix}"
        shutil.copy(shard, outside)
        shutil.copy(shard, tmp_path)
    line["shard"] = TRICKS[trick].format(name=line["shard"], outside=outside)
    manifest.write_bytes(sealed(line))
    with pytest.raises(CacheError, match="invalid line for a shard"):
        read_all(folder, 5)


@pytest.mark.parametrize("name", ["manifest.jsonl", "manifests", "000000.jsonl", ".safetensors", ".parquet"])
def test_symbolic_links_are_not_followed(name: str, single_shard: Files, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    write_files(folder, single_shard)
    (file,) = (path for path in folder.rglob("*") if path.name.endswith(name))
    file.rename(tmp_path / "outside")
    file.symlink_to(tmp_path / "outside")
    with pytest.raises(CacheError, match=rf"{file.name} is .*(symbolic link|not a regular file)"):
        read_all(folder, 5)


LINES: dict[str, Any] = {
    "a number": 5,
    "a string with 'shard'": "shard and cost",
    "a list with 'cost'": ["cost"],
    "null": None,
    "infinity": float("inf"),
    "invalid JSON": b"{",
    "invalid UTF-8": b"\xff\xfe{}",
    "nested": b"[" * 100_000 + b"]" * 100_000,
    "an empty object": {},
    "a cost of type number": {"cost": 5},
    "an empty cost": {"cost": {}},
}


ENTRIES: dict[str, Any] = {
    "checksums as a list": {"crc32": ["header", "parquet"]},
    "checksums as a string": {"crc32": "header parquet"},
    "checksums of type string": {"crc32": {"header": "1", "parquet": "2"}},
    "no checksums": {"crc32": {}},
    "sizes as a list": {"bytes": [1, 2]},
    "fractional sizes": {"bytes": {"safetensors": 1.5, "parquet": 1.5}},
    "negative sizes": {"bytes": {"safetensors": -1, "parquet": -1}},
    "huge sizes": {"bytes": {"safetensors": 10**400, "parquet": 10**400}},
    "NaN records": {"records": float("nan")},
    "infinite records": {"records": float("inf")},
    "records as a list": {"records": [2]},
    "a fraction of a record": {"records": 2.5},
    "negative records": {"records": -2},
    "too many records": {"records": 10**400},
    "keys as a list": {"keys": ["AAAA"]},
    "keys that are not base64": {"keys": "ééééé"},
    "a name of type number": {"shard": 1},
    "a name of type list": {"shard": ["0123456789abcdef"]},
}


@pytest.mark.parametrize("kind", [*LINES, *ENTRIES])
def test_a_hostile_line_of_a_manifest_is_refused(kind: str, single_shard: Files, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    write_files(folder, single_shard)
    (manifest,) = folder.glob("manifests/*/*")
    (line,) = unsealed(manifest.read_bytes())
    manifest.write_bytes(sealed(LINES[kind] if kind in LINES else line | ENTRIES[kind]))
    with pytest.raises(CacheError, match=r"damaged|invalid line for a shard"):
        read_all(folder, 5)


@pytest.mark.parametrize("kind", [*LINES, "a fingerprint of type number", "a deeply nested fingerprint"])
def test_a_hostile_header_of_a_cache_is_refused(kind: str, single_shard: Files, tmp_path: Path) -> None:
    folder, nested = tmp_path / "cache", b'{"format": 3, "fingerprint": ' + b'{"a": ' * 900 + b"1" + b"}" * 901
    write_files(folder, single_shard)
    more = {"a fingerprint of type number": {"format": 3, "fingerprint": 3}, "a deeply nested fingerprint": nested}
    (folder / "manifest.jsonl").write_bytes(sealed((LINES | more)[kind]))
    with pytest.raises(CacheError, match=r"damaged|has format|with other settings"):
        read_all(folder, 5)
    # It does not disturb the search for similar caches either.
    nearest = nearest_difference(tmp_path / "ours", FINGERPRINT)
    assert nearest is None or nearest[0] == folder


@fuzzed(200)
@given(
    changes=st.dictionaries(st.sampled_from(["shard", "records", "bytes", "crc32", "keys", "cost"]), odd_values),
    missing=st.sets(st.sampled_from(["shard", "records", "bytes", "crc32", "keys"]), max_size=1),
)
def test_a_changed_line_gives_a_record_or_a_cache_error(
    single_shard: Files, tmp_path: Path, changes: dict[str, Any], missing: set[str]
) -> None:
    folder = tmp_path / "cache"
    write_files(folder, single_shard)
    (manifest,) = folder.glob("manifests/*/*")
    (line,) = unsealed(manifest.read_bytes())
    manifest.write_bytes(sealed({name: value for name, value in (line | changes).items() if name not in missing}))
    with suppress(CacheError):
        for number, record in zip((5, 8), read_all(folder, 5, 8), strict=True):
            assert comparable(record) == comparable(annotation(number))
