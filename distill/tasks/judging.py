"""Comparing two answers as a task: the question shows both without their origin, and its answer is A, B or tie.

The answers come from the `predictions.jsonl` of run folders. Each pair is shown in both orders, for a judge may prefer
the place and not the answer.
"""

from __future__ import annotations

import json
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, final

from distill.errors import AnswerError, ConfigError
from distill.records import Example, Splits

CHOICES = ("A", "B", "tie")
GOLD, TEACHER, OTHERS = "gold", "teacher", "other questions"
_PREDICTIONS = "predictions.jsonl"
_FIELDS = {"question", "first", "second"}


@dataclass(frozen=True)
class Pair:
    """An answer and its rival, to one question; `orders` show the answer first, then second."""

    example_id: str
    answer: str
    rival: str
    orders: tuple[Example, Example]


@dataclass(frozen=True)
class Contest:
    """The answers of a run against those of a rival: `gold`, `teacher` or another run's folder.

    Against `other questions`, the reference texts of the run's questions compete with those of other questions, and
    ought to win.
    """

    run: Path
    against: str
    pairs: tuple[Pair, ...]


@final
class Judging:
    """The pairs of run folders as questions to a judge."""

    version = "1"
    choices: Sequence[str] = CHOICES
    is_free_text = False

    def __init__(self, *, runs: str | list[str], against: str | list[str], num_pairs: int | None, show: str) -> None:
        """`against` is gold, teacher, or the folder of a rival for each of `runs`.

        `num_pairs` limits the questions, in order of their id. `show` lays out a question, with {question}, {first} and
        {second} in braces.
        """
        fields = {name for _, name, _, _ in string.Formatter().parse(show) if name is not None}
        if fields != _FIELDS:
            raise ConfigError(f"task.examples.show={show!r:.60}: expected {{question}}, {{first}} and {{second}} in it")
        runs, rivals = ([names] if isinstance(names, str) else names for names in (runs, against))
        if len(rivals) not in (1, len(runs)):
            raise ConfigError(
                f"against has {len(rivals)} rivals for {len(runs)} runs: expected one, or one for each run"
            )
        self._rivals = list(zip(runs, rivals * len(runs) if len(rivals) == 1 else rivals, strict=True))
        self._num_pairs, self._show = num_pairs, show

    @cached_property
    def contests(self) -> tuple[Contest, ...]:
        """The contests of all runs, then the check of the judge on the texts of each run."""
        contests = [self._contest(Path(run), rival) for run, rival in self._rivals]
        return (*contests, *(self._check(Path(run)) for run, _ in self._rivals))

    def splits(self) -> Splits:
        """All pairs in both orders as test; those that check the judge as train, on which it may be calibrated."""
        examples = {contest.against == OTHERS: dict[str, Example]() for contest in self.contests}
        for contest in self.contests:
            questions = [example for pair in contest.pairs for example in pair.orders]
            examples[contest.against == OTHERS] |= {example.id: example for example in questions}
        return Splits(tuple(examples[True].values()), (), tuple(examples[False].values()))

    def shots(self) -> Sequence[Example]:
        """None."""
        return ()

    def read_answer(self, text: str, example: Example) -> str:
        """Read the choice that the text begins with."""
        choices = [choice for choice in CHOICES if text.strip().casefold().startswith(choice.casefold())]
        if not choices:
            raise AnswerError(f"{text[:60]!r} does not begin with any of {', '.join(CHOICES)}")
        return choices[0]

    def value(self, answer: str) -> str:
        """The answer itself."""
        return answer

    def is_same(self, answer: str, reference: str) -> bool:
        """Whether the answers are equal."""
        return answer == reference

    def _contest(self, run: Path, rival: str) -> Contest:
        lines = self._lines(run)
        if rival in (GOLD, TEACHER):
            texts = {id_: _text(line, rival) for id_, line in lines.items()}
        else:
            texts = {id_: _text(line, "student") for id_, line in _read(Path(rival)).items()}
        shared = [id_ for id_ in lines if id_ in texts and (texts[id_] or rival not in (GOLD, TEACHER))]
        if not shared:
            raise ConfigError(f"{run} and against={rival} have no question in common with an answer of both")
        pairs = (self._pair(lines[id_], _text(lines[id_], "student"), texts[id_]) for id_ in shared)
        return Contest(run, rival, tuple(pairs))

    def _check(self, run: Path) -> Contest:
        lines = [line for line in self._lines(run).values() if _reference(line)]
        pairs = []
        for line, other in zip(lines, [*lines[1:], *lines[:1]], strict=True):
            if _reference(line) != _reference(other):
                pairs.append(self._pair(line, _reference(line), _reference(other)))
        return Contest(run, OTHERS, tuple(pairs))

    def _lines(self, run: Path) -> dict[str, Mapping[str, Any]]:
        lines = _read(run)
        return {id_: lines[id_] for id_ in sorted(lines)[: self._num_pairs]}

    def _pair(self, line: Mapping[str, Any], answer: str, rival: str) -> Pair:
        turns = [f"{turn['role']}: {turn['content']}" for turn in line.get("history") or ()]
        question = "\n".join([*turns, f"user: {line['question']}"] if turns else [line["question"]])
        first, second = (
            Example(self._show.format(question=question, first=left or "(empty)", second=right or "(empty)"))
            for left, right in ((answer, rival), (rival, answer))
        )
        return Pair(line["id"], answer, rival, (first, second))


def _text(line: Mapping[str, Any], author: str) -> str:
    return str(line.get(author if author == GOLD else f"{author}_answer") or "").strip()


def _reference(line: Mapping[str, Any]) -> str:
    """The gold text; the teacher's where there is none."""
    return _text(line, GOLD) or _text(line, TEACHER)


def _read(run: Path) -> dict[str, Mapping[str, Any]]:
    """Predictions by example id; ConfigError if the folder has none, or they are damaged."""
    path = run / _PREDICTIONS
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
        return {str(line["id"]): {**line, "question": str(line["question"])} for line in lines}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} cannot be read ({type(error).__name__}: {error}); expected the folder of a complete run, as "
            "written by `python -m distill.train`, and against=gold, teacher or such a folder"
        ) from None
