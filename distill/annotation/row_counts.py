"""What became of the rows, the teacher's answers and its rationales: counts whose sums agree, as lines and a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from distill.annotation.annotation_job import AnnotationJob
from distill.annotation.reader import count_answers
from distill.annotation.requests import AnnotationRequests
from distill.app.console import say
from distill.errors import ConfigError
from distill.records import FilteredRationale, RowCounts


def rationale_counts(filled: AnnotationRequests, rationales: Sequence[FilteredRationale]) -> RowCounts:
    """Count the rationales that were requested to learn from, and those not kept by their reason."""
    num_requested = sum(map(len, filled.samples.values()))
    lost = Counter[str](rationale.reason for rationale in rationales if rationale.reason)
    num_kept = len(rationales) - lost.total()
    lost["not annotated"] = num_requested - len(rationales)
    return RowCounts(num_requested, {reason: number for reason, number in lost.most_common() if number}, num_kept)


def table(rows: Mapping[str, RowCounts]) -> str:
    """Format the counts as a table with the reasons of what was left out."""
    lines = [f"{'rows':12} {'read':>9} {'kept':>9}  left out"]
    for name, counts in rows.items():
        lost = ", ".join(f"{number:,} {reason}" for reason, number in counts.lost.items())
        lines.append(f"{name:12} {counts.read:>9,} {counts.kept:>9,}  {lost}".rstrip())
    return "\n".join(lines)


def say_answers(job: AnnotationJob, filled: AnnotationRequests) -> None:
    """Say how many of the teacher's answers can be learned; raise ConfigError if no question has a recorded answer."""
    counts = count_answers(job.reader(filled.requests), filled.all_requests)
    for line in counts.lines:
        say(line)
    if counts.num_answers and counts.defects.get("unmatched") == counts.num_answers:
        question = next(iter(filled.requests.values())).example.question
        raise ConfigError(
            f"no recorded answer belongs to any of the {counts.num_answers} questions, for example to "
            f"{question[:80]!r}. Set teacher.kind.question to the column or template that gives the same texts as "
            "task.question, and check that teacher.kind.files are recordings of this task"
        )
