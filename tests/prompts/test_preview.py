"""A prompt as text: all of it, with the learned tokens between marks."""

from __future__ import annotations

from typing import Any

import pytest

from distill.prompts.preview import preview
from distill.prompts.rendering import Prompts
from distill.records import Example, Prompt
from tests.conftest import LAYOUT
from tests.prompts.kinds import KEPT
from tests.prompts.test_chat import prompts_of

SHOTS = (Example("Is 3 odd?", "yes", "It is 3."),)
QUESTION = Example("Is it 10?")


def unmarked(text: str) -> str:
    return text.replace("⟦", "").replace("⟧", "")


@pytest.mark.parametrize("kind", [k for k in KEPT if "unigram" not in k and "meta" not in k and k != "prepending"])
def test_learned_tokens_are_marked_with_the_space_before_them(kind: str) -> None:
    prompts = Prompts(KEPT[kind](), LAYOUT, SHOTS, max_length=256, too_long="drop")
    prompt = prompts.rationale_prompt(QUESTION, "So, no.", "no")
    shown = preview(prompts, prompt)
    assert shown.endswith("</s>\nQ: Is it 10?\nReason:⟦ So, no.\nAnswer:⟧⟦ no</s>⟧")
    assert unmarked(shown) == prompts.frame.pieces.decode(prompt.ids, skip_special=False)


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("ChatML", "Is it 10?<|im_end|>\n<|im_start|>assistant\n⟦no<|im_end|>⟧"),
        ("Mistral", "<s>[INST] Is it 10? [/INST]⟦ no</s>⟧"),
    ],
)
def test_a_chat_is_shown_with_the_names_of_its_special_tokens(name: str, end: str) -> None:
    prompts = prompts_of(name)
    assert preview(prompts, prompts.answer_prompt(QUESTION, "no")).endswith(end)


def test_a_letter_that_is_cut_between_a_prompt_and_its_target_is_shown_on_both_sides() -> None:
    prompts: Any = prompts_of("ChatML")
    ids = prompts.encode("é")
    assert len(ids) == 2
    assert preview(prompts, Prompt(ids, {"answer": (1, 2)})) == "�⟦�⟧"
    assert preview(prompts, Prompt(ids)) == "é"
