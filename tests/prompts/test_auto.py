"""How a model is asked that has no chat template, or that decides by having one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distill.errors import ConfigError
from distill.prompts.chat import Chat
from distill.prompts.cues import Cues
from distill.prompts.rendering import Prompts, build_prompts, student_prompts
from distill.prompts.serving import served_tokenizer
from distill.prompts.templates import TOKENS, named_template
from distill.records import Example
from tests.conftest import compose
from tests.prompts.kinds import with_byte_tokens
from tests.prompts.templates import TEMPLATES, chat_tokenizer

CHAT_MODEL, BASE_MODEL = TEMPLATES["ChatML"][:2], ("", TEMPLATES["ChatML"][1])
QUESTION = Example("Is 5 odd?")


@pytest.fixture
def folder(tmp_path: Path) -> Any:
    """Save a tokenizer with a template and these special tokens."""

    def folder(template: str, tokens: tuple[str, ...], name: str = "model") -> Path:
        chat_tokenizer(template, tokens).save_pretrained(tmp_path / name)
        return tmp_path / name

    return folder


def built(folder: Path, *overrides: str) -> Prompts:
    return build_prompts(compose(*overrides, "prompt.num_shots=0"), folder)


def asked(prompts: Prompts) -> tuple[int, ...]:
    return prompts.prefix("answer") + prompts.question(QUESTION, "answer")


def test_the_former_name_of_cues_is_the_same_prompt(folder: Any) -> None:
    assert compose("prompt=few_shot") == compose("prompt=cues") == compose()


def test_auto_asks_each_model_as_it_can_be_asked_and_says_so(folder: Any, capsys: pytest.CaptureFixture[str]) -> None:
    chat_model, base_model = folder(*CHAT_MODEL, "instruct"), folder(*BASE_MODEL, "base")
    teacher = built(chat_model, "prompt=auto")
    student = student_prompts(teacher, base_model)
    assert (type(teacher.frame), type(student.frame)) == (Chat, Cues)
    assert capsys.readouterr().err.splitlines() == [
        f"{chat_model} has a chat template, in which it is asked",
        f"{base_model} has no chat template and is asked by the task's cues",
    ]
    for prompts, way in ((teacher, "chat"), (student, "cues")):
        name = chat_model if way == "chat" else base_model
        by_name = built(name, f"prompt={way}")
        assert asked(prompts) == asked(by_name)
        assert prompts.fingerprint() == by_name.fingerprint()  # so a cache is shared


@pytest.mark.parametrize(
    ("number", "message"),
    [(2, ""), (3, "prompt.num_shots=3, but the task has 2 demonstrations\n")],
)
def test_more_shots_than_the_task_has_are_announced(
    number: int, message: str, folder: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    shots = [Example("Is 3 odd?", "yes"), Example("Is 4 odd?", "no")]
    prompts = build_prompts(compose(f"prompt.num_shots={number}"), folder(*BASE_MODEL, "base"), shots)
    assert len(prompts.shots) == 2
    assert capsys.readouterr().err == message


def test_a_student_that_has_learned_cues_is_asked_by_them_again(folder: Any, tmp_path: Path) -> None:
    learned = built(folder(*BASE_MODEL), "prompt=auto")
    served_tokenizer(learned, "answer").save_pretrained(tmp_path / "student")
    again = built(tmp_path / "student", "prompt=auto")
    assert isinstance(again.frame, Cues)
    assert asked(again) == asked(learned)


@pytest.mark.parametrize("name", TOKENS)
def test_a_model_without_a_template_gets_a_named_one_and_keeps_it(name: str, folder: Any, tmp_path: Path) -> None:
    prompts = built(folder("", TOKENS[name]), "prompt=chat", f"prompt.without_template={name}")
    tokenizer = prompts.tokenizer
    assert prompts.vocabulary_size == len(tokenizer)
    message = [{"role": "user", "content": QUESTION.question}]
    assert prompts.tokenizer.chat_template == ""
    served_tokenizer(prompts, "answer").save_pretrained(tmp_path / "student")
    again = built(tmp_path / "student", "prompt=chat")  # which has one now
    text = again.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    assert again.tokenizer.chat_template == named_template(name, tokenizer)
    assert tuple(tokenizer.encode(text, add_special_tokens=False)) == asked(again) == asked(prompts)
    assert asked(prompts).count(tokenizer.bos_token_id) == 1
    assert len(again.tokenizer) == len(tokenizer)  # no token is new


def test_a_model_keeps_the_template_that_it_has(folder: Any) -> None:
    own = folder(*CHAT_MODEL)
    named = built(own, "prompt=chat", "prompt.without_template=zephyr")
    assert named.frame.template == TEMPLATES["ChatML"][0]
    assert named.fingerprint() == built(own, "prompt=chat").fingerprint()


def test_the_name_of_the_template_is_in_the_fingerprint_by_its_text(folder: Any) -> None:
    base = folder(*BASE_MODEL)
    names = ("chatml", "plain", "zephyr", "cues")
    prints = [built(base, "prompt=chat", f"prompt.without_template={name}").fingerprint() for name in names]
    assert len({str(print_) for print_ in prints}) == len(names)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ((), r"no chat template; give it one with prompt\.without_template=chatml\|plain\|zephyr, or set prompt=cues"),
        (("prompt.without_template=gemma",), r"no special token <start_of_turn> and no <end_of_turn> .* chatml, plain"),
        (("prompt.without_template=vicuna",), "expected one of chatml, gemma, llama3, plain, zephyr, cues, null"),
    ],
)
def test_a_refusal_names_the_templates_that_are_possible(overrides: tuple[str, ...], reason: str, folder: Any) -> None:
    with pytest.raises(ConfigError, match=reason):
        built(folder(*BASE_MODEL), "prompt=chat", *overrides)


def test_a_named_template_begins_with_a_start_token_only_where_texts_do() -> None:
    assert named_template("plain", with_byte_tokens(prepends=True)).startswith("{{- bos_token -}}")
    without = with_byte_tokens(prepends=True)
    without.add_bos_token = False
    without.backend_tokenizer.post_processor = None
    assert not named_template("plain", without).startswith("{{- bos_token")
