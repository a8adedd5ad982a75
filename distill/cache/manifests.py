"""The manifests of a cache: JSON lines about its shards, in files that one process each appends to.

    manifests/<writer>/<number>.jsonl   the lines of one writer, at most `_MAX_LINES` in a file
    manifest-<writer>.jsonl             the same beside the shards, as earlier versions wrote it: read, never written

A look for new lines lists the writers and opens the last file of each. What it costs does not depend on the number of
shards.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, final

from distill.app.files import sync_folder
from distill.cache.sealed import read_lines, seal
from distill.errors import CacheError

FOLDER = "manifests"
_MAX_LINES = 256  # a damaged file costs its lines, and with a URL a file is uploaded as a whole after each line

Line = dict[str, Any]


@final
class Manifests:
    """The manifests in a cache's folder, and how much of each this process has read."""

    def __init__(self, folder: Path) -> None:
        """`folder` is that of the cache."""
        self._folder = folder
        self._num_bytes: dict[Path, int] = {}
        self._last_number: dict[str, int] = {}  # by writer
        self._has_read_all = False

    def unread(self) -> list[Path]:
        """The files that may have new lines: at first all, later the last of each writer and those after it."""
        if self._has_read_all:
            return list(self._growing())
        self._has_read_all = True
        return manifest_paths(self._folder)

    def _growing(self) -> Iterator[Path]:
        with suppress(FileNotFoundError):
            for writer in sorted(os.listdir(self._folder / FOLDER)):  # noqa: PTH208 - one call to the system
                number = self._last_number.get(writer, 0)
                while (path := _path(self._folder, writer, number)).exists():
                    yield path
                    number += 1

    def new_lines(self, path: Path) -> list[Line]:
        """Return the complete lines that were appended to a file since it was last read."""
        self._refuse_links(path)
        start = self._num_bytes.get(path, 0)
        with path.open("rb") as file:
            file.seek(start)
            lines, num_bytes = read_lines(path, file.read())
        self._num_bytes[path] = start + num_bytes
        if path.stem.isdigit():
            self._last_number[path.parent.name] = max(int(path.stem), self._last_number.get(path.parent.name, 0))
        return lines

    def _refuse_links(self, path: Path) -> None:
        while path != self._folder:
            if path.is_symlink():
                raise CacheError(f"{path} is a symbolic link; replace it by a regular file or folder")
            path = path.parent


@final
class OwnManifests:
    """The manifests that one writer appends to."""

    def __init__(self, folder: Path) -> None:
        """`folder` is that of the cache; the first line creates a file."""
        self._folder, self._writer = folder, uuid.uuid4().hex[:12]
        self._number, self._num_lines = 0, 0

    @property
    def is_lost(self) -> bool:
        """Whether the file that lines were appended to no longer exists."""
        return bool(self._num_lines) and not _path(self._folder, self._writer, self._number).exists()

    def append(self, *lines: Mapping[str, Any]) -> Path:
        """Append lines durably; return the file."""
        if self._num_lines >= _MAX_LINES:
            self._number, self._num_lines = self._number + 1, 0
        path = _path(self._folder, self._writer, self._number)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(b"".join(map(seal, lines)))
            file.flush()
            os.fsync(file.fileno())
        if not self._num_lines:
            for parent in (path.parent, path.parent.parent, self._folder):
                sync_folder(parent)
        self._num_lines += len(lines)
        return path


def manifest_paths(folder: Path) -> list[Path]:
    """All manifests of a cache. Lists the folder with all its shards."""
    return [*sorted(folder.glob("manifest-*.jsonl")), *sorted(folder.glob(f"{FOLDER}/*/*.jsonl"))]


def manifest_name(folder: Path, path: Path) -> str:
    """The path of a manifest below the cache's folder, by which lines and URLs name it."""
    return path.relative_to(folder).as_posix()


def _path(folder: Path, writer: str, number: int) -> Path:
    return folder / FOLDER / writer / f"{number:06d}.jsonl"
