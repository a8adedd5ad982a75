"""Law 8, damaged files: a cache returns what was written, or raises CacheError."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.cache.sealed import read_lines, seal
from distill.errors import CacheError
from tests.cache.conftest import (
    FINGERPRINT,
    Files,
    annotation,
    comparable,
    files_of,
    fuzzed,
    key,
    open_store,
    write_files,
    write_records,
)


def test_a_last_line_with_a_wrong_end_is_damage_and_half_a_line_is_none() -> None:
    line = seal({"a": 1})
    assert read_lines(Path("manifest"), line * 2) == ([{"a": 1}] * 2, 2 * len(line))
    assert read_lines(Path("manifest"), line + line[:-5]) == ([{"a": 1}], len(line))  # an interrupted write
    with pytest.raises(CacheError, match="its last line has no line end"):
        read_lines(Path("manifest"), line + line[:-1] + b"x")
    with pytest.raises(CacheError, match="line 1 has a wrong checksum"):
        read_lines(Path("manifest"), line.replace(b"1}", b"2}") + line)


NUMBERS = (257, 677, 5, 6, 8)  # the first two have files of equal sizes


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """The files of a small cache: a header, the manifests of two writers, a shard per record."""
    folder = tmp_path_factory.mktemp("intact")
    write_records(folder, *NUMBERS[:3], size=1)
    write_records(folder, *NUMBERS[3:], size=1)
    return files_of(folder)


@dataclass(frozen=True)
class Damage:
    """A change of a file, or of two."""

    kind: str
    which: int
    other: int
    place: float
    bit: int
    more: bytes

    def apply(self, files: Files) -> Files:
        shards = [name for name in files if not name.endswith(".jsonl")]
        manifests = [name for name in files if name.endswith(".jsonl")]
        names = {"swap": shards, "lines": manifests, "bytes": manifests, "remove": ["manifest.jsonl", *shards]}
        candidates = names.get(self.kind, list(files))
        name = candidates[self.which % len(candidates)]
        content, at = files[name], int(self.place * len(files[name]))
        lines = content.splitlines(keepends=True)
        if self.kind == "swap":
            same_kind = [n for n in shards if n != name and n.endswith(name[-8:])]
            second = same_kind[self.other % len(same_kind)]
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


@fuzzed(60)
@given(damage=damages)
def test_a_damaged_file_never_yields_another_value(intact: Files, tmp_path: Path, damage: Damage) -> None:
    read_damaged(intact, tmp_path, damage)


@pytest.mark.slow
@fuzzed(400)
@given(damage=damages)
def test_much_damage_never_yields_another_value(intact: Files, tmp_path: Path, damage: Damage) -> None:
    read_damaged(intact, tmp_path, damage)


def read_damaged(intact: Files, tmp_path: Path, damage: Damage) -> None:
    files = damage.apply(intact)
    write_files(tmp_path / "cache", files)
    try:
        store = open_store(tmp_path / "cache")
    except CacheError:
        return
    for number in NUMBERS:
        if key(number) not in store:
            assert is_cut_off(number, intact, files)
            continue
        try:
            record = store.read(key(number))
        except CacheError:
            assert store.check() != []
        else:
            assert comparable(record) == comparable(annotation(number))


def is_cut_off(number: int, before: Files, after: Files) -> bool:
    """Whether the line that listed a record is after the last complete line of its manifest."""
    encoded_key = base64.b64encode(bytes.fromhex(key(number)))
    (name,) = (name for name, content in before.items() if name.startswith("manifests/") and encoded_key in content)
    complete = after[name][: after[name].rfind(b"\n") + 1]
    return before[name].startswith(complete) and before[name].index(encoded_key) > len(complete)


def test_a_cache_without_its_header_is_refused(intact: Files, tmp_path: Path) -> None:
    write_files(
        tmp_path / "cache", Files({name: content for name, content in intact.items() if name != "manifest.jsonl"})
    )
    with pytest.raises(CacheError, match=r"manifest\.jsonl is missing"):
        open_store(tmp_path / "cache", FINGERPRINT | {"teacher": "another"})
