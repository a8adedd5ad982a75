"""What to ask a teacher: the requests of a task's examples, and the groups that are annotated together."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distill.annotation.annotation_job import AnnotationJob
from distill.app.machine import paused_collector
from distill.records import SPANS, Example, Group, Request, Span, unique_requests


@dataclass(frozen=True)
class AnnotationRequests:
    """Requests by example id and span, all samples of rationales, and how many records were reused or annotated."""

    requests: Mapping[tuple[str, Span], Request]
    samples: Mapping[str, Sequence[Request]]
    too_long: Mapping[str, str]
    num_reused: int
    num_annotated: int
    seconds: float

    @property
    def all_requests(self) -> list[Request]:
        """All requests, without repeated keys."""
        samples = (request for requests in self.samples.values() for request in requests)
        return unique_requests([*self.requests.values(), *samples])


@paused_collector()
def collect_requests(
    job: AnnotationJob, examples: Mapping[Span, Sequence[Example]], *, use_given_rationales: bool = False
) -> AnnotationRequests:
    """Return the requests that `fill` would have annotated, without annotating any."""
    requests, too_long = _requests(job, examples, use_given_rationales)
    return AnnotationRequests(requests, _samples(job, requests), too_long, 0, 0, 0.0)


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


def without_labels(examples: Sequence[Example]) -> list[Example]:
    """Return the same questions without gold answers and rationales, for teachers that must not see them."""
    return [example.unlabelled() for example in examples]


def _num_tokens(request: Request) -> int:
    """Number of tokens that the teacher reads after the shared prefix."""
    return len(request.question_ids) + len(request.given_ids)


def _samples(job: AnnotationJob, requests: Mapping[tuple[str, Span], Request]) -> dict[str, list[Request]]:
    """Return all rationale requests of each train example; only these are sampled several times."""
    samples = {}
    for example in job.splits.train:
        first = requests.get((example.id, "rationale"))
        if first and not first.given_ids:
            numbers = range(1, job.rationales_each)
            samples[example.id] = [first, *(job.prompts.request(example, "rationale", sample=n) for n in numbers)]
    return samples


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
