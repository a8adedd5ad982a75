"""Law 8 under attack: damaged files, hostile files, full disks and folders that vanish."""

from __future__ import annotations

import base64
import errno
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import numpy as np
import pytest
import torch
from conftest import LAYOUT, CountingTeacher, codec, compose, conf_names, environment, examples, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig
from safetensors.numpy import load, save
from test_annotate import shards, tiny
from test_cache import FINGERPRINT, annotation, filled, key, opened, stored
from torch.utils.data import DataLoader, Dataset

from distill.annotate import main
from distill.annotation.fill import Share, fill, open_source, plan
from distill.app.files import whole_file
from distill.cache.claims import Claims
from distill.cache.codecs.topk import TopK
from distill.cache.store import Store, nearest_difference
from distill.errors import CacheError
from distill.lessons.collate import collate
from distill.lessons.curriculum import prepare, teach
from distill.lessons.join import Join, Records
from distill.prompts.cues import Prompts
from distill.prompts.tokenizers import load_tokenizer
from distill.records import Annotation, Batch, Example, Request, Span, Target

NUMBERS = (257, 677, 5, 6, 8)  # the first two make files of the same sizes
MOST_BYTES = 64_000_000  # that reading files of a few kilobytes may take


def fuzzed(number: int) -> settings:
    """So many examples, the same each time."""
    unhealthy = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(
        max_examples=number, derandomize=True, deadline=None, database=None, suppress_health_check=unhealthy
    )


def sealed(line: Any) -> bytes:
    """A manifest line with the checksum that it should have."""
    body = line if isinstance(line, bytes) else json.dumps(line, sort_keys=True).encode()
    return b'{"crc32": %10d, "line": %s}\n' % (zlib.crc32(body), body)


def unsealed(manifest: bytes) -> list[Any]:
    return [json.loads(line)["line"] for line in manifest.splitlines()]


class Files(dict[str, bytes]):
    """The files of a folder by name."""

    def __repr__(self) -> str:
        return f"{len(self)} files"


def files_of(folder: Path) -> Files:
    return Files(
        {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file() and path.name[0] != "."}
    )


def laid_out(folder: Path, files: Files) -> None:
    """A folder with these files and nothing else."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """The files of a small cache: a header, two writers' manifests, a shard for each record."""
    folder = tmp_path_factory.mktemp("whole")
    filled(folder, *NUMBERS[:3], size=1)
    filled(folder, *NUMBERS[3:], size=1)
    return files_of(folder)


# Damage that nobody intends.


@dataclass(frozen=True)
class Damage:
    """Something that happens to one file, or to two."""

    kind: str
    which: int
    other: int
    place: float
    bit: int
    more: bytes

    def done_to(self, files: Files) -> Files:
        shards = [name for name in files if not name.endswith(".jsonl")]
        manifests = [name for name in files if name.endswith(".jsonl")]
        names = {"swap": shards, "lines": manifests, "bytes": manifests, "remove": ["manifest.jsonl", *shards]}
        among = names.get(self.kind, list(files))
        name = among[self.which % len(among)]
        content, at = files[name], int(self.place * len(files[name]))
        lines = content.splitlines(keepends=True)
        if self.kind == "swap":
            alike = [n for n in shards if n != name and n.endswith(name[-8:])]
            second = alike[self.other % len(alike)]
            return Files(files | {name: files[second], second: content})
        if self.kind == "remove":
            return Files({n: c for n, c in files.items() if n != name})
        damaged = {
            "flip": content[:at] + bytes([content[at] ^ 1 << self.bit]) + content[at + 1 :],
            "cut": content[:at],
            "empty": b"",
            "append": content + self.more,
            "lines": b"".join([*lines[::-1], *lines[: self.other % 3]]),
            "bytes": self.more,
        }
        return Files(files | {name: damaged[self.kind]})


damages = st.builds(
    Damage,
    st.sampled_from(["flip", "cut", "empty", "append", "swap", "lines", "bytes", "remove"]),
    st.integers(0, 9),
    st.integers(0, 9),
    st.floats(0, 1, exclude_max=True),
    st.integers(0, 7),
    st.binary(min_size=1, max_size=60) | st.sampled_from([b"\n", b"{}\n", b"\0" * 4096]),
)


