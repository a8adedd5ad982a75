"""What to ask a teacher: the requests of a task's examples, and the groups that are annotated together."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from distill.annotation.annotation_job import AnnotationJob
from distill.app.machine import paused_collector
from distill.prompts.rendering import Prompts
from distill.records import SPANS, Annotation, Example, Group, Request, Span, Splits, unique_requests
from distill.tasks import choices_of


@dataclass(frozen=True)
class AnnotationRequests:
    """Requests by example id and span, and how many records were reused or annotated.

    By example id, `samples` are all requests for rationales, and `answers` those for answers where there are several.
    """

    requests: Mapping[tuple[str, Span], Request]
    samples: Mapping[str, Sequence[Request]]
    answers: Mapping[str, Sequence[Request]]
    too_long: Mapping[str, str]
    num_reused: int
    num_annotated: int
    seconds: float

    @property
    def all_requests(self) -> list[Request]:
        """All requests, without repeated keys."""
        samples = itertools.chain.from_iterable([*self.samples.values(), *self.answers.values()])
        return unique_requests([*self.requests.values(), *samples])


@paused_collector()
def collect_requests(
    job: AnnotationJob, examples: Mapping[Span, Sequence[Example]], *, use_given_rationales: bool = False
) -> AnnotationRequests:
    """Return the requests that `fill` would have annotated, without annotating any."""
    requests, too_long = _requests(job, examples, use_given_rationales)
    return AnnotationRequests(requests, _samples(job, requests), _answers(job, requests), too_long, 0, 0, 0.0)


def examples_to_reason(splits: Splits, number: int, *, is_answer_reasoned: bool) -> list[Example]:
    """Return the examples whose rationales the teacher writes: the first of train, at most `number`.

    Where students answer after reasoning, as many of validation too: an answer is then measured behind a rationale.
    """
    return [*splits.train[:number], *(splits.validation[:number] if is_answer_reasoned else ())]


def group_requests(requests: Sequence[Request], size: int) -> list[Group]:
    """Split requests into groups of similar lengths, so that batches have little padding."""
    groups = []
    for span in SPANS:
        of_span = unique_requests(request for request in requests if request.span == span)
        ordered = sorted(of_span, key=lambda request: (_num_tokens(request), request.key))
        for start in range(0, len(ordered), size):
            members = tuple(ordered[start : start + size])
            keys = "".join(request.key for request in members)
            groups.append(Group(hashlib.blake2b(keys.encode(), digest_size=8).hexdigest(), members))
    return groups


def count_tokens(prompts: Prompts, requests: Iterable[Request], annotations: Iterable[Annotation]) -> tuple[int, int]:
    """Numbers of tokens that a teacher reads after the shared prefix, and of those in the texts that it wrote."""
    texts = [text for annotation in annotations for text in (annotation.rationale, annotation.text) if text]
    return sum(map(_num_tokens, requests)), sum(len(prompts.encode(text)) for text in texts)


def without_labels(examples: Sequence[Example]) -> list[Example]:
    """Return the same questions without gold answers and rationales, for teachers that must not see them."""
    return [example.unlabelled() for example in examples]


def _num_tokens(request: Request) -> int:
    """Number of tokens that the teacher reads after the shared prefix."""
    return len(request.question_ids) + len(request.given_ids)


def _samples(job: AnnotationJob, requests: Mapping[tuple[str, Span], Request]) -> dict[str, list[Request]]:
    """Return all rationale requests of each example of train and validation; only these are sampled several times."""
    samples = {}
    for example in (*job.splits.train, *job.splits.validation):
        first = requests.get((example.id, "rationale"))
        if first and not first.given_ids:
            numbers = range(1, job.rationales_each)
            samples[example.id] = [first, *(job.prompts.request(example, "rationale", sample=n) for n in numbers)]
    return samples


def _answers(job: AnnotationJob, requests: Mapping[tuple[str, Span], Request]) -> dict[str, list[Request]]:
    """Return all answer requests of each train example whose answer the teacher writes in its own words."""
    answers = {}
    for example in job.splits.train if job.answers_each > 1 else ():
        first = requests.get((example.id, "answer"))
        if first and not first.given_ids and not choices_of(job.task, example):
            numbers = range(1, job.answers_each)
            answers[example.id] = [first, *(job.prompts.request(first.example, "answer", sample=n) for n in numbers)]
    return answers


def _requests(
    job: AnnotationJob, examples: Mapping[Span, Sequence[Example]], use_given_rationales: bool
) -> tuple[dict[tuple[str, Span], Request], dict[str, str]]:
    """Return the requests, and an error message per example that is too long."""
    requests: dict[tuple[str, Span], Request] = {}
    too_long: dict[str, str] = {}
    learned = {example.id for example in job.splits.train}
    for span, examples_of_span in examples.items():
        for example in examples_of_span:
            try:
                rationale = example.rationale if use_given_rationales and span == "rationale" else None
                request = job.prompts.request(example, span, given=rationale)
                requests[example.id, span] = job.positions.keyed(request, is_held_out=example.id not in learned)
            except ValueError as error:
                too_long[example.id] = str(error)
    return requests, too_long
