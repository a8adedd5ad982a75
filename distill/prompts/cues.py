"""Renders an example as token ids and spans, for teachers and students. The only caller of a tokenizer.

A shot, or a training sequence of a student (with the rationale line only if the span is `rationale`):

    Review: The jokes fall flat.
    Reason: Jokes that fall flat are a failing.
    Sentiment: negative<end>

Every piece is tokenized separately, so the token ids of a target do not depend on the prompt before it.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, final

from transformers import PreTrainedTokenizerBase

from distill.app import config as configuration
from distill.app.config import Config
from distill.app.fingerprint import arguments_of, fingerprint_of
from distill.app.quoting import escape_problem
from distill.errors import ConfigError
from distill.prompts.pieces import Pieces, same_text
from distill.prompts.tokenizers import load_tokenizer, tokenizer_fingerprint
from distill.records import Example, Prompt, Request, Span

TooLong = Literal["drop", "cut", "refuse"]
_NUM_CACHED_TEXTS = 512


@dataclass(frozen=True)
class Layout:
    """The fixed texts of a task's prompt."""

    instruction: str
    question_cue: str
    rationale_cue: str
    answer_cue: str

    def __post_init__(self) -> None:
        """Raise ConfigError for texts in which a line break stayed two characters, as on most command lines."""
        texts = {f"task.layout.{field.name}": getattr(self, field.name) for field in fields(self)}
        if problems := [problem for key, text in texts.items() if (problem := escape_problem(key, text))]:
            raise ConfigError(*problems)


@dataclass(frozen=True)
class Reply:
    """Rationale and answer of a generated text, as generated: the answer is not canonical."""

    rationale: str
    answer: str


