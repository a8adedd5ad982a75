"""The prompt of an exported student: as a file that its example reads, and as the literal text on its card."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from distill.app import config as configuration
from distill.app.config import Config
from distill.exports import example
from distill.lessons.join import AnswerMode, first_span
from distill.prompts.pieces import CONTEXTS
from distill.prompts.rendering import Prompts
from distill.records import Example, Span

PLACE = "{question}"
_SHORT = Example("?", None)


@dataclass(frozen=True)
class Recipe:
    """All that example.py needs beside model and tokenizer; tuples of numbers are token ids."""

    mode: AnswerMode
    text: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    contexts: tuple[str, ...]
    max_question_tokens: int
    is_cut: bool
    question_spaces: str
    target_spaces: str
    answer_cue: str
    separator: tuple[int, ...]
    choices: Mapping[str, tuple[int, ...]]
    has_own_choices: bool
    end: str
    end_id: int
    vocabulary_size: int
    max_new_tokens: int
    example: str

    @property
    def usage(self) -> str:
        """How to ask a question on the command line."""
        argument = '{"question": "a question and its choices", "choices": ["A", "B"]}'
        return f"example.py {shlex.quote(argument)}" if self.has_own_choices else 'example.py "a question"'

    def write(self, folder: Path) -> None:
        """Write the prompt, and the example that reads it."""
        (folder / "prompt.json").write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False), encoding="utf-8")
        shutil.copyfile(example.__file__, folder / "example.py")


def make_recipe(prompts: Prompts, config: Config, questions: Sequence[Example]) -> Recipe:
    """Make the recipe of a student with these prompts; ValueError if its example would read a question otherwise."""
    mode: AnswerMode = config.task.answer_mode
    span = first_span(mode)
    before, after = _around(prompts, span)
    choices = {choice: prompts.answer_ids(choice) for choice in configuration.build(config.task.examples).choices}
    has_own_choices = any(question.choices for question in questions)
    recipe = Recipe(
        mode=mode,
        text=PLACE.join(prompts.literal(span)),
        before=before,
        after=after,
        contexts=_contexts(prompts, questions),
        max_question_tokens=prompts.max_length - len(before) + len(prompts.prefix(span)) - len(after),
        is_cut=prompts.too_long == "cut" and not has_own_choices,
        question_spaces=prompts.frame.question_lead,
        target_spaces=prompts.frame.target_lead,
        answer_cue=prompts.frame.separator,
        separator=prompts.separator_ids(),
        choices=choices,
        has_own_choices=has_own_choices,
        end=prompts.token_text(prompts.end),
        end_id=prompts.end,
        vocabulary_size=prompts.vocabulary_size,
        max_new_tokens=max(map(len, choices.values())) if choices and mode == "direct" else config.max_new_tokens,
        example=_argument(questions[0]) if questions else _SHORT.question,
    )
    for question in questions:
        if (ids := _learned(prompts, question, span)) and tuple(_read(prompts, recipe, question)) != ids:
            raise ValueError(
                f"example.py would read {question.question[:60]!r} in other tokens than the student learned"
            )
        _check_choices(prompts, recipe, question.choices)
    return recipe


def _argument(question: Example) -> str:
    """A question as an argument of example.py, with its choices where it has its own."""
    own = {"question": question.question, "choices": question.choices}
    return json.dumps(own, ensure_ascii=False) if question.choices else question.question


def _check_choices(prompts: Prompts, recipe: Recipe, choices: Sequence[str]) -> None:
    read = example.choice_ids(prompts.tokenizer, asdict(recipe), choices)
    if tuple(map(tuple, read.values())) != prompts.choice_ids(choices):
        raise ValueError(f"example.py would read {', '.join(choices)[:60]!r} in other tokens than the student learned")


def num_literal(recipe: Recipe, prompts: Prompts, questions: Sequence[Example]) -> int:
    """Number of questions whose literal prompt, tokenized as one text, has exactly the ids that the student learned."""
    texts = [recipe.text.replace(PLACE, question.question) for question in questions]
    tokens = [tuple(prompts.tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
    learned = [_learned(prompts, question, first_span(recipe.mode)) for question in questions]
    return sum(ids == expected for ids, expected in zip(tokens, learned, strict=True))


def _around(prompts: Prompts, span: Span) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Token ids before and after the question's own."""
    head, _, after = prompts.frame.question(span, _SHORT.question)
    return prompts.prefix(span) + head, after


def _learned(prompts: Prompts, question: Example, span: Span) -> tuple[int, ...]:
    """Token ids of the prompt in training; none if the question was left out as too long."""
    try:
        return prompts.prefix(span) + prompts.question(question, span)
    except ValueError:
        return ()


def _read(prompts: Prompts, recipe: Recipe, question: Example) -> Sequence[int]:
    return example.prompt_ids(prompts.tokenizer, asdict(recipe), question.question)


def _contexts(prompts: Prompts, questions: Sequence[Example]) -> tuple[str, ...]:
    """Texts after which a piece is tokenized; none if it is tokenized as a text of its own."""
    pieces = [f"{prompts.frame.question_lead}{question.question}" for question in (*questions, _SHORT)]
    is_alone = all(tuple(example.text_ids(prompts.tokenizer, (), piece)) == prompts.encode(piece) for piece in pieces)
    return () if is_alone else CONTEXTS
