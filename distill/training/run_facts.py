"""What a run writes down of what it was given: its settings, its cache, its examples, and what was left out."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

from distill.app.config import Config
from distill.lessons.curriculum import Curriculum, Job

Json = dict[str, Any]
_MOST_OVERLAPS = 200


def settings(config: Config) -> Json:
    """What the arms of a comparison are told apart by, beside their losses."""
    return {
        "steps": config.trainer.max_steps,
        "batch_size": config.batch_size,
        "task": config.task.name,
        "teacher": config.teacher.get("name") or config.teacher.model.partition("#")[0],
        "student": config.student.model.partition("#")[0],
    }


def cache_card(job: Job, curriculum: Curriculum) -> Json:
    """Which cache was learned from, and what it cost to fill."""
    store = job.source.store
    return {
        "dir": str(store.folder),
        "fingerprint": store.digest,
        "num_records": len(store),
        "num_reused": curriculum.filled.num_reused,
        "num_annotated": curriculum.filled.num_annotated,
        "annotation_seconds": sum(cost["seconds"] for cost in store.costs),
    }


def counts(job: Job, curriculum: Curriculum) -> Json:
    """How many examples there are, and how many were left out for which reason."""
    splits = job.source.splits
    return {
        "train": len(splits.train),
        "labelled": sum(example.answer is not None for example in splits.train),
        "lessons": len(curriculum.train),
        "validation": len(splits.validation),
        "test": len(splits.test),
        "dropped": dict(splits.dropped),
        "too_long": len(curriculum.too_long),
        "rationales_kept": sum(c.reason is None for c in curriculum.rationales),
        "rationales_rejected": dict(Counter(c.reason for c in curriculum.rationales if c.reason)),
    }


def contamination(job: Job) -> Json:
    """Train questions that share words with one of validation or test; the first of them by name."""
    found, overlap = job.source.overlaps, job.config.overlap
    num_train = len({each.train_id for each in found})
    is_dropped = overlap.action == "drop"
    told = [asdict(each) for each in found[:_MOST_OVERLAPS]]
    return {"n": overlap.words, "num_train": num_train, "num_dropped": num_train if is_dropped else 0, "found": told}


def rejected(curriculum: Curriculum) -> list[Json]:
    """What was left out, each with the reason."""
    bad = [c for c in curriculum.rationales if c.reason]
    rows = [{"id": c.example_id, "reason": c.reason, "text": c.annotation.rationale} for c in bad]
    return rows + [{"id": i, "reason": "too long", "text": why} for i, why in curriculum.too_long.items()]


def rationales(job: Job, curriculum: Curriculum) -> list[Json]:
    """Every rationale of the teacher's, kept or not, beside the question and what is known of it."""
    examples = {example.id: example for example in job.source.splits.train}
    return [
        {
            "id": c.example_id,
            "question": examples[c.example_id].question,
            "gold": examples[c.example_id].answer,
            "gold_rationale": examples[c.example_id].rationale,
            "answer": c.annotation.answer,
            "rationale": c.annotation.rationale,
            "is_sampled": c.annotation.is_sampled,
            "confidence": c.confidence,
            "compared_with": c.compared_with,
            "reason": c.reason,
        }
        for c in curriculum.rationales
    ]
