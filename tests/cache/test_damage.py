"""Law 8 under attack: damaged files, hostile files, full disks and folders that vanish."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.errors import CacheError
from tests.cache.conftest import FINGERPRINT, Files, annotation, files_of, filled, fuzzed, key, laid_out, opened, stored

NUMBERS = (257, 677, 5, 6, 8)  # the first two make files of the same sizes


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """The files of a small cache: a header, two writers' manifests, a shard for each record."""
    folder = tmp_path_factory.mktemp("whole")
    filled(folder, *NUMBERS[:3], size=1)
    filled(folder, *NUMBERS[3:], size=1)
    return files_of(folder)


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
