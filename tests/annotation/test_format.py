"""A record as text, for a prompt of cues and one of a chat template."""

from __future__ import annotations

import numpy as np
import pytest

from distill.annotation.inspection import format_record
from distill.prompts.rendering import Prompts
from distill.records import Annotation, Example, SoftTargets, Target
from tests.conftest import LAYOUT
from tests.prompts.test_chat import SHOTS, prompts_of


@pytest.mark.parametrize("way", ["cues", "chat"])
def test_a_record_shows_what_the_teacher_read_and_what_is_learned(way: str, prompts: Prompts) -> None:
    prompts = prompts_of("Zephyr", SHOTS) if way == "chat" else prompts
    rationale, answer = prompts.rationale_ids("So, yes."), prompts.answer_ids("yes")
    request = prompts.request(Example("Is 5 odd?"), "rationale")
    number = len(rationale)
    one_each = SoftTargets(np.array(rationale), np.zeros(number), np.zeros(number), np.ones(number, int))
    targets = {"answer": Target(answer, None), "rationale": Target(rationale, one_each)}
    annotation = Annotation(request.key, targets, "yes", "So, yes.", text="yes")
    text = format_record(request, annotation, prompts)
    shown = {
        "cues": f"Q: Is 5 odd?\n{LAYOUT.rationale_cue}⟦ So, yes.⟧\n{LAYOUT.answer_cue}⟦ yes</s>⟧\n",
        "chat": "Is 5 odd?\nWhy?</s>\n<|assistant|>\n⟦So, yes.⟧\nAnswer:\n⟦yes</s>⟧\n",
    }
    assert shown[way] in text
    assert text.count("⟦") == 3  # with the one in the heading


def test_a_record_without_targets_shows_its_prompt_alone(prompts: Prompts) -> None:
    request = prompts.request(Example("Is 5 odd?"), "answer")
    text = format_record(request, Annotation(request.key, {}, None, text="perhaps"), prompts)
    assert text.endswith("Q: Is 5 odd?\nAnswer:")
