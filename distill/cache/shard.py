"""A shard: the records of one group in two files of standard formats, and its line in a manifest.

    <name>.safetensors                  R records, N target tokens
        length.answer, length.rationale [R] int32   number of tokens of that target, 0 if missing
        token                           [N] int32   token ids of all targets: record by record, answer first
        mask                            [N / 8] u8  a bit per token: whether it has soft targets; missing if all tokens
                                                    of every record have them, or none
        end.<axis>                      [R] int64   end of each record on that axis of the codec's arrays
        <axis>.<array>                  the codec's arrays; axis "position" has a row per token with soft targets
    <name>.parquet                      key, answer, rationale, is_sampled, is_truncated, choice_logprobs, text

`<name>` is the BLAKE2b hash of both files in 16 hexadecimal digits, so equal records give equal files. The line holds
the file sizes, the keys in order (base64, 16 bytes each) and the CRC-32 of the header, of each array and of the
Parquet file. Sizes are checked when a cache is opened, checksums when a shard is first read.
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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save

from distill.app.files import atomic_write
from distill.cache import Codec
from distill.cache.index import KEY_BYTES
from distill.errors import CacheError
from distill.records import SPANS, Annotation, ScoredTokens, SoftTargets, Span, Target

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
        ("text", pa.string()),
    ]
)
Line = Mapping[str, Any]
Content = TypeVar("Content")


def write_shard(folder: Path, annotations: Sequence[Annotation], codec: Codec) -> Line:
    """Write both files durably; return the line that adds the shard to a manifest."""
    arrays = _arrays_from(annotations, codec)
    contents = {"safetensors": save(arrays), "parquet": _parquet_from(annotations)}
    name = hashlib.blake2b(contents["safetensors"] + contents["parquet"], digest_size=8).hexdigest()
    for suffix, content in contents.items():
        with atomic_write(folder / f"{name}.{suffix}") as temporary:
            temporary.write_bytes(content)
    extents = _array_extents(contents["safetensors"])
    crcs = {array: zlib.crc32(contents["safetensors"][start:stop]) for array, (_, _, start, stop) in extents.items()}
    return {
        "shard": name,
        "records": len(annotations),
        "bytes": {suffix: len(content) for suffix, content in contents.items()},
        "crc32": crcs | {"parquet": zlib.crc32(contents["parquet"])},
        "keys": base64.b64encode(b"".join(bytes.fromhex(a.key) for a in annotations)).decode(),
    }


@dataclass(frozen=True)
class Arrays:
    """The memory-mapped arrays of a shard: the tokens of all targets, and the codec's arrays by axis."""

    lengths: Mapping[Span, list[int]]
    num_soft: Mapping[Span, list[int]]  # tokens with soft targets
    is_soft: np.ndarray  # whether each token has soft targets
    token: tuple[list[int], np.ndarray]  # the bounds of the records on the axis, and its array
    axes: tuple[tuple[list[int], tuple[np.ndarray, ...]], ...]  # the same for each of the codec's axes
    names: tuple[str, ...]  # of the codec's arrays, in the order of `axes`

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray], num_records: int) -> Arrays:
        """Group arrays by axis; raises ValueError if some are missing or their lengths are inconsistent."""
        if not _has_layout(arrays, num_records):
            raise ValueError("arrays are missing or have an unexpected type or shape")
        lengths = {span: arrays[f"length.{span}"].astype(np.int64) for span in SPANS}
        token_end_R = np.cumsum(sum(lengths.values()))
        by_axis: dict[str, dict[str, np.ndarray]] = {}
        for name, array in arrays.items():
            by_axis.setdefault(axis_name(name), {})[name] = array
        ends = {name[4:]: end_R for name, end_R in by_axis.pop("end", {}).items()}
        by_axis.pop("length")
        by_axis.pop("mask", None)
        ends["token"] = token_end_R
        is_valid = set(ends) == set(by_axis) and min(map(np.min, lengths.values())) >= 0
        if not is_valid or not all(_ends_fit(ends[x], a, num_records) for x in by_axis for a in by_axis[x].values()):
            raise ValueError("array lengths are inconsistent")
        num_positions_R = np.diff(ends.get("position", np.zeros_like(token_end_R)), prepend=0)
        is_soft = _soft_tokens(arrays.get("mask"), num_positions_R > 0, np.diff(token_end_R, prepend=0))
        num_soft = _num_soft(is_soft, lengths, num_positions_R)
        bounds = {axis: [0, *end_R.tolist()] for axis, end_R in ends.items()}
        token = bounds["token"], by_axis.pop("token")["token"]
        names = {axis: sorted(members) for axis, members in sorted(by_axis.items())}
        axes = tuple((bounds[axis], tuple(by_axis[axis][name] for name in members)) for axis, members in names.items())
        array_names = tuple(name for members in names.values() for name in members)
        return cls(_as_lists(lengths), _as_lists(num_soft), is_soft, token, axes, array_names)

    def token_ids(self, row: int) -> tuple[int, ...]:
        """Token ids of all targets of a record."""
        bounds, token = self.token
        return tuple(token[bounds[row] : bounds[row + 1]].tolist())

    def spans(self, row: int) -> dict[Span, slice]:
        """Slices of a record's tokens that belong to each target."""
        return _slices(self.lengths, row)

    def soft_spans(self, row: int) -> dict[Span, slice]:
        """Slices of a record's positions that belong to each target; empty if it has no soft targets."""
        return _slices(self.num_soft, row)

    def scored(self, row: int) -> dict[Span, ScoredTokens]:
        """The tokens of a record's targets, and which of them have soft targets; empty if none has."""
        token_ids, start = self.token_ids(row), self.token[0][row]
        scored = dict[Span, ScoredTokens]()
        for span in self.soft_spans(row):
            tokens = self.spans(row)[span]
            is_soft = self.is_soft[start + tokens.start : start + tokens.stop]
            chosen = None if is_soft.all() else tuple(np.flatnonzero(is_soft).tolist())
            scored[span] = ScoredTokens(token_ids[tokens], chosen)
        return scored

    def soft(self, row: int) -> list[np.ndarray]:
        """The codec's arrays of a record, in the order of `names`; empty if it has no soft targets."""
        return [array[bounds[row] : bounds[row + 1]] for bounds, arrays in self.axes for array in arrays]


