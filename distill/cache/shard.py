"""One shard: the records of one group as two files that any tool reads, and the line that vouches for them.

    <name>.safetensors                  R records, N target tokens
        length.answer, length.rationale [R] int32   tokens of that target, 0 where there is none
        token                           [N] int32   ids of all targets: record by record, answer first
        end.<axis>                      [R] int64   where each record ends on that axis of the codec's arrays
        <axis>.<what>                   the codec's arrays; axis "position" has a row per token with soft targets
    <name>.parquet                      key, answer, rationale, is_sampled, is_truncated, choice_logprobs

`<name>` is the BLAKE2b hash of both files in 16 hexadecimal digits, so whoever writes the same records writes the
same files. The line holds sizes, the keys in order (base64, 16 bytes each) and a CRC-32 of the header, of each
array and of the Parquet file. Sizes are looked at when a cache is opened, checksums when a shard is first read.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save

from distill.cache import Codec
from distill.fetch import whole_file
from distill.records import SPANS, Annotation, CacheError, SoftTargets, Span, Target

_DTYPES = {"U8": "u1", "I8": "i1", "U16": "<u2", "F16": "<f2", "I32": "<i4", "U32": "<u4", "F32": "<f4", "I64": "<i8"}
_NAME = re.compile(r"[0-9a-f]{16}")
_KEY_BYTES = 16
_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("answer", pa.string()),
        ("rationale", pa.string()),
        ("is_sampled", pa.bool_()),
        ("is_truncated", pa.bool_()),
        ("choice_logprobs", pa.list_(pa.float64())),
    ]
)
Line = Mapping[str, Any]


def write_shard(folder: Path, annotations: Sequence[Annotation], codec: Codec) -> Line:
    """Write the records; on return both files are on disk, and the line that names them is what is left to write."""
    arrays = _arrays_of(annotations, codec)
    contents = {"safetensors": save(arrays), "parquet": _parquet_of(annotations)}
    name = hashlib.blake2b(contents["safetensors"] + contents["parquet"], digest_size=8).hexdigest()
    for suffix, content in contents.items():
        with whole_file(folder / f"{name}.{suffix}") as temporary:
            temporary.write_bytes(content)
    places = _places(contents["safetensors"], name)
    crcs = {array: zlib.crc32(contents["safetensors"][start:stop]) for array, (_, _, start, stop) in places.items()}
    return {
        "shard": name,
        "records": len(annotations),
        "bytes": {suffix: len(content) for suffix, content in contents.items()},
        "crc32": crcs | {"parquet": zlib.crc32(contents["parquet"])},
        "keys": base64.b64encode(b"".join(bytes.fromhex(a.key) for a in annotations)).decode(),
    }


@final
class Shard:
    """A shard on disk, read at random."""

    def __init__(self, folder: Path, line: Line, codec: Codec) -> None:
        """Raise CacheError unless the line makes sense and both files are there with the right sizes."""
        self._codec, self._line = codec, line
        self.name, self.keys = _sensible(line)
        self._paths = {suffix: folder / f"{self.name}.{suffix}" for suffix in ("safetensors", "parquet")}
        for suffix, path in self._paths.items():
            if path.is_symlink() or not path.is_file():
                raise CacheError(f"{path} is named in the manifest but is no plain file there; {self._remedy()}")
            if path.stat().st_size != line["bytes"][suffix]:
                raise CacheError(f"{path} is damaged: its size is not the manifest's; {self._remedy()}")
        self._arrays: dict[str, np.ndarray] = {}
        self._rows: list[dict[str, Any]] = []

    def read(self, row: int) -> Annotation:
        """Return one record; raises CacheError if the shard is damaged."""
        if not self._rows:
            self.check()
        record, soft = self._rows[row], self._soft(row)
        start = int(self._token_ends[row - 1]) if row else 0
        first, targets = start, dict[Span, Target]()
        for span in SPANS:
            stop = start + int(self._arrays[f"length.{span}"][row])
            if stop > start:
                ids = tuple(self._arrays["token"][start:stop].tolist())
                targets[span] = Target(ids, soft[start - first : stop - first] if soft else None)
            start = stop
        return Annotation(
            key=record["key"],
            targets=targets,
            answer=record["answer"],
            rationale=record["rationale"],
            is_sampled=record["is_sampled"],
            is_truncated=record["is_truncated"],
            choice_logprobs=tuple(record["choice_logprobs"]),
        )

    def check(self) -> None:
        """Read both files, and raise CacheError unless every checksum and every length is right."""
        self._arrays = self._checked_arrays()
        self._rows = self._checked_rows()
        lengths_SR = np.stack([self._arrays[f"length.{span}"].astype(np.int64) for span in SPANS])
        self._token_ends = np.cumsum(lengths_SR.sum(0))
        axes = {name.partition(".")[0] for name in self._arrays if "." in name} - {"length", "end"}
        ends = {axis: self._arrays.get(f"end.{axis}", np.zeros(0)) for axis in axes}
        is_right = len(self._arrays["token"]) == self._token_ends[-1] and np.all(lengths_SR >= 0)
        is_right = is_right and all(
            len(end) == self._line["records"] and np.all(np.diff(end, prepend=0) >= 0) for end in ends.values()
        )
        if is_right and "position" in ends:  # a distribution per token, or none
            positions_R = np.diff(ends["position"], prepend=0)
            is_right = np.all((positions_R == 0) | (positions_R == lengths_SR.sum(0)))
        for name, array in self._arrays.items():
            axis = name.partition(".")[0]
            is_right = is_right and (axis not in ends or len(array) == ends[axis][-1])
        if not is_right:
            raise CacheError(f"{self._paths['safetensors']} is damaged: its lengths do not fit; {self._remedy()}")

    def _soft(self, row: int) -> SoftTargets | None:
        parts = {}
        for name, array in self._arrays.items():
            axis, _, what = name.partition(".")
            if what and axis not in ("length", "end"):
                end_R = self._arrays[f"end.{axis}"]
                parts[name] = array[int(end_R[row - 1]) if row else 0 : int(end_R[row])]
        return self._codec.unpack(parts) if any(len(part) for part in parts.values()) else None

    def _checked_arrays(self) -> dict[str, np.ndarray]:
        path = self._paths["safetensors"]
        try:
            content: Any = np.asarray(np.memmap(path, np.uint8, "r"))
            places = _places(content, str(path))
        except (OSError, ValueError) as error:
            raise CacheError(f"{path} is damaged: {error}; {self._remedy()}") from None
        wanted = {name: crc for name, crc in self._line["crc32"].items() if name != "parquet"}
        found = {name: zlib.crc32(content[start:stop]) for name, (_, _, start, stop) in places.items()}
        if found != wanted:
            differing = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
            raise CacheError(
                f"{path} is damaged: the checksum of {', '.join(differing)} is not the manifest's; {self._remedy()}"
            )
        arrays = {
            name: content[start:stop].view(dtype).reshape(shape)
            for name, (dtype, shape, start, stop) in places.items()
            if name != "header"
        }
        if not _are_ours(arrays, self._line["records"]):
            raise CacheError(f"{path} is damaged: it lacks arrays, or has them in another form; {self._remedy()}")
        return arrays

    def _checked_rows(self) -> list[dict[str, Any]]:
        path = self._paths["parquet"]
        content = path.read_bytes()
        if zlib.crc32(content) != self._line["crc32"]["parquet"]:
            raise CacheError(f"{path} is damaged: its checksum is not the manifest's; {self._remedy()}")
        try:
            file = pq.ParquetFile(pa.BufferReader(content))
            if file.metadata.num_rows != self._line["records"] or not file.schema_arrow.equals(_SCHEMA):
                raise ValueError(f"{file.metadata.num_rows} rows of {file.schema_arrow.names}")
            rows: list[dict[str, Any]] = file.read().to_pylist()
        except (pa.ArrowException, OSError, ValueError) as error:
            raise CacheError(f"{path} is damaged: {error}; {self._remedy()}") from None
        if [row["key"] for row in rows] != [key.hex() for key in self.keys]:
            raise CacheError(f"{path} is damaged: its keys are not the manifest's; {self._remedy()}")
        return rows

    def _remedy(self) -> str:
        return f"restore it, or make it anew: python -m distill.annotate rebuild={self.name}"


def _sensible(line: Line) -> tuple[str, list[bytes]]:
    """The name and the keys of a manifest line; CacheError where the line cannot be one of ours."""
    try:
        name, records = line["shard"], line["records"]
        keys = base64.b64decode(line["keys"], validate=True)
        is_right = _NAME.fullmatch(name) and len(keys) == _KEY_BYTES * records and records > 0
        is_right = is_right and all(isinstance(line["bytes"][s], int) for s in ("safetensors", "parquet"))
        is_right = is_right and isinstance(line["crc32"], dict) and {"header", "parquet"} <= line["crc32"].keys()
    except (KeyError, TypeError, ValueError, AttributeError):
        is_right = False
    if not is_right:
        raise CacheError(f"the manifest names a shard in a way that this program does not: {str(line)[:80]}")
    return name, [keys[start : start + _KEY_BYTES] for start in range(0, len(keys), _KEY_BYTES)]


def _places(content: Any, where: str) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    """Where each array lies: dtype, shape, first and last byte; and the header itself. ValueError if it is absurd."""
    size = len(content)
    length = int.from_bytes(bytes(content[:8]), "little")
    if size < 8 or length > size - 8:
        raise ValueError(f"{where}: the header claims {length} of {size} bytes")
    found: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
    try:
        entries = json.loads(bytes(content[8 : 8 + length]), object_pairs_hook=_each_once)
        for name, entry in entries.items():
            dtype, shape, (start, stop) = _DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
            if any(type(n) is not int or not 0 <= n <= size for n in (*shape, start, stop)) or len(shape) > 8:
                raise ValueError(f"{name} has a shape or a place that no array of ours has")
            if math.prod(shape) * np.dtype(dtype).itemsize != stop - start:
                raise ValueError(f"{name} has another size than its shape")
            found[name] = (dtype, shape, 8 + length + start, 8 + length + stop)
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{where}: the header is not one of safetensors: {error!r}") from None
    ends = [8 + length, *(stop for _, stop in sorted(place[2:] for place in found.values()))]
    if ends != [*sorted(place[2] for place in found.values()), size]:
        raise ValueError(f"{where}: the arrays overlap, or something lies between them")
    return _each_once([("header", ("u1", (8 + length,), 0, 8 + length)), *found.items()])


def _each_once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs; ValueError where one name stands for two values."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name stands for two things")
    return dict(pairs)


def _are_ours(arrays: Mapping[str, np.ndarray], records: int) -> bool:
    """Whether tokens, lengths and ends are there as `write_shard` makes them, and the codec's arrays have rows."""
    kinds = dict.fromkeys(("token", *(f"length.{span}" for span in SPANS)), "<i4")
    kinds |= {name: "<i8" for name in arrays if name.startswith("end.")}
    return (
        all(name in arrays and arrays[name].dtype == kind and arrays[name].ndim == 1 for name, kind in kinds.items())
        and all(len(arrays[f"length.{span}"]) == records for span in SPANS)
        and all(array.ndim > 0 for array in arrays.values())
    )


