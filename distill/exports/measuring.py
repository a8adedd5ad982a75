"""What a file lost when it was made from the student: both answer the test questions of the run."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from distill.app.files import Json
from distill.lessons.join import AnswerMode, first_span
from distill.losses.forward_kl import ForwardKL
from distill.models.reading import PrefixedReader
from distill.prompts.rendering import Prompts
from distill.records import Example
from distill.reports.statistics import Interval, paired_interval
from distill.tasks import Task, choices_of, is_right, readable_answer

_NUM_CHATS = 20  # questions that are also asked as chat messages
_MIN_REST = 1e-9


@dataclass(frozen=True)
class Completion:
    """A text that an engine wrote: its tokens, and the log-probabilities of the most probable ones at each place."""

    text: str
    ids: tuple[int, ...]
    logprobs: tuple[Mapping[int, float], ...]
    milliseconds: float


@runtime_checkable
class Engine(Protocol):
    """A program that runs a file."""

    def complete(self, ids: Sequence[int], max_new_tokens: int) -> Completion:
        """Continue these tokens greedily, until the file's own end."""
        ...

    def answer(self, messages: Sequence[Mapping[str, str]], max_new_tokens: int) -> str:
        """Answer chat messages greedily, by the file's own chat template."""
        ...


@dataclass(frozen=True)
class Questions:
    """The test questions of a run, what its student wrote to them, and how to ask and read."""

    prompts: Prompts
    task: Task
    mode: AnswerMode
    max_new_tokens: int
    examples: tuple[Example, ...]
    written: tuple[str | None, ...]

    def first(self, number: int) -> Questions:
        """Only the first so many."""
        parts = self.examples[:number], self.written[:number]
        return Questions(self.prompts, self.task, self.mode, self.max_new_tokens, *parts)

    @property
    def context(self) -> int:
        """The number of tokens of the longest prompt and answer together."""
        span = first_span(self.mode)
        return len(self.prompts.prefix(span)) + self.prompts.max_length + self.max_new_tokens

    def limit(self, example: Example) -> int:
        """The most tokens of an answer, as in the evaluation of the student."""
        choices = self.prompts.choice_ids(choices_of(self.task, example)) if self.mode == "direct" else ()
        return max(map(len, choices), default=self.max_new_tokens)

    def ids(self, example: Example) -> tuple[int, ...]:
        """The tokens of a prompt; empty if the question is too long."""
        span = first_span(self.mode)
        try:
            return self.prompts.prefix(span) + self.prompts.question(example, span)
        except ValueError:
            return ()

    def read(self, text: str, example: Example) -> str | None:
        """The answer in a text; None if there is none."""
        answer = self.prompts.reply(text).answer if self.mode == "reasoned" else text.strip()
        return readable_answer(self.task, answer, example)


def measure(engine: Engine, questions: Questions, student: Any) -> Json:
    """Return the file's accuracy beside the student's, agreement, KL(student || file), and milliseconds per answer.

    The answers are written greedily by both. KL is per written token, over the file's most probable tokens and one
    bucket for all others. Questions that are too long are left out.
    """
    asked = [(e, theirs, ids) for e, theirs in _pairs(questions) if (ids := questions.ids(e))]
    completions = [engine.complete(ids, questions.limit(example)) for example, _, ids in asked]
    answers = [questions.read(done.text, example) for done, (example, _, _) in zip(completions, asked, strict=True)]
    row: Json = {"num_examples": len(asked)}
    if not questions.task.is_free_text:
        row |= _accuracies(
            [is_right(questions.task, answer, e) is True for answer, (e, _, _) in zip(answers, asked, strict=True)],
            [is_right(questions.task, theirs, e) is True for e, theirs, _ in asked],
        )
    same = [answer == theirs for answer, (_, theirs, _) in zip(answers, asked, strict=True)]
    return row | {
        "agreement": statistics.fmean(same) if same else None,
        "kl": _mean_kl(questions.prompts, student, [ids for *_, ids in asked], completions),
        "ms_per_example": statistics.median(done.milliseconds for done in completions) if completions else None,
        **_chats(engine, questions, [(e, done.text) for done, (e, _, _) in zip(completions, asked, strict=True)]),
    }


def _pairs(questions: Questions) -> list[tuple[Example, str | None]]:
    return list(zip(questions.examples, questions.written, strict=True))


def _accuracies(ours: Sequence[bool], theirs: Sequence[bool]) -> Json:
    if not ours:
        return {"accuracy": None, "student_accuracy": None, "difference": None}
    left, right = (np.array([side], np.float64) for side in (ours, theirs))
    interval: Interval = paired_interval(left, right)
    return {
        "accuracy": float(left.mean()),
        "student_accuracy": float(right.mean()),
        "difference": [interval.low, interval.high],
    }


def _mean_kl(
    prompts: Prompts, student: Any, asked: Sequence[tuple[int, ...]], completions: Sequence[Completion]
) -> float | None:
    """Return the mean over written tokens of KL(student || file)."""
    written = [(ids, done) for ids, done in zip(asked, completions, strict=True) if done.ids]
    if not written:
        return None
    reader = PrefixedReader(student.eval(), (), prompts.vocabulary_size)
    total = num_tokens = 0.0
    with torch.inference_mode():
        for ids, done in written:
            hidden_TH = reader.hidden_before_targets([ids], [done.ids])
            logprobs_TV = torch.cat([*reader.logprobs_in_chunks(hidden_TH)])
            total += sum(_kl(logprob_V, kept) for logprob_V, kept in zip(logprobs_TV, done.logprobs, strict=True))
            num_tokens += len(done.ids)
    return total / num_tokens


def _kl(logprob_V: Tensor, kept: Mapping[int, float]) -> float:
    log_t, log_q = logprob_V[list(kept)], torch.tensor(list(kept.values()))
    rests = [(1 - part.double().exp().sum()).clamp(min=_MIN_REST).log().reshape(1) for part in (log_q, log_t)]
    value, _ = ForwardKL()(torch.cat([log_q.double(), rests[0]]), torch.cat([log_t.double(), rests[1]]))
    return float(value.sum())


def _chats(engine: Engine, questions: Questions, answered: Sequence[tuple[Example, str]]) -> Json:
    """Ask some questions as chat messages, as others will, and count the answers that are the same."""
    chosen = answered[:_NUM_CHATS]
    texts = [engine.answer(_messages(example), questions.limit(example)) for example, _ in chosen]
    alike = sum(text.strip() == expected.strip() for text, (_, expected) in zip(texts, chosen, strict=True))
    return {"num_chats": len(chosen), "num_chats_alike": alike}


def _messages(example: Example) -> list[dict[str, str]]:
    history = [{"role": message.role, "content": message.content} for message in example.history]
    return [*history, {"role": "user", "content": example.question}]
