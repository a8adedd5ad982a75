"""Reading a teacher's annotations from the cache, with answers as the task reads them now.

A record keeps the teacher's text beside the answer that was read from it. A task whose rules for reading have changed
since therefore needs no new annotation. Soft targets belong to the words that the teacher scored: where the answer now
has other tokens, they are left out, and the example teaches its words alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from distill.cache.store import Store
from distill.prompts.rendering import Prompts
from distill.records import Annotation, AnswerDefect, Example, Request, ScoredTokens, SoftTargetsKey, Span
from distill.tasks import Task, with_reading

_CHUNK = 1024  # records whose soft targets are decoded together


@dataclass(frozen=True)
class AnnotationReader:
    """Reads a teacher's annotations by example id and span."""

    store: Store
    requests: Mapping[tuple[str, Span], Request]
    task: Task
    prompts: Prompts

    def find(self, example_id: str, span: Span) -> Annotation | None:
        """Return the annotation, or None if none was requested."""
        request = self.requests.get((example_id, span))
        return self.read(request) if request else None

    def find_words(self, example_id: str, span: Span) -> Annotation | None:
        """Return the annotation without its targets, or None if none was requested."""
        request = self.requests.get((example_id, span))
        return self.words(request) if request else None

    def words(self, request: Request) -> Annotation:
        """Return the record of a request without its targets."""
        return with_reading(self.store.words(request.key), self.task, request.example)

    def read(self, request: Request) -> Annotation:
        """Return the record of a request with the targets that belong to its answer."""
        stored = self.store.read(request.key)
        present, target = with_reading(stored, self.task, request.example), stored.targets.get("answer")
        if target and not self._has_tokens(present, stored, target.token_ids):
            return replace(present, targets={span: t for span, t in stored.targets.items() if span != "answer"})
        return present

    def scored(self, key: str, example: Example) -> dict[Span, ScoredTokens]:
        """Return the tokens of an example's record that have soft targets, as in `read`; nothing is decoded."""
        scored, stored = self.store.scored(key), self.store.words(key)
        present, answer = with_reading(stored, self.task, example), scored.get("answer")
        if answer and not self._has_tokens(present, stored, answer.token_ids):
            return {span: tokens for span, tokens in scored.items() if span != "answer"}
        return scored

    def _has_tokens(self, present: Annotation, stored: Annotation, token_ids: tuple[int, ...]) -> bool:
        """Whether the answer, as it is read at present, still has the tokens that were stored with it."""
        if present.answer == stored.answer:
            return True
        return present.answer is not None and self.prompts.answer_ids(present.answer) == token_ids

    def largest_soft_id(self, places: Sequence[SoftTargetsKey]) -> int:
        """Return the largest id that soft targets have an entry for; raises CacheError if some cannot be decoded."""
        chunks = (places[start : start + _CHUNK] for start in range(0, len(places), _CHUNK))
        return max((int(self.store.soft_targets(chunk).ids_E.max(initial=-1)) for chunk in chunks), default=-1)


@dataclass(frozen=True)
class AnswerCounts:
    """What became of the answers that a teacher gave in its own words or chose.

    `num_changed` answers are read differently from when they were annotated; `num_words_only` of these are learned
    without soft targets.
    """

    num_answers: int
    defects: Mapping[AnswerDefect, int]
    num_changed: int
    num_words_only: int

    @property
    def lines(self) -> list[str]:
        """The counts as lines for the terminal."""
        defects = ", ".join(f"{self.defects.get(name, 0)} {name}" for name in ("empty", "truncated", "unreadable"))
        lines = [f"{self.num_answers} answers of the teacher: {defects}"]
        if self.defects.get("unmatched"):
            num_matched = self.num_answers - self.defects["unmatched"]
            lines += [f"{num_matched} of {self.num_answers} questions have a recorded answer"]
        if self.num_changed:
            lines += [
                f"{self.num_changed} answers are read differently from when they were annotated, since task.read has "
                f"changed; nothing is annotated again. {self.num_words_only} of them are learned without soft targets"
            ]
        return lines


def count_answers(reader: AnnotationReader, requests: Iterable[Request]) -> AnswerCounts:
    """Count the answers to requests for a direct answer of the teacher's own, and the changed ones of all requests."""
    defects, num_answers = Counter[AnswerDefect](), 0
    changed: list[Request] = []
    for request in requests:
        if request.key not in reader.store:
            continue
        stored = reader.store.words(request.key)
        present = with_reading(stored, reader.task, request.example)
        if present.answer != stored.answer:
            changed.append(request)
        if request.span == "answer" and not request.given_ids:
            num_answers += 1
            defects.update([present.defect] if present.defect else [])
    num_words_only = sum(_has_words_only(reader.read(request)) for request in changed)
    return AnswerCounts(num_answers, defects, len(changed), num_words_only)


def _has_words_only(annotation: Annotation) -> bool:
    return annotation.whole_answer is not None and "answer" not in annotation.targets
