"""Who works on what: a file for each piece of work, which only one process can create; works on shared file systems.

A claim lives as long as its holder touches it, from a thread of its own. It is dead when its process is gone (on
this machine), or when it was not touched for `seconds`, by the clock of the file system and not of any machine. No
file is ever locked.
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

from distill.app.files import whole_file


@final
class Claims:
    """The claims in one folder, as seen by one process."""

    def __init__(self, folder: Path, *, seconds: float) -> None:
        """A claim that was not touched for `seconds` is dead."""
        self._folder, self._seconds = folder, seconds
        self._mine: set[str] = set()

    def take(self, name: str) -> bool:
        """Claim a piece of work; False where another process has it."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / name
        for _ in range(2):
            if self._create(path):
                self._mine.add(name)
                return True
            if not self._bury(path):
                return False
        return False

    def release(self, name: str) -> None:
        """Give up a claim of this process."""
        self._mine.discard(name)
        (self._folder / name).unlink(missing_ok=True)

    @contextmanager
    def held(self) -> Iterator[None]:
        """While this lasts the claims of this process are kept alive; at its end they are given up.

        Dead claims of others are taken away first: of work that was done, but not of its claim.
        """
        for path in self._folder.glob("[!.]*"):
            self._bury(path)
        done = threading.Event()
        keeper = threading.Thread(target=self._keep_alive, args=(done,), daemon=True)
        keeper.start()
        try:
            yield
        finally:
            done.set()
            keeper.join()
            for name in list(self._mine):
                self.release(name)

    def _keep_alive(self, done: threading.Event) -> None:
        while not done.wait(self._seconds / 10):
            for name in list(self._mine):
                with suppress(FileNotFoundError):
                    os.utime(self._folder / name)

    def _create(self, path: Path) -> bool:
        # A link appears with all its content, and not where there is one: a claim always says whose it is.
        whole = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        whole.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        try:
            os.link(whole, path)
        except FileExistsError:
            return False
        finally:
            whole.unlink()
        return True

    def _bury(self, path: Path) -> bool:
        """Take a dead claim away; False if it is alive. What another process renewed meanwhile is put back."""
        seen = _stat(path)
        if seen is None:
            return True
        if not self._is_dead(path, seen):
            return False
        grave = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
        try:
            path.rename(grave)
        except FileNotFoundError:
            return True
        if _stat(grave) == seen:
            grave.unlink()
            return True
        with suppress(FileExistsError):
            os.link(grave, path)
        grave.unlink()
        return False

    def _is_dead(self, path: Path, seen: tuple[int, int]) -> bool:
        try:
            holder = json.loads(path.read_text())
            host, pid = holder["host"], int(holder["pid"])
        except (OSError, ValueError, KeyError, TypeError):
            host, pid = "", 0  # damaged: only time tells
        if host == socket.gethostname() and pid != os.getpid() and not _is_running(pid):
            return True
        return self._now_ns() - seen[1] > self._seconds * 1e9

    def _now_ns(self) -> int:
        with whole_file(self._folder / ".clock") as temporary:
            return temporary.stat().st_mtime_ns


def _stat(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
