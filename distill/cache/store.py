"""Annotations on disk, addressed by key: filled by many writers, resumed, verified, refused, read at random.

A cache is a folder:

    manifest.jsonl              one line: {"format": 2, "fingerprint": {...}}
    manifest-<writer>.jsonl     what one writer made: a line per shard (see `shard`); {"cost": {...}};
                                {"struck": <manifest>, "shard": <shard>}: that line there counts no more
    <shard>.safetensors, .parquet
    claims/<group>              who is at work on which group (see `claims`)

Each line carries the CRC-32 of the rest of it. A shard is written under temporary names, synced and renamed, and
only then named in its writer's manifest: what no manifest names does not exist, and a torn last line is no line.
No file is written by two processes. Two that make the same records make the same shard. Format 1 is not read.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, final

import numpy as np

from distill.app.files import sync_folder, whole_file
from distill.cache import Codec
from distill.cache.claims import Claims
from distill.cache.index import KEY_BYTES, Index
from distill.cache.remote import Remote
from distill.cache.shard import SUFFIXES, Shard, axis_of, write_shard
from distill.errors import CacheError
from distill.records import Annotation, Group, Place, Request, SoftTargets, unique_requests

FORMAT = 2
_DAY_SECONDS = 86_400
_MOST_OPEN = 4096
_MOST_LINES = 256


@final
class Store:
    """One cache folder, made by one teacher in one way."""

    def __init__(
        self,
        folder: Path,
        fingerprint: Mapping[str, Any],
        codec: Codec,
        *,
        url: str | None = None,
        claim_seconds: float = 600.0,
    ) -> None:
        """Open the folder, or begin it; raises CacheError where something else made it or it is damaged.

        Opening looks at the manifests and at the sizes of files; a shard's checksums are looked at when it is read.
        With `url`, which fsspec understands, the cache is there, and the folder is a copy of what was read or made.
        """
        self.folder, self.place = folder, url or str(folder)
        self._remote = Remote(url, folder) if url else None
        self.fingerprint = json.loads(json.dumps(fingerprint))
        self.claims = Claims(folder / "claims", seconds=claim_seconds)
        self._codec = codec
        self._index = Index()
        self._shards: dict[str, Shard] = {}
        self._struck: set[tuple[str, str]] = set()
        self._in_order: list[Shard] = []
        self._num_rows = 0
        self._starts: list[int] = []  # the number of each shard's first record
        self._open = OrderedDict[str, Shard]()
        self._read_bytes: dict[Path, int] = {}
        self.costs: list[dict[str, Any]] = []  # what each filling took
        self.refresh()

    @property
    def digest(self) -> str:
        """The fingerprint in twelve hexadecimal digits."""
        return fingerprint_digest(self.fingerprint)

    def __len__(self) -> int:
        """Number of records."""
        return len(self._index)

    @property
    def is_begun(self) -> bool:
        """Whether the folder has its header."""
        return (self.folder / "manifest.jsonl").is_file()

    def __contains__(self, key: str) -> bool:
        """Whether there is a record for this request key."""
        return self._number(key) >= 0

    def missing(self, requests: Iterable[Request]) -> list[Request]:
        """Requests that have no record yet, each key once."""
        asked = unique_requests(requests)
        numbers = self._index.find(bytes.fromhex("".join(request.key for request in asked)))
        return [request for request, number in zip(asked, numbers.tolist(), strict=True) if number < 0]

    def read(self, key: str) -> Annotation:
        """Return one record; raises CacheError where there is none, or its shard is damaged."""
        shard, row = self._place(key, self._number(key))
        return shard.read(row)

    def soft_targets(self, places: Sequence[Place]) -> SoftTargets:
        """Return the soft targets of many (key, span) one after the other, without making a record of each.

        Raises CacheError where there are none, or a shard is damaged. Safe in forked processes.
        """
        parts, wanted, total = [], list[range](), 0
        numbers = self._index.find(bytes.fromhex("".join(key for key, _ in places)))
        for (key, span), number in zip(places, numbers.tolist(), strict=True):
            shard, row = self._place(key, number)
            arrays = shard.arrays()
            part, spans = arrays.soft(row), arrays.spans(row)
            if span not in spans or not any(map(len, part)):
                raise CacheError(f"{self.folder} holds no soft targets for the {span} of record {key}")
            parts.append(part)
            wanted.append(range(total + spans[span].start, total + spans[span].stop))
            total += sum(arrays.lengths[each][row] for each in spans)
        columns = dict(zip(arrays.names, zip(*parts, strict=True), strict=True))
        lengths = {axis_of(name): np.array(list(map(len, column))) for name, column in columns.items()}
        soft = self._codec.unpack({name: np.concatenate(column) for name, column in columns.items()}, lengths)
        return soft if sum(map(len, wanted)) == total else soft[np.concatenate(wanted)]

    def _number(self, key: str) -> int:
        return int(self._index.find(bytes.fromhex(key))[0])

    def _place(self, key: str, number: int) -> tuple[Shard, int]:
        if number < 0:
            raise CacheError(f"{self.folder} holds no record {key}; annotate first: python -m distill.annotate")
        place = bisect_right(self._starts, number) - 1
        shard = self._in_order[place]
        self._open[shard.name] = shard
        self._open.move_to_end(shard.name)
        if len(self._open) > _MOST_OPEN:  # a process may have so many memory maps only
            self._open.popitem(last=False)[1].close()
        return shard, number - self._starts[place]

    def refresh(self) -> None:
        """See what other processes have written meanwhile."""
        if self._remote:
            self._remote.pull_manifests()
        header = self.folder / "manifest.jsonl"
        if not self.is_begun:
            # A writer makes the header first, so it may have come while we looked.
            if any(self.folder.glob("manifest-*.jsonl")) and not self.is_begun:
                raise CacheError(
                    f"{header} is missing, and with it what made the records beside it. Restore it, or delete "
                    f"{self.folder}"
                )
            return
        if header not in self._read_bytes:
            self._check_header(header)
        self.take_lines(*sorted(self.folder.glob("manifest-*.jsonl")))

    def take_lines(self, *manifests: Path) -> None:
        """See what has come to these manifests."""
        lines = [(path.name, line) for path in manifests for line in self._new_lines(path)]
        self._struck |= {(str(line["struck"]), str(line.get("shard"))) for _, line in lines if "struck" in line}
        for name, line in lines:
            if "struck" not in line and (name, str(line.get("shard"))) not in self._struck:
                self._take(line)

    def check(self) -> list[str]:
        """Read everything; return what is wrong, a sentence for each damaged shard."""
        problems = []
        for shard in self._shards.values():
            try:
                shard.check()
            except CacheError as error:
                problems.append(str(error))
        return problems

    @contextmanager
    def writing(self) -> Iterator[Writer]:
        """Give a writer; whatever ends the block, what was annotated until then is kept."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.is_begun:
            with whole_file(self.folder / "manifest.jsonl") as temporary:
                temporary.write_bytes(_sealed({"format": FORMAT, "fingerprint": self.fingerprint}))
        self.refresh()
        if self._remote:
            self._remote.put_missing()
        # What killed writers left: that of live ones is younger.
        for left in (*self.folder.glob(".*.tmp"), *self.folder.glob("claims/.*.tmp")):
            with suppress(FileNotFoundError):  # a live one's may be gone since it was listed
                if time.time() - left.stat().st_mtime > _DAY_SECONDS:
                    left.unlink()
        writer = Writer(self, self._codec, self._remote)
        with self.claims.held():
            try:
                yield writer
            except OSError as error:
                if not self.is_begun:
                    raise CacheError(f"{self.folder} is not there any more ({error}); annotate again") from None
                error.filename = error.filename or str(self.folder)
                raise
            except BaseException:
                writer.flush()
                raise
            writer.flush()

    def _new_lines(self, path: Path) -> list[dict[str, Any]]:
        if path.is_symlink():
            raise CacheError(f"{path} is no plain file of the cache; put the file itself in its place")
        with path.open("rb") as file:
            file.seek(self._read_bytes.get(path, 0))
            lines, num_bytes = _lines(path, file.read())
        self._read_bytes[path] = self._read_bytes.get(path, 0) + num_bytes
        return lines

    def _take(self, line: Mapping[str, Any]) -> None:
        if "cost" in line:
            if not isinstance(line["cost"], dict) or not {"seconds", "ms_per_example"} <= line["cost"].keys():
                raise CacheError(f"a manifest in {self.folder} is damaged: it has a cost that says nothing")
            self.costs.append(line["cost"])
            return
        shard = Shard(self.folder, line, self._codec, self._remote and self._remote.get)
        if shard.name in self._shards:  # two processes have made it
            return
        self._shards[shard.name] = shard
        self._in_order.append(shard)
        self._starts.append(self._num_rows)
        self._index.add(shard.keys)
        self._num_rows += len(shard.keys) // KEY_BYTES

    def _check_header(self, path: Path) -> None:
        if path.read_bytes()[:12] == b'{"format": 1':
            raise CacheError(self._another_format(1))
        lines = self._new_lines(path)
        if not lines:
            raise CacheError(f"{path} is damaged: it has no whole line. Restore it, or delete {self.folder}")
        if lines[0].get("format") != FORMAT:
            raise CacheError(self._another_format(lines[0].get("format")))
        differences = difference(lines[0].get("fingerprint"), self.fingerprint)
        if differences:
            raise CacheError(
                f"{self.folder} was made in another way than is asked for now:\n"
                + "\n".join(differences)
                + "\nName another folder (cache.dir=…), leave cache.dir out, or restore the old settings."
            )

    def _another_format(self, found: object) -> str:
        return (
            f"{self.folder} has format {found}, this version reads {FORMAT}; name another folder (cache.dir=…) to "
            "annotate anew, or use the version that made it"
        )


