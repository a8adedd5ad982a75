"""Renders an example as token ids and spans, for teachers and students.

Every piece is tokenized separately, so the token ids of a target do not depend on the prompt before it.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

from transformers import PreTrainedTokenizerBase

from distill.app import config as configuration
from distill.app.config import Config
from distill.app.console import say
from distill.app.fingerprint import arguments_of, fingerprint_of
from distill.errors import ConfigError
from distill.prompts import Layout, auto
from distill.prompts.pieces import same_text
from distill.prompts.tokenizers import listed_ends, load_tokenizer, tokenizer_fingerprint
from distill.records import Example, Message, Prompt, Request, Span

TooLong = Literal["drop", "cut", "refuse"]
_NUM_CACHED_CHOICES = 512  # tuples of choices, of which tasks have one, or a few where they are letters


@dataclass(frozen=True)
class Reply:
    """Rationale and answer of a generated text, as generated: the answer is not canonical."""

    rationale: str
    answer: str


@final
class Prompts:
    """Renders examples for a model: few-shot with shots, zero-shot without."""

    not_in_key = ("other_ends",)  # `ends` is, where there are several

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        layout: Layout,
        shots: Sequence[Example],
        *,
        max_length: int,
        too_long: TooLong,
        other_ends: Sequence[int] = (),
    ) -> None:
        """`max_length` limits the tokens of prompt and targets together, not counting the shots.

        A target ends with the end token of its layout; a model may end what it generates with `other_ends` as well.
        """
        self._arguments = arguments_of(locals())
        self.tokenizer = tokenizer
        self.layout = layout
        self.shots = tuple(shots)
        self.max_length = max_length
        self.too_long = too_long
        self.frame = layout.frame(tokenizer, self.shots)
        self.end = self.frame.end
        self._other_ends = tuple(other_ends)
        self._prefix = functools.cache(self.frame.prefix)
        self._choice_ids = functools.lru_cache(_NUM_CACHED_CHOICES)(self._whole_answers)

    def zero_shot(self, tokenizer: PreTrainedTokenizerBase, other_ends: Sequence[int] = ()) -> Prompts:
        """Prompts of the same layout and limits, without shots, for another tokenizer."""
        return Prompts(
            tokenizer, self.layout, (), max_length=self.max_length, too_long=self.too_long, other_ends=other_ends
        )

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens at which a generated text ends, first the one that ends a target."""
        return tuple(dict.fromkeys((self.end, *self._other_ends)))

    @functools.cached_property  # get_vocab builds a new dict on every call
    def vocabulary_size(self) -> int:
        """Number of token ids; embedding rows from this index on are padding."""
        return max(self.tokenizer.get_vocab().values()) + 1

    def fingerprint(self) -> dict[str, Any]:
        """Everything in the prompts that affects a teacher's targets."""
        contents = {"tokenizer": tokenizer_fingerprint(self.tokenizer), "layout": self.frame.layout}
        ends = {"ends": self.ends} if len(self.ends) > 1 else {}
        return fingerprint_of(self, self._arguments, **contents, **ends, **self.frame.fingerprint())

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a text inside a prompt; a text from data never produces a special token."""
        return self.frame.pieces(text)

    def prefix(self, span: Span) -> tuple[int, ...]:
        """Token ids before every question: start token if the model has one, instruction, shots."""
        return self._prefix(span)

    def question(self, example: Example, span: Span, room: int = 0) -> tuple[int, ...]:
        """Token ids between prefix and target; with `too_long=cut`, cut to leave space for `room` more tokens.

        If it is too long, raises ConfigError with `refuse`, ValueError with `drop` or if cutting is not enough. A
        question with choices of its own is never cut, because they stand at its end.
        """
        head, body, tail = self.frame.question(span, example.question, example.history)
        surplus = len(head) + len(body) + len(tail) + room - self.max_length
        if surplus > 0:
            if self.too_long == "refuse":
                raise ConfigError(
                    f"{example.question[:60]!r}… is {surplus} tokens over max_length={self.max_length}; "
                    "increase max_length, or set too_long=drop or too_long=cut"
                )
            if self.too_long == "drop" or example.choices or surplus >= len(body):
                raise ValueError(f"{surplus} tokens over max_length={self.max_length}")
            body = body[: len(body) - surplus]
        return head + body + tail

    def around_question(self, span: Span, history: Sequence[Message] = ()) -> tuple[str, str]:
        """The texts before and after the question in a prompt without shots, up to the target."""
        return self.frame.around(span, history)

    def literal(self, span: Span) -> tuple[str, str]:
        """The same texts with the names of special tokens, as a tokenizer reads them."""
        return self.frame.literal(span)

    def is_before_target(self, ids: Sequence[int], span: Span) -> bool:
        """Whether token ids end as they do before a target: after a question, or an answer after its rationale."""
        endings = [self.frame.question(span, "")[2], *([self.separator_ids()] if span == "answer" else [])]
        return any(tuple(ids[-len(ending) :]) == ending for ending in endings)

    def answer_ids(self, answer: str) -> tuple[int, ...]:
        """Token ids of an answer as a target, with the end token."""
        return (*self.encode(f"{self.frame.target_lead}{answer}"), self.end)

    def choice_ids(self, choices: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Token ids of choices as targets: whole answers, which exclude each other.

        Raises ConfigError if two of them have the same tokens, or one has tokens of another text.
        """
        return self._choice_ids(tuple(choices))

    def _whole_answers(self, choices: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
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
        return self.encode(f"{self.frame.target_lead}{rationale}")

    def answer_prompt(self, example: Example, answer: str) -> Prompt:
        """prompt | answer, end token."""
        target = self.answer_ids(answer)
        before = self._before_target(example, "answer", len(target))
        return Prompt(before + target, {"answer": (len(before), len(before) + len(target))})

    def rationale_prompt(self, example: Example, rationale: str, answer: str | None) -> Prompt:
        """prompt | rationale, end token; or, with an answer, prompt | rationale, cue | answer, end token.

        The cue is part of the rationale's span: whoever reasons before an answer writes it, as it writes an end token.
        """
        target = self.rationale_ids(rationale)
        if answer is None:
            before = self._before_target(example, "rationale", len(target) + 1)
            ids = (*before, *target, self.end)
            return Prompt(ids, {"rationale": (len(before), len(ids))})
        cue, answer_ids = self.separator_ids(), self.answer_ids(answer)
        before = self._before_target(example, "rationale", len(target) + len(cue) + len(answer_ids))
        start = len(before) + len(target) + len(cue)
        spans: dict[Span, tuple[int, int]] = {
            "rationale": (len(before), start),
            "answer": (start, start + len(answer_ids)),
        }
        return Prompt(before + target + cue + answer_ids, spans)

    def separator_ids(self) -> tuple[int, ...]:
        """Token ids between a rationale and the answer after it."""
        return self.frame.separator_ids()

    def request(self, example: Example, span: Span, *, given: str | None = None, sample: int = 0) -> Request:
        """A request, whose key is a hash of all token ids that the teacher reads, also of an example's own choices.

        The teacher reads `given`, or else the example's gold answer if it has one, instead of generating a text.
        """
        ids: tuple[int, ...] = ()
        if span == "answer":
            text = example.answer if given is None else given
            ids = self.answer_ids(text) if text is not None else ()
        elif given is not None:
            ids = self.rationale_ids(given)
        question = self.question(example, span)
        more = [sample] if sample else []
        own = [{"choices": self.choice_ids(example.choices)}] if example.choices else []
        content = json.dumps([span, self.prefix(span), question, ids, *more, *own])
        key = hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
        return Request(key, span, example, question, ids, sample)

    def split_reply(self, token_ids: Sequence[int]) -> Reply:
        """Decode a text generated after a rationale cue and split it at the answer cue."""
        return self.reply(self.generated_text(token_ids))

    def reply(self, text: str) -> Reply:
        """Split a text that was generated after a rationale cue at the answer cue."""
        rationale, cue, answer = text.partition(self.frame.separator)
        return Reply(rationale.strip(), answer.strip() if cue else "")

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens as it was encoded, without special tokens."""
        return self.frame.pieces.decode(token_ids)

    def text(self, token_ids: Sequence[int]) -> str:
        """Decode tokens, without an end, special tokens and outer spaces."""
        return self.generated_text(token_ids).strip()

    def generated_text(self, token_ids: Sequence[int]) -> str:
        """Decode the tokens of a generated text, without an end and special tokens."""
        return self.decode(self._unended(token_ids))

    def has_ended(self, token_ids: Sequence[int]) -> bool:
        """Whether a generated text is complete, rather than cut off at a limit."""
        return bool(token_ids) and token_ids[-1] in self.ends

    def token_text(self, token_id: int) -> str:
        """The text of a token; of a special token its name."""
        return self.frame.pieces.decode([token_id], skip_special=False)

    def _unended(self, token_ids: Sequence[int]) -> Sequence[int]:
        return token_ids[:-1] if self.has_ended(token_ids) else token_ids

    def _before_target(self, example: Example, span: Span, room: int) -> tuple[int, ...]:
        return self.prefix(span) + self.question(example, span, room)


def build_prompts(config: Config, model_dir: Path, shots: Iterable[Example] = ()) -> Prompts:
    """Prompts for the model in a folder, as `prompt` and the task configure them; uses the first `num_shots`."""
    tokenizer, all_shots = load_tokenizer(model_dir), list(shots)
    if config.prompt.num_shots > len(all_shots):
        say(f"prompt.num_shots={config.prompt.num_shots}, but the task has {len(all_shots) or 'no'} demonstrations")
    prompts = Prompts(
        tokenizer,
        _layout(config),
        all_shots[: config.prompt.num_shots],
        max_length=config.prompt.max_length,
        too_long=config.prompt.too_long,
        other_ends=listed_ends(model_dir, tokenizer),
    )
    return _said(prompts)


def student_prompts(teacher: Prompts, model_dir: Path) -> Prompts:
    """Prompts for the student in a folder, laid out like those of its teacher, without shots."""
    tokenizer = load_tokenizer(model_dir)
    return _said(teacher.zero_shot(tokenizer, listed_ends(model_dir, tokenizer)))


def _layout(config: Config) -> Layout:
    """The task's layout, which has its cues; or that of `prompt=chat`, and what models without a template get."""
    if not config.prompt.get("layout"):
        return configuration.build(config.task.layout)  # type: ignore[no-any-return]
    conversation, otherwise = configuration.build(config.prompt.layout), config.prompt.get("without_template")
    if not otherwise:
        return conversation  # type: ignore[no-any-return]
    return auto.Layout(conversation, configuration.build(config.task.layout) if otherwise == "cues" else otherwise)


def _said(prompts: Prompts) -> Prompts:
    """The same prompts; where the model decides how it is asked, this is said."""
    if isinstance(prompts.layout, auto.Layout):
        say(prompts.layout.choice(prompts.tokenizer))
    return prompts
