"""Annotations on disk, addressed by key: filled, resumed, verified, refused, read at random.

A cache is a folder:

    manifest.jsonl          line 1: {"format": 1, "fingerprint": {...}}; then a line per shard:
                            {"shard": "00000", "records": 256, "sha256": {"00000.safetensors": …, "00000.parquet": …}}
    00000.safetensors       token_ids [R] int32, ids [R, K] int32, logprobs [R, K] float32, tail [R] float32:
                            the target tokens of all records of the shard, one below the other
    00000.parquet           per record: key, tokens of its rationale and answer, texts, flags
    cost.jsonl              what each filling took; not part of the cache's identity

A shard is written under a temporary name, synced and renamed, and only then named in the manifest; what the
manifest does not name does not exist. A torn last line is cut off by the next writer. One writer at a time
holds the lock; another waits, and then finds the work done.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock
from safetensors import safe_open
from safetensors.numpy import save_file

from distill.fetch import sha256, whole_file
from distill.records import SPANS, Annotation, CacheError, Request, SoftTargets, Target

FORMAT = 1
_SHARD_RECORDS = 256
_ARRAYS = ("token_ids", "ids", "logprobs", "tail")


@final
class Store:
    """One cache folder, made by one teacher in one way."""

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any]) -> None:
        """Open the folder, or begin it; raises CacheError where something else made it or it is damaged."""
        self.folder = folder
        self.fingerprint = json.loads(json.dumps(fingerprint))
        self._places: dict[str, tuple[str, int]] = {}
        self._tables: dict[str, dict[str, list[Any]]] = {}
        self._offsets: dict[str, np.ndarray] = {}
        self._arrays: dict[str, Any] = {}
        self._shards: list[str] = []
        self._reload()

    @property
    def digest(self) -> str:
        """The fingerprint in twelve hexadecimal digits."""
        return fingerprint_digest(self.fingerprint)

    def __len__(self) -> int:
        """Number of records."""
        return len(self._places)

    def __contains__(self, key: str) -> bool:
        """Whether there is a record for this request key."""
        return key in self._places

    def missing(self, requests: Sequence[Request]) -> list[Request]:
        """Requests that have no record yet, each key once."""
        unique = {request.key: request for request in requests}
        return [request for request in unique.values() if request.key not in self]

    def read(self, key: str) -> Annotation:
        """Return one record; raises CacheError where there is none."""
        if key not in self:
            raise CacheError(f"{self.folder} holds no record {key}; annotate first: python -m distill.annotate")
        shard, row = self._places[key]
        table, start = self._tables[shard], int(self._offsets[shard][row])
        targets = {}
        for span in SPANS:
            length = table[f"num_{span}_tokens"][row]
            if length:
                targets[span] = self._target(shard, start, start + length)
            start += length
        return Annotation(
            key=key,
            targets=targets,
            answer=table["answer"][row],
            rationale=table["rationale"][row],
            is_sampled=table["is_sampled"][row],
            is_truncated=table["is_truncated"][row],
            choice_logprobs=tuple(table["choice_logprobs"][row]),
        )

    @contextmanager
    def writing(self) -> Iterator[Writer]:
        """Give the one writer; whatever ends the block, what was annotated until then is kept."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / ".lock"):
            self._reload()
            self._begin()
            writer = Writer(self)
            try:
                yield writer
            except OSError:
                raise
            except BaseException:
                writer.flush()
                raise
            writer.flush()

    def write_shard(self, annotations: Sequence[Annotation]) -> None:
        """Add records as one shard; on return they are on disk."""
        name = f"{len(self._shards):05d}"
        files = {f"{name}.safetensors": _arrays_of(annotations), f"{name}.parquet": _table_of(annotations)}
        hashes = {}
        for file, content in files.items():
            with whole_file(self.folder / file) as temporary:
                if isinstance(content, pa.Table):
                    pq.write_table(content, temporary)
                else:
                    save_file(content, temporary)
            hashes[file] = sha256(self.folder / file)
        line = {"shard": name, "records": len(annotations), "sha256": hashes}
        _append_line(self.folder / "manifest.jsonl", line)
        self._open_shard(line)

    def record_cost(self, **cost: Any) -> None:
        """Note what a filling took."""
        _append_line(self.folder / "cost.jsonl", cost)

    def costs(self) -> list[dict[str, Any]]:
        """What each filling took."""
        path = self.folder / "cost.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def _target(self, shard: str, start: int, stop: int) -> Target:
        token_ids, ids_NK, logprobs_NK, tail_N = (self._arrays[shard].get_slice(n)[start:stop] for n in _ARRAYS)
        soft = SoftTargets(ids_NK, logprobs_NK, tail_N) if ids_NK.shape[1] else None
        return Target(tuple(token_ids.tolist()), soft)

    def _reload(self) -> None:
        lines = _read_lines(self.folder / "manifest.jsonl")
        if not lines:
            return
        if lines[0].get("format") != FORMAT:
            raise CacheError(f"{self.folder} has format {lines[0].get('format')}, this version reads {FORMAT}")
        differences = difference(lines[0]["fingerprint"], self.fingerprint)
        if differences:
            raise CacheError(
                f"{self.folder} was made in another way than is asked for now:\n"
                + "\n".join(differences)
                + "\nName another folder (cache_dir=…), leave cache_dir out, or restore the old settings."
            )
        for line in lines[1 + len(self._shards) :]:
            self._check_shard(line)
            self._open_shard(line)

    def _begin(self) -> None:
        path = self.folder / "manifest.jsonl"
        if not _read_lines(path):
            path.unlink(missing_ok=True)
            _append_line(path, {"format": FORMAT, "fingerprint": self.fingerprint})
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(path, whole)

    def _check_shard(self, line: Mapping[str, Any]) -> None:
        for file, wanted in line["sha256"].items():
            path = self.folder / file
            if Path(file).name != file or path.is_symlink() or not path.is_file():
                raise CacheError(f"{path} is named in the manifest but is no plain file there; restore it")
            if sha256(path) != wanted:
                raise CacheError(
                    f"{path} is damaged: its SHA-256 is not the manifest's. Restore it, or delete "
                    f"{self.folder} to annotate anew."
                )

    def _open_shard(self, line: Mapping[str, Any]) -> None:
        shard = line["shard"]
        table = pq.read_table(self.folder / f"{shard}.parquet").to_pydict()
        lengths = [sum(table[f"num_{span}_tokens"][row] for span in SPANS) for row in range(line["records"])]
        self._tables[shard] = table
        self._offsets[shard] = np.concatenate([[0], np.cumsum(lengths)])
        self._arrays[shard] = safe_open(self.folder / f"{shard}.safetensors", "np")
        self._places |= {key: (shard, row) for row, key in enumerate(table["key"])}
        self._shards.append(shard)


