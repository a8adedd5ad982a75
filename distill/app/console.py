"""What a command says on the terminal, and which process says it."""

from __future__ import annotations

import os
import sys

MAX_CHARACTERS = 500
_MOST_CHARACTERS = 10_000  # of what is said at once
KEPT = "\n\t\u00a0\u200c\u200d\u202f\u3000"  # not printable to Python, yet plain parts of text


def is_first_process() -> bool:
    """Whether this one writes and speaks for all that train or annotate together."""
    return not any(int(os.environ.get(name) or 0) for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


def say(text: str) -> None:
    """A line for whoever watches; what a command gives goes to standard output, this does not."""
    if is_first_process():
        print(visible(text, _MOST_CHARACTERS), file=sys.stderr, flush=True)


def visible(text: str, limit: int = MAX_CHARACTERS) -> str:
    """The text with control, bidi and surrogate characters spelt out, cut to `limit` characters."""
    shown = "".join(c if c.isprintable() or c in KEPT else f"⟨U+{ord(c):04X}⟩" for c in text[:limit])
    return f"{shown}… ({len(text) - limit} more)" if len(text) > limit else shown