@final
class Shard:
    """A shard on disk with random access. Files are opened, and checksums verified, on first use."""

    def __init__(self, folder: Path, line: Line, codec: Codec, fetch: Callable[[str], None] | None = None) -> None:
        """Raise CacheError unless the line is valid and both files exist with the right sizes.

        `fetch` downloads a file into the folder; it is called for files that are missing or damaged.
        """
        self._codec, self._line, self._fetch = codec, line, fetch
        self.name, self.keys = _parse_line(line)
        self._stem = f"{folder}{os.sep}{self.name}"
        for suffix in SUFFIXES:
            self._check_size(f"{self._stem}.{suffix}", line["bytes"][suffix])
        self._arrays: Arrays | None = None
        self._records: list[Annotation] | None = None

    def read(self, row: int) -> Annotation:
        """Return one record; raises CacheError if the shard is damaged."""
        record, arrays = self.words(row), self.arrays()
        scored, rows = arrays.scored(row), arrays.soft_spans(row)
        if not scored:
            token_ids, spans = arrays.token_ids(row), arrays.spans(row)
            return replace(record, targets={span: Target(token_ids[where], None) for span, where in spans.items()})
        soft = self._codec.unpack(dict(zip(arrays.names, arrays.soft(row), strict=True)))
        targets = {span: Target(tokens.token_ids, soft[rows[span]], tokens.chosen) for span, tokens in scored.items()}
        return replace(record, targets=targets)

    def scored(self, row: int) -> dict[Span, ScoredTokens]:
        """Return the tokens of one record's targets that have soft targets, which are not decoded."""
        return self.arrays().scored(row)

    def words(self, row: int) -> Annotation:
        """Return one record without its targets, whose arrays are not read."""
        if self._records is None:
            self._records = _records_from(self._load(self._verified_texts, "parquet"))
        return self._records[row]

    def arrays(self) -> Arrays:
        """The shard's arrays; raises CacheError if they are damaged. Uses no Arrow, so forked workers may call it."""
        if self._arrays is None:
            self._arrays = self._load(self._verified_arrays, "safetensors")
        return self._arrays

    def close(self) -> None:
        """Release memory; the next read verifies the checksums again."""
        self._arrays = self._records = None

    def check(self) -> None:
        """Read both files; raise CacheError unless all checksums and lengths are right."""
        self.close()
        self.arrays()
        self._load(self._verified_texts, "parquet")

    def _load(self, read: Callable[[str], Content], suffix: str) -> Content:
        """Read a file; download it first if it is missing or damaged."""
        path = f"{self._stem}.{suffix}"
        if self._fetch is None:
            return read(path)
        try:
            if Path(path).exists():
                return read(path)
        except CacheError:
            pass  # the local copy is damaged, the remote file may not be
        try:
            self._fetch(f"{self.name}.{suffix}")
        except FileNotFoundError:
            raise CacheError(
                f"{path} is listed in the manifest but exists neither locally nor remotely; {self._remedy()}"
            ) from None
        return read(path)

    def _check_size(self, path: str, size: int) -> None:
        try:
            file_stat = os.lstat(path)
        except FileNotFoundError:
            if self._fetch:
                return
            file_stat = None
        if file_stat is None or not stat.S_ISREG(file_stat.st_mode):
            raise CacheError(f"{path} is listed in the manifest but is missing or not a regular file; {self._remedy()}")
        if file_stat.st_size != size and not self._fetch:
            raise CacheError(
                f"{path} is damaged: it has {file_stat.st_size} bytes, the manifest says {size}; {self._remedy()}"
            )

    def _verified_arrays(self, path: str) -> Arrays:
        try:
            content: Any = np.asarray(np.memmap(path, np.uint8, "r"))
            extents = _array_extents(content)
        except (OSError, ValueError) as error:
            raise CacheError(f"{path} is damaged: {error}; {self._remedy()}") from None
        expected = {name: crc for name, crc in self._line["crc32"].items() if name != "parquet"}
        actual = {name: zlib.crc32(content[start:stop]) for name, (_, _, start, stop) in extents.items()}
        if actual != expected:
            differing = sorted(name for name in {*actual, *expected} if actual.get(name) != expected.get(name))
            raise CacheError(
                f"{path} is damaged: checksums of {', '.join(differing)} differ from the manifest; {self._remedy()}"
            )
        del extents["header"]
        try:
            arrays = {
                n: content[start:stop].view(dtype).reshape(shape) for n, (dtype, shape, start, stop) in extents.items()
            }
            return Arrays.of(arrays, self._line["records"])
        except ValueError as error:
            raise CacheError(f"{path} is damaged: {error}; {self._remedy()}") from None

    def _verified_texts(self, path: str) -> pa.Table:
        content = Path(path).read_bytes()
        if zlib.crc32(content) != self._line["crc32"]["parquet"]:
            raise CacheError(f"{path} is damaged: its checksum differs from the manifest; {self._remedy()}")
        try:
            file = pq.ParquetFile(pa.BufferReader(content))
            if file.metadata.num_rows != self._line["records"] or not file.schema_arrow.equals(_SCHEMA):
                raise ValueError(f"got {file.metadata.num_rows} rows of {file.schema_arrow.names}")
            texts = file.read()
        except (pa.ArrowException, OSError, ValueError) as error:
            raise CacheError(f"{path} is damaged: {error}; {self._remedy()}") from None
        if "".join(map(str, texts.column("key").to_pylist())) != self.keys.hex():
            raise CacheError(f"{path} is damaged: its keys differ from the manifest; {self._remedy()}")
        return texts

    def _remedy(self) -> str:
        return f"restore it, or annotate it again: python -m distill.annotate rebuild={self.name}"


