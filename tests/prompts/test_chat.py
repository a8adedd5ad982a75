"""Prompts in chat templates: the tokens of the whole rendering, the tokens that generation continues, or a refusal."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distill.errors import ConfigError
from distill.prompts.chat import Layout
from distill.prompts.rendering import Prompts, build_prompts
from distill.prompts.serving import served_tokenizer
from distill.records import Example, Span
from tests.cases import LAYOUT as CUES
from tests.conftest import compose
from tests.prompts.kinds import KEPT
from tests.prompts.templates import ENDS, TEMPLATES, chat_tokenizer

LAYOUT = Layout(system="", rationale_request="Why?", answer_cue="Answer:", arguments={}, reasoning_marks=None)
SHOTS = (Example("Is 3 odd?", "yes", "Half of 3 is no whole number."), Example("Is 4 odd?", "no", "4 is 2 and 2."))
WORDS = ("Is", "it", "so?", "3", "+", "10", "é", "no,", "\n", "  ", "yes", "<s>", "<|im_end|>", "[INST]")


def prompts_of(name: str, shots: tuple[Example, ...] = (), kind: str = "byte-level", **changes: Any) -> Prompts:
    template, tokens, arguments = TEMPLATES[name]
    layout = replace(LAYOUT, arguments=arguments, **changes)
    return Prompts(chat_tokenizer(template, tokens, KEPT[kind]), layout, shots, max_length=512, too_long="drop")


def conversation(prompts: Prompts, shots: tuple[Example, ...], question: str, answer: str) -> list[dict[str, str]]:
    system = prompts.layout.system
    turns = [{"role": "system", "content": system}] if system else []
    for example in (*shots, Example(question, answer)):
        turns += [{"role": "user", "content": example.question}, {"role": "assistant", "content": str(example.answer)}]
    return turns


def ids_of(prompts: Prompts, turns: list[dict[str, str]], *, begin: bool) -> tuple[int, ...]:
    """The tokens that the model's own template gives, computed by its tokenizer."""
    arguments = prompts.layout.arguments
    text = prompts.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=begin, **arguments)
    return tuple(prompts.tokenizer.encode(text, add_special_tokens=False))


def random_text(generator: random.Random) -> str:
    """Words without special tokens, with a letter at both ends."""
    words = [word for word in generator.choices(WORDS, k=generator.randint(1, 9)) if "<" not in word]
    return f"Q{' '.join(words)}!"


@pytest.mark.parametrize("system", ["", "Be brief."])
@pytest.mark.parametrize("name", TEMPLATES)
def test_prompt_and_target_are_the_templates_own_rendering_in_tokens(name: str, system: str) -> None:
    generator = random.Random(name)
    for num_shots in (0, 1, 2):
        shots = tuple(Example(random_text(generator), random_text(generator)) for _ in range(num_shots))
        prompts = prompts_of(name, shots, system=system)
        question, answer = random_text(generator), random_text(generator)
        prompt = prompts.answer_prompt(Example(question), answer)
        start, stop = prompt.spans["answer"]
        turns = conversation(prompts, shots, question, answer)
        if system and name in ("Gemma", "gemma", "Mistral"):  # no turns of the system
            del turns[0]
            turns[0]["content"] = f"{system}\n\n{turns[0]['content']}"
        whole = ids_of(prompts, turns, begin=False)
        assert whole[: len(prompt.ids)] == prompt.ids
        assert ids_of(prompts, turns[:-1], begin=True) == prompt.ids[:start]
        assert stop == len(prompt.ids)
        end = ENDS.get(name, "<|im_end|>")
        assert prompt.ids[-1] == prompts.end == prompts.tokenizer.convert_tokens_to_ids(end)
        assert prompts.decode(prompt.ids[start:stop]).strip() == answer


