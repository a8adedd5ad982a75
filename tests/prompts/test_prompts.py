"""Prompts: spans, start and end tokens, lengths, keys; special tokens never come from a user's text."""

from __future__ import annotations

import functools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distill.app import config as configuration
from distill.errors import ConfigError
from distill.prompts.rendering import Prompts
from distill.prompts.tokenizers import load_tokenizer
from distill.records import Example, Prompt, Span
from tests.conftest import LAYOUT, arithmetic, compose, examples, make_model, make_tokenizer

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


def test_the_target_is_the_answer_and_the_end_token(prompts: Prompts) -> None:
    prompt = prompts.answer_prompt(QUESTION, "3")
    (start, stop) = prompt.spans["answer"]
    assert prompt.ids[start:stop] == prompts.answer_ids("3")
    assert prompt.ids[stop - 1] == prompts.end == prompts.tokenizer.eos_token_id
    assert prompts.tokenizer.decode(prompt.ids) == f"Q: {QUESTION.question}\nAnswer: 3</s>"


def test_a_rationale_is_followed_by_the_end_token_or_by_the_answer(prompts: Prompts) -> None:
    alone = prompts.rationale_prompt(QUESTION, QUESTION.rationale, None)
    with_answer = prompts.rationale_prompt(QUESTION, QUESTION.rationale, "3")
    text = f"Q: {QUESTION.question}\nReason: {QUESTION.rationale}"
    assert prompts.tokenizer.decode(alone.ids) == f"{text}</s>"
    assert prompts.tokenizer.decode(with_answer.ids) == f"{text}\nAnswer: 3</s>"
    assert alone.ids[slice(*alone.spans["rationale"])] == (*prompts.rationale_ids(QUESTION.rationale), prompts.end)
    reasoning = (*prompts.rationale_ids(QUESTION.rationale), *prompts.separator_ids())
    assert with_answer.ids[slice(*with_answer.spans["rationale"])] == reasoning
    assert with_answer.ids[slice(*with_answer.spans["answer"])] == prompts.answer_ids("3")


def test_target_ids_are_the_same_in_a_teachers_and_a_students_prompt(prompts: Prompts) -> None:
    teacher = few_shot(prompts)
    assert len(teacher.prefix("answer")) > len(prompts.prefix("answer"))
    for example in (QUESTION, *examples(9)):
        for method in ("answer_prompt", "rationale_prompt"):
            arguments = (example.answer,) if method == "answer_prompt" else (example.rationale or "so", example.answer)
            few, zero = (getattr(p, method)(example, *arguments) for p in (teacher, prompts))
            assert [few.ids[slice(*s)] for s in few.spans.values()] == [
                zero.ids[slice(*s)] for s in zero.spans.values()
            ]
            assert (
                few.ids[-len(zero.ids) + len(prompts.prefix("answer")) :] == zero.ids[len(prompts.prefix("answer")) :]
            )


@pytest.mark.parametrize("text", ["</s>", "<s>", "a </s> b", "<s></s>", "</s", " </s>\n</s>"])
def test_a_users_text_never_produces_special_tokens(prompts: Prompts, text: str) -> None:
    special = set(prompts.tokenizer.all_special_ids)
    assert special == {0, 1}
    example = Example(text, text, text)
    with_shot = few_shot(prompts, shots=[example], layout=replace(LAYOUT, instruction=text))
    ends_of_answers = [prompts.end]
    for span in ("answer", "rationale"):
        assert [i for i in with_shot.prefix(span) if i in special] == ends_of_answers
        assert not special & set(prompts.question(example, span))
    for prompt in (prompts.answer_prompt(example, text), prompts.rationale_prompt(example, text, text)):
        assert [i for i in prompt.ids if i in special] == [prompts.end]
    assert prompts.tokenizer.decode(prompts.encode(text)) == text