def pack_annotation(annotation: Annotation, codec: Codec) -> dict[str, np.ndarray]:
    """Encode a record's soft targets, those of all spans concatenated; empty if it has none."""
    targets = [annotation.targets[span] for span in SPANS if span in annotation.targets]
    softs = [target.soft for target in targets if target.soft is not None]
    if not softs:
        return {}
    if len(softs) < len(targets):
        raise CacheError(f"record {annotation.key} has soft targets for only some of its spans")
    return codec.pack(SoftTargets.join(softs))


def _as_lists(numbers: Mapping[Span, np.ndarray]) -> dict[Span, list[int]]:
    return {span: of_span_R.tolist() for span, of_span_R in numbers.items()}


def _slices(numbers: Mapping[Span, list[int]], row: int) -> dict[Span, slice]:
    """Slices of consecutive parts of these lengths; none of length 0."""
    slices, start = dict[Span, slice](), 0
    for span, of_span in numbers.items():
        if of_span[row]:
            slices[span] = slice(start, start + of_span[row])
            start += of_span[row]
    return slices


def _soft_tokens(mask: np.ndarray | None, has_soft_R: np.ndarray, num_tokens_R: np.ndarray) -> np.ndarray:
    """Whether each token has soft targets: as the mask says, else all tokens of the records that have any."""
    if mask is None:
        return np.repeat(has_soft_R, num_tokens_R)
    is_soft = np.unpackbits(mask, count=int(num_tokens_R.sum())).astype(bool)
    if not np.array_equal(np.packbits(is_soft), mask):
        raise ValueError(f"its mask of {8 * len(mask)} bits does not fit {len(is_soft)} tokens")
    return is_soft


