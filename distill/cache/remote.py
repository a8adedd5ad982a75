"""A cache at an fsspec URL: complete local files are uploaded, and files are downloaded before they are read.

Only manifests are ever replaced, each by its own writer with a longer version; shards are named by their content. So
any number of machines may write to one URL without seeing each other's claims; at worst some groups are annotated
twice.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import fsspec

from distill.app.files import atomic_write
from distill.cache.manifests import FOLDER as MANIFESTS
from distill.cache.manifests import manifest_name, manifest_paths
from distill.errors import ConfigError


@final
class Remote:
    """A folder behind a URL, and its local copy."""

    def __init__(self, url: str, folder: Path) -> None:
        """Raise ConfigError if no installed package supports the URL."""
        self._url, self._folder = url, folder
        try:
            self._fs, self._path = fsspec.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"{url} cannot be opened: {error}. For S3: pip install 'distill[s3]'") from None

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Return the names and sizes in bytes of the remote files, or of those in a folder."""
        with self._connection_errors():
            self._fs.invalidate_cache()
            try:
                entries: dict[str, dict[str, Any]] = self._fs.find(f"{self._path}/{folder}".rstrip("/"), detail=True)
            except FileNotFoundError:
                return {}
        prefix = f"{self._path.strip('/')}/"
        return {name.lstrip("/").removeprefix(prefix): entry["size"] for name, entry in entries.items()}

    def pull_manifests(self, *, with_header: bool = True) -> None:
        """Download manifests that are new or longer than the local ones, the cache's header first.

        Without the header, which is beside the shards and the manifests of earlier versions, no shard is listed.
        """
        sizes = self.sizes("" if with_header else MANIFESTS)
        for name, size in sorted(sizes.items(), key=lambda item: item[0] != "manifest.jsonl"):
            local = self._folder / name
            if name.startswith("manifest") and (not local.is_file() or local.stat().st_size < size):
                self.get(name)

    def get(self, name: str) -> None:
        """Download a file, replacing the local one."""
        with atomic_write(self._folder / name) as temporary, self._connection_errors():
            self._fs.get_file(f"{self._path}/{name}", str(temporary))

    def put(self, *names: str) -> None:
        """Upload files in order."""
        with self._connection_errors():
            for folder in {f"{self._path}/{name}".rpartition("/")[0] for name in names}:
                self._fs.makedirs(folder, exist_ok=True)
            for name in names:
                self._fs.put_file(str(self._folder / name), f"{self._path}/{name}")

    def put_missing(self) -> None:
        """Upload what a killed process did not: shards first, then the manifests that name them."""
        sizes = self.sizes()
        paths = [*sorted(self._folder.glob("[0-9a-f]*.*")), *sorted(self._folder.glob("manifest*.json*"))]
        local = {manifest_name(self._folder, path): path for path in [*paths, *manifest_paths(self._folder)]}
        self.put(*(name for name, path in local.items() if path.stat().st_size > sizes.get(name, -1)))

    @contextmanager
    def _connection_errors(self) -> Iterator[None]:
        """Turn errors of the file system into an OSError that names the URL."""
        try:
            yield
        except FileNotFoundError:
            raise
        except Exception as error:  # each fsspec implementation raises its own types
            message = f"{self._url} cannot be reached ({type(error).__name__}: {error}); local copy: {self._folder}"
            raise OSError(errno.EIO, message) from error
