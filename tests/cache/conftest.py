"""Builders for the tests of the cache."""

from __future__ import annotations

import json
import resource
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from distill.annotate import main
from distill.cache.codecs.topk import TopK
from distill.cache.store import Store
from distill.records import Annotation, Example, Request, Target
from tests.annotation.conftest import annotate_options
from tests.conftest import compose

MAX_BYTES = 64_000_000  # for reading files of a few kilobytes
FINGERPRINT = {"teacher": {"weights": "abc", "dtype": "float32"}, "shots": ["one", "two"], "codec": {"k": 4}}
CODEC = TopK(k=4, temperature=1.0)

odd_numbers = st.sampled_from([-1, 0, 1, 2, 3, 4, 8, 2**31, 2**63, 2**64, 10**30, float("nan"), float("inf"), 1.5])
odd_values = odd_numbers | st.none() | st.booleans() | st.text(max_size=3) | st.lists(odd_numbers, max_size=3)


def fuzzed(max_examples: int) -> settings:
    """Hypothesis settings with the same examples in every run."""
    unhealthy = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(
        max_examples=max_examples, derandomize=True, deadline=None, database=None, suppress_health_check=unhealthy
    )


def sealed(line: Any) -> bytes:
    """A manifest line with its checksum."""
    body = line if isinstance(line, bytes) else json.dumps(line, sort_keys=True).encode()
    return b'{"crc32": %10d, "line": %s}\n' % (zlib.crc32(body), body)


def unsealed(manifest: bytes) -> list[Any]:
    """The content of a manifest's lines."""
    return [json.loads(line)["line"] for line in manifest.splitlines()]


class Files(dict[str, bytes]):
    """The files of a cache by their path in its folder."""

    def __repr__(self) -> str:
        return f"{len(self)} files"


def files_of(folder: Path) -> Files:
    paths = sorted(path for path in folder.rglob("[!.]*") if path.is_file() and path.parent.name != "claims")
    return Files({str(path.relative_to(folder)): path.read_bytes() for path in paths})


def write_files(folder: Path, files: Files) -> None:
    """Replace a folder by one with these files."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def replace_arrays(folder: Path, content: bytes) -> None:
    """Replace the arrays of the only shard, with matching size and checksums in the manifest."""
    (shard,), (manifest,) = folder.glob("*.safetensors"), folder.glob("manifests/*/*")
    shard.write_bytes(content)
    (line,) = unsealed(manifest.read_bytes())
    line["bytes"]["safetensors"] = len(content)
    line["crc32"] = {"parquet": line["crc32"]["parquet"]} | dict(checksums(content))
    manifest.write_bytes(sealed(line))


def checksums(content: bytes) -> Iterator[tuple[str, int]]:
    """Checksums of the header and of every array, as computed by a reader that trusts the header."""
    length = int.from_bytes(content[:8], "little")
    yield "header", zlib.crc32(content[: 8 + length])
    with suppress(ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        for name, item in json.loads(content[8 : 8 + length]).items():
            start, stop = (max(0, int(offset)) for offset in item["data_offsets"])
            yield name, zlib.crc32(content[8 + length :][start:stop])


def with_header(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def split_header(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The entries of the header, and the data after it."""
    stop = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:stop]), content[stop:]


@pytest.fixture(scope="module")
def single_shard(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """The files of a cache with a single shard of two records."""
    folder = tmp_path_factory.mktemp("single_shard")
    assert write_records(folder, 5, 8).check() == []  # this also starts Arrow's threads, before memory is limited
    return files_of(folder)


@contextmanager
def limited_memory() -> Iterator[None]:
    """Limit allocations in the block to `MAX_BYTES`."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    status = Path("/proc/self/status").read_text().split()
    used = 1024 * int(status[status.index("VmData:") + 1])
    resource.setrlimit(resource.RLIMIT_DATA, (used + MAX_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def read_all(folder: Path, *numbers: int) -> list[Annotation]:
    """Read records with limited memory."""
    with limited_memory():
        store = open_store(folder)
        return [store.read(key(number)) for number in numbers]


def entry(dtype: str, shape: Any, *offsets: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


def annotate_command(root: Path, cache: Path, teacher: Path, *more: str) -> list[str]:
    """Overrides of the annotate command for this cache folder."""
    options = annotate_options(root, teacher, *more)
    return [*(o for o in options if not o.startswith("cache.dir")), f"cache.dir={cache}"]


def annotate_here(root: Path, cache: Path, teacher: Path, *more: str) -> None:
    """Run the annotate command in this process."""
    main(compose(*annotate_command(root, cache, teacher, *more), f"root={root}", name="annotate"))


def key(number: int) -> str:
    return f"{number:032x}"


def annotation(number: int) -> Annotation:
    """An annotation determined by `number`; over several numbers all fields take all kinds of values."""
    rng = np.random.default_rng(number)

    def target(length: int) -> Target:
        logits_NV = torch.from_numpy(3 * rng.normal(size=(length, 300)).astype(np.float32))
        return Target(
            tuple(rng.integers(0, 300, length).tolist()),
            CODEC.cut(logits_NV.log_softmax(-1), torch.zeros(length, dtype=torch.float64)),
        )

    spans = ("answer", "rationale")[: number % 3]
    return Annotation(
        key=key(number),
        targets={span: target(1 + number % 7) for span in spans},
        answer=None if number % 4 == 0 else f"{number} ünïcode",
        rationale="so\nso" if number % 2 else None,
        is_sampled=number % 5 == 0,
        is_truncated=number % 3 == 0,
        choice_logprobs=(-0.1, -2.5) if number % 2 else (),
        text=None if number % 3 == 1 else f"It is {number}.",
    )


def comparable(annotation: Annotation) -> list[Any]:
    """The annotation as values that support ==, with its targets as encoded by the codec."""
    targets = {
        span: (t.token_ids, t.soft and {name: a.tolist() for name, a in CODEC.pack(t.soft).items()})
        for span, t in annotation.targets.items()
    }
    return [targets, *(value for name, value in vars(annotation).items() if name != "targets")]


def open_store(folder: Path, fingerprint: Any = FINGERPRINT, **settings: Any) -> Store:
    return Store(folder, fingerprint, CODEC, **settings)


def write_records(folder: Path, *numbers: int, fingerprint: Any = FINGERPRINT, size: int = 4) -> Store:
    """Write annotations in shards of `size` records."""
    store = open_store(folder, fingerprint)
    with store.writing() as writer:
        for start in range(0, len(numbers), size):
            writer.add([annotation(number) for number in numbers[start : start + size]])
            writer.flush()
    return store


def request(number: int) -> Request:
    return Request(key(number), "answer", Example(str(number)), ())


def train_and_validation(job: Any) -> dict[Any, Any]:
    """The examples to annotate by span: answers of train and validation."""
    return {"answer": [*job.splits.train, *job.splits.validation]}