@final
class Writer:
    """Collects annotations; each flush makes them one shard."""

    def __init__(self, store: Store, codec: Codec, remote: Remote | None) -> None:
        """Made by `Store.writing` alone."""
        self._store, self._codec, self._remote = store, codec, remote
        self._manifest, self._num_lines = _new_manifest(store.folder), 0
        self._waiting: list[Annotation] = []
        self.num_written = 0

    def add(self, annotations: Sequence[Annotation]) -> None:
        """Take annotations; they are on disk after the next flush."""
        self._waiting += annotations

    def flush(self) -> None:
        """Put on disk, as one shard, what is waiting."""
        if self._waiting:
            line = write_shard(self._store.folder, self._waiting, self._codec)
            if self._remote:
                self._remote.put(*(f"{line['shard']}.{suffix}" for suffix in line["bytes"]))
            self.num_written += len(self._waiting)
            self._waiting.clear()
            self._append(line)

    def write(self, group: Group, annotations: Sequence[Annotation]) -> None:
        """Put a group on disk, and give up its claim."""
        self.add(annotations)
        self.flush()
        self._store.claims.release(group.name)

    def record_cost(self, **cost: Any) -> None:
        """Note what this filling took."""
        self._append({"cost": cost})

    def _append(self, line: Mapping[str, Any]) -> None:
        if not self._store.is_begun or (self._num_lines and not self._manifest.exists()):
            raise CacheError(f"{self._store.folder} is not there any more; annotate again")
        if self._num_lines == _MOST_LINES:  # a manifest is put to a URL whole
            self._manifest, self._num_lines = _new_manifest(self._store.folder), 0
        with self._manifest.open("ab") as file:
            file.write(_sealed(line))
            file.flush()
            os.fsync(file.fileno())
        if not self._num_lines:
            sync_folder(self._manifest.parent)
        self._num_lines += 1
        if self._remote:
            self._remote.put(self._manifest.name)
        self._store.take_lines(self._manifest)


