"""The kinds of work that people bring, in small. The laws hold for each: a test that takes `case` is run for all.

Each kind has prompts for the tokenizer of the tiny models, examples, and the overrides of a run.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from distill.prompts import Layout, auto, chat, cues
from distill.prompts.rendering import Prompts
from distill.prompts.tokenizers import load_tokenizer
from distill.records import Example, Message
from tests.prompts.templates import REASONING, TEMPLATES, chat_tokenizer

LAYOUT = cues.Layout(instruction="", question_cue="Q:", rationale_cue="Reason:", answer_cue="Answer:")
CHAT = chat.Layout(system=None, rationale_request="Why?", answer_cue="So:", arguments={}, reasoning_marks=None)
OTHER_ENDS = tuple(range(60, 200))  # so many that a random teacher writes one of them soon
LIKE_OTHERS_IN_A_BATCH = {"own choices", "named template", "several ends"}  # which differ only before it is made
NAMED_TEMPLATES = {name: template[:2] for name, template in TEMPLATES.items()}
NAMED_TEMPLATES["reasoning"] = REASONING["Qwen 3"][:2]


@dataclass(frozen=True)
class Kind:
    """How its models are asked, what its examples have that others lack, and the overrides of a run on its rows."""

    adapt: Callable[[Example, int], Example] = lambda example, _: example
    layout: Layout = LAYOUT
    template: str | None = None
    other_ends: tuple[int, ...] = ()
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """Prompts without shots of one kind of work, and its examples."""

    prompts: Prompts
    adapt: Callable[[Example, int], Example]

    def examples(self, number: int) -> list[Example]:
        """Examples with an answer and a rationale, of very different lengths."""
        return [self.adapt(example, index) for index, example in enumerate(examples(number))]

    def with_shots(self, number: int) -> Prompts:
        """The same prompts after this many shots."""
        ours = self.prompts
        sizes: Any = {"max_length": ours.max_length, "too_long": ours.too_long, "other_ends": ours.ends[1:]}
        return Prompts(ours.tokenizer, ours.layout, examples(number), **sizes)


def examples(number: int) -> list[Example]:
    """Examples with questions of very different lengths, answers and rationales."""
    words = "two and two are how many, and why would anyone wish to know"
    return [
        Example(f"{i}: {words[: 3 + 9 * (i % 6)]}?", str(7 * i), f"{i} times 7. " * (1 + i % 4)) for i in range(number)
    ]


def _after_turns(example: Example, index: int) -> Example:
    """The last question of a conversation of up to three; every second has a turn of the system."""
    turns = [Message("system", f"Be {index}.")] if index % 2 else []
    for turn in range(index % 3):
        turns += [Message("user", f"And {index} + {turn}?"), Message("assistant", f"It is\n{turn}.")]
    return replace(example, history=tuple(turns))


def _with_choices(example: Example, index: int) -> Example:
    choices = tuple(f"{7 * index}{' or more' * place}" for place in range(2 + index % 3))
    return replace(example, choices=choices)


def _with_long_answer(example: Example, index: int) -> Example:
    lines = [f"  - {number} is {number}" for number in range(1 + index % 2)]
    return replace(example, answer="\n\n".join([f"House {index}:", *lines]))


KINDS = {
    "cues": Kind(),
    "conversations": Kind(_after_turns, CHAT, "Zephyr", overrides=("task=chat", "prompt=chat")),
    "own choices": Kind(
        _with_choices,
        overrides=("task=jsonl", "task.choices=choices", "task.options.answer=text", "teacher.kind.constrain=false"),
    ),
    "long answers": Kind(_with_long_answer, overrides=("task=jsonl", "task.read.kind=text")),
    "reasoning": Kind(
        layout=replace(CHAT, system=""),
        template="reasoning",
        overrides=("task=jsonl", "prompt=chat", "task.rationale=rationale"),
    ),
    "named template": Kind(
        layout=auto.Layout(replace(CHAT, system="Be brief."), "zephyr"),
        overrides=("task=jsonl", "prompt=chat", "prompt.without_template=zephyr"),
    ),
    "several ends": Kind(
        layout=replace(CHAT, system=""),
        template="Zephyr",
        other_ends=OTHER_ENDS,
        overrides=("task=jsonl", "prompt=chat"),
    ),
}


STOPS = "teacher.kind.generation.stops=[a,e,i,o,u]"  # a random teacher writes one of them soon
TEXTS = ("task.read.kind=text", "task.examples.num_labelled=6", "teacher.kind.max_new_tokens=24", STOPS)
# Ways to learn from one of these kinds, with the overrides of a run.
WAYS: dict[str, tuple[str, tuple[str, ...]]] = {
    "turns in one sequence": ("conversations", ("task.learn=all", "loss=[answer,kl]")),
    "several answers": ("long answers", (*TEXTS, "teacher.answers_each=2", "loss=[answer,teacher_answer,kl]")),
    "chosen positions": ("long answers", ("cache.positions.share=0.4", "loss=[answer,kl]")),
    "random positions": ("long answers", ("cache.positions={share:0.4,by:random}", "loss=[answer,kl]")),
    "reasoned": ("reasoning", ("task.answer_mode=reasoned", "loss=[answer,rationale,rationale_kl]")),
}

OWN_BATCHES = [name for name in KINDS if name not in LIKE_OTHERS_IN_A_BATCH]


# For tests that take half a second of each kind: the others run with the slow tests.
TWO_FAST = [name if name in ("cues", "conversations") else pytest.param(name, marks=pytest.mark.slow) for name in KINDS]


def make_case(name: str, folder: Path) -> Case:
    """The case of this kind, for the tokenizer of a model without a template."""
    kind = KINDS[name]
    tokenizer = _tokenizer(folder, kind.template) if kind.template else load_tokenizer(folder)
    sizes: Any = {"max_length": 512, "too_long": "drop"}
    return Case(Prompts(tokenizer, kind.layout, (), **sizes, other_ends=kind.other_ends), kind.adapt)


def case_overrides(name: str, root: Path, teacher: Path, student: Path) -> list[str]:
    """The overrides of a run on 24 rows of this kind, or in this way, after those of the tiny models."""
    of_kind, settings = WAYS.get(name, (name, ()))
    kind, rows = KINDS[of_kind], root / "rows.jsonl"
    made = [kind.adapt(example, index) for index, example in enumerate(examples(24))]
    rows.write_text("".join(f"{json.dumps(_row(example))}\n" for example in made))
    if kind.template:
        ends = [1, 0] if kind.other_ends else None
        teacher, student = (
            with_template(folder, root / place, kind.template, ends)
            for folder, place in ((teacher, "teacher"), (student, "student"))
        )
    sizes = [f"task.examples.num_{split}={number}" for split, number in (("labelled", 16), ("unlabelled", "null"))]
    models = [f"teacher.model={teacher}", f"student.model={student}", "prompt.num_shots=0", "teacher.calibrate=0"]
    return [*kind.overrides, f"task.path={rows}", *models, *sizes, *settings]


def _row(example: Example) -> dict[str, Any]:
    turns = [*example.history, Message("user", example.question), Message("assistant", str(example.answer))]
    messages = [{"role": message.role, "content": message.content} for message in turns]
    fields = {"question": example.question, "answer": example.answer, "rationale": example.rationale}
    return {"messages": messages} | fields | {"choices": list(example.choices)}


def _tokenizer(folder: Path, name: str) -> Any:
    """The tokenizer of a model with this template; marks of reasoning are tokens, but no special ones."""
    template, special = NAMED_TEMPLATES[name]
    tokenizer = chat_tokenizer(template, special, kind=partial(load_tokenizer, folder))
    tokenizer.add_tokens([mark for mark in ("<think>", "</think>") if name == "reasoning"])
    return tokenizer


def with_template(source: Path, folder: Path, name: str, ends: Sequence[int] | None = None) -> Path:
    """A copy of a model with a chat template, which ends a text at any of `ends` if they are named."""
    shutil.copytree(source, folder)
    _tokenizer(folder, name).save_pretrained(folder)
    if ends:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return folder
