"""Chat templates: the one that a model has, and named ones, in files beside this one, for models without.

A named template needs no tokens but those that a tokenizer has: its marks are special tokens of the tokenizer, or plain
text, and a turn of the assistant ends in the tokenizer's end token. So no model gets new embeddings by it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from distill.errors import ConfigError

BASE = "base"  # name of the template that a saved student's own was made from
CUES = "{#- a prompt of cues -#}"  # how a saved student's own begins if it was not made from one
FOLDER = Path(__file__).parent
TOKENS: Mapping[str, tuple[str, ...]] = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "plain": (),
    "zephyr": (),
}


def own_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A model's template; of a saved student, whose own template holds its whole prompt, that of its source."""
    templates = tokenizer.chat_template
    template = templates.get(BASE, templates.get("default")) if isinstance(templates, dict) else templates
    return str(template) if template else None


def is_chat_model(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a model has a chat template; that of a student that has learned a prompt of cues is none."""
    return not (own_template(tokenizer) or CUES).startswith(CUES)


def named_template(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The template of this name for a tokenizer; raises ConfigError for another name, or if a token is missing."""
    if name not in TOKENS:
        expected = ", ".join((*TOKENS, "cues", "null"))
        raise ConfigError(f"prompt.without_template={name}: expected one of {expected}")
    if missing := _missing_tokens(name, tokenizer):
        raise ConfigError(
            f"the tokenizer of {tokenizer.name_or_path} has no special token {' and no '.join(missing)} for "
            f"prompt.without_template={name}; expected one of {', '.join(templates_for(tokenizer))}, or cues"
        )
    text = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8").strip()
    has_start = tokenizer.bos_token_id is not None and tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    return f"{{{{- bos_token -}}}}{text}" if has_start else text


def templates_for(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The names of the templates of which a tokenizer has all tokens."""
    return [name for name in TOKENS if not _missing_tokens(name, tokenizer)]


def _missing_tokens(name: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    added = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    return [token for token in TOKENS[name] if token not in added]
