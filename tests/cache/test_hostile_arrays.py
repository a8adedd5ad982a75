"""Law 8: hostile shards with correct checksums: reading gives a record or raises CacheError, with little memory."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load, save

from distill.cache.store import Store
from distill.errors import CacheError
from distill.records import Annotation, Target
from tests.cache.conftest import (
    FINGERPRINT,
    Files,
    files_of,
    fuzzed,
    key,
    limited_memory,
    odd_numbers,
    odd_values,
    open_store,
    read_all,
    replace_arrays,
    sealed,
    split_header,
    unsealed,
    with_header,
    write_files,
)
from tests.conftest import codec, conf_names


@st.composite
def header_changes(draw: st.DrawFn) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A function that makes a few changes to a header's entries."""
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

    def apply(entries: dict[str, Any]) -> dict[str, Any]:
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

    return apply


Change = Callable[[dict[str, Any]], dict[str, Any]]


@fuzzed(40)
@given(change=header_changes())
def test_a_changed_header_gives_a_record_or_a_cache_error(single_shard: Files, tmp_path: Path, change: Change) -> None:
    read_with_header(single_shard, tmp_path, change)


@pytest.mark.slow
@fuzzed(400)
@given(change=header_changes())
def test_many_changed_headers_give_a_record_or_a_cache_error(
    single_shard: Files, tmp_path: Path, change: Change
) -> None:
    read_with_header(single_shard, tmp_path, change)


def read_with_header(single_shard: Files, tmp_path: Path, change: Change) -> None:
    write_files(tmp_path / "cache", single_shard)
    (arrays,) = (content for file, content in single_shard.items() if file.endswith(".safetensors"))
    entries, data = split_header(arrays)
    replace_arrays(tmp_path / "cache", with_header(json.dumps(change(entries)).encode(), data))
    with suppress(CacheError):
        assert [record.key for record in read_all(tmp_path / "cache", 5, 8)] == [key(5), key(8)]


def write_with_codec(name: str, folder: Path) -> None:
    """Write a cache of two records with this codec."""
    named_codec = codec(name)
    records = []
    for number in (5, 9):
        rng = np.random.default_rng(number)
        logits_NV = torch.from_numpy(4 * rng.normal(size=(number, 300)).astype(np.float32))
        uniform_N = torch.from_numpy(rng.random(number))
        soft, chosen = named_codec.cut(logits_NV.log_softmax(-1), uniform_N), (0, 3) if number == 5 else None
        target = Target(tuple(range(number)), soft if chosen is None else soft[np.array(chosen)], chosen)
        records.append(Annotation(key(number), {"answer": target}, "so"))
    store = Store(folder, FINGERPRINT, named_codec)
    with store.writing() as writer:
        writer.add(records)
    assert store.check() == []


@pytest.fixture(scope="module")
def by_codec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache per codec."""
    folder = tmp_path_factory.mktemp("by_codec")
    for name in conf_names("cache"):
        write_with_codec(name, folder / name)
    return folder


EXTREMES = (-(2**62), -1, 0, 1, 15, 16, 254, 255, 256, 65535, 2**31 - 1, 2**62)


KINDS = ("u1", "i1", "<u2", "<i4", "<u4", "<f4", "<f2", "<i8")


Changes = list[tuple[str, int, int, int]]


def apply_changes(arrays: dict[str, np.ndarray], changes: Changes) -> dict[str, np.ndarray]:
    arrays = dict(arrays)
    for how, which, position, extreme in changes:
        name = sorted(arrays)[which % len(arrays)]
        array, number = arrays[name].copy(), EXTREMES[extreme % len(EXTREMES)]
        if how == "value" and array.size:
            array.ravel()[position % array.size] = np.array(number).astype(array.dtype)
        elif how == "every value":
            array[...] = np.array(number).astype(array.dtype)
        elif how == "row" and len(array):
            array = np.delete(array, position % len(array), 0)
        elif how == "rows":
            array = np.concatenate([array, array[:1]])
        elif how == "type":
            array = array.astype(KINDS[extreme % len(KINDS)])
        elif how == "shape":
            array = [array.ravel(), array[None], array[..., None], array.T, array[..., :1]][extreme % 5]
        elif how == "name":
            arrays[f"{name}{position}"] = arrays.pop(name)
            continue
        arrays[name] = np.ascontiguousarray(array)
    return arrays


codecs = st.sampled_from(conf_names("cache"))
array_changes = st.lists(
    st.tuples(
        st.sampled_from(["value", "every value", "row", "rows", "type", "shape", "name"]),
        *(st.integers(0, 99) for _ in range(3)),
    ),
    min_size=1,
    max_size=3,
)


@fuzzed(60)
@given(name=codecs, changes=array_changes)
def test_arrays_of_any_form_give_a_record_or_a_cache_error(
    by_codec: Path, tmp_path: Path, name: str, changes: Changes
) -> None:
    read_with_arrays(by_codec, tmp_path, name, changes)


@pytest.mark.slow
@fuzzed(600)
@given(name=codecs, changes=array_changes)
def test_many_forms_of_arrays_give_a_record_or_a_cache_error(
    by_codec: Path, tmp_path: Path, name: str, changes: Changes
) -> None:
    read_with_arrays(by_codec, tmp_path, name, changes)


def read_with_arrays(by_codec: Path, tmp_path: Path, name: str, changes: Changes) -> None:
    write_files(tmp_path / "cache", files_of(by_codec / name))
    (shard,) = tmp_path.glob("cache/*.safetensors")
    with np.errstate(all="ignore"):
        content = save(apply_changes(load(shard.read_bytes()), changes))
    replace_arrays(tmp_path / "cache", content)
    named_codec = codec(name)
    with limited_memory(), suppress(CacheError):
        store = Store(tmp_path / "cache", FINGERPRINT, named_codec)
        for number in (5, 9):
            for target in store.read(key(number)).targets.values():
                assert target.soft is None or len(target.soft) == target.scored.num_positions


def test_texts_with_other_keys_are_refused(single_shard: Files, tmp_path: Path) -> None:
    write_files(tmp_path / "cache", single_shard)
    (manifest,) = tmp_path.glob("cache/manifests/*/*")
    (line,) = unsealed(manifest.read_bytes())
    line["keys"] = base64.b64encode(bytes.fromhex(key(8) + key(5))).decode()
    manifest.write_bytes(sealed(line))
    store = open_store(tmp_path / "cache")
    for number in (5, 8):
        with pytest.raises(CacheError, match="its keys differ from the manifest"):
            store.read(key(number))