@fuzzed(400)
@given(damage=damages)
def test_whatever_happens_to_a_file_no_other_value_is_read(whole: Files, tmp_path: Path, damage: Damage) -> None:
    files = damage.done_to(whole)
    laid_out(tmp_path / "cache", files)
    try:
        store = opened(tmp_path / "cache")
    except CacheError:
        return
    for number in NUMBERS:
        if key(number) not in store:
            assert is_torn_off(number, whole, files)
            continue
        try:
            found = stored(store.read(key(number)))
        except CacheError:
            found = stored(annotation(number))
            assert store.check() != []
        assert found == stored(annotation(number))


def is_torn_off(number: int, before: Files, after: Files) -> bool:
    """Whether the line that named a record stood where a manifest has no whole line any more."""
    entry = base64.b64encode(bytes.fromhex(key(number)))
    (name,) = (name for name, content in before.items() if name.startswith("manifest-") and entry in content)
    kept = after[name][: after[name].rfind(b"\n") + 1]
    return before[name].startswith(kept) and before[name].index(entry) > len(kept)


def test_a_cache_without_its_header_is_refused_and_not_taken_over(whole: Files, tmp_path: Path) -> None:
    laid_out(tmp_path / "cache", Files({name: content for name, content in whole.items() if name != "manifest.jsonl"}))
    with pytest.raises(CacheError, match=r"manifest\.jsonl is missing"):
        opened(tmp_path / "cache", FINGERPRINT | {"teacher": "another"})


# Damage that somebody intends: every checksum is right.


def forged(folder: Path, content: bytes) -> None:
    """Put other arrays in the place of the only shard's, and the checksums that belong to them."""
    (shard,), (manifest,) = folder.glob("*.safetensors"), folder.glob("manifest-*")
    shard.write_bytes(content)
    (line,) = unsealed(manifest.read_bytes())
    line["bytes"]["safetensors"] = len(content)
    line["crc32"] = {"parquet": line["crc32"]["parquet"]} | dict(checksums(content))
    manifest.write_bytes(sealed(line))


