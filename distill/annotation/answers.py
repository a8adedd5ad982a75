"""Which of a teacher's answers to an example are taught, where it gave several in its own words.

Free texts are all taught. Answers that can be compared are votes: the most frequent one is taught, in the words of the
first sample that gave it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distill.annotation.annotation_job import AnnotationJob
from distill.annotation.requests import AnnotationRequests
from distill.records import Annotation, Request, RowCounts, Span
from distill.tasks import Task

Answer = tuple[Request, Annotation]


@dataclass(frozen=True)
class TaughtAnswers:
    """The requests by example id and span, of several answers that of the first one taught, and the further answers.

    `counts` are those of all answers of examples with several; `num_taught` has the number of each example.
    """

    requests: Mapping[tuple[str, Span], Request]
    further: Mapping[str, Sequence[Annotation]]
    num_taught: Mapping[str, int]
    counts: RowCounts


def choose_answers(job: AnnotationJob, filled: AnnotationRequests) -> TaughtAnswers:
    """Choose the answers to teach, and count the others by their reason."""
    reader, lost = job.reader(filled.requests), Counter[str]()
    requests, further, num_taught = dict(filled.requests), dict[str, list[Annotation]](), dict[str, int]()
    for id_, samples in filled.answers.items():
        answers = [(request, reader.words(request)) for request in samples if request.key in job.store]
        lost["not annotated"] += len(samples) - len(answers)
        lost.update(str(annotation.defect) for _, annotation in answers if annotation.defect)
        equal = _by_value([answer for answer in answers if not answer[1].defect], job.task)
        # Of values that are equally frequent, the one that came first is taught.
        chosen = equal if job.task.is_free_text else sorted(equal, key=len, reverse=True)[:1]
        lost["outvoted"] += sum(map(len, equal)) - sum(map(len, chosen))
        lost["repeated"] += sum(map(len, chosen)) - len(chosen)
        if chosen:
            requests[id_, "answer"] = chosen[0][0][0]
            further[id_], num_taught[id_] = [same[0][1] for same in chosen[1:]], len(chosen)
    num_read = sum(map(len, filled.answers.values()))
    reasons = {reason: number for reason, number in lost.most_common() if number}
    return TaughtAnswers(requests, further, num_taught, RowCounts(num_read, reasons, sum(num_taught.values())))


def _by_value(answers: Sequence[Answer], task: Task) -> list[list[Answer]]:
    """The answers, those that are the same together; free texts are the same word for word."""
    equal: dict[str, list[Answer]] = {}
    for request, annotation in answers:
        text = str(annotation.answer)
        equal.setdefault(text if task.is_free_text else task.value(text), []).append((request, annotation))
    return list(equal.values())