def _num_soft(
    is_soft: np.ndarray, lengths: Mapping[Span, np.ndarray], num_positions_R: np.ndarray
) -> dict[Span, np.ndarray]:
    """Number of tokens with soft targets by span; all spans of a record have some, or none has."""
    length_RS = np.stack([*lengths.values()], 1)
    end_RS = np.cumsum(length_RS).reshape(length_RS.shape)
    before = np.concatenate([[0], np.cumsum(is_soft)])
    num_RS = before[end_RS] - before[end_RS - length_RS]
    has_all_R = ((num_RS > 0) == (length_RS > 0)).all(1) | (num_positions_R == 0)
    if (num_RS.sum(1) != num_positions_R).any() or not has_all_R.all():
        raise ValueError("soft targets do not belong to its tokens")
    return dict(zip(lengths, num_RS.T, strict=True))


def _ends_fit(end_R: np.ndarray, array: np.ndarray, num_records: int) -> bool:
    """Whether `end_R` are the ends of all records on the first dimension of the array."""
    is_ascending = end_R.shape == (num_records,) and bool((np.diff(end_R, prepend=0) >= 0).all())
    return is_ascending and array.ndim > 0 and len(array) == int(end_R[-1])


def axis_name(array_name: str) -> str:
    """The axis of an array named "axis.name"."""
    return array_name.partition(".")[0]


def _parse_line(line: Line) -> tuple[str, bytes]:
    """Return the name and the keys of a shard's line; raises CacheError if the line is invalid."""
    try:
        name, records = line["shard"], line["records"]
        keys = base64.b64decode(line["keys"], validate=True)
        is_valid = _NAME.fullmatch(name) and len(keys) == KEY_BYTES * records and records > 0
        is_valid = is_valid and all(isinstance(line["bytes"][s], int) for s in SUFFIXES)
        is_valid = is_valid and isinstance(line["crc32"], dict) and {"header", "parquet"} <= line["crc32"].keys()
    except (KeyError, TypeError, ValueError, AttributeError):
        is_valid = False
    if not is_valid:
        raise CacheError(f"the manifest has an invalid line for a shard: {str(line)[:80]}")
    return name, keys