@final
class Writer:
    """Collects annotations and writes them shard by shard."""

    def __init__(self, store: Store) -> None:
        """Made by `Store.writing` alone."""
        self._store = store
        self._waiting: list[Annotation] = []

    def add(self, annotations: Sequence[Annotation]) -> None:
        """Take annotations; every full shard goes to disk."""
        self._waiting += annotations
        while len(self._waiting) >= _SHARD_RECORDS:
            self._write(_SHARD_RECORDS)

    def flush(self) -> None:
        """Put on disk what is still waiting."""
        if self._waiting:
            self._write(len(self._waiting))

    def _write(self, number: int) -> None:
        self._store.write_shard(self._waiting[:number])
        del self._waiting[:number]


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


def _arrays_of(annotations: Sequence[Annotation]) -> dict[str, np.ndarray]:
    targets = [a.targets[span] for a in annotations for span in SPANS if span in a.targets]
    empty = SoftTargets(np.zeros((0, 0), np.int32), np.zeros((0, 0), np.float32), np.zeros(0, np.float32))
    softs = [t.soft if t.soft is not None else _nothing(len(t.token_ids)) for t in targets]
    soft = SoftTargets.join(softs) if softs else empty
    return {
        "token_ids": np.array([i for t in targets for i in t.token_ids], np.int32),
        "ids": np.ascontiguousarray(soft.ids_NK),
        "logprobs": np.ascontiguousarray(soft.logprobs_NK),
        "tail": np.ascontiguousarray(soft.tail_N),
    }


def _nothing(num_positions: int) -> SoftTargets:
    shape = (num_positions, 0)
    return SoftTargets(np.zeros(shape, np.int32), np.zeros(shape, np.float32), np.ones(num_positions, np.float32))


def _table_of(annotations: Sequence[Annotation]) -> pa.Table:
    lengths = {
        f"num_{span}_tokens": [len(a.targets[span].token_ids) if span in a.targets else 0 for a in annotations]
        for span in SPANS
    }
    return pa.table(
        {
            "key": [a.key for a in annotations],
            **lengths,
            "answer": pa.array([a.answer for a in annotations], pa.string()),
            "rationale": pa.array([a.rationale for a in annotations], pa.string()),
            "is_sampled": [a.is_sampled for a in annotations],
            "is_truncated": [a.is_truncated for a in annotations],
            "choice_logprobs": pa.array([list(a.choice_logprobs) for a in annotations], pa.list_(pa.float64())),
        }
    )


def _append_line(path: Path, value: Mapping[str, Any]) -> None:
    with path.open("ab") as file:
        file.write(json.dumps(value, sort_keys=True).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    try:
        return [json.loads(line) for line in whole.splitlines()]
    except ValueError as error:
        raise CacheError(f"{path} is damaged: {error}. Delete its folder to annotate anew.") from None
