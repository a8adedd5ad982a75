"""Rows from many files, from folders of files, and from packed files."""

from __future__ import annotations

import gzip
import json
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from distill.tasks import packed
from tests.tasks.test_files import ROWS, error_of, task, write


def pack(path: Path) -> Path:
    """Pack a file as its suffix says."""
    compress = {".gz": gzip.compress, ".zst": partial(pyarrow.Codec("zstd").compress, asbytes=True)}[path.suffix]
    path.write_bytes(compress(path.read_bytes()))
    return path


def packed_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows to a packed file, such as a.jsonl.gz."""
    plain = write(path.with_suffix(""), rows)
    plain.rename(path)
    return pack(path)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.csv.gz", "a.tsv.GZ", "a.jsonl.zst", "a.csv.zst"])
def test_a_packed_file_gives_the_same_examples(name: str, tmp_path: Path) -> None:
    expected = task(write(tmp_path / "plain.jsonl", ROWS), rationale="why").splits()
    if name.endswith("GZ"):
        path = packed_rows(tmp_path / name.lower(), ROWS).rename(tmp_path / name)
    else:
        path = packed_rows(tmp_path / name, ROWS)
    assert task(path, rationale="why").splits() == expected


def test_a_packed_file_of_several_parts_is_read_whole(tmp_path: Path) -> None:
    parts = ["".join(json.dumps(row) + "\n" for row in part).encode() for part in (ROWS[:20], ROWS[20:])]
    (tmp_path / "a.jsonl.gz").write_bytes(b"".join(map(gzip.compress, parts)))
    zstd = pyarrow.Codec("zstd")
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(zstd.compress(part, asbytes=True) for part in parts))
    for name in ("a.jsonl.gz", "a.jsonl.zst"):
        assert sum(counts.read for counts in task(tmp_path / name).splits().counts.values()) == len(ROWS)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_a_damaged_or_too_large_packed_file_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = packed_rows(tmp_path / name, ROWS)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"no packed file", whole[:20] + b"xxxx" + whole[24:]):
        path.write_bytes(damaged)
        message = error_of(task(path))
        assert str(path) in message
    packed_rows(path, [{"question": "x" * 100_000, "answer": "yes"}] * 60)
    assert path.stat().st_size < 10_000
    monkeypatch.setattr(packed, "_MAX_UNPACKED_BYTES", 2**20)
    monkeypatch.setattr(packed, "_MAX_UNPACKED_RATIO", 100)
    assert "and unpacks to more than" in error_of(task(path))


def test_files_and_folders_of_files_are_one_table(tmp_path: Path) -> None:
    expected = task(write(tmp_path / "whole.jsonl", ROWS), rationale="why").splits()
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "a.jsonl", ROWS[:10])
    write(folder / "b.csv", ROWS[10:20])
    packed_rows(folder / "c.jsonl.gz", ROWS[20:])
    (folder / "README.md").write_text("# rows")
    assert task(folder, rationale="why").splits() == expected
    assert task(folder / "?.*", rationale="why").splits() == expected
    assert "matches no file" in error_of(task(folder / "*.tsv"))
    assert "README.md: expected a file that ends in .jsonl" in error_of(task(folder / "*"))
    assert "expected a file that ends in" in error_of(
        task(write(folder / "d.parquet", ROWS).rename(folder / "d.parquet.gz"))
    )


def test_an_invalid_row_of_several_files_is_named_with_its_file(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", ROWS[:5])
    write(tmp_path / "b.jsonl", [*ROWS[5:7], {"question": "Is it?", "answer": "perhaps"}])
    message = error_of(task(tmp_path / "*.jsonl"))
    assert f"{tmp_path / '*.jsonl'}: {tmp_path / 'b.jsonl'}, line 3: 'perhaps'" in message
    conflict = write(tmp_path / "c.jsonl", [{**ROWS[0], "answer": "yes"}])
    (tmp_path / "b.jsonl").unlink()
    message = error_of(task(tmp_path / "*.jsonl"))
    assert f"{tmp_path / 'a.jsonl'}, line 1 says 'no' but {conflict}, line 1 says 'yes'" in message


def test_files_of_a_folder_that_are_named_by_splits_are_its_splits(tmp_path: Path) -> None:
    write(tmp_path / "train-1.jsonl", ROWS[:10])
    write(tmp_path / "train-2.jsonl", ROWS[10:30])
    write(tmp_path / "test.jsonl", ROWS[30:])
    splits = task(tmp_path, num_validation=4).splits()
    assert {example.question for example in splits.test} == {row["question"] for row in ROWS[30:]}
    assert (len(splits.train), len(splits.validation)) == (26, 4)
    write(tmp_path / "more.jsonl", [{"question": "Another?", "answer": "no"}])
    assert len(task(tmp_path, num_test=0, num_validation=0).splits().train) == len(ROWS) + 1
