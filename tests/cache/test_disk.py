"""Law 8: full disks, read-only disks, folders that vanish, and the order of writes."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig

from distill.annotation.annotation_job import open_annotation_job
from distill.app.files import atomic_write
from distill.cache.store import Store
from distill.errors import CacheError
from distill.lessons.curriculum import build_curriculum, prepare
from tests.cache.conftest import Files, annotate_command, annotate_here, annotation, open_store, unsealed, write_files
from tests.conftest import CountingTeacher, compose, run, shards


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A separate file system: call with mount options to mount it, and again to remount it."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        remount = "remount," if folder.is_mount() else ""
        command = ["mount", "-t", "tmpfs", "-o", f"{remount}{options}", "none", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"FULL DISKS WERE NOT TESTED: mounting a tmpfs failed ({done.stderr.strip()})")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def cache_of(root: Path, cache: Path, teacher: Path) -> Store:
    return open_annotation_job(compose(*annotate_command(root, cache, teacher), f"root={root}", name="annotate")).store


@pytest.mark.slow
def test_a_full_disk_gives_a_single_message_and_the_next_run_resumes(
    disk: Callable[[str], Path], tmp_path: Path, teacher_folder: Path
) -> None:
    cache = disk("size=96k") / "cache"
    line = annotate_command(tmp_path, cache, teacher_folder)
    done = run(tmp_path, *line, command="annotate")
    assert done.returncode == 4
    assert "Traceback" not in done.stderr
    (message,) = (text for text in done.stderr.splitlines() if "No space left on device" in text)
    assert re.search(rf"{cache}\S*\. .*free disk space.* then run the same command again", message)
    written = shards(cache)
    store = cache_of(tmp_path, cache, teacher_folder)
    assert len(store) > 0
    assert store.check() == []
    assert not list(cache.rglob("*.tmp"))
    assert not list(cache.glob("claims/[0-9a-f]*"))
    disk("ro")
    with pytest.raises(OSError, match="Read-only file system") as raised:
        annotate_here(tmp_path, cache, teacher_folder)
    assert str(raised.value.filename).startswith(str(cache))
    disk("rw,size=8m")
    done = run(tmp_path, *line, command="annotate")
    assert done.returncode == 0, done.stderr
    annotate_here(tmp_path, tmp_path / "undisturbed", teacher_folder)
    assert shards(cache) == shards(tmp_path / "undisturbed")
    assert shards(cache).items() >= written.items()
    assert cache_of(tmp_path, cache, teacher_folder).check() == []


def test_a_complete_cache_can_be_read_on_a_read_only_disk(
    disk: Callable[[str], Path],
    tmp_path: Path,
    teacher_folder: Path,
    configured: Callable[..., DictConfig],
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = configured(f"cache.dir={disk('size=8m')}/cache", "loss=[answer,kl,rationale]")
    first = build_curriculum(prepare(config, tmp_path))
    with pytest.raises(OSError, match="Read-only file system"):
        (disk("ro") / "file").touch()
    job = prepare(config, tmp_path)
    teacher = CountingTeacher(job.annotation_job.teacher)
    again = build_curriculum(replace(job, annotation_job=replace(job.annotation_job, teacher=teacher)))
    assert teacher.num_loads == 0
    assert [lesson.example_ids for lesson in again.train] == [lesson.example_ids for lesson in first.train]
    assert [lesson.counts() for lesson in again.train] == [lesson.counts() for lesson in first.train]
    assert "records exist; the teacher is not loaded" in capsys.readouterr().err
    assert job.annotation_job.store.check() == []


@pytest.mark.slow
def test_a_folder_that_vanishes_gives_a_single_message_and_stays_intact(tmp_path: Path, teacher_folder: Path) -> None:
    cache, elsewhere = tmp_path / "cache", tmp_path / "elsewhere"
    line = annotate_command(tmp_path, cache, teacher_folder, "task.examples.num_unlabelled=400")
    command = [sys.executable, "-m", "distill.annotate", *line]
    environment = os.environ | {"DISTILL_ROOT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while process.poll() is None and len(list(cache.glob("*.parquet"))) < 3:
        time.sleep(0.01)
    cache.rename(elsewhere)
    _, errors = process.communicate(timeout=60)
    assert process.returncode in (3, 4)
    assert "Traceback" not in errors
    assert str(cache) in errors.strip().splitlines()[-1]
    store = cache_of(tmp_path, elsewhere, teacher_folder)
    assert len(store) > 0
    assert store.check() == []


def test_a_folder_that_cannot_be_made_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nowhere")):
        with pytest.raises(CacheError, match=rf"cannot be written to {folder}: .*; set cache\.dir or root"):
            open_store(folder).writing().__enter__()


def test_a_failed_write_names_its_file_and_leaves_none(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as raised, atomic_write(tmp_path / "file"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert raised.value.filename == str(tmp_path / "file")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("replacement", ["nothing", "a file", "an empty folder"])
def test_a_writer_reports_that_its_folder_is_gone(replacement: str, tmp_path: Path) -> None:
    folder = tmp_path / "cache"

    def write_after_removal() -> None:
        with open_store(folder).writing() as writer:
            writer.add([annotation(1)])
            writer.flush()
            shutil.rmtree(folder)
            if replacement != "nothing":
                folder.touch() if replacement == "a file" else folder.mkdir()
            writer.add([annotation(2)])
            writer.flush()

    with pytest.raises(CacheError, match=rf"{folder}\S* (no longer exists|is missing)"):
        write_after_removal()


def test_a_shard_is_durable_before_the_manifest_lists_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Survives a power cut: contents are synced before names, names of shards before the manifest."""
    folder, synced, unsynced, listed = tmp_path / "cache", set[int](), set[Path](), list[str]()
    known, sync, originals = set[Path](), os.fsync, {name: getattr(os, name) for name in ("replace", "rename", "link")}

    def fsync(handle: int) -> None:
        path = Path(f"/proc/self/fd/{handle}").resolve()
        if path.parent.parent.name == "manifests":
            for line in unsealed(path.read_bytes()):
                assert all((folder / f"{line['shard']}.{suffix}").exists() for suffix in ("safetensors", "parquet"))
                assert not unsynced
                listed.append(line["shard"])
            if path not in known:
                known.add(path)
                unsynced.update((path, path.parent, path.parent.parent))
        sync(handle)
        synced.add(path.stat().st_ino)
        unsynced.difference_update([name for name in unsynced if name.parent == path])

    def renaming(how: str) -> Callable[..., None]:
        def name(source: Any, target: Any, **options: Any) -> None:
            originals[how](source, target, **options)
            if Path(target).suffix in {".safetensors", ".parquet", ".jsonl"}:
                assert Path(target).stat().st_ino in synced
                unsynced.add(Path(target))  # until the folder is synced

        return name

    monkeypatch.setattr(os, "fsync", fsync)
    for how in originals:
        monkeypatch.setattr(os, how, renaming(how))
    store = open_store(folder)
    with store.writing() as writer:
        for number in (1, 2, 3):
            writer.add([annotation(number)])
            writer.flush()
            assert not unsynced
    assert set(listed) == {path.stem for path in folder.glob("*.parquet")}
    assert len(set(listed)) == 3


@pytest.mark.parametrize("suffix", ["safetensors", "parquet"])
def test_opening_refuses_files_of_wrong_size(suffix: str, single_shard: Files, tmp_path: Path) -> None:
    write_files(tmp_path / "cache", single_shard)
    (file,) = tmp_path.glob(f"cache/*.{suffix}")
    for content in (b"", file.read_bytes()[:-1], file.read_bytes() + b"x"):
        file.write_bytes(content)
        with pytest.raises(CacheError, match=rf"{file.name} is damaged: it has"):
            open_store(tmp_path / "cache")


@pytest.mark.parametrize("name", [None, "a file"])
def test_a_failure_while_writing_names_its_file_or_else_the_folder(name: str | None, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    with pytest.raises(OSError, match="No space left") as raised, open_store(folder).writing():
        raise OSError(errno.ENOSPC, "No space left on device", *([name] if name else []))
    assert raised.value.filename == (name or str(folder))