def _array_extents(content: Any) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    """Return dtype, shape, start and end of each array and of the header; raises ValueError if they are invalid."""
    size = len(content)
    length = int.from_bytes(bytes(content[:8]), "little")
    if size < 8 or length > size - 8:
        raise ValueError(f"its header claims {length} bytes, the file has {size}")
    extents: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
    try:
        entries = json.loads(bytes(content[8 : 8 + length]), object_pairs_hook=_dict_of_unique_names)
        for name, entry in entries.items():
            dtype, shape, (start, stop) = _DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
            if any(type(n) is not int or not 0 <= n <= size for n in (*shape, start, stop)) or len(shape) > 8:
                raise ValueError(f"array {name} has an invalid shape or offset")
            if math.prod(shape) * np.dtype(dtype).itemsize != stop - start:
                raise ValueError(f"the offsets of array {name} do not match its shape")
            extents[name] = (dtype, shape, 8 + length + start, 8 + length + stop)
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"its header is not a safetensors header: {error!r}") from None
    ends = [8 + length, *(stop for _, stop in sorted(extent[2:] for extent in extents.values()))]
    if ends != [*sorted(extent[2] for extent in extents.values()), size]:
        raise ValueError("its arrays overlap or have gaps between them")
    return _dict_of_unique_names([("header", ("u1", (8 + length,), 0, 8 + length)), *extents.items()])


def _dict_of_unique_names(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Build a dictionary; raises ValueError if a name occurs twice."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("its header has a name twice")
    return dict(pairs)


def _has_layout(arrays: Mapping[str, np.ndarray], records: int) -> bool:
    """Whether tokens, lengths and ends have the form that `write_shard` gives them, and all arrays have rows."""
    kinds = dict.fromkeys(("token", *(f"length.{span}" for span in SPANS)), "<i4")
    kinds |= {name: "<i8" for name in arrays if name.startswith("end.")}
    kinds |= {"mask": "u1"} if "mask" in arrays else {}
    return (
        all(name in arrays and arrays[name].dtype == kind and arrays[name].ndim == 1 for name, kind in kinds.items())
        and all(len(arrays[f"length.{span}"]) == records for span in SPANS)
        and all(array.ndim > 0 for array in arrays.values())
    )


def _arrays_from(annotations: Sequence[Annotation], codec: Codec) -> dict[str, np.ndarray]:
    lengths = {s: [len(a.targets[s].token_ids) if s in a.targets else 0 for a in annotations] for s in SPANS}
    targets = [annotation.targets[span] for annotation in annotations for span in SPANS if span in annotation.targets]
    arrays = {f"length.{span}": np.array(lengths[span], "<i4") for span in SPANS}
    arrays["token"] = np.array([token_id for target in targets for token_id in target.token_ids], "<i4")
    if any(target.chosen is not None for target in targets):
        arrays["mask"] = np.packbits(np.concatenate([_is_soft(target) for target in targets]))
    packs = [pack_annotation(annotation, codec) for annotation in annotations]
    for name in sorted({name for parts in packs for name in parts}):
        parts = [part[name] for part in packs if name in part]
        arrays[name] = np.ascontiguousarray(np.concatenate(parts))
        arrays[f"end.{axis_name(name)}"] = np.cumsum(
            [len(part[name]) if name in part else 0 for part in packs], dtype="<i8"
        )
    return arrays


def _is_soft(target: Target) -> np.ndarray:
    """Whether each token of a target has soft targets."""
    is_soft = np.full(len(target.token_ids), target.soft is not None and target.chosen is None)
    if target.soft is not None and target.chosen is not None:
        is_soft[list(target.chosen)] = True
    return is_soft


def _records_from(texts: pa.Table) -> list[Annotation]:
    """All records of a shard without their targets; whole columns at once are ten times faster than single values."""
    columns = {name: texts.column(name).to_pylist() for name in _SCHEMA.names}
    columns["choice_logprobs"] = list(map(tuple, columns["choice_logprobs"]))
    rows = zip(*columns.values(), strict=True)
    return [Annotation(targets={}, **dict(zip(columns, row, strict=True))) for row in rows]


def _parquet_from(annotations: Sequence[Annotation]) -> bytes:
    columns = {name: [getattr(a, name) for a in annotations] for name in _SCHEMA.names if name != "choice_logprobs"}
    columns["choice_logprobs"] = [list(a.choice_logprobs) for a in annotations]
    out = io.BytesIO()
    pq.write_table(pa.table(columns, schema=_SCHEMA), out)
    return out.getvalue()
