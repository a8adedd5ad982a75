"""Looking into a cache: one record as a person wants to see it, all records as a table, a sample asked again."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distill.app.console import visible
from distill.app.files import whole_file
from distill.cache import Codec
from distill.cache.shard import packed
from distill.cache.store import Store
from distill.prompts.cues import Prompts
from distill.records import SPANS, Annotation, Request, Span, Target
from distill.teachers import Teacher

Row = tuple[np.ndarray, np.ndarray]  # ids and log-probabilities
_TOP = 5
_MOST_CHARACTERS = 10_000  # of one text


@dataclass(frozen=True)
class Estimate:
    """What annotating would take, by a small sample of it."""

    seconds: float
    num_bytes: int
    num_sampled: int


@dataclass(frozen=True)
class Rescored:
    """How far stored records are from the live teacher, and how far the live teacher is from itself.

    Both are the largest total variation, over positions, of probabilities on the ids that both sides name. The live
    teacher differs from itself by rounding, since kernels depend on what else is in a batch.
    """

    from_live: float
    noise_floor: float
    num_records: int

    @property
    def is_close(self) -> bool:
        """Stored numbers are rounded too, by less than 0.02 in probability."""
        return self.from_live <= 4 * self.noise_floor + 0.02


def estimate(teacher: Teacher, codec: Codec, missing: Sequence[Request], batch_size: int) -> Estimate:
    """Annotate a batch per span, of requests spread over all lengths; `teacher` is loaded. Nothing is stored."""
    seconds, num_bytes, num_sampled = 0.0, 0.0, 0
    for span in SPANS:
        asked = sorted((r for r in missing if r.span == span), key=lambda r: len(r.question_ids))
        sample = asked[:: max(1, len(asked) // batch_size)][:batch_size]
        if sample:
            teacher.annotate(sample[:1])
            start = time.perf_counter()
            made = teacher.annotate(sample)
            scale = len(asked) / len(sample)
            seconds += (time.perf_counter() - start) * scale
            num_bytes += sum(_stored_bytes(annotation, codec) for annotation in made) * scale
            num_sampled += len(sample)
    return Estimate(seconds, round(num_bytes), num_sampled)


def rescore(store: Store, teacher: Teacher, requests: Sequence[Request], number: int, seed: int) -> Rescored:
    """Ask the loaded teacher again about a random sample of stored records of one span, together and one by one."""
    stored = [request for request in requests if request.key in store]
    places = np.random.default_rng(seed).permutation(len(stored))[:number]
    sample = [stored[place] for place in places.tolist()]
    if not sample:
        return Rescored(0.0, 0.0, 0)
    together = teacher.annotate(sample)
    alone = [teacher.annotate([request])[0] for request in sample]
    kept = [store.read(request.key) for request in sample]
    return Rescored(
        max(_distance(a, b) for a, b in zip(kept, together, strict=True)),
        max(_distance(a, b) for a, b in zip(alone, together, strict=True)),
        len(sample),
    )


def show(request: Request, annotation: Annotation, prompts: Prompts) -> str:
    """A record as text: the question, what the teacher said, and what it expected at each token."""
    lines = [f"record     {request.key} ({request.span})", f"question   {request.example.question}"]
    if annotation.answer or request.example.answer is None:
        lines += [f"answer     {annotation.answer or 'none could be read'}"]
    if request.example.answer is not None:
        lines += [f"gold       {request.example.answer}"]
    if annotation.rationale is not None:
        lines += [f"rationale  {annotation.rationale}{' … (cut off)' if annotation.is_truncated else ''}"]
    for span, target in annotation.targets.items():
        lines += ["", f"{span}: the tokens, and what the teacher expected in the place of each"]
        lines += _expected(target, prompts)
    return "\n".join(visible(line, _MOST_CHARACTERS) for line in lines)


def export_table(store: Store, requests: Sequence[Request], prompts: Prompts, path: Path) -> int:
    """Write all records among `requests` as one nested Parquet table; return the number of its rows."""
    there = [(request, store.read(request.key)) for request in requests if request.key in store]
    rows = [
        _row(request, annotation, span, target, prompts)
        for request, annotation in there
        for span, target in annotation.targets.items()
    ]
    with whole_file(path) as temporary:
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
        "rationale": annotation.rationale,
        "is_truncated": annotation.is_truncated,
        "span": span,
        "token_ids": list(target.token_ids),
        "tokens": [prompts.piece(token_id) for token_id in target.token_ids],
        "ids": [ids.tolist() for ids, _ in soft.rows()] if soft else [],
        "logprobs": [logprobs.astype(float).tolist() for _, logprobs in soft.rows()] if soft else [],
        "tail": soft.tail_N.astype(float).tolist() if soft else [],
    }


def _expected(target: Target, prompts: Prompts) -> list[str]:
    if target.soft is None:
        return [f"  {prompts.piece(token_id)!r}" for token_id in target.token_ids]
    lines = []
    for token_id, (ids, logprobs), tail in zip(target.token_ids, target.soft.rows(), target.soft.tail_N, strict=True):
        best = np.argsort(-logprobs, kind="stable")[:_TOP]
        told = [f"{prompts.piece(int(ids[k]))!r} {np.exp(logprobs[k]):.3f}" for k in best]
        lines.append(f"  {prompts.piece(token_id)!r:16} {'  '.join(told)}  rest {tail:.3f}")
    return lines


def _stored_bytes(annotation: Annotation, codec: Codec) -> int:
    arrays = packed(annotation, codec)
    num_tokens = sum(len(target.token_ids) for target in annotation.targets.values())
    text = (annotation.rationale or "") + (annotation.answer or "")
    return sum(array.nbytes for array in arrays.values()) + 4 * num_tokens + len(text.encode()) + len(annotation.key)


def _distance(left: Annotation, right: Annotation) -> float:
    """Largest total variation over positions; 1 where the two do not even have the same tokens."""
    worst = 0.0
    for span in {*left.targets, *right.targets}:
        mine, theirs = left.targets.get(span), right.targets.get(span)
        if mine is None or theirs is None or mine.token_ids != theirs.token_ids:
            return 1.0
        if mine.soft is not None and theirs.soft is not None:
            both = mine.soft.buckets().rows(), theirs.soft.buckets().rows()  # draws differ where rounding does
            worst = max(worst, *(_variation(*rows) for rows in zip(*both, strict=True)))
    return worst


def _variation(left: Row, right: Row) -> float:
    mine, theirs = (dict(zip(ids.tolist(), np.exp(logprobs).tolist(), strict=True)) for ids, logprobs in (left, right))
    return 0.5 * math.fsum(abs(mine[token_id] - theirs[token_id]) for token_id in {*mine} & {*theirs})
