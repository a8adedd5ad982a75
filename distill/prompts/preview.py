"""A prompt as a model sees it: as text, with the names of special tokens, and with the learned tokens between marks."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence

from distill.prompts.rendering import Prompts
from distill.records import Prompt

OPEN, CLOSE = "⟦", "⟧"


def preview(prompts: Prompts, prompt: Prompt) -> str:
    """The text of a prompt's tokens, with ⟦ ⟧ around those of each span."""
    return marked(prompts, prompt.ids, prompt.spans.values())


def marked(prompts: Prompts, ids: Sequence[int], ranges: Collection[tuple[int, int]]) -> str:
    """The text of tokens, with ⟦ ⟧ around those of each range."""
    cuts = sorted({0, len(ids), *itertools.chain.from_iterable(ranges)})
    parts = []
    for start, stop in itertools.pairwise(cuts):
        text = _text(prompts, ids, start, stop)
        parts.append(f"{OPEN}{text}{CLOSE}" if (start, stop) in ranges else text)
    return "".join(parts)


def _text(prompts: Prompts, ids: Sequence[int], start: int, stop: int) -> str:
    """The text of a range of tokens; many tokenizers drop the space before a text that they decode by itself."""
    decode = prompts.frame.pieces.decode
    before, whole = (decode(ids[:end], skip_special=False) for end in (start, stop))
    return whole.removeprefix(before) if whole.startswith(before) else decode(ids[start:stop], skip_special=False)
