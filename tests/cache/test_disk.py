"""Law 8 under attack: damaged files, hostile files, full disks and folders that vanish."""

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

from distill.annotation.fill import open_source
from distill.app.files import whole_file
from distill.cache.store import Store
from distill.errors import CacheError
from distill.lessons.curriculum import prepare, teach
from tests.cache.conftest import Files, annotating, annotation, here, laid_out, opened, unsealed
from tests.conftest import CountingTeacher, compose, run, shards


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A file system of its own: call it with mount options, first to have it and again to change it."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mounted(options: str) -> Path:
        again = "remount," if folder.is_mount() else ""
        line = ["mount", "-t", "tmpfs", "-o", f"{again}{options}", "none", str(folder)]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"THE FULL DISK WAS NOT TESTED: nothing can be mounted here ({done.stderr.strip()})")
        return folder

    yield mounted
    if folder.is_mount():
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def stored_in(root: Path, cache: Path, teacher: Path) -> Store:
    return open_source(compose(*annotating(root, cache, teacher), f"root={root}", name="annotate")).store


@pytest.mark.slow
def test_a_full_disk_is_one_message_and_the_next_run_goes_on(
    disk: Callable[[str], Path], tmp_path: Path, teacher_folder: Path
) -> None:
    cache = disk("size=96k") / "cache"
    line = annotating(tmp_path, cache, teacher_folder)
    done = run(tmp_path, *line, command="annotate")
    assert done.returncode == 4
    assert "Traceback" not in done.stderr
    (message,) = (text for text in done.stderr.splitlines() if "No space left on device" in text)
    assert re.search(rf"{cache}\S*\. .*free space.* then run the same command again", message)
    there = shards(cache)
    store = stored_in(tmp_path, cache, teacher_folder)
    assert len(store) > 0
    assert store.check() == []
    assert not list(cache.rglob("*.tmp"))
    assert not list(cache.glob("claims/[0-9a-f]*"))
    disk("ro")
    with pytest.raises(OSError, match="Read-only file system") as raised:
        here(tmp_path, cache, teacher_folder)
    assert str(raised.value.filename).startswith(str(cache))
    disk("rw,size=8m")
    done = run(tmp_path, *line, command="annotate")
    assert done.returncode == 0, done.stderr
    here(tmp_path, tmp_path / "undisturbed", teacher_folder)
    assert shards(cache) == shards(tmp_path / "undisturbed")
    assert shards(cache).items() >= there.items()
    assert stored_in(tmp_path, cache, teacher_folder).check() == []


def test_a_whole_cache_can_be_read_where_nothing_can_be_written(
    disk: Callable[[str], Path],
    tmp_path: Path,
    teacher_folder: Path,
    configured: Callable[..., DictConfig],
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = configured(f"cache.dir={disk('size=8m')}/cache", "loss=[answer,kl,rationale]")
    first = teach(prepare(config, tmp_path))
    with pytest.raises(OSError, match="Read-only file system"):
        (disk("ro") / "file").touch()
    job = prepare(config, tmp_path)
    teacher = CountingTeacher(job.source.teacher)
    again = teach(replace(job, source=replace(job.source, teacher=teacher)))
    assert teacher.num_loads == 0
    assert [lesson.example_id for lesson in again.train] == [lesson.example_id for lesson in first.train]
    assert [lesson.counts() for lesson in again.train] == [lesson.counts() for lesson in first.train]
    assert "records exist; the teacher is not loaded" in capsys.readouterr().err
    assert job.source.store.check() == []


@pytest.mark.slow
def test_a_folder_that_goes_away_is_one_message_and_what_was_in_it_is_whole(
    tmp_path: Path, teacher_folder: Path
) -> None:
    cache, elsewhere = tmp_path / "cache", tmp_path / "elsewhere"
    line = annotating(tmp_path, cache, teacher_folder, "task.examples.num_unlabelled=400")
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
    store = stored_in(tmp_path, elsewhere, teacher_folder)
    assert len(store) > 0
    assert store.check() == []


def test_a_write_that_fails_names_its_file_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as raised, whole_file(tmp_path / "file"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert raised.value.filename == str(tmp_path / "file")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["nothing", "a file", "an empty folder"])
def test_a_writer_whose_folder_is_gone_says_so(what: str, tmp_path: Path) -> None:
    folder = tmp_path / "cache"

    def interrupted() -> None:
        with opened(folder).writing() as writer:
            writer.add([annotation(1)])
            writer.flush()
            shutil.rmtree(folder)
            if what != "nothing":
                folder.touch() if what == "a file" else folder.mkdir()
            writer.add([annotation(2)])
            writer.flush()

    with pytest.raises(CacheError, match=rf"{folder}\S* is (not there any more|missing)"):
        interrupted()


def test_a_shard_is_on_disk_under_its_name_before_a_line_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a power cut would leave: contents are synced before names, names of shards before the line."""
    folder, synced, named, checked = tmp_path / "cache", set[int](), dict[str, int](), list[str]()
    sync, replaces = os.fsync, {name: getattr(os, name) for name in ("replace", "rename", "link")}

    def fsync(handle: int) -> None:
        path = Path(f"/proc/self/fd/{handle}").resolve()
        if path.name.startswith("manifest-"):
            for line in unsealed(path.read_bytes()):
                assert {f"{line['shard']}.safetensors", f"{line['shard']}.parquet"} <= set(named)
                assert all(number == 0 for number in named.values())
                checked.append(line["shard"])
            named[path.name] = named.get(path.name, 1)
        sync(handle)
        synced.add(path.stat().st_ino)
        if path == folder:
            named.update(dict.fromkeys(named, 0))

    def naming(how: str) -> Callable[..., None]:
        def name(source: Any, target: Any, **others: Any) -> None:
            replaces[how](source, target, **others)
            if Path(target).suffix in {".safetensors", ".parquet", ".jsonl"}:
                assert Path(target).stat().st_ino in synced
                named[Path(target).name] = 1  # until the folder is synced

        return name

    monkeypatch.setattr(os, "fsync", fsync)
    for how in replaces:
        monkeypatch.setattr(os, how, naming(how))
    store = opened(folder)
    with store.writing() as writer:
        for number in (1, 2, 3):
            writer.add([annotation(number)])
            writer.flush()
            assert not any(named.values())
    assert set(checked) == {path.stem for path in folder.glob("*.parquet")}
    assert len(set(checked)) == 3


@pytest.mark.parametrize("suffix", ["safetensors", "parquet"])
def test_a_file_of_another_size_is_found_when_a_cache_is_opened(suffix: str, one: Files, tmp_path: Path) -> None:
    laid_out(tmp_path / "cache", one)
    (file,) = tmp_path.glob(f"cache/*.{suffix}")
    for content in (b"", file.read_bytes()[:-1], file.read_bytes() + b"x"):
        file.write_bytes(content)
        with pytest.raises(CacheError, match=rf"{file.name} is damaged: its size"):
            opened(tmp_path / "cache")
