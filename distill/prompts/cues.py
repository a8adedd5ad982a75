"""Prompts of plain text, in which cues stand before the question and its targets.

A shot, or a training sequence of a student (with the rationale line only if the span is `rationale`):

    Review: The jokes fall flat.
    Reason: Jokes that fall flat are a failing.
    Sentiment: negative<end>
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, final

from transformers import PreTrainedTokenizerBase

from distill.errors import ConfigError
from distill.prompts import check_texts
from distill.prompts.pieces import Ids, Pieces
from distill.records import Example, Message, Span


@dataclass(frozen=True)
class Layout:
    """The fixed texts of a task's prompt."""

    instruction: str
    question_cue: str
    rationale_cue: str
    answer_cue: str

    def __post_init__(self) -> None:
        """Raise ConfigError for texts in which a line break stayed two characters, as on most command lines."""
        check_texts({f"task.layout.{field.name}": getattr(self, field.name) for field in fields(self)})

    def frame(self, tokenizer: PreTrainedTokenizerBase, shots: Sequence[Example]) -> Cues:
        """The layout in the tokens of a model."""
        return Cues(self, tokenizer, shots)


@final
class Cues:
    """A layout in the tokens of one model."""

    question_lead = target_lead = " "
    template: str | None = None

    def __init__(self, layout: Layout, tokenizer: PreTrainedTokenizerBase, shots: Sequence[Example]) -> None:
        assert tokenizer.eos_token_id is not None
        self.end: int = int(tokenizer.eos_token_id)
        self.separator = f"\n{layout.answer_cue}"
        self.pieces = Pieces(tokenizer, _samples(layout))
        self.layout = layout
        self._shots = shots

    def prefix(self, span: Span) -> Ids:
        """Token ids of the start token if the model has one, the instruction, and the shots."""
        ids, encode = self.pieces.start, self.pieces
        if self.layout.instruction:
            ids = self._followed(ids, self.layout.instruction + "\n\n")
        for shot in self._shots:
            if shot.answer is None or (span == "rationale" and shot.rationale is None):
                raise ConfigError(f"the shot {shot.question[:60]!r} has no answer or no rationale")
            ids = self._followed(ids, f"{self.layout.question_cue} {shot.question}\n")
            if span == "rationale":
                ids += encode(self.layout.rationale_cue) + encode(f" {shot.rationale}") + encode("\n")
            ids += (*encode(self.layout.answer_cue), *encode(f" {shot.answer}"), self.end, *encode("\n"))
        return ids

    def question(self, span: Span, text: str, history: Sequence[Message] = ()) -> tuple[Ids, Ids, Ids]:
        """Token ids of the question's cue, of the question, and of the target's cue."""
        if history:
            raise ConfigError("conversations of several messages need a chat template; set prompt=chat")
        is_first = not self.layout.instruction and not self._shots
        encode_cue = self.pieces.first if is_first else self.pieces
        after = self.pieces("\n") + self.pieces(self._cue(span))
        return encode_cue(self.layout.question_cue), self.pieces(f" {text}"), after

    def separator_ids(self) -> Ids:
        """Token ids between a rationale and the answer after it."""
        return self.pieces("\n") + self.pieces(self.layout.answer_cue)

    def around(self, span: Span, history: Sequence[Message] = ()) -> tuple[str, str]:  # noqa: ARG002
        """The texts before and after the question in a prompt without shots."""
        instruction = f"{self.layout.instruction}\n\n" if self.layout.instruction else ""
        return f"{instruction}{self.layout.question_cue} ", f"\n{self._cue(span)}"

    def literal(self, span: Span) -> tuple[str, str]:
        """The same texts, after the name of the start token if the model has one."""
        before, after = self.around(span)
        return self.pieces.decode(self.pieces.start, skip_special=False) + before, after

    def fingerprint(self) -> Mapping[str, Any]:
        """The layout and the tokenizer decide everything."""
        return {}

    def _cue(self, span: Span) -> str:
        return self.layout.answer_cue if span == "answer" else self.layout.rationale_cue

    def _followed(self, ids: Ids, text: str) -> Ids:
        """Append a text, which some tokenizers encode differently if it is the first of the prompt."""
        return ids + (self.pieces.first(text) if ids == self.pieces.start else self.pieces(text))


def _samples(layout: Layout) -> tuple[str, ...]:
    """Pieces of a prompt to try a tokenizer on, of characters that every prompt has."""
    word = layout.answer_cue or "a"
    return (layout.question_cue or word, f" {word}", "\n", word, f" {word}", "\n")