@pytest.mark.parametrize("kind", ["byte tokens, prepending", "byte tokens, metaspace not split", "byte tokens"])
@pytest.mark.parametrize("name", ["Mistral", "Gemma", "ChatML"])
def test_a_space_that_a_tokenizer_puts_before_a_text_stands_nowhere_inside_a_prompt(name: str, kind: str) -> None:
    prompts = prompts_of(name, SHOTS, kind)
    prompt = prompts.answer_prompt(Example("Is it 10?\nSay so."), "no, it is")
    turns = conversation(prompts, SHOTS, "Is it 10?\nSay so.", "no, it is")
    assert ids_of(prompts, turns, begin=False)[: len(prompt.ids)] == prompt.ids
    assert ids_of(prompts, turns[:-1], begin=True) == prompt.ids[: prompt.spans["answer"][0]]


def test_a_tokenizer_that_joins_the_parts_of_a_template_otherwise_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"encodes '<s><\|start_header_id\|>user.* otherwise than its parts"):
        prompts_of("Llama 3", kind="byte tokens, prepending")  # which puts a space after each special token


@pytest.mark.parametrize("name", [*TEMPLATES, "cues"])
def test_everything_after_the_question_is_learned(name: str) -> None:
    example = Example("Is 5 odd?")
    if name == "cues":
        prompts = Prompts(KEPT["byte-level"](), CUES, (), max_length=512, too_long="drop")
    else:
        prompts = prompts_of(name)
    for prompt, span in (
        (prompts.answer_prompt(example, "yes"), "answer"),
        (prompts.rationale_prompt(example, "5 is 4 and 1.", None), "rationale"),
        (prompts.rationale_prompt(example, "5 is 4 and 1.", "yes"), "rationale"),
    ):
        before = len(prompts.prefix(span) + prompts.question(example, span))
        starts, stops = zip(*sorted(prompt.spans.values()), strict=True)
        assert (*starts, len(prompt.ids)) == (before, *stops)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_rationale_is_requested_by_the_user_and_split_from_its_answer(name: str) -> None:
    prompts = prompts_of(name, SHOTS)
    prompt = prompts.rationale_prompt(Example("Is 5 odd?"), "5 is 4 and 1.", "yes")
    text = prompts.tokenizer.decode(prompt.ids)
    assert text.count("Why?") == 3
    assert "odd?\nWhy?" in text
    written = prompt.ids[prompt.spans["rationale"][0] :]
    assert prompts.split_reply(written) == prompts.split_reply(written[:-1])
    assert (prompts.split_reply(written).rationale, prompts.split_reply(written).answer) == ("5 is 4 and 1.", "yes")
    assert prompts.is_before_target(prompt.ids[: prompt.spans["answer"][0]], "answer")
    assert not prompts.is_before_target(prompt.ids[: prompt.spans["answer"][0] + 1], "answer")


@pytest.mark.parametrize("name", TEMPLATES)
def test_special_tokens_in_data_remain_text(name: str) -> None:
    special = set(prompts_of(name).tokenizer.all_special_ids)
    texts = ["a <|im_end|> b", "</s>", "<|eot_id|><end_of_turn>", "<s>"]
    harmless = prompts_of(name, (Example("q", "a"),)).answer_prompt(Example("q"), "a")
    expected = [i for i in harmless.ids if i in special]
    for text in texts:
        prompt = prompts_of(name, (Example(text, text),)).answer_prompt(Example(text), text)
        assert [i for i in prompt.ids if i in special] == expected


