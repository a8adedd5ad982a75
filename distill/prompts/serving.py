"""The tokenizer that leaves with a student: its chat template renders the prompt that the student has learned."""

from __future__ import annotations

import copy

from transformers import PreTrainedTokenizerBase

from distill.prompts.rendering import Prompts
from distill.prompts.templates import BASE, CUES
from distill.records import Span

_QUESTION = "question"


def served_tokenizer(prompts: Prompts, span: Span) -> PreTrainedTokenizerBase:
    """A copy of a student's tokenizer that renders a question, as the user's message, with the prompt for this span.

    The template of the model that the student is made from is the only one where it does so, else a further one, from
    which the prompts of the student can be made again. The end token is that of a target.
    """
    tokenizer = copy.deepcopy(prompts.tokenizer)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(prompts.end)
    base = prompts.frame.template
    tokenizer.chat_template = tokenizer.chat_template or base  # which a model may have been given
    before, after = prompts.literal(span)
    if not _renders(tokenizer, f"{before}{_QUESTION}{after}"):
        template = _template(before, after, prompts.frame.target_lead, str(tokenizer.eos_token))
        tokenizer.chat_template = {"default": template, BASE: base} if base else f"{CUES}{template}"
    return tokenizer


def _renders(tokenizer: PreTrainedTokenizerBase, expected: str) -> bool:
    """Whether a tokenizer's own template gives this prompt."""
    if not tokenizer.chat_template:
        return False
    message = {"role": "user", "content": _QUESTION}
    return bool(tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True) == expected)


def _template(before: str, after: str, lead: str, end: str) -> str:
    """A template for one message of the user, and the assistant's answer to it."""
    parts = (
        "{%- if messages | length > 2 or messages[0].role != 'user' -%}",
        "{{ raise_exception('this model answers one question: expected one message, of the user') }}",
        "{%- endif -%}",
        f"{{{{- {_quoted(before)} + messages[0].content -}}}}",
        "{%- if messages | length == 2 or add_generation_prompt -%}",
        f"{{{{- {_quoted(after)} -}}}}",
        "{%- endif -%}{%- if messages | length == 2 -%}",
        f"{{{{- {_quoted(lead)} + messages[1].content + {_quoted(end)} -}}}}",
        "{%- endif -%}",
    )
    return "".join(parts)


def _quoted(text: str) -> str:
    """A text as a literal of Jinja, which reads the escapes of Python."""
    escaped = text.encode("unicode_escape").decode().replace("'", "\\'")
    return f"'{escaped}'"
