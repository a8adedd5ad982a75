"""Conversations of several messages: the template's own rendering, in tokens, or a refusal."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from distill.errors import ConfigError
from distill.prompts.rendering import Prompts
from distill.prompts.serving import served_tokenizer
from distill.records import Example, Message
from tests.prompts.templates import ENDS, TEMPLATES, chat_tokenizer
from tests.prompts.test_chat import LAYOUT, ids_of, prompts_of, random_text

NO_SYSTEM = ("gemma", "mistral")  # templates that refuse a turn of the system


def random_conversation(generator: random.Random, *, system: bool) -> Example:
    """A question with up to four pairs of turns before it, and perhaps a turn of the system."""
    history = [Message("system", random_text(generator))] if system else []
    for _ in range(generator.randint(0, 4)):
        history += [Message("user", random_text(generator)), Message("assistant", random_text(generator))]
    return Example(random_text(generator), random_text(generator), history=tuple(history))


def turns_of(example: Example, name: str) -> list[dict[str, str]]:
    """The messages with the answer, as the templates are called with them."""
    turns = [{"role": message.role, "content": message.content} for message in example.history]
    turns += [{"role": "user", "content": example.question}, {"role": "assistant", "content": str(example.answer)}]
    if turns[0]["role"] == "system" and name.lower() in NO_SYSTEM:
        system = turns.pop(0)["content"]
        turns[0]["content"] = f"{system}\n\n{turns[0]['content']}"
    return turns


@pytest.mark.parametrize("name", TEMPLATES)
def test_random_conversations_have_the_tokens_of_their_whole_rendering(name: str) -> None:
    generator = random.Random(name)
    for own_system in (True, False):
        prompts = prompts_of(name, system=None if own_system else "")
        for _ in range(12):
            example = random_conversation(generator, system=own_system and generator.random() < 0.7)
            prompt = prompts.answer_prompt(example, str(example.answer))
            turns = turns_of(example, name)
            start, stop = prompt.spans["answer"]
            assert ids_of(prompts, turns[:-1], begin=True) == prompt.ids[:start]
            assert ids_of(prompts, turns, begin=False)[: len(prompt.ids)] == prompt.ids
            assert prompts.decode(prompt.ids[start:stop]).strip() == example.answer
            assert prompt.ids[-1] == prompts.tokenizer.convert_tokens_to_ids(ENDS.get(name, "<|im_end|>"))


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_answers_of_a_conversation_and_its_ends_are_in_the_whole_rendering_once(name: str) -> None:
    prompts = prompts_of(name, system=None)
    contents = ["One?", "First.", "Two?", "Second.", "Three?", "Third."]
    roles = ("user", "assistant")
    messages = tuple(Message(roles[n % 2], content) for n, content in enumerate(contents))
    whole = ids_of(prompts, turns_of(Example("Three?", "Third.", history=messages[:4]), name), begin=False)
    last_stop = 0
    for number in (1, 3, 5):
        example = Example(messages[number - 1].content, history=messages[: number - 1])
        prompt = prompts.answer_prompt(example, messages[number].content)
        start, stop = prompt.spans["answer"]
        if name == "Qwen 3":  # writes an empty reasoning before the last answer, and not before earlier ones
            continue
        assert whole[:stop] == prompt.ids
        assert last_stop < start
        last_stop = stop


def test_the_turns_of_a_conversation_follow_the_layouts_system_and_the_shots() -> None:
    shots = (Example("Is 3 odd?", "yes"),)
    prompts = prompts_of("ChatML", shots, system="Be brief.")
    example = Example("And 5?", history=(Message("user", "Is 4 odd?"), Message("assistant", "no")))
    text = prompts.tokenizer.decode((*prompts.prefix("answer"), *prompts.question(example, "answer")))
    contents = ["Be brief.", "Is 3 odd?", "yes", "Is 4 odd?", "no", "And 5?"]
    assert [text.count(content) for content in contents] == [1] * len(contents)
    assert sorted(contents, key=text.index) == contents


def test_a_systems_turn_is_of_the_layout_or_of_the_conversation() -> None:
    example = Example("And 5?", history=(Message("system", "Be long."),))
    with pytest.raises(ConfigError, match=r"Be long.*set prompt\.layout\.system=null"):
        prompts_of("ChatML", system="Be brief.").question(example, "answer")
    own = prompts_of("ChatML", system=None)
    text = own.tokenizer.decode((*own.prefix("answer"), *own.question(example, "answer")))
    assert "<|im_start|>system\nBe long.<|im_end|>" in text
    without = own.tokenizer.decode(own.question(Example("And 5?"), "answer"))
    assert "<|im_start|>system\nYou are helpful.<|im_end|>" in without  # the template's


def test_reasoning_in_an_earlier_turn_is_left_out_as_templates_leave_it_out() -> None:
    prompts = prompts_of("Qwen 3", system=None)
    history = (Message("user", "1 + 1?"), Message("assistant", "<think>\nOne more.\n</think>\n\n2"))
    example = Example("2 + 2?", "4", history=history)
    prompt = prompts.answer_prompt(example, "4")
    turns = turns_of(example, "Qwen 3")
    assert ids_of(prompts, turns, begin=False)[: len(prompt.ids)] == prompt.ids
    assert "One more." not in prompts.tokenizer.decode(prompt.ids)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages[-2:] %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}", "leaves out"),
        (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n"
            "{{ m.content if loop.last else m.content | replace('Say', 'Said') }}<|im_end|>\n{% endfor %}",
            "changes what a conversation contains: it writes '.*Said so.*' for '.*Say so",
        ),
        (
            "{% if messages | length > 2 %}{{ raise_exception('one question only') }}{% endif %}"
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
            "refuses this prompt: one question only",
        ),
    ],
)
def test_a_template_that_changes_earlier_turns_is_refused(template: str, reason: str) -> None:
    begun = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    tokenizer = chat_tokenizer(template + begun, ("<|im_start|>", "<|im_end|>"))
    prompts = Prompts(tokenizer, replace(LAYOUT, system=None), (), max_length=512, too_long="drop")
    assert prompts.question(Example("Well?"), "answer")
    with pytest.raises(ConfigError, match=reason):
        prompts.question(Example("Well?", history=(Message("user", "Say so"), Message("assistant", "so"))), "answer")


def test_cues_refuse_conversations(prompts: Prompts) -> None:
    history = (Message("user", "a"), Message("assistant", "b"))
    with pytest.raises(ConfigError, match="need a chat template; set prompt=chat"):
        prompts.question(Example("Well?", history=history), "answer")


@pytest.mark.parametrize("system", [None, "", "Say 'yes' or \\ {{ x }} 😀."])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_served_tokenizer_renders_conversations_as_they_were_learned(name: str, system: str | None) -> None:
    generator = random.Random(name)
    prompts = prompts_of(name, system=system)
    tokenizer = served_tokenizer(prompts, "answer")
    assert bool(system) <= isinstance(tokenizer.chat_template, dict)  # which has the template of the source too
    for _ in range(4):
        example = random_conversation(generator, system=False)
        turns = turns_of(example, name)
        begun = tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(turns, tokenize=False)
        prompt = prompts.answer_prompt(example, str(example.answer))
        start, _ = prompt.spans["answer"]
        assert tuple(tokenizer.encode(begun, add_special_tokens=False)) == prompt.ids[:start]
        assert tuple(tokenizer.encode(whole, add_special_tokens=False))[: len(prompt.ids)] == prompt.ids
