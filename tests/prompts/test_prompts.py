"""What a model reads: spans, ends, starts, lengths, and nothing special from a user's text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from distill.errors import ConfigError
from distill.prompts.cues import Prompts
from distill.prompts.tokenizers import check_shared_vocabulary, load_tokenizer
from distill.records import Example, Prompt
from tests.conftest import LAYOUT, arithmetic, examples, make_model, make_tokenizer

SHOTS = arithmetic().shots()
QUESTION = Example("Ann has 3 pens. How many pens does Ann have?", "3", "Nothing is added to 3.")


def few_shot(prompts: Prompts, **changes: Any) -> Prompts:
    settings = {"layout": LAYOUT, "shots": SHOTS, "max_length": 256, "too_long": "drop"} | changes
    return Prompts(prompts.tokenizer, **settings)


@pytest.mark.parametrize("span", [(0, 3), (2, 2), (3, 2), (1, 7), (-1, 2)])
def test_a_span_at_position_0_or_outside_the_sequence_is_refused(span: tuple[int, int]) -> None:
    assert Prompt((5, 6, 7, 8), {"answer": (1, 4)})
    with pytest.raises(ValueError, match="does not lie"):
        Prompt((5, 6, 7, 8), {"answer": span})


def test_an_answer_and_its_end_are_the_target(prompts: Prompts) -> None:
    prompt = prompts.answer_prompt(QUESTION, "3")
    (start, stop) = prompt.spans["answer"]
    assert prompt.ids[start:stop] == prompts.answer_ids("3")
    assert prompt.ids[stop - 1] == prompts.end == prompts.tokenizer.eos_token_id
    assert prompts.tokenizer.decode(prompt.ids) == f"Q: {QUESTION.question}\nAnswer: 3</s>"


def test_a_rationale_ends_or_leads_to_an_answer(prompts: Prompts) -> None:
    alone = prompts.rationale_prompt(QUESTION, QUESTION.rationale, None)
    led = prompts.rationale_prompt(QUESTION, QUESTION.rationale, "3")
    text = f"Q: {QUESTION.question}\nReason: {QUESTION.rationale}"
    assert prompts.tokenizer.decode(alone.ids) == f"{text}</s>"
    assert prompts.tokenizer.decode(led.ids) == f"{text}\nAnswer: 3</s>"
    assert alone.ids[slice(*alone.spans["rationale"])] == (*prompts.rationale_ids(QUESTION.rationale), prompts.end)
    assert led.ids[slice(*led.spans["rationale"])] == prompts.rationale_ids(QUESTION.rationale)
    assert led.ids[slice(*led.spans["answer"])] == prompts.answer_ids("3")


def test_target_ids_are_the_same_behind_a_teachers_and_a_students_prompt(prompts: Prompts) -> None:
    teacher = few_shot(prompts)
    assert len(teacher.prefix("answer")) > len(prompts.prefix("answer"))
    for example in (QUESTION, *examples(9)):
        for made in ("answer_prompt", "rationale_prompt"):
            arguments = (example.answer,) if made == "answer_prompt" else (example.rationale or "so", example.answer)
            seen, read = (getattr(p, made)(example, *arguments) for p in (teacher, prompts))
            assert [seen.ids[slice(*s)] for s in seen.spans.values()] == [
                read.ids[slice(*s)] for s in read.spans.values()
            ]
            assert (
                seen.ids[-len(read.ids) + len(prompts.prefix("answer")) :] == read.ids[len(prompts.prefix("answer")) :]
            )


@pytest.mark.parametrize("text", ["</s>", "<s>", "a </s> b", "<s></s>", "</s", " </s>\n</s>"])
def test_no_special_token_arises_from_a_users_text(prompts: Prompts, text: str) -> None:
    special = set(prompts.tokenizer.all_special_ids)
    assert special == {0, 1}
    example = Example(text, text, text)
    shown = few_shot(prompts, shots=[example], layout=replace(LAYOUT, instruction=text))
    ends_of_answers = [prompts.end]
    for span in ("answer", "rationale"):
        assert [i for i in shown.prefix(span) if i in special] == ends_of_answers
        assert not special & set(prompts.question(example, span))
    for prompt in (prompts.answer_prompt(example, text), prompts.rationale_prompt(example, text, text)):
        assert [i for i in prompt.ids if i in special] == [prompts.end]
    assert prompts.tokenizer.decode(prompts.encode(text)) == text


def test_a_start_token_stands_once_and_only_where_the_model_has_one(prompts: Prompts, tmp_path: Path) -> None:
    make_tokenizer(tmp_path, has_start=True)
    for shots in ((), SHOTS):
        started = Prompts(load_tokenizer(tmp_path), LAYOUT, shots, max_length=256, too_long="drop")
        ids = started.rationale_prompt(QUESTION, "so", "3").ids
        assert ids[0] == 0
        assert ids.count(0) == 1
    assert 0 not in few_shot(prompts).answer_prompt(QUESTION, "3").ids


def test_a_question_that_is_too_long_is_dropped_cut_or_refused(prompts: Prompts) -> None:
    long = Example("very " * 100 + "long?", "4")
    length = 40
    with pytest.raises(ValueError, match="over max_length=40"):
        few_shot(prompts, max_length=length).answer_prompt(long, "4")
    with pytest.raises(ConfigError, match=r"over max_length=40; raise max_length"):
        few_shot(prompts, max_length=length, too_long="refuse").answer_prompt(long, "4")
    cut = few_shot(prompts, max_length=length, too_long="cut")
    prompt = cut.answer_prompt(long, "4")
    assert len(prompt.ids) - len(cut.prefix("answer")) == length
    assert prompt.ids[slice(*prompt.spans["answer"])] == cut.answer_ids("4")
    assert cut.tokenizer.decode(prompt.ids).endswith("\nAnswer: 4</s>")
    with pytest.raises(ValueError, match="over max_length=3"):
        few_shot(prompts, max_length=3, too_long="cut").answer_prompt(long, "4")
    exact = len(prompts.answer_prompt(QUESTION, "3").ids)
    assert Prompts(prompts.tokenizer, LAYOUT, (), max_length=exact, too_long="refuse").answer_prompt(QUESTION, "3")


def test_a_key_is_that_of_what_the_teacher_reads(prompts: Prompts) -> None:
    plain, shown = prompts, few_shot(prompts)
    key = plain.request(QUESTION, "answer").key
    assert key == plain.request(replace(QUESTION, rationale="another"), "answer").key
    others = {
        plain.request(QUESTION, "rationale").key,
        plain.request(replace(QUESTION, answer="4"), "answer").key,
        plain.request(replace(QUESTION, answer=None), "answer").key,
        plain.request(replace(QUESTION, question=QUESTION.question + "?"), "answer").key,
        shown.request(QUESTION, "answer").key,
        few_shot(prompts, layout=replace(LAYOUT, answer_cue="So:")).request(QUESTION, "answer").key,
        few_shot(prompts, layout=replace(LAYOUT, instruction="Count.")).request(QUESTION, "answer").key,
    }
    assert len(others) == 7
    assert key not in others


@pytest.mark.parametrize(
    "change", [{"shots": ()}, {"layout": replace(LAYOUT, question_cue="?")}, {"max_length": 9}, {"too_long": "cut"}]
)
def test_every_setting_of_the_prompts_is_in_their_fingerprint(prompts: Prompts, change: dict[str, Any]) -> None:
    assert few_shot(prompts).fingerprint() == few_shot(prompts).fingerprint()
    assert few_shot(prompts, **change).fingerprint() != few_shot(prompts).fingerprint()


def test_a_shot_without_what_is_to_be_shown_is_refused(prompts: Prompts) -> None:
    with pytest.raises(ConfigError, match="lacks an answer or a rationale"):
        few_shot(prompts, shots=[Example("Why?", "3")]).prefix("rationale")
    assert few_shot(prompts, shots=[Example("Why?", "3")]).prefix("answer")


def test_a_reply_is_taken_apart_at_the_answer_cue(prompts: Prompts) -> None:
    reply = prompts.take_apart((*prompts.rationale_ids("Since so."), *prompts.bridge(), *prompts.answer_ids("12")))
    assert (reply.rationale, reply.answer) == ("Since so.", "12")
    without = prompts.take_apart(prompts.rationale_ids("Since so."))
    assert (without.rationale, without.answer) == ("Since so.", "")


def test_the_vocabulary_is_every_token_and_no_padded_row(prompts: Prompts) -> None:
    assert sorted(prompts.tokenizer.get_vocab().values()) == list(range(prompts.vocabulary_size))


def test_two_tokenizers_that_are_alike_share_soft_targets(teacher_folder: Path, student_folder: Path) -> None:
    check_shared_vocabulary(load_tokenizer(teacher_folder), load_tokenizer(student_folder))


@pytest.mark.parametrize("change", ["permuted", "extra", "fewer", "end"])
def test_tokenizers_that_differ_are_refused_with_what_to_do(
    change: str, teacher_folder: Path, student_folder: Path
) -> None:
    student = load_tokenizer(student_folder)
    if change == "extra":
        student.add_tokens(["zebra"])
    elif change == "end":
        student.eos_token = "<s>"
    else:
        state = student.backend_tokenizer.to_str()
        swapped = {
            "permuted": (('"A":', '"AB?":'), ('"B":', '"A":'), ('"AB?":', '"B":')),
            "fewer": (('"~":', '"~~":'),),
        }
        for old, new in swapped[change]:
            assert old in state
            state = state.replace(old, new)
        student = type(student)(tokenizer_object=Tokenizer.from_str(state), bos_token="<s>", eos_token="</s>")
    with pytest.raises(ConfigError) as raised:
        check_shared_vocabulary(load_tokenizer(teacher_folder), student)
    found = {"permuted": "2 of 320", "extra": "0 of 320", "fewer": "1 of 320", "end": "id 1, the student with 0"}
    assert found[change] in str(raised.value)
    assert "loss=[answer,rationale]" in str(raised.value)


def test_a_folder_without_a_tokenizer_or_without_an_end_is_refused(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", seed=0)
    for file in folder.glob("*token*"):
        file.unlink()
    with pytest.raises(ConfigError, match="no tokenizer that opens"):
        load_tokenizer(folder)
