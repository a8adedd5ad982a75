"""Example -> token ids and spans, for teacher and student alike. The one caller of a tokenizer.

A shot, or what a student learns, reads so (the rationale line only where reasoning is asked for):

    Review: The jokes fall flat.
    Reason: Jokes that fall flat are a failing.
    Sentiment: negative<end>

Every piece is tokenized by itself, so a target has the same token ids behind whatever prompt it stands.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, final

from transformers import PreTrainedTokenizerBase

from distill.app import config as configuration
from distill.app.config import Config
from distill.errors import ConfigError
from distill.prompts.tokenizers import load_tokenizer, vocabulary_fingerprint
from distill.records import Example, Prompt, Request, Span

TooLong = Literal["drop", "cut", "refuse"]


@dataclass(frozen=True)
class Layout:
    """A task's words around its pieces."""

    instruction: str
    question_cue: str
    rationale_cue: str
    answer_cue: str


@dataclass(frozen=True)
class Reply:
    """A generated text taken apart: reasoning and answer as they stand, unread and unchecked."""

    rationale: str
    answer: str


@final
class Prompts:
    """Renders examples for one model. With shots it is few-shot, without it zero-shot."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        layout: Layout,
        shots: Sequence[Example],
        *,
        max_length: int,
        too_long: TooLong,
    ) -> None:
        """`max_length` bounds prompt and targets together, the shots not counted."""
        self.tokenizer = tokenizer
        self.layout = layout
        self.shots = tuple(shots)
        self.max_length = max_length
        self.too_long = too_long
        assert tokenizer.eos_token_id is not None
        self.end: int = int(tokenizer.eos_token_id)
        self._cue = functools.cache(self.encode)  # for texts of the layout, which come again and again
        self._prefix = functools.cache(self._render_prefix)

    def zero_shot(self, tokenizer: PreTrainedTokenizerBase) -> Prompts:
        """The same words and limits for another model, which sees no shots."""
        return Prompts(tokenizer, self.layout, (), max_length=self.max_length, too_long=self.too_long)

    @functools.cached_property  # a tokenizer makes its vocabulary anew each time it is asked
    def vocabulary_size(self) -> int:
        """Ids below this are tokens; rows of an embedding above it are padding."""
        return max(self.tokenizer.get_vocab().values()) + 1

    def fingerprint(self) -> dict[str, Any]:
        """What of the prompts decides a teacher's targets."""
        return {
            "layout": asdict(self.layout),
            "shots": [asdict(shot) for shot in self.shots],
            "tokenizer": vocabulary_fingerprint(self.tokenizer),
            "max_length": self.max_length,
            "too_long": self.too_long,
        }

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a text that comes from data: no special token can arise from it."""
        encoded = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return tuple(int(i) for i in encoded)

    def prefix(self, span: Span) -> tuple[int, ...]:
        """What stands before every question: start token if the model has one, instruction, shots."""
        return self._prefix(span)

    def _render_prefix(self, span: Span) -> tuple[int, ...]:
        ids = self._start()
        if self.layout.instruction:
            ids += self.encode(self.layout.instruction + "\n\n")
        for shot in self.shots:
            if shot.answer is None or (span == "rationale" and shot.rationale is None):
                raise ConfigError(f"the shot {shot.question[:60]!r} lacks an answer or a rationale")
            ids += self.encode(f"{self.layout.question_cue} {shot.question}\n")
            if span == "rationale":
                ids += self.encode(self.layout.rationale_cue) + self.encode(f" {shot.rationale}")
                ids += self.encode("\n")
            ids += self.encode(self.layout.answer_cue) + self.answer_ids(shot.answer) + self.encode("\n")
        return ids

    def question(self, example: Example, span: Span, room: int = 0) -> tuple[int, ...]:
        """What stands between prefix and target; cut by choice so that `room` tokens still fit.

        Raises ConfigError where `too_long` is `refuse`, ValueError where it is `drop`.
        """
        cue = self.layout.answer_cue if span == "answer" else self.layout.rationale_cue
        head, tail = self._cue(self.layout.question_cue), self._cue("\n") + self._cue(cue)
        body = self.encode(f" {example.question}")
        surplus = len(head) + len(body) + len(tail) + room - self.max_length
        if surplus > 0:
            if self.too_long == "refuse":
                raise ConfigError(
                    f"{example.question[:60]!r}… is {surplus} tokens over max_length={self.max_length}; "
                    "raise max_length, or set too_long=drop or too_long=cut"
                )
            if self.too_long == "drop" or surplus >= len(body):
                raise ValueError(f"{surplus} tokens over max_length={self.max_length}")
            body = body[: len(body) - surplus]
        return head + body + tail

    def answer_ids(self, answer: str) -> tuple[int, ...]:
        """An answer as a target: its tokens, then the end of the sequence."""
        return (*self.encode(f" {answer}"), self.end)

    def rationale_ids(self, rationale: str) -> tuple[int, ...]:
        """A rationale as a target, without an end."""
        return self.encode(f" {rationale}")

    def answer_prompt(self, example: Example, answer: str) -> Prompt:
        """prompt | answer, end."""
        target = self.answer_ids(answer)
        before = self._start_of(example, "answer", len(target))
        return Prompt(before + target, {"answer": (len(before), len(before) + len(target))})

    def rationale_prompt(self, example: Example, rationale: str, answer: str | None) -> Prompt:
        """prompt | rationale, end; or, with an answer, prompt | rationale, cue | answer, end."""
        target = self.rationale_ids(rationale)
        if answer is None:
            before = self._start_of(example, "rationale", len(target) + 1)
            ids = (*before, *target, self.end)
            return Prompt(ids, {"rationale": (len(before), len(ids))})
        cue, last = self.bridge(), self.answer_ids(answer)
        before = self._start_of(example, "rationale", len(target) + len(cue) + len(last))
        start = len(before) + len(target) + len(cue)
        spans: dict[Span, tuple[int, int]] = {
            "rationale": (len(before), len(before) + len(target)),
            "answer": (start, start + len(last)),
        }
        return Prompt(before + target + cue + last, spans)

    def bridge(self) -> tuple[int, ...]:
        """What stands between a rationale and the answer after it."""
        return self._cue("\n") + self._cue(self.layout.answer_cue)

    def request(self, example: Example, span: Span, *, given: str | None = None, sample: int = 0) -> Request:
        """A request whose key is the hash of the token ids that the teacher will be asked to read.

        An example's gold answer is given to the teacher, and so is what is `given` in its place.
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

    def take_apart(self, token_ids: Sequence[int]) -> Reply:
        """Decode what was generated behind a rationale cue into its two pieces."""
        text = str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))
        rationale, cue, answer = text.partition(f"\n{self.layout.answer_cue}")
        return Reply(rationale.strip(), answer.strip() if cue else "")

    def text(self, token_ids: Sequence[int]) -> str:
        """Decode tokens, special ones left out."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True)).strip()

    def piece(self, token_id: int) -> str:
        """The text of one token, special ones by name."""
        return str(self.tokenizer.decode([token_id]))

    def _start_of(self, example: Example, span: Span, room: int) -> tuple[int, ...]:
        return self.prefix(span) + self.question(example, span, room)

    def _start(self) -> tuple[int, ...]:
        alone = self.tokenizer("", add_special_tokens=True).input_ids
        return tuple(int(i) for i in alone if i != self.tokenizer.eos_token_id)


def build_prompts(config: Config, model_dir: Path, shots: Iterable[Example] = ()) -> Prompts:
    """Prompts for the model in a folder, as `task.layout` and `prompt` configure them; uses the first `num_shots`."""
    return Prompts(
        load_tokenizer(model_dir),
        configuration.build(config.task.layout),
        list(shots)[: config.prompt.num_shots],
        max_length=config.prompt.max_length,
        too_long=config.prompt.too_long,
    )
