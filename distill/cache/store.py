"""The store of annotations on disk, addressed by key, with random access and any number of concurrent writers.

A cache is a folder:

    manifest.jsonl              one line: {"format": 3, "fingerprint": {...}, "backend": {...}}
    manifest.<name>.json        what all records share and was made once, such as a teacher's calibration
    manifests/                  of each writer (see `manifests`): a line per shard (see `shard`); {"cost": {...}};
                                {"struck": <manifest>, "shard": <shard>}: ignore that line of that manifest
    <shard>.safetensors, .parquet
    claims/<group>              which process annotates which group (see `claims`)

Each line carries the CRC-32 of its content. A shard is written under temporary names, synced and renamed, and only
then added to its writer's manifest: files that no manifest lists are ignored, and so is an incomplete last line. No
file is written by two processes. Processes that annotate the same records write the same shard. Formats 1 and 2 cannot
be read: format 2 kept how an answer was read, not the text that it was read from.
"""

from __future__ import annotations

import hashlib
import json
import time
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, final

import numpy as np

from distill.app.console import say
from distill.app.files import Json, atomic_write
from distill.cache import Codec
from distill.cache.claims import Claims
from distill.cache.index import KEY_BYTES, Index
from distill.cache.manifests import Manifests, OwnManifests, manifest_name, manifest_paths
from distill.cache.remote import Remote
from distill.cache.sealed import create_once, read_lines, seal, unseal
from distill.cache.shard import SUFFIXES, Shard, axis_name, write_shard
from distill.errors import CacheError
from distill.records import (
    Annotation,
    Group,
    Request,
    ScoredTokens,
    SoftTargets,
    SoftTargetsKey,
    Span,
    unique_requests,
)

FORMAT = 3
_DAY_SECONDS = 86_400
_MAX_OPEN_SHARDS = 4096


