"""A cache behind a URL: put there when it is whole, read through a copy, by any number of machines."""

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
from tests.cache.conftest import CODEC, FINGERPRINT, annotation, key, stored
from tests.conftest import run, shards, tiny_overrides


def opened(tmp_path: Path, machine: str = "one") -> Store:
    """The cache as a machine sees it that has a copy of its own."""
    return Store(tmp_path / machine, FINGERPRINT, CODEC, url=f"file://{tmp_path}/there")


def fill(tmp_path: Path, *numbers: int, machine: str = "one") -> Store:
    store = opened(tmp_path, machine)
    with store.writing() as writer:
        for number in numbers:
            writer.add([annotation(number)])
            writer.flush()
    return store


def test_what_one_machine_makes_another_reads(tmp_path: Path) -> None:
    watching = opened(tmp_path, "two")
    fill(tmp_path, 1, 2, 4)
    assert shards(tmp_path / "there") == shards(tmp_path / "one")
    watching.refresh()
    assert len(watching) == 3
    assert not shards(tmp_path / "two")  # nothing is fetched before it is read
    assert stored(watching.read(key(2))) == stored(annotation(2))
    assert len(shards(tmp_path / "two")) == 2
    fill(tmp_path, 5, machine="two")
    assert stored(opened(tmp_path).read(key(5))) == stored(annotation(5))
    assert watching.check() == []


def test_a_damaged_copy_is_fetched_anew_and_a_damaged_original_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, 1)
    whole = shards(tmp_path / "one")
    for path in (tmp_path / "one").glob("[0-9a-f]*.[sp]*"):
        path.write_bytes(path.read_bytes()[:-3] + b"xyz")
    assert stored(opened(tmp_path).read(key(1))) == stored(annotation(1))
    assert shards(tmp_path / "one") == whole
    (original,) = (tmp_path / "there").glob("*.safetensors")
    original.write_bytes(original.read_bytes()[:-3] + b"xyz")
    with pytest.raises(CacheError, match=f"{original.name} is damaged"):
        opened(tmp_path, "two").read(key(1))
    original.unlink()
    with pytest.raises(CacheError, match="exists neither locally nor remotely"):
        opened(tmp_path, "three").read(key(1))
    drop_shard(tmp_path / "two", original.stem, url=f"file://{tmp_path}/there")
    assert len(opened(tmp_path)) == len(opened(tmp_path, "two")) == 0
    fill(tmp_path, 1, machine="two")
    assert shards(tmp_path / "there") == whole
    assert stored(opened(tmp_path, "three").read(key(1))) == stored(annotation(1))


def test_what_a_killed_process_did_not_put_there_is_put_by_the_next(tmp_path: Path) -> None:
    fill(tmp_path, 1, 2)
    whole = shards(tmp_path / "there")
    shutil.rmtree(tmp_path / "there")
    fill(tmp_path, 4)
    assert shards(tmp_path / "there").keys() > whole.keys()
    assert all(stored(opened(tmp_path, "two").read(key(n))) == stored(annotation(n)) for n in (1, 2, 4))


def test_another_fingerprint_there_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, 1)
    with pytest.raises(CacheError, match="dtype: cache has"):
        Store(tmp_path / "two", {**FINGERPRINT, "teacher": {}}, CODEC, url=f"file://{tmp_path}/there")


def test_a_url_that_nothing_understands_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere://bucket/x cannot be opened"):
        Store(tmp_path, FINGERPRINT, CODEC, url="nowhere://bucket/x")


def test_a_url_that_cannot_be_reached_says_so_and_keeps_what_was_made(tmp_path: Path) -> None:
    fill(tmp_path, 1)
    store = opened(tmp_path)

    def unplugged() -> None:
        with store.writing() as writer:
            shutil.rmtree(tmp_path / "there")
            (tmp_path / "there").write_text("a file in its place")
            writer.add([annotation(2)])

    with pytest.raises(OSError, match=r"there cannot be reached .* local copy: .*one"):
        unplugged()
    (tmp_path / "there").unlink()
    fill(tmp_path, 4)
    assert stored(opened(tmp_path, "two").read(key(4))) == stored(annotation(4))


# A server that speaks S3, and the commands in processes of their own.

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
def test_machines_that_share_a_bucket_annotate_once(
    s3: None, tmp_path: Path, teacher_folder: Path, student_folder: Path
) -> None:
    def done(machine: str, *more: str, command: str = "annotate") -> str:
        (tmp_path / machine).mkdir(exist_ok=True)
        given = annotate_options(tmp_path, teacher_folder, *more)
        if command == "train":
            given = [*tiny_overrides(tmp_path, teacher_folder, student_folder), *more]
        given = [o for o in given if not o.startswith(("root=", "cache.dir="))]
        found = run(tmp_path / machine, *given, "root=s3://bucket/team", command=command)
        assert found.returncode == 0, found.stderr
        return found.stderr + found.stdout

    assert "58 of them new" in done("one", "teacher.num_rationales=4")
    assert "the teacher is not loaded (0 calls)" in done("two", "teacher.num_rationales=4")
    assert "58 records: all checksums are right" in done("two", "teacher.num_rationales=4", "verify=true")
    (first,), (second,) = ((tmp_path / machine).glob("copies/*") for machine in ("one", "two"))
    assert shards(first) == shards(second) != {}
    done("one", "trainer.max_steps=2", command="train")
    told = done("two", "trainer.max_steps=2", command="train")
    assert "the teacher is not loaded (0 calls)" in told
    assert list((tmp_path / "two" / "runs").glob("*/student/config.json"))
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in written if b"canary-of-s3" in path.read_bytes()]
