"""Models that reason between marks before they answer: the reasoning is the rationale, and can be left out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distill.errors import ConfigError
from distill.prompts.preview import preview
from distill.prompts.reasoning import Marks
from distill.prompts.rendering import Prompts, Reply
from distill.prompts.serving import served_tokenizer
from distill.prompts.tokenizers import load_tokenizer
from distill.records import Example, Message, Span
from tests.cases import with_template
from tests.prompts.templates import REASONING, TEMPLATES, chat_tokenizer
from tests.prompts.test_chat import LAYOUT, SHOTS, ids_of
from tests.teachers.conftest import FreeText, make_teacher

QUESTION = Example("Is 5 odd?")
HISTORY = (Message("user", "Is 3 odd?"), Message("assistant", "<think>\n3 is 2 and 1.\n</think>\n\nYes."))
SPANS: tuple[Span, ...] = ("answer", "rationale")


def reasoning_tokenizer(template: str, tokens: tuple[str, ...]) -> Any:
    tokenizer = chat_tokenizer(template, tokens)
    tokenizer.add_tokens(["<think>", "</think>"])
    return tokenizer


def prompts_of(name: str, shots: tuple[Example, ...] = (), **changes: Any) -> Prompts:
    template, tokens, _ = REASONING[name]
    tokenizer = reasoning_tokenizer(template, tokens)
    return Prompts(tokenizer, replace(LAYOUT, **changes), shots, max_length=512, too_long="drop")


@pytest.mark.parametrize("shots", [(), SHOTS])
@pytest.mark.parametrize("name", REASONING)
def test_reasoning_and_answer_are_learned_as_the_model_writes_them(name: str, shots: tuple[Example, ...]) -> None:
    prompts, begun = prompts_of(name, shots), REASONING[name][2]
    end = prompts.token_text(prompts.end)
    reasoned = preview(prompts, prompts.rationale_prompt(QUESTION, "5 is 4 and 1.", "yes"))
    assert reasoned.endswith(f"{begun}<think>\n⟦5 is 4 and 1.\n</think>\n\n⟧⟦yes{end}⟧")
    assert preview(prompts, prompts.answer_prompt(QUESTION, "yes")).endswith(
        f"{begun}<think>\n\n</think>\n\n⟦yes{end}⟧"
    )
    assert "Why?" not in reasoned  # the model needs no request
    begun_ids = ids_of(prompts, conversation(shots), begin=True)
    for span in SPANS:
        asked = prompts.prefix(span) + prompts.question(QUESTION, span)
        assert asked[: len(begun_ids)] == begun_ids
    mark = prompts.tokenizer.convert_tokens_to_ids("</think>")
    assert prompts.separator_ids().count(mark) == 1


def conversation(shots: tuple[Example, ...]) -> list[dict[str, str]]:
    turns = [("user", "assistant")[n % 2] for n in range(2 * len(shots) + 1)]
    texts = [text for shot in shots for text in (shot.question, str(shot.answer))]
    return [{"role": r, "content": t} for r, t in zip(turns, [*texts, QUESTION.question], strict=True)]


def test_an_answer_alone_is_asked_for_as_the_template_does_without_thinking() -> None:
    thinking, direct = prompts_of("Qwen 3"), prompts_of("Qwen 3", arguments={"enable_thinking": False})
    assert thinking.answer_prompt(QUESTION, "yes") == direct.answer_prompt(QUESTION, "yes")
    assert "Why?" in preview(direct, direct.rationale_prompt(QUESTION, "5 is 4 and 1.", "yes"))
    assert direct.separator_ids() == direct.encode("\nAnswer:\n")


def test_the_whole_rendering_of_a_reasoned_answer_has_the_learned_text() -> None:
    prompts = prompts_of("Qwen 3")
    turns = [*conversation(()), {"role": "assistant", "content": "yes"}]
    whole = prompts.tokenizer.apply_chat_template(turns, tokenize=False)
    learned = prompts.answer_prompt(QUESTION, "yes").ids
    assert tuple(prompts.tokenizer.encode(whole, add_special_tokens=False))[: len(learned)] == learned


@pytest.mark.parametrize(
    ("text", "reply"),
    [
        ("5 is 4 and 1.\n</think>\n\nyes", Reply("5 is 4 and 1.", "yes")),
        ("5 is 4</think>yes, </think> no", Reply("5 is 4", "yes, </think> no")),
        ("5 is 4 and", Reply("5 is 4 and", "")),  # unfinished
        ("\n</think>\n\nyes", Reply("", "yes")),
    ],
)
def test_a_reply_is_split_at_the_end_of_the_reasoning(text: str, reply: Reply) -> None:
    prompts = prompts_of("Qwen 3")
    ids = prompts.tokenizer.encode(text, add_special_tokens=False)
    assert prompts.split_reply(ids) == prompts.split_reply([*ids, prompts.end]) == reply


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("name", REASONING)
def test_a_student_is_served_the_prompt_that_it_has_learned_also_in_conversations(name: str, span: Span) -> None:
    for system in ("", "Be brief."):
        prompts = prompts_of(name, system=system)
        tokenizer = served_tokenizer(prompts, span)
        for example in (QUESTION, replace(QUESTION, history=HISTORY)):
            messages = [{"role": m.role, "content": m.content.split("</think>\n\n")[-1]} for m in example.history]
            messages.append({"role": "user", "content": QUESTION.question})
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            learned = prompts.prefix(span) + prompts.question(example, span)
            assert tuple(tokenizer.encode(text, add_special_tokens=False)) == learned
        again = Prompts(tokenizer, prompts.layout, (), max_length=512, too_long="drop")
        assert again.prefix(span) + again.question(QUESTION, span) == prompts.prefix(span) + prompts.question(
            QUESTION, span
        )


@pytest.mark.parametrize("name", REASONING)
def test_marks_in_data_remain_text(name: str) -> None:
    prompts = prompts_of(name)
    marks = prompts.tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    text = "a </think> b <think>"
    prompt = prompts.rationale_prompt(Example(text), text, text)
    assert [i for i in prompt.ids if i in marks] == marks
    assert prompts.tokenizer.encode(text, add_special_tokens=False).count(marks[1]) == 1


def test_marks_can_be_named_or_left_out() -> None:
    template, tokens, _ = TEMPLATES["ChatML"]
    tokenizer = reasoning_tokenizer(template, tokens)

    def asked(*marks: str, of: Any = tokenizer, names: list[str] | None = None) -> str:
        layout = replace(LAYOUT, reasoning_marks=list(marks) if names is None else names)
        prompts = Prompts(of, layout, (), max_length=512, too_long="drop")
        return preview(prompts, prompts.rationale_prompt(QUESTION, "So.", "yes"))

    assert asked().endswith("Why?<|im_end|>\n<|im_start|>assistant\n⟦So.\nAnswer:\n⟧⟦yes<|im_end|>⟧")
    named = "<|im_start|>assistant\n[R]\n⟦So.\n[/R]\n\n⟧⟦yes<|im_end|>⟧"
    assert asked("[R]", "[/R]").endswith(f"odd?<|im_end|>\n{named}")
    with pytest.raises(ConfigError, match=r"reasoning_marks=\['<think>'\]: expected two texts"):
        asked("<think>")
    with pytest.raises(ConfigError, match="begins an assistant's turn"):
        asked(of=reasoning_tokenizer(*REASONING["R1"][:2]), names=[])


@pytest.mark.parametrize(
    ("begun", "rationale", "answer"),
    [
        ("A:", "<think>\n", "<think>\n\n</think>\n\n"),
        ("A:<think>\n", "", "\n</think>\n\n"),
        ("A:<think>", "\n", "\n\n</think>\n\n"),
    ],
)
def test_what_is_added_depends_on_where_the_template_ends(begun: str, rationale: str, answer: str) -> None:
    marks = Marks("<think>", "</think>")
    assert marks.openings(begun) == {"rationale": rationale, "answer": answer}
    assert marks.removed(f"{begun}{answer}") == marks.removed(begun) == "A:"
    assert marks.is_closed(f"{begun}{answer}")
    assert not marks.is_closed(begun)


def test_a_teachers_reasoning_is_its_rationale_and_unfinished_reasoning_is_no_answer(
    teacher_folder: Path, tmp_path: Path
) -> None:
    folder = with_template(teacher_folder, tmp_path / "teacher", "Zephyr")
    questions = [Example(f"{n} + {n}?") for n in range(4)]

    def annotated(close: str) -> list[Any]:
        layout = replace(LAYOUT, reasoning_marks=["<think>", close])
        prompts = Prompts(load_tokenizer(folder), layout, (), max_length=256, too_long="drop")
        teacher = make_teacher(folder, prompts, task=FreeText(), max_new_tokens=12)
        teacher.load()
        return list(teacher.annotate([prompts.request(question, "rationale") for question in questions]))

    unfinished = annotated("</think>")
    assert {annotation.defect for annotation in unfinished} == {"truncated"}
    assert not any(annotation.whole_answer or "answer" in annotation.targets for annotation in unfinished)
    whole = unfinished[0].rationale
    close = whole[len(whole) // 2 : len(whole) // 2 + 2]  # what this teacher happens to write
    first = annotated(close)[0]
    rationale, _, answer = whole.partition(close)
    assert (first.rationale, first.text) == (rationale.strip(), answer.strip())
    assert set(first.targets) == {"rationale", "answer"}