def test_each_sample_of_a_rationale_has_a_key_and_a_number(prompts: Prompts) -> None:
    requests = [prompts.request(QUESTION, "rationale", sample=number) for number in range(4)]
    assert len({request.key for request in requests}) == 4
    assert [request.sample for request in requests] == [0, 1, 2, 3]
    assert requests[0] == prompts.request(QUESTION, "rationale")


def test_a_given_text_is_read_in_place_of_the_gold_answer(prompts: Prompts) -> None:
    assert prompts.request(QUESTION, "answer").given_ids == prompts.answer_ids("3")
    assert prompts.request(QUESTION, "answer", given="7").given_ids == prompts.answer_ids("7")
    assert prompts.request(QUESTION, "answer", given="").given_ids == prompts.answer_ids("")
    assert prompts.request(QUESTION, "rationale").given_ids == ()
    assert prompts.request(QUESTION, "rationale", given="So.").given_ids == prompts.rationale_ids("So.")
    assert prompts.request(replace(QUESTION, answer=None), "answer").given_ids == ()


@pytest.mark.parametrize("answer", ["3", "three of them", None])
def test_a_question_is_cut_by_as_much_as_its_targets_need(prompts: Prompts, answer: str | None) -> None:
    """With a limit below the whole length, the prompt has just the limit; nothing of a target is cut."""
    whole = prompts.rationale_prompt(QUESTION, "Since so.", answer)
    for surplus in (1, 3):
        length = len(whole.ids) - len(prompts.prefix("rationale")) - surplus
        cut = few_shot(prompts, shots=[], max_length=length, too_long="cut")
        found = cut.rationale_prompt(QUESTION, "Since so.", answer)
        assert len(found.ids) == len(whole.ids) - surplus
        targets = [[p.ids[slice(*span)] for span in p.spans.values()] for p in (found, whole)]
        assert targets[0] == targets[1]


def test_a_question_of_which_nothing_would_remain_is_refused(prompts: Prompts) -> None:
    length = len(prompts.question(QUESTION, "answer"))
    body = len(prompts.encode(f" {QUESTION.question}"))
    cut = few_shot(prompts, shots=[], max_length=length - body + 1, too_long="cut")
    assert len(cut.question(QUESTION, "answer")) == length - body + 1
    with pytest.raises(ValueError, match=f"{body} tokens over"):
        few_shot(prompts, shots=[], max_length=length - body, too_long="cut").question(QUESTION, "answer")


def test_a_start_token_occurs_once_and_only_if_the_model_has_one(prompts: Prompts, tmp_path: Path) -> None:
    make_tokenizer(tmp_path, has_start=True)
    for shots in ((), SHOTS):
        with_start = Prompts(load_tokenizer(tmp_path), LAYOUT, shots, max_length=256, too_long="drop")
        ids = with_start.rationale_prompt(QUESTION, "so", "3").ids
        assert ids[0] == 0
        assert ids.count(0) == 1
    assert 0 not in few_shot(prompts).answer_prompt(QUESTION, "3").ids


def test_a_too_long_question_is_dropped_cut_or_refused(prompts: Prompts) -> None:
    long = Example("very " * 100 + "long?", "4")
    length = 40
    with pytest.raises(ValueError, match="over max_length=40"):
        few_shot(prompts, max_length=length).answer_prompt(long, "4")
    with pytest.raises(ConfigError, match=r"over max_length=40; increase max_length"):
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


@pytest.mark.parametrize("span", ["answer", "rationale"])
def test_a_question_that_just_fits_is_asked_whole(prompts: Prompts, span: Span) -> None:
    length = len(prompts.question(QUESTION, span))
    for too_long in ("drop", "cut", "refuse"):
        exact = few_shot(prompts, shots=[], max_length=length, too_long=too_long)
        assert exact.question(QUESTION, span) == prompts.question(QUESTION, span)
    with pytest.raises(ValueError, match="1 tokens over"):
        few_shot(prompts, shots=[], max_length=length - 1).question(QUESTION, span)