@final
class Store:
    """A cache folder with the records of one fingerprint: one task, teacher and codec."""

    def __init__(
        self,
        folder: Path,
        fingerprint: Mapping[str, Any],
        codec: Codec,
        *,
        backend: Mapping[str, str] | None = None,
        accepts_backend: bool = False,
        url: str | None = None,
        claim_seconds: float = 600.0,
    ) -> None:
        """Open or create a cache; raises CacheError if it has another fingerprint or backend, or is damaged.

        The `backend` has the versions and the dtype that change targets by rounding alone. With `accepts_backend` a
        cache of another one is read, and records of both are written to it.

        Opening reads the manifests and checks file sizes; a shard's checksums are verified when it is read. With an
        fsspec `url` the cache is at that URL, and the folder holds copies of the files that were read or written.
        """
        self.folder, self.location = folder, url or str(folder)
        self._remote = Remote(url, folder) if url else None
        self.fingerprint = json.loads(json.dumps(fingerprint))
        self.backend, self._accepts_backend = dict(backend or {}), accepts_backend
        self.claims = Claims(folder / "claims", seconds=claim_seconds)
        self._codec = codec
        self._index = Index()
        self._shards: dict[str, Shard] = {}
        self._struck: set[tuple[str, str]] = set()
        self._ordered_shards: list[Shard] = []
        self._num_rows = 0
        self._starts: list[int] = []  # the number of each shard's first record
        self._open = OrderedDict[str, Shard]()
        self._manifests, self._has_read_header = Manifests(folder), False
        self.costs: list[dict[str, Any]] = []  # of each annotation run
        self._is_writing = False
        self.refresh()

    @property
    def digest(self) -> str:
        """Hash of the fingerprint, twelve hexadecimal digits."""
        return fingerprint_digest(self.fingerprint)

    @property
    def _identity(self) -> dict[str, Any]:
        return {"fingerprint": self.fingerprint, "backend": self.backend}

    def __len__(self) -> int:
        """Number of records."""
        return len(self._index)

    @property
    def has_header(self) -> bool:
        """Whether the folder has a header, manifest.jsonl."""
        return (self.folder / "manifest.jsonl").is_file()

    def __contains__(self, key: str) -> bool:
        """Whether the cache has a record for this request key."""
        return self._number(key) >= 0

    def missing(self, requests: Iterable[Request]) -> list[Request]:
        """Return the requests that have no record yet, without repeated keys."""
        unique = unique_requests(requests)
        numbers = self._index.find(bytes.fromhex("".join(request.key for request in unique)))
        return [request for request, number in zip(unique, numbers.tolist(), strict=True) if number < 0]

    def read(self, key: str) -> Annotation:
        """Return a record; raises CacheError if it is missing or its shard is damaged."""
        shard, row = self._locate(key, self._number(key))
        return shard.read(row)

    def words(self, key: str) -> Annotation:
        """Return a record without its targets; raises CacheError like `read`."""
        shard, row = self._locate(key, self._number(key))
        return shard.words(row)

    def scored(self, key: str) -> dict[Span, ScoredTokens]:
        """Return the tokens of a record that have soft targets, by span; raises CacheError like `read`."""
        shard, row = self._locate(key, self._number(key))
        return shard.scored(row)

    def soft_targets(self, places: Sequence[SoftTargetsKey]) -> SoftTargets:
        """Return the concatenated soft targets of many (key, span), decoded together.

        Raises CacheError if some are missing or a shard is damaged. Safe in forked processes.
        """
        record_arrays, selected_rows, total = [], list[range](), 0
        numbers = self._index.find(bytes.fromhex("".join(key for key, _ in places)))
        for (key, span), number in zip(places, numbers.tolist(), strict=True):
            shard, row = self._locate(key, number)
            arrays = shard.arrays()
            spans = arrays.soft_spans(row)
            if span not in spans:
                raise CacheError(f"{self.folder} has no soft targets for the {span} of record {key}")
            record_arrays.append(arrays.soft(row))
            selected_rows.append(range(total + spans[span].start, total + spans[span].stop))
            total += sum(arrays.num_soft[name][row] for name in spans)
        columns = dict(zip(arrays.names, zip(*record_arrays, strict=True), strict=True))
        lengths = {axis_name(name): np.array(list(map(len, column))) for name, column in columns.items()}
        soft = self._codec.unpack({name: np.concatenate(column) for name, column in columns.items()}, lengths)
        return soft if sum(map(len, selected_rows)) == total else soft[np.concatenate(selected_rows)]

    def _number(self, key: str) -> int:
        return int(self._index.find(bytes.fromhex(key))[0])

    def _locate(self, key: str, number: int) -> tuple[Shard, int]:
        """Return a record's shard and its row there."""
        if number < 0:
            raise CacheError(f"{self.folder} has no record {key}; annotate first: python -m distill.annotate")
        shard_number = bisect_right(self._starts, number) - 1
        shard = self._ordered_shards[shard_number]
        self._open[shard.name] = shard
        self._open.move_to_end(shard.name)
        if len(self._open) > _MAX_OPEN_SHARDS:  # the number of memory maps per process is limited
            self._open.popitem(last=False)[1].close()
        return shard, number - self._starts[shard_number]

    def refresh(self) -> None:
        """Read what other processes have written since; after the first time, shards are not listed."""
        if self._remote:
            self._remote.pull_manifests(with_header=not self._has_read_header)
        header = self.folder / "manifest.jsonl"
        if not self.has_header:
            # Writers create the header first; it may have been created since the first look.
            if manifest_paths(self.folder) and not self.has_header:
                raise CacheError(
                    f"{header} is missing, so the fingerprint of the records beside it is unknown. Restore it, or "
                    f"delete {self.folder}"
                )
            return
        if not self._has_read_header:
            self._check_header(header)
            self._has_read_header = True
        self.read_manifests(*self._manifests.unread())

    def read_manifests(self, *manifests: Path) -> None:
        """Read the lines that were appended to these manifests since."""
        new_lines = {manifest_name(self.folder, path): self._manifests.new_lines(path) for path in manifests}
        lines = [(name, line) for name, of_manifest in new_lines.items() for line in of_manifest]
        self._struck |= {(str(line["struck"]), str(line.get("shard"))) for _, line in lines if "struck" in line}
        for name, line in lines:
            if "struck" not in line and (name, str(line.get("shard"))) not in self._struck:
                self._apply(line)

    def recall(self, name: str, make: Callable[[], Json]) -> Json:
        """Return the JSON object `name` that all records share; the first process that needs it makes it.

        It is kept only inside `writing`. Raises CacheError if it is damaged, or missing beside records.
        """
        path = self.folder / f"manifest.{name}.json"
        if self._remote and not path.is_file():
            with suppress(FileNotFoundError):
                self._remote.get(path.name)
        if not path.is_file():
            if len(self):
                raise CacheError(f"{path} is missing, which the records share. Restore it, or delete {self.folder}")
            value = make()
            if not self._is_writing:
                return value
            create_once(path, seal(value))
            if self._remote:
                self._remote.put(path.name)
        line = unseal(path.read_bytes()[:-1])
        if line is None:
            raise CacheError(f"{path} is damaged: its checksum is wrong. Restore it, or delete {self.folder}")
        return line

    def check(self) -> list[str]:
        """Read all shards; return an error message per damaged shard."""
        problems = []
        for shard in self._shards.values():
            try:
                shard.check()
            except CacheError as error:
                problems.append(str(error))
        return problems

    @contextmanager
    def writing(self) -> Iterator[Writer]:
        """Open a writer. However the block ends, annotations added before are written."""
        self._make_folder()
        if not self.has_header:
            with atomic_write(self.folder / "manifest.jsonl") as temporary:
                temporary.write_bytes(seal({"format": FORMAT, **self._identity}))
        self.refresh()
        if self._remote:
            self._remote.put_missing()
        # Temporary files of killed writers; those of live writers are younger.
        for temporary in (*self.folder.glob(".*.tmp"), *self.folder.glob("claims/.*.tmp")):
            with suppress(FileNotFoundError):  # a live writer may have renamed its file meanwhile
                if time.time() - temporary.stat().st_mtime > _DAY_SECONDS:
                    temporary.unlink()
        writer, self._is_writing = Writer(self, self._codec, self._remote), True
        with self.claims.held():
            try:
                yield writer
            except OSError as error:
                if not self.has_header:
                    raise CacheError(f"{self.folder} no longer exists ({error}); annotate again") from None
                error.filename = error.filename or str(self.folder)
                raise
            except BaseException:
                writer.flush()
                raise
            finally:
                self._is_writing = False
            writer.flush()

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
            reason = f"the cache cannot be written to {self.folder}: {error.strerror} ({error.filename})"
            raise CacheError(f"{reason}; set cache.dir or root to a folder that this user may create") from None

    def _apply(self, line: Mapping[str, Any]) -> None:
        if "cost" in line:
            if not isinstance(line["cost"], dict) or not {"seconds", "ms_per_example"} <= line["cost"].keys():
                raise CacheError(f"a manifest in {self.folder} is damaged: its cost lacks seconds or ms_per_example")
            self.costs.append(line["cost"])
            return
        shard = Shard(self.folder, line, self._codec, self._remote and self._remote.get)
        if shard.name in self._shards:  # written by two processes
            return
        self._shards[shard.name] = shard
        self._ordered_shards.append(shard)
        self._starts.append(self._num_rows)
        self._index.add(shard.keys)
        self._num_rows += len(shard.keys) // KEY_BYTES

    def _check_header(self, path: Path) -> None:
        if path.read_bytes()[:12] == b'{"format": 1':
            raise CacheError(self._unknown_format(1))
        lines = self._manifests.new_lines(path)
        if not lines:
            raise CacheError(f"{path} is damaged: it has no complete line. Restore it, or delete {self.folder}")
        if lines[0].get("format") != FORMAT:
            raise CacheError(self._unknown_format(lines[0].get("format")))
        differences = difference(lines[0].get("fingerprint"), self.fingerprint)
        if differences:
            raise CacheError(
                f"{self.folder} was annotated with other settings:\n"
                + "\n".join(differences)
                + "\nSet another folder (cache.dir=…), leave cache.dir out, or restore the old settings."
            )
        self._check_backend(lines[0].get("backend"))

    def _check_backend(self, theirs: Any) -> None:
        differences = "\n".join(difference(theirs, self.backend))
        if differences and not self._accepts_backend:
            raise CacheError(
                f"{self.folder} was annotated with the same settings, but another backend:\n{differences}\n"
                "Targets may differ by rounding. To use this cache all the same, and to add records to it, set "
                "cache.accept=backend; to keep both apart, set another folder (cache.dir=…)"
            )
        if differences:
            say(f"cache {self.location}: another backend is accepted (cache.accept=backend):\n{differences}")

    def _unknown_format(self, version: object) -> str:
        return (
            f"{self.folder} has format {version}, this version of distill reads format {FORMAT}; set another folder "
            "(cache.dir=…) and annotate again, or use the version that created it"
        )


