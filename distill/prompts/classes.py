"""Renders an example for a model with a class head: its text as the model's own tokenizer encodes it, then its class.

A class is written behind the text as if it were a token, its id being its place among the labels. Losses then see a
vocabulary of the classes, and all that holds for the tokens of an answer holds for a class. The model never reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

from transformers import PreTrainedTokenizerBase

from distill.errors import ConfigError
from distill.prompts.rendering import TooLong
from distill.prompts.tokenizers import tokenizer_fingerprint
from distill.records import Example, Prompt, Span


@final
class ClassPrompts:
    """Renders examples for one tokenizer and the labels of one task, in their order."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        labels: Sequence[str],
        *,
        max_length: int,
        too_long: TooLong,
        padding_id: int | None = None,
    ) -> None:
        """`max_length` limits the tokens of a text with the special tokens around it.

        `padding_id` is that of the model; without it, that of the tokenizer, or its end token.
        """
        self.tokenizer = tokenizer
        self.labels = tuple(labels)
        self.max_length = max_length
        self.too_long = too_long
        known = (index for index in (padding_id, tokenizer.pad_token_id, tokenizer.eos_token_id) if index is not None)
        padding = next(known, None)
        if padding is None:
            raise ConfigError(f"the tokenizer of {tokenizer.name_or_path} has no padding token; set pad_token in it")
        self.end: int = padding
        self._class_of = {label: index for index, label in enumerate(self.labels)}

    @property
    def vocabulary_size(self) -> int:
        """Number of classes."""
        return len(self.labels)

    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides the ids of a text and its class."""
        tokenizer = tokenizer_fingerprint(self.tokenizer)
        return {"tokenizer": tokenizer, "labels": self.labels, "limit": [self.max_length, self.too_long]}

    def question(self, example: Example, span: Span, room: int = 0) -> tuple[int, ...]:
        """Token ids of a text with the special tokens around it; ValueError or ConfigError if it is too long.

        With `too_long=cut`, its end is cut off. The class takes no `room`, since the model does not read it.
        """
        ids = tuple(self.tokenizer(example.text).input_ids)
        if (surplus := len(ids) - self.max_length) <= 0:
            return ids
        if self.too_long == "refuse":
            raise ConfigError(
                f"{example.text[:60]!r}… is {surplus} tokens over the {self.max_length} that the student can read; set "
                "prompt.too_long=drop or prompt.too_long=cut"
            )
        if self.too_long == "drop":
            raise ValueError(f"{surplus} tokens over max_length={self.max_length}")
        return tuple(self.tokenizer(example.text, truncation=True, max_length=self.max_length).input_ids)

    def answer_ids(self, answer: str) -> tuple[int, ...]:
        """The class of an answer, as the only token of a target."""
        if answer not in self._class_of:
            raise ConfigError(f"the answer {answer!r} is none of the classes {', '.join(self.labels)[:100]}")
        return (self._class_of[answer],)

    def answer_prompt(self, example: Example, answer: str) -> Prompt:
        """text | class."""
        text = self.question(example, "answer")
        return Prompt(text + self.answer_ids(answer), {"answer": (len(text), len(text) + 1)})

    def label(self, ids: Sequence[int]) -> str:
        """The name of the class that is the only token of a target."""
        (index,) = ids
        return self.labels[index]

    def text(self, ids: Sequence[int]) -> str:
        """The text of tokens, with the names of special ones."""
        return str(self.tokenizer.decode(list(ids)))

    def num_unknown(self, example: Example) -> tuple[int, int]:
        """Number of unknown tokens in a text, and of all its tokens."""
        ids = self.tokenizer(example.text, add_special_tokens=False).input_ids
        unknown = self.tokenizer.unk_token_id
        return (0 if unknown is None else ids.count(unknown)), len(ids)
