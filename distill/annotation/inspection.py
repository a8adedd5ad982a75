"""Inspection of a cache: a record as text, all records as a table, and a sample compared with the live teacher."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distill.annotation.annotation_job import AnnotationJob
from distill.annotation.reader import AnnotationReader
from distill.annotation.requests import count_tokens
from distill.app.console import visible
from distill.app.files import atomic_write
from distill.cache import Codec
from distill.cache.shard import pack_annotation
from distill.cache.store import Store
from distill.prompts.preview import preview
from distill.prompts.rendering import Prompts
from distill.records import SPANS, Annotation, Prompt, Request, Span, Target
from distill.teachers import Teacher

Row = tuple[np.ndarray, np.ndarray]  # ids and log-probabilities
_TOP = 5  # tokens shown per position
_MAX_CHARACTERS = 10_000  # of a line
TOKEN_BYTES = 4 + 1 / 8  # a token's id, and whether it has soft targets


@dataclass(frozen=True)
class Estimate:
    """Time, disk space and tokens that annotation will need, extrapolated from a sample."""

    seconds: float
    num_bytes: int
    num_sampled: int
    num_read: int
    num_written: int


@dataclass(frozen=True)
class Rescored:
    """How much stored records differ from the live teacher, and the live teacher from itself.

    Both are the largest total variation over positions, on the ids that both sides contain. The live teacher differs
    from itself by rounding, since kernels depend on the batch.
    """

    distance: float
    noise_floor: float
    num_records: int

    @property
    def is_close(self) -> bool:
        """Whether the distance is explained by the noise and by the rounding of stored probabilities, below 0.02."""
        return self.distance <= 4 * self.noise_floor + 0.02


def estimate(job: AnnotationJob, missing: Sequence[Request]) -> Estimate:
    """Annotate a batch per span, with requests of all lengths. The teacher must be loaded; nothing is written."""
    teacher, seconds, num_bytes, num_written, num_sampled = job.teacher, 0.0, 0.0, 0.0, 0
    for span in SPANS:
        requests = sorted((r for r in missing if r.span == span), key=lambda r: len(r.question_ids))
        if requests:
            number = job.batch_limit.num_texts(max(map(teacher.num_tokens, requests)))
            sample = requests[:: max(1, len(requests) // number)][:number]
            teacher.annotate(sample[:1])
            start = time.perf_counter()
            annotations = job.positions.reduced(sample, teacher.annotate(sample))
            scale = len(requests) / len(sample)
            seconds += (time.perf_counter() - start) * scale
            num_bytes += sum(_stored_bytes(annotation, job.codec) for annotation in annotations) * scale
            num_written += count_tokens(job.prompts, sample, annotations)[1] * scale
            num_sampled += len(sample)
    num_read, _ = count_tokens(job.prompts, missing, ())
    return Estimate(seconds, round(num_bytes), num_sampled, num_read, round(num_written))


def rescore(store: Store, teacher: Teacher, requests: Sequence[Request], number: int, seed: int) -> Rescored:
    """Annotate a random sample of stored requests of one span again, as one batch and one by one.

    The teacher must be loaded. It gives soft targets at all positions; those that are stored are compared.
    """
    stored = [again for request in requests if request.key in store and (again := _again(request, store))]
    indices = np.random.default_rng(seed).permutation(len(stored))[:number]
    sample = [stored[index] for index in indices.tolist()]
    if not sample:
        return Rescored(0.0, 0.0, 0)
    batched = teacher.annotate(sample)
    single = [teacher.annotate([request])[0] for request in sample]
    cached = [store.read(request.key) for request in sample]
    return Rescored(
        max(_distance(a, b) for a, b in zip(cached, batched, strict=True)),
        max(_distance(a, b) for a, b in zip(single, batched, strict=True)),
        len(sample),
    )


def _again(request: Request, store: Store) -> Request | None:
    """The request to repeat; of a sampled answer one to score its words, since sampled again they may be others."""
    if not store.words(request.key).is_sampled:
        return request
    scored = store.scored(request.key).get(request.span) if request.span == "answer" else None
    return replace(request, given_ids=scored.token_ids) if scored else None


def format_record(request: Request, annotation: Annotation, prompts: Prompts) -> str:
    """Format a record as text: what was read and written, and the teacher's top tokens at each position."""
    lines = [f"record     {request.key} ({request.span})", f"question   {request.example.question}"]
    if annotation.answer or request.example.answer is None:
        lines += [
            f"answer     {annotation.answer or '(unreadable)'}{' … (truncated)' if annotation.is_truncated else ''}"
        ]
    if annotation.text is not None:
        lines += [f"text       {annotation.text}"]
    if request.example.answer is not None:
        lines += [f"gold       {request.example.answer}"]
    if annotation.rationale is not None:
        lines += [f"rationale  {annotation.rationale}{' … (truncated)' if annotation.is_truncated else ''}"]
    lines += ["", "prompt, as the teacher read it, with the tokens to learn in ⟦ ⟧"]
    lines += [preview(prompts, _whole_prompt(request, annotation, prompts))]
    for span, target in annotation.targets.items():
        lines += ["", f"{span}: each token, and the teacher's most probable tokens at its position"]
        lines += _token_lines(target, prompts)
    return "\n".join(visible(line, _MAX_CHARACTERS) for line in lines)