def checksums(content: bytes) -> Iterator[tuple[str, int]]:
    """Those of the header and of every array that lies somewhere, as a reader that believes anything finds them."""
    length = int.from_bytes(content[:8], "little")
    yield "header", zlib.crc32(content[: 8 + length])
    with suppress(ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        for name, found in json.loads(content[8 : 8 + length]).items():
            start, stop = (max(0, int(offset)) for offset in found["data_offsets"])
            yield name, zlib.crc32(content[8 + length :][start:stop])


def with_header(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def apart(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The header's entries, and what follows it."""
    stop = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:stop]), content[stop:]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """The files of a cache of one shard with two records."""
    folder = tmp_path_factory.mktemp("one")
    assert filled(folder, 5, 8).check() == []  # by now Arrow has its threads
    return files_of(folder)


@contextmanager
def little_memory() -> Iterator[None]:
    """In this block no more than `MOST_BYTES` can be had."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    status = Path("/proc/self/status").read_text().split()
    used = 1024 * int(status[status.index("VmData:") + 1])
    resource.setrlimit(resource.RLIMIT_DATA, (used + MOST_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def read_all(folder: Path, *numbers: int) -> list[Annotation]:
    """The records, or the CacheError; nothing else may come of a cache, whatever is in it."""
    with little_memory():
        store = opened(folder)
        return [store.read(key(number)) for number in numbers]


def entry(kind: str, shape: Any, *offsets: Any) -> dict[str, Any]:
    return {"dtype": kind, "shape": shape, "data_offsets": list(offsets)}


# What becomes of the entries of a header, two of which lie like this: length.answer [16, 24], token [32, ...].
HOSTILE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no dimension": lambda e: e | {"token": entry("I32", [], 32, 36)},
    "two dimensions": lambda e: e | {"token": e["token"] | {"shape": [*e["token"]["shape"], 1]}},
    "lengths of two dimensions": lambda e: e | {"length.answer": e["length.answer"] | {"shape": [1, 2]}},
    "ends of two dimensions": lambda e: e | {"end.position": e["end.position"] | {"shape": [2, 1]}},
    "a hundred dimensions": lambda e: e | {"more": entry("U8", [1] * 100, 0, 1)},
    "an extent beyond numbers": lambda e: e | {"more": entry("U8", [0, 10**30], 0, 0)},
    "a huge number": lambda e: e | {"more": entry("U8", [10**4000], 0, 1)},
    "a shape that is a text": lambda e: e | {"more": entry("U8", "4", 0, 4)},
    "a shape that is an object": lambda e: e | {"more": entry("U8", {"4": 0}, 0, 4)},
    "offsets that are texts": lambda e: e | {"more": entry("U8", [4], "0", "4")},
    "offsets that are fractions": lambda e: e | {"more": entry("U8", [4], 0.5, 4.5)},
    "offsets that are no numbers": lambda e: e | {"more": entry("U8", [4], float("nan"), 4)},
    "one offset": lambda e: e | {"more": entry("U8", [4], 0)},
    "three offsets": lambda e: e | {"more": entry("U8", [4], 0, 4, 8)},
    "overlapping": lambda e: e | {"more": entry("U8", [4], 0, 4)},
    "the same bytes twice": lambda e: e | {"token": e["position.id"] | {"dtype": "I32", "shape": [24]}},
    "lengths that are fractions": lambda e: e | {"length.answer": e["length.answer"] | {"dtype": "F32"}},
    "ids that are fractions": lambda e: e | {"token": e["token"] | {"dtype": "F32"}},
    "ends that are bytes": lambda e: e | {"end.position": e["end.position"] | {"dtype": "U8", "shape": [16]}},
    "a type that is a list": lambda e: e | {"more": entry(["U8"], [4], 0, 4)},  # type: ignore[arg-type]
    "an entry that is a list": lambda e: e | {"more": []},
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
def test_a_hostile_header_is_refused(name: str, one: Files, tmp_path: Path) -> None:
    laid_out(tmp_path / "cache", one)
    (arrays,) = (content for file, content in one.items() if file.endswith(".safetensors"))
    entries, data = apart(arrays)
    forged(tmp_path / "cache", with_header(json.dumps(HOSTILE[name](entries)).encode(), data))
    with pytest.raises(CacheError, match=r"damaged|wanted are|does not fit together"):
        read_all(tmp_path / "cache", 5, 8)


BRACKETS = b'{"token": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"


@pytest.mark.parametrize("header", [BRACKETS, b'{"a": 1, ' * 50_000, b"9" * 100_000, b'"\\ud800"', b"{}", b""])
def test_a_header_that_is_no_table_of_arrays_is_refused(header: bytes, one: Files, tmp_path: Path) -> None:
    laid_out(tmp_path / "cache", one)
    forged(tmp_path / "cache", with_header(header, bytes(64)))
    with pytest.raises(CacheError, match="is damaged"):
        read_all(tmp_path / "cache", 5)


def test_an_array_that_is_named_twice_is_refused(one: Files, tmp_path: Path) -> None:
    laid_out(tmp_path / "cache", one)
    (arrays,) = (content for file, content in one.items() if file.endswith(".safetensors"))
    entries, data = apart(arrays)
    header = json.dumps(entries).encode()
    forged(tmp_path / "cache", with_header(b'{"token": {}, ' + header[1:], data))
    with pytest.raises(CacheError, match="is damaged"):
        read_all(tmp_path / "cache", 5)


odd_numbers = st.sampled_from([-1, 0, 1, 2, 3, 4, 8, 2**31, 2**63, 2**64, 10**30, float("nan"), float("inf"), 1.5])
odd_values = odd_numbers | st.none() | st.booleans() | st.text(max_size=3) | st.lists(odd_numbers, max_size=3)


@st.composite
def entries_changed(draw: st.DrawFn) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A few changes of any of a header's entries."""
    fields = st.sampled_from(["dtype", "shape", "data_offsets", "name", "copy", "drop"])
    kinds = st.sampled_from(["U8", "I8", "U16", "F16", "I32", "U32", "F32", "I64", "F64", "BOOL", "", None])
    offsets = st.integers(0, 200) | odd_numbers
    changes = draw(
        st.lists(
            st.tuples(st.integers(0, 99), fields, kinds, st.lists(offsets, max_size=3), odd_values),
            min_size=1,
            max_size=3,
        )
    )

    def changed(entries: dict[str, Any]) -> dict[str, Any]:
        entries = dict(entries)
        for which, field, kind, numbers, value in changes:
            name = sorted(entries)[which % len(entries)]
            if field == "drop" and len(entries) > 1:
                del entries[name]
            elif field in ("name", "copy"):
                new = str(value) if which % 2 else sorted(entries)[which // 2 % len(entries)]
                entries[new] = entries[name]
            else:
                entries[name] = entries[name] | {
                    field: {"dtype": kind, "shape": numbers}.get(field, numbers if which % 3 else value)
                }
        return entries

    return changed


@fuzzed(200)
@given(change=entries_changed())
def test_a_changed_header_gives_a_record_or_a_cache_error(
    one: Files, tmp_path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    laid_out(tmp_path / "cache", one)
    (arrays,) = (content for file, content in one.items() if file.endswith(".safetensors"))
    entries, data = apart(arrays)
    forged(tmp_path / "cache", with_header(json.dumps(change(entries)).encode(), data))
    with suppress(CacheError):
        assert [found.key for found in read_all(tmp_path / "cache", 5, 8)] == [key(5), key(8)]


# Arrays that no codec would make, in a file that is right in every other way.


def given_to(name: str, folder: Path) -> None:
    """Make a cache of two records with this codec."""
    made = codec(name)
    records = []
    for number in (5, 9):
        rng = np.random.default_rng(number)
        logits_NV = torch.from_numpy(4 * rng.normal(size=(number, 300)).astype(np.float32))
        uniform_N = torch.from_numpy(rng.random(number))
        target = Target(tuple(range(number)), made.cut(logits_NV.log_softmax(-1), uniform_N))
        records.append(Annotation(key(number), {"answer": target}, "so"))
    store = Store(folder, FINGERPRINT, made)
    with store.writing() as writer:
        writer.add(records)
    assert store.check() == []


@pytest.fixture(scope="module")
def by_codec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Caches by each codec."""
    folder = tmp_path_factory.mktemp("by_codec")
    for name in conf_names("cache"):
        given_to(name, folder / name)
    return folder


EXTREMES = (-(2**62), -1, 0, 1, 15, 16, 254, 255, 256, 65535, 2**31 - 1, 2**62)
KINDS = ("u1", "i1", "<u2", "<i4", "<u4", "<f4", "<f2", "<i8")
Changes = list[tuple[str, int, int, int]]


def changed(arrays: dict[str, np.ndarray], changes: Changes) -> dict[str, np.ndarray]:
    arrays = dict(arrays)
    for how, which, place, extreme in changes:
        name = sorted(arrays)[which % len(arrays)]
        array, number = arrays[name].copy(), EXTREMES[extreme % len(EXTREMES)]
        if how == "value" and array.size:
            array.ravel()[place % array.size] = np.array(number).astype(array.dtype)
        elif how == "every value":
            array[...] = np.array(number).astype(array.dtype)
        elif how == "row" and len(array):
            array = np.delete(array, place % len(array), 0)
        elif how == "rows":
            array = np.concatenate([array, array[:1]])
        elif how == "type":
            array = array.astype(KINDS[extreme % len(KINDS)])
        elif how == "shape":
            array = [array.ravel(), array[None], array[..., None], array.T, array[..., :1]][extreme % 5]
        elif how == "name":
            arrays[f"{name}{place}"] = arrays.pop(name)
            continue
        arrays[name] = np.ascontiguousarray(array)
    return arrays


@fuzzed(300)
@given(
    name=st.sampled_from(conf_names("cache")),
    changes=st.lists(
        st.tuples(
            st.sampled_from(["value", "every value", "row", "rows", "type", "shape", "name"]),
            *(st.integers(0, 99) for _ in range(3)),
        ),
        min_size=1,
        max_size=3,
    ),
)
def test_arrays_of_any_form_give_a_record_or_a_cache_error(
    by_codec: Path, tmp_path: Path, name: str, changes: Changes
) -> None:
    laid_out(tmp_path / "cache", files_of(by_codec / name))
    (shard,) = tmp_path.glob("cache/*.safetensors")
    with np.errstate(all="ignore"):
        content = save(changed(load(shard.read_bytes()), changes))
    forged(tmp_path / "cache", content)
    made = codec(name)
    with little_memory(), suppress(CacheError):
        store = Store(tmp_path / "cache", FINGERPRINT, made)
        for number in (5, 9):
            for target in store.read(key(number)).targets.values():
                assert target.soft is None or len(target.soft) == len(target.token_ids)


# Lines that a manifest should not have.


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
    with pytest.raises(CacheError, match="in a way that this program does not"):
        read_all(folder, 5)


@pytest.mark.parametrize("name", ["manifest.jsonl", "manifest-", ".safetensors", ".parquet"])
def test_no_link_is_followed_out_of_a_cache(name: str, one: Files, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    laid_out(folder, one)
    (file,) = (path for path in folder.iterdir() if name in path.name)
    file.rename(tmp_path / "outside")
    file.symlink_to(tmp_path / "outside")
    with pytest.raises(CacheError, match=rf"{file.name} .*no plain file"):
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
    with pytest.raises(CacheError, match=r"damaged|in a way that this program does not"):
        read_all(folder, 5)


@pytest.mark.parametrize("what", [*LINES, "a fingerprint that is none", "a fingerprint of many layers"])
def test_a_hostile_header_of_a_cache_is_refused(what: str, one: Files, tmp_path: Path) -> None:
    folder, layers = tmp_path / "cache", b'{"format": 2, "fingerprint": ' + b'{"a": ' * 900 + b"1" + b"}" * 901
    laid_out(folder, one)
    more = {"a fingerprint that is none": {"format": 2, "fingerprint": 3}, "a fingerprint of many layers": layers}
    (folder / "manifest.jsonl").write_bytes(sealed((LINES | more)[what]))
    with pytest.raises(CacheError, match=r"damaged|has format|in another way"):
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


# Disks that are full, or cannot be written, or go away.


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A file system of its own: call it with mount options, first to have it and again to change it."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mounted(options: str) -> Path:
        again = "remount," if folder.is_mount() else ""
        line = ["mount", "-t", "tmpfs", "-o", f"{again}{options}", "none", str(folder)]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"THE FULL DISK WAS NOT TESTED: nothing can be mounted here ({done.stderr.strip()})")
        return folder

    yield mounted
    if folder.is_mount():
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def annotating(root: Path, cache: Path, teacher: Path, *more: str) -> list[str]:
    """The annotate command for this cache folder."""
    return [*(o for o in tiny(root, teacher, *more) if not o.startswith("cache.dir")), f"cache.dir={cache}"]


def here(root: Path, cache: Path, teacher: Path, *more: str) -> None:
    """The same in this process."""
    main(compose(*annotating(root, cache, teacher, *more), f"root={root}", name="annotate"))


def stored_in(root: Path, cache: Path, teacher: Path) -> Store:
    return open_source(compose(*annotating(root, cache, teacher), f"root={root}", name="annotate")).store


@pytest.mark.slow
def test_a_full_disk_is_one_message_and_the_next_run_goes_on(
    disk: Callable[[str], Path], tmp_path: Path, teacher_folder: Path
) -> None:
    cache = disk("size=96k") / "cache"
    line = annotating(tmp_path, cache, teacher_folder)
    done = run(tmp_path, *line, command="annotate")
    assert done.returncode == 4
    assert "Traceback" not in done.stderr
    (message,) = (text for text in done.stderr.splitlines() if "No space left on device" in text)
    assert re.search(rf"{cache}\S*\. .*free space.* then run the same command again", message)
    there = shards(cache)
    store = stored_in(tmp_path, cache, teacher_folder)
    assert len(store) > 0
    assert store.check() == []
    assert not list(cache.rglob("*.tmp"))
    assert not list(cache.glob("claims/[0-9a-f]*"))
    disk("ro")
    with pytest.raises(OSError, match="Read-only file system") as raised:
        here(tmp_path, cache, teacher_folder)
    assert str(raised.value.filename).startswith(str(cache))
    disk("rw,size=8m")
    done = run(tmp_path, *line, command="annotate")
    assert done.returncode == 0, done.stderr
    here(tmp_path, tmp_path / "undisturbed", teacher_folder)
    assert shards(cache) == shards(tmp_path / "undisturbed")
    assert shards(cache).items() >= there.items()
    assert stored_in(tmp_path, cache, teacher_folder).check() == []


def test_a_whole_cache_can_be_read_where_nothing_can_be_written(
    disk: Callable[[str], Path],
    tmp_path: Path,
    teacher_folder: Path,
    configured: Callable[..., DictConfig],
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = configured(f"cache.dir={disk('size=8m')}/cache", "loss=[answer,kl,rationale]")
    first = teach(prepare(config, tmp_path))
    with pytest.raises(OSError, match="Read-only file system"):
        (disk("ro") / "file").touch()
    job = prepare(config, tmp_path)
    teacher = CountingTeacher(job.source.teacher)
    again = teach(replace(job, source=replace(job.source, teacher=teacher)))
    assert teacher.num_loads == 0
    assert [lesson.example_id for lesson in again.train] == [lesson.example_id for lesson in first.train]
    assert [lesson.counts() for lesson in again.train] == [lesson.counts() for lesson in first.train]
    assert "records are there; the teacher is not loaded" in capsys.readouterr().err
    assert job.source.store.check() == []


@pytest.mark.slow
def test_a_folder_that_goes_away_is_one_message_and_what_was_in_it_is_whole(
    tmp_path: Path, teacher_folder: Path
) -> None:
    cache, elsewhere = tmp_path / "cache", tmp_path / "elsewhere"
    line = annotating(tmp_path, cache, teacher_folder, "task.examples.num_unlabelled=400")
    command = [sys.executable, "-m", "distill.annotate", *line]
    environment = os.environ | {"DISTILL_ROOT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while process.poll() is None and len(list(cache.glob("*.parquet"))) < 3:
        time.sleep(0.01)
    cache.rename(elsewhere)
    _, errors = process.communicate(timeout=60)
    assert process.returncode in (3, 4)
    assert "Traceback" not in errors
    assert str(cache) in errors.strip().splitlines()[-1]
    store = stored_in(tmp_path, elsewhere, teacher_folder)
    assert len(store) > 0
    assert store.check() == []


def test_a_write_that_fails_names_its_file_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as raised, whole_file(tmp_path / "file"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert raised.value.filename == str(tmp_path / "file")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["nothing", "a file", "an empty folder"])
def test_a_writer_whose_folder_is_gone_says_so(what: str, tmp_path: Path) -> None:
    folder = tmp_path / "cache"

    def interrupted() -> None:
        with opened(folder).writing() as writer:
            writer.add([annotation(1)])
            writer.flush()
            shutil.rmtree(folder)
            if what != "nothing":
                folder.touch() if what == "a file" else folder.mkdir()
            writer.add([annotation(2)])
            writer.flush()

    with pytest.raises(CacheError, match=rf"{folder}\S* is (not there any more|missing)"):
        interrupted()


# In the right order, by the right clock, once.


def test_a_shard_is_on_disk_under_its_name_before_a_line_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a power cut would leave: contents are synced before names, names of shards before the line."""
    folder, synced, named, checked = tmp_path / "cache", set[int](), dict[str, int](), list[str]()
    sync, replaces = os.fsync, {name: getattr(os, name) for name in ("replace", "rename", "link")}

    def fsync(handle: int) -> None:
        path = Path(f"/proc/self/fd/{handle}").resolve()
        if path.name.startswith("manifest-"):
            for line in unsealed(path.read_bytes()):
                assert {f"{line['shard']}.safetensors", f"{line['shard']}.parquet"} <= set(named)
                assert all(number == 0 for number in named.values())
                checked.append(line["shard"])
            named[path.name] = named.get(path.name, 1)
        sync(handle)
        synced.add(path.stat().st_ino)
        if path == folder:
            named.update(dict.fromkeys(named, 0))

    def naming(how: str) -> Callable[..., None]:
        def name(source: Any, target: Any, **others: Any) -> None:
            replaces[how](source, target, **others)
            if Path(target).suffix in {".safetensors", ".parquet", ".jsonl"}:
                assert Path(target).stat().st_ino in synced
                named[Path(target).name] = 1  # until the folder is synced

        return name

    monkeypatch.setattr(os, "fsync", fsync)
    for how in replaces:
        monkeypatch.setattr(os, how, naming(how))
    store = opened(folder)
    with store.writing() as writer:
        for number in (1, 2, 3):
            writer.add([annotation(number)])
            writer.flush()
            assert not any(named.values())
    assert set(checked) == {path.stem for path in folder.glob("*.parquet")}
    assert len(set(checked)) == 3


@pytest.mark.parametrize("suffix", ["safetensors", "parquet"])
def test_a_file_of_another_size_is_found_when_a_cache_is_opened(suffix: str, one: Files, tmp_path: Path) -> None:
    laid_out(tmp_path / "cache", one)
    (file,) = tmp_path.glob(f"cache/*.{suffix}")
    for content in (b"", file.read_bytes()[:-1], file.read_bytes() + b"x"):
        file.write_bytes(content)
        with pytest.raises(CacheError, match=rf"{file.name} is damaged: its size"):
            opened(tmp_path / "cache")


def test_texts_of_other_keys_are_refused(one: Files, tmp_path: Path) -> None:
    laid_out(tmp_path / "cache", one)
    (manifest,) = tmp_path.glob("cache/manifest-*")
    (line,) = unsealed(manifest.read_bytes())
    line["keys"] = base64.b64encode(bytes.fromhex(key(8) + key(5))).decode()
    manifest.write_bytes(sealed(line))
    store = opened(tmp_path / "cache")
    for number in (5, 8):
        with pytest.raises(CacheError, match="its keys are not the manifest's"):
            store.read(key(number))


@pytest.mark.parametrize("days", [-1, 1])
def test_the_clock_of_a_machine_that_is_wrong_kills_no_claim_and_keeps_none_alive(
    days: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clocks = {name: getattr(time, name) for name in ("time", "time_ns")}
    for name, clock in clocks.items():
        ahead = days * 86_400 * (10**9 if name == "time_ns" else 1)
        monkeypatch.setattr(time, name, lambda clock=clock, ahead=ahead: clock() + ahead)
    for name, age in (("young", 5), ("old", 60)):
        (tmp_path / name).write_text(json.dumps({"host": "elsewhere", "pid": 2**22 + 1}))  # no process here has it
        touched = clocks["time"]() - age
        os.utime(tmp_path / name, (touched, touched))
    claims = Claims(tmp_path, seconds=30.0)
    assert not claims.take("young")
    assert claims.take("old")


class Watching(CountingTeacher):
    """A teacher in whose presence something happens each time it is asked."""

    def __init__(self, teacher: Any, happens: Callable[[int], None]) -> None:
        super().__init__(teacher)
        self._happens, self._calls = happens, 0

    def annotate(self, requests: Sequence[Request]) -> list[Annotation]:
        self._calls += 1
        self._happens(self._calls)
        return super().annotate(requests)


GROUPED = ("teacher.group_size=2", "teacher.batch_size=2")


def test_what_another_process_makes_meanwhile_is_not_made_again(configured: Callable[..., DictConfig]) -> None:
    source = open_source(configured(*GROUPED))
    groups = plan([source.prompts.request(example, "answer") for example in source.splits.train], 2)
    folder, made = source.store.folder, list[str]()

    def meanwhile(call: int) -> None:
        if call == 1:
            free = [group for group in groups if not (folder / "claims" / group.name).exists()]
            made.extend(group.name for group in free)
            other = open_source(configured(*GROUPED))
            fill(other, {"answer": [request.example for group in free for request in group.requests]})

    fill(replace(source, teacher=Watching(source.teacher, meanwhile)), {"answer": source.splits.train})
    assert 0 < len(made) < len(groups)
    lines = [line for path in folder.glob("manifest-*") for line in unsealed(path.read_bytes()) if "shard" in line]
    assert len(lines) == len(groups) == 6
    assert len({line["keys"] for line in lines}) == 6


def test_what_another_process_made_just_before_a_claim_is_not_made_again(
    configured: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(configured(*GROUPED))
    last = plan([source.prompts.request(example, "answer") for example in source.splits.train], 2)[-1]
    take, just_before = Claims.take, list[str]()

    def taking(self: Claims, name: str) -> bool:
        if name == last.name and not just_before:
            just_before.append(name)
            fill(open_source(configured(*GROUPED)), {"answer": [request.example for request in last.requests]})
        return take(self, name)

    monkeypatch.setattr(Claims, "take", taking)
    fill(source, {"answer": source.splits.train})
    assert just_before
    manifests = source.store.folder.glob("manifest-*")
    lines = [line for path in manifests for line in unsealed(path.read_bytes()) if "shard" in line]
    assert len(lines) == len({line["keys"] for line in lines}) == 6
    assert not list(source.store.folder.glob("claims/[0-9a-f]*"))


def test_a_claim_is_given_up_as_soon_as_its_group_is_made_and_when_work_breaks_off(
    configured: Callable[..., DictConfig],
) -> None:
    source = open_source(configured(*GROUPED))
    claimed: list[int] = []

    def watched(call: int) -> None:
        claimed.append(len(list(source.store.folder.glob("claims/[0-9a-f]*"))))
        if call == 6:
            raise RuntimeError("broken off")

    with pytest.raises(RuntimeError, match="broken off"):
        fill(replace(source, teacher=Watching(source.teacher, watched)), {"answer": source.splits.train})
    assert 1 <= min(claimed) <= max(claimed) <= 3  # a few that are at work or next, of six
    assert not list(source.store.folder.glob("claims/[0-9a-f]*"))
    assert len(open_source(configured(*GROUPED)).store) == 10


@pytest.mark.slow
def test_a_share_is_the_same_whatever_is_there_already(configured: Callable[..., DictConfig]) -> None:
    source = open_source(configured())
    every = source.splits.train

    def made(cache: str, part: int, *there: Example) -> set[str]:
        source = open_source(configured(*GROUPED, f"cache.dir={configured().root}/{cache}{part}"))
        if there:
            fill(source, {"answer": there})
        fill(source, {"answer": every}, share=Share(part, 2))
        return {e.id for e in every if source.prompts.request(e, "answer").key in source.store}

    fresh = [made("fresh", part) for part in (1, 2)]
    assert fresh[0] | fresh[1] == {example.id for example in every}
    assert not fresh[0] & fresh[1]
    assert made("begun", 1, *every[:3]) == fresh[0] | {example.id for example in every[:3]}


# Read by many.


@final
class Steps(Dataset[Batch]):
    """Batches of lessons that are read from a cache when they are wanted."""

    def __init__(self, join: Join, store: Store, given: Sequence[Example]) -> None:
        self._join, self._store, self._given = join, store, given

    def __len__(self) -> int:
        return len(self._given) // 4

    def __getitem__(self, number: int) -> Batch:
        part = self._given[4 * number : 4 * number + 4]
        return collate(self._join.lessons(part), {("answer", "soft"): number}, 0, self._store.soft_targets)


def lesson_prompts(folder: Path) -> Prompts:
    return Prompts(load_tokenizer(folder), LAYOUT, (), max_length=256, too_long="drop")


def read_by_workers(folder: Path, tokenizer: Path) -> None:
    """Read a cache in workers that are forked, and then here; the batches must be the same."""
    prompts, given = lesson_prompts(tokenizer), examples(24)
    requests: dict[tuple[str, Span], Request] = {(e.id, "answer"): prompts.request(e, "answer") for e in given}
    needed: Any = frozenset({("answer", "labels"), ("answer", "soft")})
    store = Store(folder, FINGERPRINT, TopK(k=4, temperature=1.0))
    settings: Any = {"soft_teacher": None, "rationales": {}, "answer": "direct", "needed": needed}
    join = Join(prompts=prompts, teacher=Records(store, requests), **settings)
    loaders = [DataLoader(Steps(join, store, given), batch_size=None, num_workers=number) for number in (2, 0)]
    there, here = (list(loader) for loader in loaders)
    assert len(there) == len(here) == 6
    for left, right in zip(there, here, strict=True):
        assert left.counts == right.counts
        assert left.example_ids == right.example_ids
        for name in ("input_ids_BT", "mask_BT", "sequence_N", "before_N", "label_N", "is_labelled_N", "is_soft_N"):
            assert torch.equal(getattr(left, name), getattr(right, name))
        assert left.soft.ends_N.tolist() == right.soft.ends_N.tolist()
        for name in ("position_E", "ids_E", "logprobs_E", "tail_N"):
            assert torch.equal(getattr(left.soft, name), getattr(right.soft, name))


@pytest.mark.slow
def test_workers_read_from_a_cache_what_one_process_reads(tmp_path: Path, student_folder: Path) -> None:
    made, prompts = TopK(k=4, temperature=1.0), lesson_prompts(student_folder)
    with Store(tmp_path, FINGERPRINT, made).writing() as writer:
        for number, example in enumerate(examples(24)):
            ids = prompts.answer_ids(example.answer or "")
            soft = made.cut((3 * torch.randn(len(ids), 300)).log_softmax(-1), torch.zeros(len(ids)).double())
            request = prompts.request(example, "answer")
            writer.add([Annotation(request.key, {"answer": Target(ids, soft)}, example.answer)])
            if number % 5 == 4:
                writer.flush()
    # Only a process without threads may fork.
    line = [sys.executable, __file__, str(tmp_path), str(student_folder)]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


if __name__ == "__main__":
    read_by_workers(Path(sys.argv[1]), Path(sys.argv[2]))
