"""JSON lines that carry a checksum of their content, and files of them that only one process creates."""

from __future__ import annotations

import json
import os
import uuid
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from distill.app.files import sync_folder
from distill.errors import CacheError


def create_once(path: Path, content: bytes) -> None:
    """Create a file with its whole content, unless another process has created it."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    with temporary.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    with suppress(FileExistsError):
        os.link(temporary, path)
    temporary.unlink()
    sync_folder(path.parent)


def seal(value: Mapping[str, Any]) -> bytes:
    """A manifest line with its checksum."""
    body = json.dumps(value, sort_keys=True).encode()
    return b'{"crc32": %10d, "line": %s}\n' % (zlib.crc32(body), body)


def unseal(line: bytes) -> dict[str, Any] | None:
    """The content of a manifest line, or None if its checksum is wrong."""
    body = line[30:-1]
    if line[:30] != b'{"crc32": %10d, "line": ' % zlib.crc32(body) or line[-1:] != b"}":
        return None
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def read_lines(path: Path, content: bytes) -> tuple[list[dict[str, Any]], int]:
    """Return the complete lines and their length in bytes; raises CacheError if one of them is damaged."""
    complete, end, incomplete = content.rpartition(b"\n")
    values = []
    for number, line in enumerate(complete.split(b"\n") if end else (), start=1):
        value = unseal(line)
        if value is None:
            raise CacheError(
                f"{path} is damaged: line {number} has a wrong checksum. Restore the file, or delete it: the records "
                "that it lists will be annotated again"
            )
        values.append(value)
    # An interrupted write leaves a prefix of a line. A complete line without its line end is damage.
    if unseal(incomplete[:-1]) is not None:
        raise CacheError(f"{path} is damaged: its last line has no line end. Restore the file, or delete it")
    return values, len(complete) + len(end)