def _arrays_of(annotations: Sequence[Annotation], codec: Codec) -> dict[str, np.ndarray]:
    lengths = {s: [len(a.targets[s].token_ids) if s in a.targets else 0 for a in annotations] for s in SPANS}
    tokens = [i for a in annotations for span in SPANS if span in a.targets for i in a.targets[span].token_ids]
    arrays = {f"length.{span}": np.array(lengths[span], "<i4") for span in SPANS}
    arrays["token"] = np.array(tokens, "<i4")
    packed = [_packed(annotation, codec) for annotation in annotations]
    for name in sorted({name for parts in packed for name in parts}):
        parts = [part[name] for part in packed if name in part]
        arrays[name] = np.ascontiguousarray(np.concatenate(parts))
        axis = name.partition(".")[0]
        arrays[f"end.{axis}"] = np.cumsum([len(part[name]) if name in part else 0 for part in packed], dtype="<i8")
    return arrays


def _packed(annotation: Annotation, codec: Codec) -> dict[str, np.ndarray]:
    targets = [annotation.targets[span] for span in SPANS if span in annotation.targets]
    softs = [target.soft for target in targets if target.soft is not None]
    if not softs:
        return {}
    if len(softs) < len(targets):
        raise CacheError(f"record {annotation.key} has soft targets for some of its spans only")
    return codec.pack(SoftTargets.join(softs))


def _parquet_of(annotations: Sequence[Annotation]) -> bytes:
    columns = {name: [getattr(a, name) for a in annotations] for name in _SCHEMA.names if name != "choice_logprobs"}
    columns["choice_logprobs"] = [list(a.choice_logprobs) for a in annotations]
    out = io.BytesIO()
    pq.write_table(pa.table(columns, schema=_SCHEMA), out)
    return out.getvalue()
