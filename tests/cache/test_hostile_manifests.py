"""Law 8 under attack: damaged files, hostile files, full disks and folders that vanish."""

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
    fuzzed,
    laid_out,
    odd_values,
    read_all,
    sealed,
    stored,
    unsealed,
)

TRICKS = {
    "above": "../{name}",
    "above and back": "../cache/{name}",
    "absolute": "{outside}/{name}",
    "here": "./{name}",
    "with an end": "{name}\0",
    "with a line": "{name}\n",
    "long": "a" * 300,
    "upper": "ABCDEF0123456789",
    "wide digits": "０１２３４５６７８９abcdef",
    "dots that are none": "․․/{name}",
    "nothing": "",
    "a dot": ".",
    "a drive": "C:{name}",
    "another slash": "..\\{name}",
    "home": "~/{name}",
}


@pytest.mark.parametrize("trick", TRICKS)
def test_a_name_that_no_shard_has_opens_no_other_file(trick: str, one: Files, tmp_path: Path) -> None:
    """The files that it would lead to are there, and right."""
    folder, outside = tmp_path / "cache", tmp_path / "outside"
    laid_out(folder, one)
    (manifest,) = folder.glob("manifest-*")
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


@pytest.mark.parametrize("name", ["manifest.jsonl", "manifest-", ".safetensors", ".parquet"])
def test_no_link_is_followed_out_of_a_cache(name: str, one: Files, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    laid_out(folder, one)
    (file,) = (path for path in folder.iterdir() if name in path.name)
    file.rename(tmp_path / "outside")
    file.symlink_to(tmp_path / "outside")
    with pytest.raises(CacheError, match=rf"{file.name} is .*(symbolic link|not a regular file)"):
        read_all(folder, 5)


LINES: dict[str, Any] = {
    "a number": 5,
    "a text that names a shard": "shard and cost",
    "a list that names a cost": ["cost"],
    "nothing": None,
    "infinity": float("inf"),
    "no JSON": b"{",
    "no text": b"\xff\xfe{}",
    "nested": b"[" * 100_000 + b"]" * 100_000,
    "an empty object": {},
    "a cost that is none": {"cost": 5},
    "a cost without its numbers": {"cost": {}},
}


ENTRIES: dict[str, Any] = {
    "checksums as a list": {"crc32": ["header", "parquet"]},
    "checksums as a text": {"crc32": "header parquet"},
    "checksums that are texts": {"crc32": {"header": "1", "parquet": "2"}},
    "no checksums": {"crc32": {}},
    "sizes as a list": {"bytes": [1, 2]},
    "sizes that are fractions": {"bytes": {"safetensors": 1.5, "parquet": 1.5}},
    "sizes below nothing": {"bytes": {"safetensors": -1, "parquet": -1}},
    "sizes beyond everything": {"bytes": {"safetensors": 10**400, "parquet": 10**400}},
    "records that are none": {"records": float("nan")},
    "records beyond numbers": {"records": float("inf")},
    "records as a list": {"records": [2]},
    "a fraction of a record": {"records": 2.5},
    "less than no records": {"records": -2},
    "too many records": {"records": 10**400},
    "keys as a list": {"keys": ["AAAA"]},
    "keys in other letters": {"keys": "ééééé"},
    "a name that is a number": {"shard": 1},
    "a name that is a list": {"shard": ["0123456789abcdef"]},
}


@pytest.mark.parametrize("what", [*LINES, *ENTRIES])
def test_a_hostile_line_of_a_manifest_is_refused(what: str, one: Files, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    laid_out(folder, one)
    (manifest,) = folder.glob("manifest-*")
    (line,) = unsealed(manifest.read_bytes())
    manifest.write_bytes(sealed(LINES[what] if what in LINES else line | ENTRIES[what]))
    with pytest.raises(CacheError, match=r"damaged|invalid line for a shard"):
        read_all(folder, 5)


@pytest.mark.parametrize("what", [*LINES, "a fingerprint that is none", "a fingerprint of many layers"])
def test_a_hostile_header_of_a_cache_is_refused(what: str, one: Files, tmp_path: Path) -> None:
    folder, layers = tmp_path / "cache", b'{"format": 2, "fingerprint": ' + b'{"a": ' * 900 + b"1" + b"}" * 901
    laid_out(folder, one)
    more = {"a fingerprint that is none": {"format": 2, "fingerprint": 3}, "a fingerprint of many layers": layers}
    (folder / "manifest.jsonl").write_bytes(sealed((LINES | more)[what]))
    with pytest.raises(CacheError, match=r"damaged|has format|with other settings"):
        read_all(folder, 5)
    # The same beside a cache that is asked for.
    nearest = nearest_difference(tmp_path / "ours", FINGERPRINT)
    assert nearest is None or nearest[0] == folder


@fuzzed(200)
@given(
    changes=st.dictionaries(st.sampled_from(["shard", "records", "bytes", "crc32", "keys", "cost"]), odd_values),
    gone=st.sets(st.sampled_from(["shard", "records", "bytes", "crc32", "keys"]), max_size=1),
)
def test_a_changed_line_gives_a_record_or_a_cache_error(
    one: Files, tmp_path: Path, changes: dict[str, Any], gone: set[str]
) -> None:
    folder = tmp_path / "cache"
    laid_out(folder, one)
    (manifest,) = folder.glob("manifest-*")
    (line,) = unsealed(manifest.read_bytes())
    manifest.write_bytes(sealed({name: value for name, value in (line | changes).items() if name not in gone}))
    with suppress(CacheError):
        for number, found in zip((5, 8), read_all(folder, 5, 8), strict=True):
            assert stored(found) == stored(annotation(number))
