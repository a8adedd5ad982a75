"""A layout for any model: a conversation in the chat template that it has, or else a named one, or the task's cues."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from distill.prompts import Frame, chat, cues
from distill.prompts.templates import is_chat_model, named_template
from distill.records import Example


@dataclass(frozen=True)
class Layout:
    """`chat` for models with a chat template; the others get the template of the name `otherwise`, or these cues."""

    chat: chat.Layout
    otherwise: cues.Layout | str

    def frame(self, tokenizer: PreTrainedTokenizerBase, shots: Sequence[Example]) -> Frame:
        """The layout that suits a model, in its tokens; raises ConfigError if the model cannot have it."""
        if is_chat_model(tokenizer):
            return self.chat.frame(tokenizer, shots)
        if isinstance(self.otherwise, str):
            return self.chat.frame(tokenizer, shots, template=named_template(self.otherwise, tokenizer))
        return self.otherwise.frame(tokenizer, shots)

    def choice(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """How a model is asked, and why."""
        if is_chat_model(tokenizer):
            return f"{tokenizer.name_or_path} has a chat template, in which it is asked"
        is_named = isinstance(self.otherwise, str)
        way = f"gets the template {self.otherwise}" if is_named else "is asked by the task's cues"
        return f"{tokenizer.name_or_path} has no chat template and {way}"
