"""A cache behind an fsspec URL: files are put there once they are whole here, and read through a copy here.

Only manifests are ever replaced, each by its own writer and by a longer one; shards are named by their content. So
any number of machines may write to one URL without seeing each other's claims: at worst some work is done twice.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import fsspec

from distill.app.files import whole_file
from distill.errors import ConfigError


@final
class Remote:
    """A folder behind a URL, and its local copy."""

    def __init__(self, url: str, folder: Path) -> None:
        """Raise ConfigError where no installed package can reach such a URL."""
        self._url, self._folder = url, folder
        try:
            self._fs, self._path = fsspec.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"{url} cannot be opened: {error}. For S3: pip install 'distill[s3]'") from None

    def sizes(self) -> dict[str, int]:
        """Names and bytes of the files there."""
        with self._reaching():
            self._fs.invalidate_cache()
            try:
                found: list[dict[str, Any]] = self._fs.ls(self._path, detail=True)
            except FileNotFoundError:
                return {}
        return {one["name"].rpartition("/")[2]: one["size"] for one in found if one["type"] == "file"}

    def pull_manifests(self) -> None:
        """Bring here what others have added to theirs."""
        for name, size in sorted(
            self.sizes().items(), key=lambda one: one[0] != "manifest.jsonl"
        ):  # what made it first
            here = self._folder / name
            if name.startswith("manifest") and (not here.is_file() or here.stat().st_size < size):
                self.get(name)

    def get(self, name: str) -> None:
        """Bring one file here, in the place of what may be here."""
        with whole_file(self._folder / name) as temporary, self._reaching():
            self._fs.get_file(f"{self._path}/{name}", str(temporary))

    def put(self, *names: str) -> None:
        """Put files there, one after the other."""
        with self._reaching():
            self._fs.makedirs(self._path, exist_ok=True)
            for name in names:
                self._fs.put_file(str(self._folder / name), f"{self._path}/{name}")

    def put_missing(self) -> None:
        """Put there what a process that was killed has left here: shards first, then the manifests that name them."""
        there = self.sizes()
        here = [path for pattern in ("[0-9a-f]*.*", "manifest*") for path in sorted(self._folder.glob(pattern))]
        self.put(*(path.name for path in here if path.stat().st_size > there.get(path.name, -1)))

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except Exception as error:  # of whatever package reaches this URL
            reason = (
                f"{self._url} cannot be reached ({type(error).__name__}: {error}); what was made is in {self._folder}"
            )
            raise OSError(errno.EIO, reason) from error