def drop_shard(folder: Path, name: str, *, url: str | None = None) -> None:
    """Strike a shard out of the cache, damaged or not; its records are missing for whoever opens it from then on.

    A line in a manifest of its own strikes the line that named the shard: no file of another writer is changed.
    """
    remote = Remote(url, folder) if url else None
    if remote:
        remote.pull_manifests()
    named = [
        path
        for path in sorted(folder.glob("manifest-*.jsonl"))
        if any(line.get("shard") == name for line in _lines(path, path.read_bytes())[0])
    ]
    if not named:
        raise CacheError(f"no manifest in {folder} names a shard {name!r}")
    strike = _new_manifest(folder)
    with whole_file(strike) as temporary:
        temporary.write_bytes(b"".join(_sealed({"struck": path.name, "shard": name}) for path in named))
    if remote:
        remote.put(strike.name)
    for suffix in SUFFIXES:
        (folder / f"{name}.{suffix}").unlink(missing_ok=True)


def _new_manifest(folder: Path) -> Path:
    return folder / f"manifest-{uuid.uuid4().hex[:12]}.jsonl"


def _sealed(value: Mapping[str, Any]) -> bytes:
    body = json.dumps(value, sort_keys=True).encode()
    return b'{"crc32": %10d, "line": %s}\n' % (zlib.crc32(body), body)