@final
class Writer:
    """Collects annotations and writes them; each flush writes one shard."""

    def __init__(self, store: Store, codec: Codec, remote: Remote | None) -> None:
        """Created by `Store.writing` only."""
        self._store, self._codec, self._remote = store, codec, remote
        self._manifests = OwnManifests(store.folder)
        self._buffer: list[Annotation] = []
        self.num_written = 0

    def add(self, annotations: Sequence[Annotation]) -> None:
        """Buffer annotations until the next flush."""
        self._buffer += annotations

    def flush(self) -> None:
        """Write the buffered annotations as one shard."""
        if self._buffer:
            line = write_shard(self._store.folder, self._buffer, self._codec)
            if self._remote:
                self._remote.put(*(f"{line['shard']}.{suffix}" for suffix in line["bytes"]))
            self.num_written += len(self._buffer)
            self._buffer.clear()
            self._append(line)

    def write(self, group: Group, annotations: Sequence[Annotation]) -> None:
        """Write a group's annotations as one shard, and release its claim."""
        self.add(annotations)
        self.flush()
        self._store.claims.release(group.name)

    def record_cost(self, **cost: Any) -> None:
        """Record the cost of this annotation run, and the backend that it ran on, in the manifest."""
        self._append({"cost": cost | {"backend": self._store.backend}})

    def _append(self, line: Mapping[str, Any]) -> None:
        if not self._store.has_header or self._manifests.is_lost:
            raise CacheError(f"{self._store.folder} no longer exists; annotate again")
        path = self._manifests.append(line)
        if self._remote:
            self._remote.put(manifest_name(self._store.folder, path))
        self._store.read_manifests(path)