def _whole_prompt(request: Request, annotation: Annotation, prompts: Prompts) -> Prompt:
    """The prompt of a request with the targets of its annotation, in the order in which they were written."""
    ids, spans = prompts.prefix(request.span) + request.question_ids, dict[Span, tuple[int, int]]()
    for span in (name for name in ("rationale", "answer") if name in annotation.targets):
        ids += prompts.separator_ids() if spans else ()
        target = annotation.targets[span].token_ids
        spans[span] = (len(ids), len(ids) + len(target))
        ids += target
    return Prompt(ids, spans)


def export_parquet(reader: AnnotationReader, requests: Sequence[Request], prompts: Prompts, path: Path) -> int:
    """Write the records of `requests` as one nested Parquet table with a row per target; return the number of rows."""
    records = [(request, reader.read(request)) for request in requests if request.key in reader.store]
    rows = [
        _row(request, annotation, span, target, prompts)
        for request, annotation in records
        for span, target in annotation.targets.items()
    ]
    with atomic_write(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows), temporary)
    return len(rows)


def _row(request: Request, annotation: Annotation, span: Span, target: Target, prompts: Prompts) -> dict[str, object]:
    soft = target.soft
    return {
        "key": request.key,
        "example": request.example.id,
        "asked_for": request.span,
        "question": request.example.question,
        "answer": annotation.answer,
        "text": annotation.text,
        "rationale": annotation.rationale,
        "is_truncated": annotation.is_truncated,
        "span": span,
        "token_ids": list(target.token_ids),
        "tokens": [prompts.token_text(token_id) for token_id in target.token_ids],
        "positions": list(_offsets(target)),
        "ids": [ids.tolist() for ids, _ in soft.rows()] if soft else [],
        "logprobs": [logprobs.astype(float).tolist() for _, logprobs in soft.rows()] if soft else [],
        "tail": soft.tail_N.astype(float).tolist() if soft else [],
    }


def _token_lines(target: Target, prompts: Prompts) -> list[str]:
    lines = [f"  {prompts.token_text(token_id)!r}" for token_id in target.token_ids]
    if target.soft is None:
        return lines
    for offset, (ids, logprobs), tail in zip(_offsets(target), target.soft.rows(), target.soft.tail_N, strict=True):
        top = np.argsort(-logprobs, kind="stable")[:_TOP]
        probabilities = [f"{prompts.token_text(int(ids[k]))!r} {np.exp(logprobs[k]):.3f}" for k in top]
        lines[offset] = f"{lines[offset]:18} {'  '.join(probabilities)}  rest {tail:.3f}"
    return lines


def _offsets(target: Target) -> Sequence[int]:
    """The offsets of the tokens that have soft targets."""
    if target.soft is None:
        return ()
    return range(len(target.token_ids)) if target.chosen is None else target.chosen


def _stored_bytes(annotation: Annotation, codec: Codec) -> int:
    arrays = pack_annotation(annotation, codec)
    num_tokens = sum(len(target.token_ids) for target in annotation.targets.values())
    text = (annotation.rationale or "") + (annotation.answer or "") + (annotation.text or "")
    num_bytes = sum(array.nbytes for array in arrays.values()) + len(text.encode()) + len(annotation.key)
    return num_bytes + round(TOKEN_BYTES * num_tokens)


def _distance(left: Annotation, right: Annotation) -> float:
    """Return the largest total variation over the positions of `left`; 1 if the target tokens differ."""
    largest = 0.0
    for span in {*left.targets, *right.targets}:
        a, b = left.targets.get(span), right.targets.get(span)
        if a is None or b is None or a.token_ids != b.token_ids:
            return 1.0
        if a.soft is not None and b.soft is not None:
            soft = b.soft if a.chosen is None else b.soft[np.array(a.chosen)]
            pairs = zip(a.soft.buckets().rows(), soft.buckets().rows(), strict=True)  # samples may differ by rounding
            largest = max(largest, *(_total_variation(*pair) for pair in pairs))
    return largest


def _total_variation(left: Row, right: Row) -> float:
    p, q = (dict(zip(ids.tolist(), np.exp(logprobs).tolist(), strict=True)) for ids, logprobs in (left, right))
    return 0.5 * math.fsum(abs(p[token_id] - q[token_id]) for token_id in {*p} & {*q})