@pytest.mark.parametrize("span", ["answer", "rationale"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_served_tokenizer_renders_what_the_student_has_learned(name: str, span: Span) -> None:
    for system in ("", "Say 'yes' or \\ {{ x }} 😀."):
        prompts = prompts_of(name, system=system)
        tokenizer = served_tokenizer(prompts, span)
        messages = [{"role": "user", "content": "Is 5 odd?"}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        learned = prompts.prefix(span) + prompts.question(Example("Is 5 odd?"), span)
        assert tuple(tokenizer.encode(text, add_special_tokens=False)) == learned
        assert tokenizer.eos_token_id == prompts.end
        again = Prompts(tokenizer, prompts.layout, (), max_length=512, too_long="drop")
        assert again.prefix(span) + again.question(Example("Is 5 odd?"), span) == learned


def test_a_template_that_already_renders_the_prompt_is_kept() -> None:
    prompts = prompts_of("Llama 3")
    assert served_tokenizer(prompts, "answer").chat_template == prompts.tokenizer.chat_template
    changed = served_tokenizer(prompts_of("Llama 3", system="Be brief."), "answer")
    assert changed.chat_template["base"] == prompts.tokenizer.chat_template != changed.chat_template["default"]
    two = [{"role": "user", "content": "Is 5 odd?"}, {"role": "assistant", "content": "yes"}]
    assert changed.apply_chat_template(two, tokenize=False).endswith("\n\nyes<|eot_id|>")
    assert changed.apply_chat_template([*two, two[0]], tokenize=False).count("Be brief.") == 1
    reasoned = served_tokenizer(prompts, "rationale")  # whose question is followed by a request
    with pytest.raises(Exception, match="answers one question"):
        reasoned.apply_chat_template([*two, two[0]], tokenize=False)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("", "the tokenizer of TokenizersBackend has no chat template"),
        (TEMPLATES["Qwen 3"][0], "enable_thinking: false"),
        ("{{ strftime_now('%d %b %Y') }}" + TEMPLATES["ChatML"][0], "date_string"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "begins an assistant's turn"),
        ("{% for m in messages %}{{ m.content }};{% endfor %}", "expected a special token"),
        ("{{ raise_exception('only tools') }}", "refuses this prompt: only tools"),
        ("{{ messages[-1].content }}</s>", "begins an assistant's turn"),
    ],
)
def test_a_template_that_cannot_give_what_a_student_learns_is_refused(template: str, reason: str) -> None:
    tokenizer = chat_tokenizer(template, ("<|im_start|>", "<|im_end|>", "<think>", "</think>"))
    with pytest.raises(ConfigError, match=reason):
        Prompts(tokenizer, LAYOUT, (), max_length=256, too_long="drop")


def test_a_template_that_leaves_out_earlier_turns_is_refused_with_shots_alone() -> None:
    template = "<s>{% for m in messages[-1:] if m.role == 'user' %}{{ m.content }}</s>{% endfor %}"
    template += "{% if messages[-1].role == 'assistant' %}{{ messages[-2].content }}</s>{{ messages[-1].content }}</s>"
    template += "{% endif %}"
    tokenizer = chat_tokenizer(template)
    assert Prompts(tokenizer, LAYOUT, (), max_length=256, too_long="drop").prefix("answer")
    with pytest.raises(ConfigError, match=r"earlier turns; set prompt\.num_shots=0"):
        Prompts(tokenizer, LAYOUT, SHOTS, max_length=256, too_long="drop")


def test_the_template_and_every_text_are_in_the_fingerprint() -> None:
    prints = [prompts_of(name).fingerprint() for name in ("ChatML", "Qwen 3")]
    prints += [prompts_of("ChatML", **{name: "other"}).fingerprint() for name in ("system", "rationale_request")]
    prints += [prompts_of("ChatML", answer_cue="So:").fingerprint(), prompts_of("ChatML", SHOTS).fingerprint()]
    template, tokens, _ = TEMPLATES["ChatML"]
    other = chat_tokenizer(template.replace("helpful", "kind"), tokens)
    prints.append(Prompts(other, LAYOUT, (), max_length=512, too_long="drop").fingerprint())
    assert len({str(print_) for print_ in prints}) == len(prints)


@pytest.mark.parametrize("shot", [Example("Is 3 odd?", None, "Because."), Example("Is 3 odd?", "yes", None)])
def test_a_shot_without_what_it_shows_is_refused(shot: Example) -> None:
    with pytest.raises(ConfigError, match="has no answer or no rationale"):
        prompts_of("ChatML", (shot,)).prefix("rationale")


def test_the_prompt_is_laid_out_by_the_task_unless_it_brings_a_layout_of_its_own(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(*TEMPLATES["ChatML"][:2])
    tokenizer.save_pretrained(tmp_path)
    by_task, by_chat = (build_prompts(compose(f"prompt={name}"), tmp_path) for name in ("cues", "chat"))
    assert by_task.layout.question_cue == "Review:"
    assert isinstance(by_chat.layout, Layout)
