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
import os
import re
import stat
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save

from distill.app.files import whole_file
from distill.cache import Codec
from distill.cache.index import KEY_BYTES
from distill.errors import CacheError
from distill.records import SPANS, Annotation, SoftTargets, Span, Target

_DTYPES = {"U8": "u1", "I8": "i1", "U16": "<u2", "F16": "<f2", "I32": "<i4", "U32": "<u4", "F32": "<f4", "I64": "<i8"}
_NAME = re.compile(r"[0-9a-f]{16}")
SUFFIXES = ("safetensors", "parquet")
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
Content = TypeVar("Content")


def write_shard(folder: Path, annotations: Sequence[Annotation], codec: Codec) -> Line:
    """Write the records; on return both files are on disk, and the line that names them is what is left to write."""
    arrays = _arrays_of(annotations, codec)
    contents = {"safetensors": save(arrays), "parquet": _parquet_of(annotations)}
    name = hashlib.blake2b(contents["safetensors"] + contents["parquet"], digest_size=8).hexdigest()
    for suffix, content in contents.items():
        with whole_file(folder / f"{name}.{suffix}") as temporary:
            temporary.write_bytes(content)
    places = _places(contents["safetensors"])
    crcs = {array: zlib.crc32(contents["safetensors"][start:stop]) for array, (_, _, start, stop) in places.items()}
    return {
        "shard": name,
        "records": len(annotations),
        "bytes": {suffix: len(content) for suffix, content in contents.items()},
        "crc32": crcs | {"parquet": zlib.crc32(contents["parquet"])},
        "keys": base64.b64encode(b"".join(bytes.fromhex(a.key) for a in annotations)).decode(),
    }


@dataclass(frozen=True)
class Arrays:
    """The numbers of a shard, in a memory map: tokens of all targets, and by axis the codec's arrays."""

    lengths: Mapping[Span, list[int]]
    token: tuple[list[int], np.ndarray]  # where each record begins and ends, and what is along that axis
    axes: tuple[tuple[list[int], tuple[np.ndarray, ...]], ...]
    names: tuple[str, ...]  # of what is along them, one after the other

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray], num_records: int) -> Arrays:
        """Sort them by what they are; ValueError where some are missing or their lengths do not fit."""
        if not _are_ours(arrays, num_records):
            raise ValueError("it lacks arrays, or has them in another form")
        lengths = {span: arrays[f"length.{span}"].astype(np.int64) for span in SPANS}
        token_end_R = np.cumsum(sum(lengths.values()))
        by_axis: dict[str, dict[str, np.ndarray]] = {}
        for name, array in arrays.items():
            by_axis.setdefault(axis_of(name), {})[name] = array
        ends = {name[4:]: end_R for name, end_R in by_axis.pop("end", {}).items()}
        by_axis.pop("length")
        ends["token"] = token_end_R
        num_positions_R = np.diff(ends.get("position", token_end_R), prepend=0)
        is_complete_R = (num_positions_R == 0) | (num_positions_R == sum(lengths.values()))
        is_right = set(ends) == set(by_axis) and min(map(np.min, lengths.values())) >= 0 and is_complete_R.all()
        if not is_right or not all(_is_along(ends[x], a, num_records) for x in by_axis for a in by_axis[x].values()):
            raise ValueError("its lengths do not fit")
        bounds = {axis: [0, *end_R.tolist()] for axis, end_R in ends.items()}
        token = bounds["token"], by_axis.pop("token")["token"]
        names = {axis: sorted(along) for axis, along in sorted(by_axis.items())}
        axes = tuple((bounds[axis], tuple(by_axis[axis][name] for name in along)) for axis, along in names.items())
        of_each = {span: length_R.tolist() for span, length_R in lengths.items()}
        return cls(of_each, token, axes, tuple(name for along in names.values() for name in along))

    def token_ids(self, row: int) -> tuple[int, ...]:
        """Of all targets of one record."""
        bounds, token = self.token
        return tuple(token[bounds[row] : bounds[row + 1]].tolist())

    def spans(self, row: int) -> dict[Span, slice]:
        """Where each target of a record lies among its tokens, and so among its positions."""
        found, start = dict[Span, slice](), 0
        for span, lengths in self.lengths.items():
            if lengths[row]:
                found[span] = slice(start, start + lengths[row])
                start += lengths[row]
        return found

    def soft(self, row: int) -> list[np.ndarray]:
        """The codec's arrays for one record, in the order of `names`; empty ones where it has no soft targets."""
        return [array[bounds[row] : bounds[row + 1]] for bounds, along in self.axes for array in along]


