"""Chat templates as published models have them, by their public formats, each with a small tokenizer for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from distill.prompts.templates import FOLDER, TOKENS
from tests.prompts.kinds import byte_level

_CHATML = (
    "{% for m in messages %}"
    "{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_LLAMA = (
    "{{ bos_token }}{% for m in messages %}"
    "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
_QWEN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
_ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TEMPLATES = {
    "ChatML": (_CHATML, ("<|im_start|>", "<|im_end|>"), {}),
    "Llama 3": (_LLAMA, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), {}),
    "Gemma": (_GEMMA, ("<start_of_turn>", "<end_of_turn>"), {}),
    "Mistral": (_MISTRAL, (), {}),
    "Qwen 3": (_QWEN, ("<|im_start|>", "<|im_end|>", "<think>", "</think>"), {"enable_thinking": False}),
    "Zephyr": (_ZEPHYR, (), {}),
    "Zephyr, start token": (f"{{{{ bos_token }}}}{_ZEPHYR}", (), {}),
}
# The project's own, for models without one.
TEMPLATES |= {name: ((FOLDER / f"{name}.jinja").read_text().strip(), tokens, {}) for name, tokens in TOKENS.items()}
ENDS = dict.fromkeys(("Mistral", "Zephyr", "Zephyr, start token", "zephyr", "plain"), "</s>")
ENDS |= {"Llama 3": "<|eot_id|>", "Gemma": "<end_of_turn>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>"}


def chat_tokenizer(template: str, tokens: tuple[str, ...] = (), kind: Callable[[], Any] = byte_level) -> Any:
    """A tokenizer, of bytes unless another kind is given, with these special tokens and this template."""
    tokenizer = kind()
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    tokenizer.chat_template = template
    return tokenizer