def drop_shard(folder: Path, name: str, *, url: str | None = None) -> None:
    """Remove a shard from the cache, damaged or not; its records are missing when the cache is next opened.

    A line in a new manifest strikes the line that lists the shard; files of other writers are not changed.
    """
    remote = Remote(url, folder) if url else None
    if remote:
        remote.pull_manifests()
    listing_manifests = [
        manifest_name(folder, path)
        for path in manifest_paths(folder)
        if any(line.get("shard") == name for line in read_lines(path, path.read_bytes())[0])
    ]
    if not listing_manifests:
        raise CacheError(f"no manifest in {folder} lists a shard {name!r}")
    manifest = OwnManifests(folder).append(*({"struck": listing, "shard": name} for listing in listing_manifests))
    if remote:
        remote.put(manifest_name(folder, manifest))
    for suffix in SUFFIXES:
        (folder / f"{name}.{suffix}").unlink(missing_ok=True)


def fingerprint_digest(fingerprint: Mapping[str, Any]) -> str:
    """Hash a fingerprint to twelve hexadecimal digits."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:12]


def difference(theirs: Any, ours: Any, path: str = "") -> list[str]:
    """Describe each leaf in which two fingerprints differ."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        keys = sorted({*theirs, *ours})
        return [d for key in keys for d in difference(theirs.get(key), ours.get(key), f"{path}.{key}".lstrip("."))]
    if isinstance(theirs, list) and isinstance(ours, list) and len(theirs) == len(ours):
        pairs = enumerate(zip(theirs, ours, strict=True))
        return [d for index, (a, b) in pairs for d in difference(a, b, f"{path}[{index}]")]
    return [] if theirs == ours else [f"  {path}: cache has {_short(theirs)}, this run has {_short(ours)}"]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 80 else f"{text[:77]}..."


def nearest_difference(folder: Path, fingerprint: Mapping[str, Any]) -> tuple[Path, list[str]] | None:
    """Return the cache beside `folder` with the fewest differences from a fingerprint, and these; None without one."""
    candidates = []
    for path in sorted(folder.parent.glob("*/manifest.jsonl")):
        if path.parent != folder:
            try:
                lines, _ = read_lines(path, path.read_bytes())
            except CacheError:  # another format, or damaged: an error only for runs that open it
                continue
            for line in lines[:1]:
                formats = difference(line.get("format"), FORMAT, "format of the cache")
                candidates.append((path.parent, [*formats, *difference(line.get("fingerprint"), dict(fingerprint))]))
    return min(candidates, key=lambda candidate: len(candidate[1]), default=None)