@final
class Prompts:
    """Renders examples for a model: few-shot with shots, zero-shot without."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        layout: Layout,
        shots: Sequence[Example],
        *,
        max_length: int,
        too_long: TooLong,
    ) -> None:
        """`max_length` limits the tokens of prompt and targets together, not counting the shots."""
        self._arguments = arguments_of(locals())
        self.tokenizer = tokenizer
        self.layout = layout
        self.shots = tuple(shots)
        self.max_length = max_length
        self.too_long = too_long
        assert tokenizer.eos_token_id is not None
        self.end: int = int(tokenizer.eos_token_id)
        self._pieces = Pieces(tokenizer, _samples(layout))
        # Cues and choices recur in every example, and the texts of an example in its requests and sequences.
        self._encode = functools.lru_cache(_NUM_CACHED_TEXTS)(self._pieces)
        self._prefix = functools.cache(self._render_prefix)

    def zero_shot(self, tokenizer: PreTrainedTokenizerBase) -> Prompts:
        """Prompts of the same layout and limits, without shots, for another tokenizer."""
        return Prompts(tokenizer, self.layout, (), max_length=self.max_length, too_long=self.too_long)

    @functools.cached_property  # get_vocab builds a new dict on every call
    def vocabulary_size(self) -> int:
        """Number of token ids; embedding rows from this index on are padding."""
        return max(self.tokenizer.get_vocab().values()) + 1

    def fingerprint(self) -> dict[str, Any]:
        """Everything in the prompts that affects a teacher's targets."""
        return fingerprint_of(self, self._arguments, tokenizer=tokenizer_fingerprint(self.tokenizer))

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a text inside a prompt; a text from data never produces a special token."""
        return self._encode(text)

    def prefix(self, span: Span) -> tuple[int, ...]:
        """Token ids before every question: start token if the model has one, instruction, shots."""
        return self._prefix(span)

    def _render_prefix(self, span: Span) -> tuple[int, ...]:
        ids = self._pieces.start
        if self.layout.instruction:
            ids = self._followed(ids, self.layout.instruction + "\n\n")
        for shot in self.shots:
            if shot.answer is None or (span == "rationale" and shot.rationale is None):
                raise ConfigError(f"the shot {shot.question[:60]!r} has no answer or no rationale")
            ids = self._followed(ids, f"{self.layout.question_cue} {shot.question}\n")
            if span == "rationale":
                ids += self.encode(self.layout.rationale_cue) + self.encode(f" {shot.rationale}")
                ids += self.encode("\n")
            ids += self.encode(self.layout.answer_cue) + self.answer_ids(shot.answer) + self.encode("\n")
        return ids

    def _followed(self, ids: tuple[int, ...], text: str) -> tuple[int, ...]:
        """Append a text, which some tokenizers encode differently if it is the first of the prompt."""
        return ids + (self._pieces.first(text) if ids == self._pieces.start else self.encode(text))

    def question(self, example: Example, span: Span, room: int = 0) -> tuple[int, ...]:
        """Token ids between prefix and target; with `too_long=cut`, cut to leave space for `room` more tokens.

        If it is too long, raises ConfigError with `refuse`, ValueError with `drop` or if cutting is not enough.
        """
        cue = self.layout.answer_cue if span == "answer" else self.layout.rationale_cue
        prefix, tail = self.prefix(span), self.encode("\n") + self.encode(cue)
        head = self._followed(prefix, self.layout.question_cue)[len(prefix) :]
        body = self.encode(f" {example.question}")
        surplus = len(head) + len(body) + len(tail) + room - self.max_length
        if surplus > 0:
            if self.too_long == "refuse":
                raise ConfigError(
                    f"{example.question[:60]!r}… is {surplus} tokens over max_length={self.max_length}; "
                    "increase max_length, or set too_long=drop or too_long=cut"
                )
            if self.too_long == "drop" or surplus >= len(body):
                raise ValueError(f"{surplus} tokens over max_length={self.max_length}")
            body = body[: len(body) - surplus]
        return head + body + tail

    def around_question(self, span: Span) -> tuple[str, str]:
        """The texts before and after the question in a prompt without shots, up to the target."""
        instruction = f"{self.layout.instruction}\n\n" if self.layout.instruction else ""
        cue = self.layout.answer_cue if span == "answer" else self.layout.rationale_cue
        return f"{instruction}{self.layout.question_cue} ", f"\n{cue}"

    def answer_ids(self, answer: str) -> tuple[int, ...]:
        """Token ids of an answer as a target, with the end token."""
        return (*self.encode(f" {answer}"), self.end)

    def choice_ids(self, choices: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Token ids of choices as targets: whole answers, which exclude each other.

        Raises ConfigError if two of them have the same tokens, or one has tokens of another text.
        """
        by_ids: dict[tuple[int, ...], str] = {}
        for choice in choices:
            ids = self.answer_ids(choice)
            if ids in by_ids:
                raise ConfigError(
                    f"the choices {by_ids[ids]!r} and {choice!r} have the same tokens in the tokenizer of "
                    f"{self.tokenizer.name_or_path}, which cannot tell them apart; rename one of them"
                )
            if not same_text(decoded := self.text(ids[:-1]), choice):
                raise ConfigError(
                    f"the tokenizer of {self.tokenizer.name_or_path} reads the choice {choice!r} back as {decoded!r}; "
                    "rename it, or choose a model whose tokenizer has these characters"
                )
            by_ids[ids] = choice
        return tuple(by_ids)

    def rationale_ids(self, rationale: str) -> tuple[int, ...]:
        """Token ids of a rationale as a target, without the end token."""
        return self.encode(f" {rationale}")

    def answer_prompt(self, example: Example, answer: str) -> Prompt:
        """prompt | answer, end token."""
        target = self.answer_ids(answer)
        before = self._before_target(example, "answer", len(target))
        return Prompt(before + target, {"answer": (len(before), len(before) + len(target))})

    def rationale_prompt(self, example: Example, rationale: str, answer: str | None) -> Prompt:
        """prompt | rationale, end token; or, with an answer, prompt | rationale, cue | answer, end token."""
        target = self.rationale_ids(rationale)
        if answer is None:
            before = self._before_target(example, "rationale", len(target) + 1)
            ids = (*before, *target, self.end)
            return Prompt(ids, {"rationale": (len(before), len(ids))})
        cue, answer_ids = self.separator_ids(), self.answer_ids(answer)
        before = self._before_target(example, "rationale", len(target) + len(cue) + len(answer_ids))
        start = len(before) + len(target) + len(cue)
        spans: dict[Span, tuple[int, int]] = {
            "rationale": (len(before), len(before) + len(target)),
            "answer": (start, start + len(answer_ids)),
        }
        return Prompt(before + target + cue + answer_ids, spans)

    def separator_ids(self) -> tuple[int, ...]:
        """Token ids between a rationale and the answer after it."""
        return self.encode("\n") + self.encode(self.layout.answer_cue)

    def request(self, example: Example, span: Span, *, given: str | None = None, sample: int = 0) -> Request:
        """A request, whose key is a hash of all token ids that the teacher reads.

        The teacher reads `given`, or else the example's gold answer if it has one, instead of generating a text.
        """
        ids: tuple[int, ...] = ()
        if span == "answer":
            text = example.answer if given is None else given
            ids = self.answer_ids(text) if text is not None else ()
        elif given is not None:
            ids = self.rationale_ids(given)
        question = self.question(example, span)
        content = json.dumps([span, self.prefix(span), question, ids, *([sample] if sample else [])])
        key = hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
        return Request(key, span, example, question, ids, sample)

    def split_reply(self, token_ids: Sequence[int]) -> Reply:
        """Decode a text generated after a rationale cue and split it at the answer cue."""
        text = self.decode(token_ids)
        rationale, cue, answer = text.partition(f"\n{self.layout.answer_cue}")
        return Reply(rationale.strip(), answer.strip() if cue else "")

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens as it was encoded, without special tokens."""
        return self._pieces.decode(token_ids)

    def text(self, token_ids: Sequence[int]) -> str:
        """Decode tokens, without special tokens and outer spaces."""
        return self.decode(token_ids).strip()

    def token_text(self, token_id: int) -> str:
        """The text of a token; of a special token its name."""
        return self._pieces.decode([token_id], skip_special=False)

    def _before_target(self, example: Example, span: Span, room: int) -> tuple[int, ...]:
        return self.prefix(span) + self.question(example, span, room)


def _samples(layout: Layout) -> tuple[str, ...]:
    """Pieces of a prompt to try a tokenizer on, of characters that every prompt has."""
    word = layout.answer_cue or "a"
    return (layout.question_cue or word, f" {word}", "\n", word, f" {word}", "\n")


def build_prompts(config: Config, model_dir: Path, shots: Iterable[Example] = ()) -> Prompts:
    """Prompts for the model in a folder, as `task.layout` and `prompt` configure them; uses the first `num_shots`."""
    return Prompts(
        load_tokenizer(model_dir),
        configuration.build(config.task.layout),
        list(shots)[: config.prompt.num_shots],
        max_length=config.prompt.max_length,
        too_long=config.prompt.too_long,
    )