@final
class Shard:
    """A shard on disk, read at random; files are opened, and checksums looked at, when they are first needed."""

    def __init__(self, folder: Path, line: Line, codec: Codec, fetch: Callable[[str], None] | None = None) -> None:
        """Raise CacheError unless the line makes sense and both files are there with the right sizes.

        With `fetch`, which brings a file to the folder, files that are not there or are damaged are brought anew.
        """
        self._codec, self._line, self._fetch = codec, line, fetch
        self.name, self.keys = _sensible(line)
        self._stem = f"{folder}{os.sep}{self.name}"
        for suffix in SUFFIXES:
            self._check_size(f"{self._stem}.{suffix}", line["bytes"][suffix])
        self._arrays: Arrays | None = None
        self._texts: pa.Table | None = None

    def read(self, row: int) -> Annotation:
        """Return one record; raises CacheError if the shard is damaged."""
        arrays = self.arrays()
        if self._texts is None:
            self._texts = self._whole(self._checked_texts, "parquet")
        text = {name: self._texts.column(name)[row].as_py() for name in _SCHEMA.names}
        kept, token_ids = dict(zip(arrays.names, arrays.soft(row), strict=True)), arrays.token_ids(row)
        soft = self._codec.unpack(kept) if any(map(len, kept.values())) else None
        targets = {
            span: Target(token_ids[part], soft[part] if soft else None) for span, part in arrays.spans(row).items()
        }
        return Annotation(**text | {"targets": targets, "choice_logprobs": tuple(text["choice_logprobs"])})

    def arrays(self) -> Arrays:
        """All that are not texts; raises CacheError if they are damaged. Nothing of Arrow is touched."""
        if self._arrays is None:
            self._arrays = self._whole(self._checked_arrays, "safetensors")
        return self._arrays

    def close(self) -> None:
        """Let go of what is in memory; what is read next is looked at anew."""
        self._arrays = self._texts = None

    def check(self) -> None:
        """Read both files, and raise CacheError unless every checksum and every length is right."""
        self.close()
        self.arrays()
        self._whole(self._checked_texts, "parquet")

    def _whole(self, checked: Callable[[str], Content], suffix: str) -> Content:
        path = f"{self._stem}.{suffix}"
        if self._fetch is None:
            return checked(path)
        try:
            if Path(path).exists():
                return checked(path)
        except CacheError:
            pass  # damaged here, and perhaps not there
        try:
            self._fetch(f"{self.name}.{suffix}")
        except FileNotFoundError:
            raise CacheError(
                f"{path} is named in the manifest and is neither here nor there; {self._remedy()}"
            ) from None
        return checked(path)

    def _check_size(self, path: str, size: int) -> None:
        try:
            found = os.lstat(path)
        except FileNotFoundError:
            if self._fetch:
                return
            found = None
        if found is None or not stat.S_ISREG(found.st_mode):
            raise CacheError(f"{path} is named in the manifest but is no plain file there; {self._remedy()}")
        if found.st_size != size and not self._fetch:
            raise CacheError(f"{path} is damaged: its size is not the manifest's; {self._remedy()}")

    def _checked_arrays(self, path: str) -> Arrays:
        try:
            content: Any = np.asarray(np.memmap(path, np.uint8, "r"))
            places = _places(content)
        except (OSError, ValueError) as error:
            raise CacheError(f"{path} is damaged: {error}; {self._remedy()}") from None
        wanted = {name: crc for name, crc in self._line["crc32"].items() if name != "parquet"}
        found = {name: zlib.crc32(content[start:stop]) for name, (_, _, start, stop) in places.items()}
        if found != wanted:
            differing = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
            raise CacheError(
                f"{path} is damaged: the checksum of {', '.join(differing)} is not the manifest's; {self._remedy()}"
            )
        del places["header"]
        try:
            arrays = {
                n: content[start:stop].view(dtype).reshape(shape) for n, (dtype, shape, start, stop) in places.items()
            }
            return Arrays.of(arrays, self._line["records"])
        except ValueError as error:
            raise CacheError(f"{path} is damaged: {error}; {self._remedy()}") from None

    def _checked_texts(self, path: str) -> pa.Table:
        content = Path(path).read_bytes()
        if zlib.crc32(content) != self._line["crc32"]["parquet"]:
            raise CacheError(f"{path} is damaged: its checksum is not the manifest's; {self._remedy()}")
        try:
            file = pq.ParquetFile(pa.BufferReader(content))
            if file.metadata.num_rows != self._line["records"] or not file.schema_arrow.equals(_SCHEMA):
                raise ValueError(f"{file.metadata.num_rows} rows of {file.schema_arrow.names}")
            texts = file.read()
        except (pa.ArrowException, OSError, ValueError) as error:
            raise CacheError(f"{path} is damaged: {error}; {self._remedy()}") from None
        if "".join(map(str, texts.column("key").to_pylist())) != self.keys.hex():
            raise CacheError(f"{path} is damaged: its keys are not the manifest's; {self._remedy()}")
        return texts

    def _remedy(self) -> str:
        return f"restore it, or make it anew: python -m distill.annotate rebuild={self.name}"


