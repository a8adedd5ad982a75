"""Packed text files: gzip and Zstandard, unpacked up to a limit."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from distill.errors import ConfigError

_CHUNK_BYTES = 2**20
# An unpacked file may exceed one of these limits, not both.
_MAX_UNPACKED_BYTES, _MAX_UNPACKED_RATIO = 2**30, 1000


def _open_gzip(file: Path) -> Any:
    return gzip.open(file)


def _open_zstandard(file: Path) -> Any:
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.OSFile(str(file)), "zstd")


_OPENERS: Mapping[str, Callable[[Path], Any]] = {".gz": _open_gzip, ".zst": _open_zstandard}
PACKED = tuple(_OPENERS)


def format_of(file: Path) -> str:
    """The suffix that says what a file holds, in lower case, without that of its packing."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in _OPENERS:
        return "".join(suffixes[-2:-1])
    return "".join(suffixes[-1:])


def content_of(file: Path) -> bytes:
    """The content of a file, unpacked if its name says that it is packed; ConfigError if it is too large."""
    if (suffix := file.suffix.lower()) not in _OPENERS:
        return file.read_bytes()
    limit, content = unpacked_limit(file), bytearray()
    try:
        with _OPENERS[suffix](file) as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                content += chunk
                if len(content) > limit:
                    raise too_large(file, limit, "pack fewer rows into a file")
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{file} cannot be unpacked: {error}; expected a whole file as its name says") from None
    return bytes(content)


def unpacked_limit(file: Path) -> int:
    """Number of bytes that a packed file may have when it is unpacked."""
    return max(_MAX_UNPACKED_BYTES, _MAX_UNPACKED_RATIO * file.stat().st_size)


def too_large(file: Path, limit: int, advice: str) -> ConfigError:
    """The error of a file that unpacks to more than its limit."""
    return ConfigError(
        f"{file} has {file.stat().st_size:,} bytes and unpacks to more than {limit:,}, which is not allowed; {advice}"
    )
