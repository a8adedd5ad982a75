"""A cache at a URL: uploaded when complete, read through local copies, by any number of machines."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from distill.cache.store import Store, drop_shard
from distill.errors import CacheError, ConfigError
from tests.annotation.conftest import annotate_options
from tests.cache.conftest import CODEC, FINGERPRINT, annotation, comparable, key
from tests.conftest import run, shards, tiny_overrides


def open_remote(tmp_path: Path, machine: str = "one") -> Store:
    """Open the cache as a machine with its own local copy."""
    return Store(tmp_path / machine, FINGERPRINT, CODEC, url=f"file://{tmp_path}/remote")


def write_records(tmp_path: Path, *numbers: int, machine: str = "one") -> Store:
    store = open_remote(tmp_path, machine)
    with store.writing() as writer:
        for number in numbers:
            writer.add([annotation(number)])
            writer.flush()
    return store


def test_a_machine_reads_what_another_wrote(tmp_path: Path) -> None:
    other = open_remote(tmp_path, "two")
    write_records(tmp_path, 1, 2, 4)
    assert shards(tmp_path / "remote") == shards(tmp_path / "one")
    other.refresh()
    assert len(other) == 3
    assert not shards(tmp_path / "two")  # shards are downloaded when they are read
    assert comparable(other.read(key(2))) == comparable(annotation(2))
    assert len(shards(tmp_path / "two")) == 2
    write_records(tmp_path, 5, machine="two")
    assert comparable(open_remote(tmp_path).read(key(5))) == comparable(annotation(5))
    assert other.check() == []


def test_a_damaged_copy_is_downloaded_again_and_a_damaged_original_is_refused(tmp_path: Path) -> None:
    write_records(tmp_path, 1)
    intact = shards(tmp_path / "one")
    for path in (tmp_path / "one").glob("[0-9a-f]*.[sp]*"):
        path.write_bytes(path.read_bytes()[:-3] + b"xyz")
    assert comparable(open_remote(tmp_path).read(key(1))) == comparable(annotation(1))
    assert shards(tmp_path / "one") == intact
    (original,) = (tmp_path / "remote").glob("*.safetensors")
    original.write_bytes(original.read_bytes()[:-3] + b"xyz")
    with pytest.raises(CacheError, match=f"{original.name} is damaged"):
        open_remote(tmp_path, "two").read(key(1))
    original.unlink()
    with pytest.raises(CacheError, match="exists neither locally nor remotely"):
        open_remote(tmp_path, "three").read(key(1))
    drop_shard(tmp_path / "two", original.stem, url=f"file://{tmp_path}/remote")
    assert len(open_remote(tmp_path)) == len(open_remote(tmp_path, "two")) == 0
    write_records(tmp_path, 1, machine="two")
    assert shards(tmp_path / "remote") == intact
    assert comparable(open_remote(tmp_path, "three").read(key(1))) == comparable(annotation(1))


def test_the_next_process_uploads_what_a_killed_one_did_not(tmp_path: Path) -> None:
    write_records(tmp_path, 1, 2)
    intact = shards(tmp_path / "remote")
    shutil.rmtree(tmp_path / "remote")
    write_records(tmp_path, 4)
    assert shards(tmp_path / "remote").keys() > intact.keys()
    assert all(comparable(open_remote(tmp_path, "two").read(key(n))) == comparable(annotation(n)) for n in (1, 2, 4))


def test_another_fingerprint_at_the_url_is_refused(tmp_path: Path) -> None:
    write_records(tmp_path, 1)
    with pytest.raises(CacheError, match="dtype: cache has"):
        Store(tmp_path / "two", {**FINGERPRINT, "teacher": {}}, CODEC, url=f"file://{tmp_path}/remote")


def test_an_unsupported_url_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere://bucket/x cannot be opened"):
        Store(tmp_path, FINGERPRINT, CODEC, url="nowhere://bucket/x")


def test_an_unreachable_url_is_reported_and_local_records_are_kept(tmp_path: Path) -> None:
    write_records(tmp_path, 1)
    store = open_remote(tmp_path)

    def write_without_remote() -> None:
        with store.writing() as writer:
            shutil.rmtree(tmp_path / "remote")
            (tmp_path / "remote").write_text("a file in its place")
            writer.add([annotation(2)])

    with pytest.raises(OSError, match=r"remote cannot be reached .* local copy: .*one"):
        write_without_remote()
    (tmp_path / "remote").unlink()
    write_records(tmp_path, 4)
    assert comparable(open_remote(tmp_path, "two").read(key(4))) == comparable(annotation(4))


# An S3 server, and commands in separate processes.

BUCKET = "import s3fs; s3fs.S3FileSystem().mkdir('bucket')"


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A bucket on a server on this machine."""
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"], stderr=subprocess.PIPE, text=True
    )
    try:
        assert server.stderr is not None
        line = next(line for line in server.stderr if "Running on http" in line)
        settings = {"ENDPOINT_URL": line.split()[-1], "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "canary-of-s3"}
        for name, value in settings.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        subprocess.run([sys.executable, "-c", BUCKET], check=True, timeout=60)
        yield
    finally:
        server.kill()
        server.communicate()


@pytest.mark.slow
def test_machines_with_a_common_bucket_annotate_once(
    s3: None, tmp_path: Path, teacher_folder: Path, student_folder: Path
) -> None:
    def output_of(machine: str, *more: str, command: str = "annotate") -> str:
        (tmp_path / machine).mkdir(exist_ok=True)
        options = annotate_options(tmp_path, teacher_folder, *more)
        if command == "train":
            options = [*tiny_overrides(tmp_path, teacher_folder, student_folder), *more]
        options = [o for o in options if not o.startswith(("root=", "cache.dir="))]
        process = run(tmp_path / machine, *options, "root=s3://bucket/team", command=command)
        assert process.returncode == 0, process.stderr
        return process.stderr + process.stdout

    assert "58 of them new" in output_of("one", "teacher.num_rationales=4")
    assert "the teacher is not loaded (0 calls)" in output_of("two", "teacher.num_rationales=4")
    assert "58 records: all checksums are correct" in output_of("two", "teacher.num_rationales=4", "verify=true")
    (first,), (second,) = ((tmp_path / machine).glob("copies/*") for machine in ("one", "two"))
    assert shards(first) == shards(second) != {}
    output_of("one", "trainer.max_steps=2", command="train")
    output = output_of("two", "trainer.max_steps=2", command="train")
    assert "the teacher is not loaded (0 calls)" in output
    assert list((tmp_path / "two" / "runs").glob("*/student/config.json"))
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in written if b"canary-of-s3" in path.read_bytes()]