def packed(annotation: Annotation, codec: Codec) -> dict[str, np.ndarray]:
    """The codec's arrays of a record, its targets one after the other; none where it has no soft targets."""
    targets = [annotation.targets[span] for span in SPANS if span in annotation.targets]
    softs = [target.soft for target in targets if target.soft is not None]
    if not softs:
        return {}
    if len(softs) < len(targets):
        raise CacheError(f"record {annotation.key} has soft targets for some of its spans only")
    return codec.pack(SoftTargets.join(softs))


def _is_along(end_R: np.ndarray, array: np.ndarray, num_records: int) -> bool:
    """Whether these are the ends of all records on the axis that the array goes along."""
    is_one_each = end_R.shape == (num_records,) and bool((np.diff(end_R, prepend=0) >= 0).all())
    return is_one_each and array.ndim > 0 and len(array) == int(end_R[-1])


def axis_of(name: str) -> str:
    """Which axis an array goes along."""
    return name.partition(".")[0]


def _sensible(line: Line) -> tuple[str, bytes]:
    """The name and the keys of a manifest line; CacheError where the line cannot be one of ours."""
    try:
        name, records = line["shard"], line["records"]
        keys = base64.b64decode(line["keys"], validate=True)
        is_right = _NAME.fullmatch(name) and len(keys) == KEY_BYTES * records and records > 0
        is_right = is_right and all(isinstance(line["bytes"][s], int) for s in SUFFIXES)
        is_right = is_right and isinstance(line["crc32"], dict) and {"header", "parquet"} <= line["crc32"].keys()
    except (KeyError, TypeError, ValueError, AttributeError):
        is_right = False
    if not is_right:
        raise CacheError(f"the manifest names a shard in a way that this program does not: {str(line)[:80]}")
    return name, keys


def _places(content: Any) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    """Where each array lies: dtype, shape, first and last byte; and the header itself. ValueError if it is absurd."""
    size = len(content)
    length = int.from_bytes(bytes(content[:8]), "little")
    if size < 8 or length > size - 8:
        raise ValueError(f"the header claims {length} of {size} bytes")
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
        raise ValueError(f"the header is not one of safetensors: {error!r}") from None
    ends = [8 + length, *(stop for _, stop in sorted(place[2:] for place in found.values()))]
    if ends != [*sorted(place[2] for place in found.values()), size]:
        raise ValueError("the arrays overlap, or something lies between them")
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
    packs = [packed(annotation, codec) for annotation in annotations]
    for name in sorted({name for parts in packs for name in parts}):
        parts = [part[name] for part in packs if name in part]
        arrays[name] = np.ascontiguousarray(np.concatenate(parts))
        arrays[f"end.{axis_of(name)}"] = np.cumsum(
            [len(part[name]) if name in part else 0 for part in packs], dtype="<i8"
        )
    return arrays


def _parquet_of(annotations: Sequence[Annotation]) -> bytes:
    columns = {name: [getattr(a, name) for a in annotations] for name in _SCHEMA.names if name != "choice_logprobs"}
    columns["choice_logprobs"] = [list(a.choice_logprobs) for a in annotations]
    out = io.BytesIO()
    pq.write_table(pa.table(columns, schema=_SCHEMA), out)
    return out.getvalue()