def test_a_key_depends_on_exactly_what_the_teacher_reads(prompts: Prompts) -> None:
    plain, with_shots = prompts, few_shot(prompts)
    key = plain.request(QUESTION, "answer").key
    assert len(key) == 32
    assert key == plain.request(replace(QUESTION, rationale="another"), "answer").key
    others = {
        plain.request(QUESTION, "rationale").key,
        plain.request(replace(QUESTION, answer="4"), "answer").key,
        plain.request(replace(QUESTION, answer=None), "answer").key,
        plain.request(replace(QUESTION, question=QUESTION.question + "?"), "answer").key,
        with_shots.request(QUESTION, "answer").key,
        few_shot(prompts, layout=replace(LAYOUT, answer_cue="So:")).request(QUESTION, "answer").key,
        few_shot(prompts, layout=replace(LAYOUT, instruction="Count.")).request(QUESTION, "answer").key,
    }
    assert len(others) == 7
    assert key not in others


@pytest.mark.parametrize(
    "change", [{"shots": ()}, {"layout": replace(LAYOUT, question_cue="?")}, {"max_length": 9}, {"too_long": "cut"}]
)
def test_the_fingerprint_covers_every_setting(prompts: Prompts, change: dict[str, Any]) -> None:
    assert few_shot(prompts).fingerprint() == few_shot(prompts).fingerprint()
    assert few_shot(prompts, **change).fingerprint() != few_shot(prompts).fingerprint()


def test_a_shot_without_the_required_rationale_is_refused(prompts: Prompts) -> None:
    with pytest.raises(ConfigError, match="has no answer or no rationale"):
        few_shot(prompts, shots=[Example("Why?", "3")]).prefix("rationale")
    assert few_shot(prompts, shots=[Example("Why?", "3")]).prefix("answer")


def test_a_reply_is_split_at_the_answer_cue(prompts: Prompts) -> None:
    reply = prompts.split_reply(
        (*prompts.rationale_ids("Since so."), *prompts.separator_ids(), *prompts.answer_ids("12"))
    )
    assert (reply.rationale, reply.answer) == ("Since so.", "12")
    without_answer = prompts.split_reply(prompts.rationale_ids("Since so."))
    assert (without_answer.rationale, without_answer.answer) == ("Since so.", "")


def test_the_vocabulary_has_all_tokens_and_no_padding_rows(prompts: Prompts) -> None:
    assert sorted(prompts.tokenizer.get_vocab().values()) == list(range(prompts.vocabulary_size))


@pytest.mark.parametrize("name", ["instruction", "question_cue", "rationale_cue", "answer_cue"])
def test_a_line_break_that_stayed_two_characters_in_a_layout_is_refused(name: str) -> None:
    override = f"task.layout.{name}="
    with pytest.raises(ConfigError, match=rf"{override}.* contains a backslash and a letter") as caught:
        configuration.build(compose("task=arithmetic", rf'{override}"Answer:\n"').task.layout)
    remedy = re.search(r"in bash \$'(.*?)…\\n…(.*?)'", str(caught.value))
    assert remedy is not None
    written = f"{remedy[1]}Answer:\n{remedy[2]}"  # as bash passes it
    assert getattr(configuration.build(compose("task=arithmetic", written).task.layout), name) == "Answer:\n"


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", seed=0)
    for file in folder.glob("*token*"):
        file.unlink()
    with pytest.raises(ConfigError, match="no tokenizer that loads"):
        load_tokenizer(folder)


def test_choices_and_the_texts_of_an_example_are_tokenized_once(prompts: Prompts) -> None:
    counting = few_shot(prompts)
    pieces: list[str] = []
    encoder = counting.frame.pieces
    encode, limit = encoder._encode_inside, encoder._inside.cache_parameters()["maxsize"]
    encoder._inside = functools.lru_cache(limit)(lambda text: pieces.append(text) or encode(text))
    for example in (QUESTION, *examples(20)):
        counting.choice_ids(("yes", "no"))
        counting.request(example, "answer")
        counting.request(example, "rationale")
        counting.rationale_prompt(example, str(example.rationale), "yes")
    assert sorted(pieces) == sorted(set(pieces))