def _unsealed(line: bytes) -> dict[str, Any] | None:
    """The content of a line, or None where it is not whole."""
    body = line[30:-1]
    if line[:30] != b'{"crc32": %10d, "line": ' % zlib.crc32(body) or line[-1:] != b"}":
        return None
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _lines(path: Path, content: bytes) -> tuple[list[dict[str, Any]], int]:
    """The whole lines and how many bytes they take; CacheError where one of them is damaged."""
    whole, end, torn = content.rpartition(b"\n")
    found = []
    for number, line in enumerate(whole.split(b"\n") if end else (), start=1):
        value = _unsealed(line)
        if value is None:
            raise CacheError(
                f"{path} is damaged: line {number} does not have the checksum it had. Restore the file, or delete it: "
                "the records that it names will be annotated anew"
            )
        found.append(value)
    # What broke off while it was written is the beginning of a line. A whole line with another end is damage.
    if _unsealed(torn[:-1]) is not None:
        raise CacheError(f"{path} is damaged: its last line does not end as it did. Restore the file, or delete it")
    return found, len(whole) + len(end)


def fingerprint_digest(fingerprint: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits that name a fingerprint."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:12]


def difference(theirs: Any, ours: Any, path: str = "") -> list[str]:
    """Name each leaf in which two fingerprints differ."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        keys = sorted({*theirs, *ours})
        return [d for key in keys for d in difference(theirs.get(key), ours.get(key), f"{path}.{key}".lstrip("."))]
    if isinstance(theirs, list) and isinstance(ours, list) and len(theirs) == len(ours):
        pairs = enumerate(zip(theirs, ours, strict=True))
        return [d for index, (a, b) in pairs for d in difference(a, b, f"{path}[{index}]")]
    return [] if theirs == ours else [f"  {path}: cache has {_short(theirs)}, asked for is {_short(ours)}"]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 80 else f"{text[:77]}..."


def nearest_difference(folder: Path, fingerprint: Mapping[str, Any]) -> tuple[Path, list[str]] | None:
    """The cache beside `folder` that differs least from a fingerprint, and in what; None where there is none."""
    found = []
    for path in sorted(folder.parent.glob("*/manifest.jsonl")):
        if path.parent != folder:
            try:
                lines, _ = _lines(path, path.read_bytes())
            except CacheError:  # of another format, or damaged: whoever asks for it will be told
                continue
            found += [(path.parent, difference(line.get("fingerprint"), dict(fingerprint))) for line in lines[:1]]
    return min(found, key=lambda one: len(one[1]), default=None)
