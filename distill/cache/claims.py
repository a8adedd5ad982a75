"""Claims on groups: files that only one process can create, so that each group is annotated once.

A background thread of the holder touches its claims. A claim is stale if its process is gone (on this machine) or if
it has not been touched for `seconds`, by the clock of the file system. No file locks are used, so claims work on
shared file systems.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import final

from distill.app.files import atomic_write


@final
class Claims:
    """The claims in a folder, as seen by one process."""

    def __init__(self, folder: Path, *, seconds: float) -> None:
        """Claims that were not touched for `seconds` are stale."""
        self._folder, self._seconds = folder, seconds
        self._held: set[str] = set()

    def take(self, name: str) -> bool:
        """Claim a group; return False if another process holds the claim."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / name
        for _ in range(2):
            if self._create(path):
                self._held.add(name)
                return True
            if not self._remove_if_stale(path):
                return False
        return False

    def release(self, name: str) -> None:
        """Release a claim of this process."""
        self._held.discard(name)
        (self._folder / name).unlink(missing_ok=True)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep the claims of this process alive inside the block, and release them at its end.

        First removes stale claims, also those of groups that are complete and will not be claimed again.
        """
        for path in self._folder.glob("[!.]*"):
            self._remove_if_stale(path)
        done = threading.Event()
        thread = threading.Thread(target=self._keep_alive, args=(done,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            for name in list(self._held):
                self.release(name)

    def _keep_alive(self, done: threading.Event) -> None:
        while not done.wait(self._seconds / 10):
            for name in list(self._held):
                with suppress(FileNotFoundError):
                    os.utime(self._folder / name)

    def _create(self, path: Path) -> bool:
        # A hard link appears atomically with its content, and fails if the path exists: every claim names its holder.
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        temporary.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        finally:
            temporary.unlink()
        return True

    def _remove_if_stale(self, path: Path) -> bool:
        """Remove a stale claim; return False if it is live. A claim that was renewed meanwhile is put back."""
        stat = _stat(path)
        if stat is None:
            return True
        if not self._is_stale(path, stat):
            return False
        removed = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
        try:
            path.rename(removed)
        except FileNotFoundError:
            return True
        if _stat(removed) == stat:
            removed.unlink()
            return True
        with suppress(FileExistsError):
            os.link(removed, path)
        removed.unlink()
        return False

    def _is_stale(self, path: Path, stat: tuple[int, int]) -> bool:
        try:
            holder = json.loads(path.read_text())
            host, pid = holder["host"], int(holder["pid"])
        except (OSError, ValueError, KeyError, TypeError):
            host, pid = "", 0  # damaged: judge by its age alone
        if host == socket.gethostname() and pid != os.getpid() and not _is_running(pid):
            return True
        return self._now_ns() - stat[1] > self._seconds * 1e9

    def _now_ns(self) -> int:
        with atomic_write(self._folder / ".clock") as temporary:
            return temporary.stat().st_mtime_ns


def _stat(path: Path) -> tuple[int, int] | None:
    """Inode and modification time, or None if the file does not exist."""
    try:
        result = path.stat()
    except FileNotFoundError:
        return None
    return result.st_ino, result.st_mtime_ns


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
