"""Law 8: another backend stops and can be accepted; weights are hashed once, and a full cache does not need them."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig

from distill.annotation.annotation_job import open_annotation_job
from distill.annotation.fill import fill
from distill.app.files import sha256
from distill.cache.store import Store
from distill.errors import CacheError, ConfigError
from distill.lessons.curriculum import build_curriculum, prepare
from distill.models import identity
from tests.cache.conftest import CODEC, FINGERPRINT, annotation, comparable, key, sealed, unsealed
from tests.conftest import counted, make_model

Configured = Callable[..., DictConfig]
OLD = {"torch": "2.9.0", "transformers": "4.57.1", "dtype": "float32"}
NEW = OLD | {"torch": "2.13.0", "dtype": "bfloat16"}


def opened(folder: Path, backend: dict[str, str], **settings: Any) -> Store:
    return Store(folder, FINGERPRINT, CODEC, backend=backend, **settings)


def test_a_cache_of_another_backend_stops_and_can_be_accepted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with opened(tmp_path, OLD).writing() as writer:
        writer.add([annotation(1)])
    with pytest.raises(CacheError) as raised:
        opened(tmp_path, NEW)
    for text in (
        'torch: cache has "2.9.0", this run has "2.13.0"',
        'dtype: cache has "float32", this run has "bfloat16"',
        "cache.accept=backend",
    ):
        assert text in str(raised.value)
    assert "transformers:" not in str(raised.value)
    store = opened(tmp_path, NEW, accepts_backend=True)
    assert comparable(store.read(key(1))) == comparable(annotation(1))
    assert 'torch: cache has "2.9.0", this run has "2.13.0"' in capsys.readouterr().err
    with store.writing() as writer:
        writer.add([annotation(2)])
        writer.record_cost(seconds=1.0, ms_per_example=None)
    assert [cost["backend"] for cost in opened(tmp_path, OLD).costs] == [NEW]  # who added what stays known
    with pytest.raises(CacheError, match="annotated with other settings"):
        Store(tmp_path, FINGERPRINT | {"codec": {"k": 5}}, CODEC, backend=NEW, accepts_backend=True)


def test_a_cache_of_another_task_is_refused(configured: Configured, tmp_path: Path) -> None:
    folder = f"cache.dir={tmp_path / 'mine'}"
    with open_annotation_job(configured(folder, "task.name=one")).store.writing():
        pass
    with pytest.raises(CacheError, match="annotated with other settings"):
        open_annotation_job(configured(folder, "task.name=two"))


def test_the_backend_is_not_in_the_folders_name(configured: Configured) -> None:
    job, _ = counted(configured())
    fill(job, {"answer": job.splits.validation})
    header = job.store.folder / "manifest.jsonl"
    (line,) = unsealed(header.read_bytes())
    assert set(line["backend"]) == {"torch", "transformers", "dtype"}
    header.write_bytes(sealed(line | {"backend": line["backend"] | {"torch": "1.0"}}))
    with pytest.raises(CacheError, match=r'torch: cache has "1\.0", this run has'):
        open_annotation_job(configured())
    accepted, teacher = counted(configured("cache.accept=backend"))
    assert fill(accepted, {"answer": job.splits.validation}).num_annotated == 0
    assert teacher.asked == []
    with pytest.raises(ConfigError, match=r"cache\.accept=all: expected null or backend"):
        open_annotation_job(configured("cache.accept=all"))


def test_an_automatic_dtype_is_compared_and_an_explicit_one_is_in_the_key(configured: Configured) -> None:
    automatic, float32, float16 = (
        open_annotation_job(configured(f"teacher.kind.dtype={dtype}")).store for dtype in ("auto", "float32", "float16")
    )
    assert automatic.fingerprint["teacher"]["dtype"] == "auto"
    assert automatic.backend["dtype"] in ("float32", "bfloat16")
    assert len({store.digest for store in (automatic, float32, float16)}) == 3


@pytest.fixture
def settled(tmp_path: Path) -> Path:
    """A model whose files were last changed a while ago."""
    folder = make_model(tmp_path / "model", seed=1)
    for path in folder.iterdir():
        os.utime(path, (1e9, 1e9))
    return folder


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the weights that were read to be hashed."""
    names: list[str] = []

    def counting(path: Path) -> str:
        names.append(path.name)
        return sha256(path)

    monkeypatch.setattr(identity, "sha256", counting)
    return names


def test_weights_are_hashed_once_and_again_if_they_change(settled: Path, hashed: list[str], tmp_path: Path) -> None:
    hashes, weights = tmp_path / "hashes", settled / "model.safetensors"
    first = identity.fingerprint(settled, hashes)
    assert identity.fingerprint(settled, hashes) == first
    assert hashed == ["model.safetensors"]
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # of the same size
    changed = identity.fingerprint(settled, hashes)
    assert changed["weights"] != first["weights"]
    assert identity.fingerprint(settled, hashes) == changed  # changed a moment ago: not kept
    assert len(hashed) == 3
    for damage in ("{", '{"files": {"model.safetensors": {"sha256": "0"}}}', "[]"):
        (kept,) = hashes.glob("*.json")
        kept.write_text(damage)
        assert identity.fingerprint(settled, hashes) == changed


def test_of_several_processes_one_hashes_the_weights(
    settled: Path, hashed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting = identity.sha256

    def slow(path: Path) -> str:
        time.sleep(0.2)
        return counting(path)

    monkeypatch.setattr(identity, "sha256", slow)
    with ThreadPoolExecutor(4) as pool:  # the lock is of an open file, so threads stand for processes
        futures = [pool.submit(identity.fingerprint, settled, tmp_path / "hashes") for _ in range(4)]
    assert len({json.dumps(future.result()) for future in futures}) == 1
    assert hashed == ["model.safetensors"]


def test_a_file_of_the_hubs_cache_is_named_by_its_hash(settled: Path, hashed: list[str], tmp_path: Path) -> None:
    plain = identity.fingerprint(settled, tmp_path / "hashes")
    blob = tmp_path / "blobs" / sha256(settled / "model.safetensors")
    blob.parent.mkdir()
    snapshot = shutil.copytree(settled, tmp_path / "snapshots" / "abc")
    (snapshot / "model.safetensors").rename(blob)
    (snapshot / "model.safetensors").symlink_to(f"../../blobs/{blob.name}")
    hashed.clear()
    assert identity.fingerprint(snapshot, tmp_path / "hashes") == plain
    blob.unlink()  # as the hub's own command does to free the disk
    assert identity.fingerprint(snapshot, tmp_path / "hashes") == plain
    assert hashed == []


def test_a_full_cache_needs_no_weights(
    configured: Configured, settled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = f"teacher.model={settled}"
    build_curriculum(prepare(configured(model), tmp_path / "run"))
    (settled / "model.safetensors").unlink()
    capsys.readouterr()
    curriculum = build_curriculum(prepare(configured(model), tmp_path / "run"))
    assert (curriculum.filled.num_annotated, bool(curriculum.train)) == (0, True)
    assert f"{settled} has no weights left" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="does not open as a causal language model"):
        build_curriculum(prepare(configured(model, "task.examples.num_unlabelled=9"), tmp_path / "run"))
    config = settled / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rope_theta": 1.0}))
    with pytest.raises(ConfigError, match="does not open as a causal language model"):
        build_curriculum(prepare(configured(model), tmp_path / "run"))
