"""Prompts: examples as token ids and spans for a model. The only caller of a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from transformers import PreTrainedTokenizerBase

from distill.app.quoting import escape_problem
from distill.errors import ConfigError
from distill.prompts.pieces import Ids, Pieces
from distill.records import Example, Message, Span


@runtime_checkable
class Frame(Protocol):
    """What a prompt has around a question and its targets, in the tokens of one model.

    `question_lead` and `target_lead` are the spaces before a question and before an answer or rationale, which are
    encoded with it. `separator` is the text between a rationale and the answer after it, up to the spaces. `end` is
    the id of the token that ends a target. `layout` is what was laid out, a part of the fingerprint.
    """

    layout: Any
    pieces: Pieces
    question_lead: str
    target_lead: str
    separator: str
    end: int

    @property
    def template(self) -> str | None:
        """The chat template that is rendered, if it is one."""
        ...

    def prefix(self, span: Span) -> Ids:
        """Token ids before every question."""
        ...

    def question(self, span: Span, text: str, history: Sequence[Message] = ()) -> tuple[Ids, Ids, Ids]:
        """Token ids from the prefix to the target: those before the question, its own, and those after it.

        `history` are the messages before the question; raises ConfigError if the frame cannot have them.
        """
        ...

    def separator_ids(self) -> Ids:
        """Token ids between a rationale and the answer after it."""
        ...

    def around(self, span: Span, history: Sequence[Message] = ()) -> tuple[str, str]:
        """The texts before and after the question, without special tokens; meant for prompts without shots."""
        ...

    def literal(self, span: Span) -> tuple[str, str]:
        """The same texts with the names of special tokens, as a tokenizer reads them."""
        ...

    def fingerprint(self) -> Mapping[str, Any]:
        """What decides the ids beside the layout and the tokenizer."""
        ...


@runtime_checkable
class Layout(Protocol):
    """The fixed texts of a task's prompt, for any model."""

    def frame(self, tokenizer: PreTrainedTokenizerBase, shots: Sequence[Example]) -> Frame:
        """The layout in the tokens of a model; raises ConfigError if the model cannot have it."""
        ...


def check_texts(texts: Mapping[str, str]) -> None:
    """Raise ConfigError for texts, by the keys of their settings, with a backslash and a letter for a line break."""
    if problems := [problem for key, text in texts.items() if (problem := escape_problem(key, text))]:
        raise ConfigError(*problems)
