"""Lines on the terminal, and which process prints them."""

from __future__ import annotations

import os
import shutil
import sys

MAX_CHARACTERS = 500
_MAX_LINE_CHARACTERS = 10_000
_WIDTH_OF_FILES = 110  # columns, where output goes to no terminal
KEPT = "\n\t\u00a0\u200c\u200d\u202f\u3000"  # not printable to Python, yet part of ordinary text


def is_first_process() -> bool:
    """Whether this process has rank 0: of several, it alone writes files and prints."""
    return not any(int(os.environ.get(name) or 0) for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


def say(text: str) -> None:
    """Print a progress line to standard error; results go to standard output."""
    if is_first_process():
        print(visible(text, _MAX_LINE_CHARACTERS), file=sys.stderr, flush=True)


def terminal_width() -> int:
    """Number of columns of the terminal that standard output goes to, or of $COLUMNS."""
    return shutil.get_terminal_size((_WIDTH_OF_FILES, 24)).columns


def visible(text: str, limit: int = MAX_CHARACTERS) -> str:
    """The text with control, bidi and surrogate characters escaped, cut to `limit` characters."""
    shown = "".join(c if c.isprintable() or c in KEPT else f"⟨U+{ord(c):04X}⟩" for c in text[:limit])
    return f"{shown}… ({len(text) - limit} more)" if len(text) > limit else shown
