"""The tokenizer that leaves with a student: its chat template renders the prompt that the student has learned."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from distill.prompts import Frame
from distill.prompts.chat import Chat
from distill.prompts.rendering import Prompts
from distill.prompts.templates import BASE, CUES
from distill.records import Span

_QUESTION = "question"


def served_tokenizer(prompts: Prompts, span: Span) -> PreTrainedTokenizerBase:
    """A copy of a student's tokenizer that renders a question, as the user's message, with the prompt for this span.

    The template of the model that the student is made from is the only one where it does so, else a further one, from
    which the prompts of the student can be made again: the same template with the system's turn and the arguments of
    the layout, for conversations too, or if that is not enough the literal prompt of one question. The end token is
    that of a target.
    """
    tokenizer = copy.deepcopy(prompts.tokenizer)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(prompts.end)
    base = prompts.frame.template
    tokenizer.chat_template = tokenizer.chat_template or base  # a named one, if the model has none
    before, after = prompts.literal(span)
    one_question = _of_one_question(before, after, prompts.frame.target_lead, tokenizer)
    further = [*_with_settings(prompts.frame, span), one_question]
    while not _renders(tokenizer, f"{before}{_QUESTION}{after}"):
        template = further.pop(0)
        tokenizer.chat_template = {"default": template, BASE: base} if base else f"{CUES}{template}"
    return tokenizer


def _with_settings(frame: Frame, span: Span) -> Iterator[str]:
    """The frame's chat template, which brings its own arguments and, where a conversation has none, system's turn."""
    if not isinstance(frame, Chat):
        return
    settings = "".join(f"{{%- set {name} = {_literal(value)} -%}}" for name, value in frame.layout.arguments.items())
    opening = f"{{%- if add_generation_prompt -%}}{{{{- {_quoted(frame.opening(span))} -}}}}{{%- endif -%}}"
    opening = opening if frame.opening(span) else ""
    system = _literal(frame.layout.system or "")
    merged = f"[{{'role': 'user', 'content': {system} + '\\n\\n' + messages[0].content}}] + messages[1:]"
    for messages in (f"[{{'role': 'system', 'content': {system}}}] + messages", merged):
        begun = f"{{%- if messages[0].role != 'system' -%}}{{%- set messages = {messages} -%}}{{%- endif -%}}"
        yield f"{settings}{begun if frame.layout.system else ''}{frame.template}{opening}"


def _renders(tokenizer: PreTrainedTokenizerBase, expected: str) -> bool:
    """Whether a tokenizer's own template gives this prompt."""
    if not tokenizer.chat_template:
        return False
    message = {"role": "user", "content": _QUESTION}
    with suppress(TemplateError):
        return bool(tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True) == expected)
    return False


def _of_one_question(before: str, after: str, lead: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A template for one message of the user, and the assistant's answer to it."""
    parts = (
        "{%- if messages | length > 2 or messages[0].role != 'user' -%}",
        "{{ raise_exception('this model answers one question: expected one message, of the user') }}",
        "{%- endif -%}",
        f"{{{{- {_quoted(before)} + messages[0].content -}}}}",
        "{%- if messages | length == 2 or add_generation_prompt -%}",
        f"{{{{- {_quoted(after)} -}}}}",
        "{%- endif -%}{%- if messages | length == 2 -%}",
        f"{{{{- {_quoted(lead)} + messages[1].content + {_quoted(str(tokenizer.eos_token))} -}}}}",
        "{%- endif -%}",
    )
    return "".join(parts)


def _quoted(text: str) -> str:
    """A text as a literal of Jinja, which reads the escapes of Python."""
    escaped = text.encode("unicode_escape").decode().replace("'", "\\'")
    return f"'{escaped}'"


def _literal(value: Any) -> str:
    """A value of a configuration as a literal of Jinja."""
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(key)}: {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return str(value)  # Jinja reads Python's True, False, None and numbers
