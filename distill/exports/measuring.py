"""What a file lost when it was made from the student: both answer the test questions of the run."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from distill.app.files import Json
from distill.lessons.join import AnswerMode, first_span
from distill.losses.forward_kl import ForwardKL
from distill.models.reading import PrefixedReader
from distill.prompts.rendering import Prompts
from distill.records import Example
from distill.reports.statistics import paired_interval
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


class _Trial(NamedTuple):
    """A question, the tokens of its prompt, and the answers that the student and the file wrote."""

    example: Example
    ids: tuple[int, ...]
    student_answer: str | None
    answer: str | None
    completion: Completion


def measure(engine: Engine, questions: Questions, student: Any) -> Json:
    """Return the file's accuracy beside the student's, agreement, KL(student || file), and milliseconds per answer.

    The answers are written greedily by both. KL is per written token, over the file's most probable tokens and one
    bucket for all others. Questions that are too long are left out.
    """
    trials = list(_trials(engine, questions))
    row: Json = {"num_examples": len(trials)}
    if not trials:
        return row
    if not questions.task.is_free_text:
        row |= _accuracies(questions.task, trials)
    row["agreement"] = statistics.fmean(trial.answer == trial.student_answer for trial in trials)
    row["kl"] = _mean_kl(questions.prompts, student, trials)
    row["ms_per_example"] = statistics.median(trial.completion.milliseconds for trial in trials)
    return row | _chats(engine, questions, trials[:_NUM_CHATS])


def _trials(engine: Engine, questions: Questions) -> Iterator[_Trial]:
    for example, student_answer in zip(questions.examples, questions.written, strict=True):
        if ids := questions.ids(example):
            completion = engine.complete(ids, questions.limit(example))
            yield _Trial(example, ids, student_answer, questions.read(completion.text, example), completion)


def _accuracies(task: Task, trials: Sequence[_Trial]) -> Json:
    ours = [is_right(task, trial.answer, trial.example) is True for trial in trials]
    theirs = [is_right(task, trial.student_answer, trial.example) is True for trial in trials]
    interval = paired_interval(*(np.array([side], np.float64) for side in (ours, theirs)))
    return {
        "accuracy": statistics.fmean(ours),
        "student_accuracy": statistics.fmean(theirs),
        "difference": [interval.low, interval.high],
    }


def _mean_kl(prompts: Prompts, student: Any, trials: Sequence[_Trial]) -> float | None:
    """Return the mean over written tokens of KL(student || file); None if nothing was written."""
    reader, values = PrefixedReader(student.eval(), (), prompts.vocabulary_size), list[float]()
    with torch.inference_mode():
        for _, ids, _, _, completion in trials:
            if completion.ids:
                hidden_TH = reader.hidden_before_targets([ids], [completion.ids])
                logprobs_TV = torch.cat([*reader.logprobs_in_chunks(hidden_TH)])
                values += map(_kl, logprobs_TV, completion.logprobs)
    return statistics.fmean(values) if values else None


def _kl(logprob_V: Tensor, kept: Mapping[int, float]) -> float:
    log_t, log_q = logprob_V[list(kept)], torch.tensor(list(kept.values()))
    rests = [(1 - part.double().exp().sum()).clamp(min=_MIN_REST).log().reshape(1) for part in (log_q, log_t)]
    value, _ = ForwardKL()(torch.cat([log_q.double(), rests[0]]), torch.cat([log_t.double(), rests[1]]))
    return float(value.sum())


def _chats(engine: Engine, questions: Questions, trials: Sequence[_Trial]) -> Json:
    """Ask questions as chat messages, as others will, and count the answers that are the same."""
    texts = [engine.answer(_messages(trial.example), questions.limit(trial.example)) for trial in trials]
    alike = sum(text.strip() == trial.completion.text.strip() for text, trial in zip(texts, trials, strict=True))
    return {"num_chats": len(trials), "num_chats_alike": alike}


def _messages(example: Example) -> list[dict[str, str]]:
    history = [{"role": message.role, "content": message.content} for message in example.history]
    return [*history, {"role": "user", "content": example.question}]
