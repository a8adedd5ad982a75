"""The facts that a run records: its settings, its cache, its examples, and what was left out."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict

from distill.app.config import Config
from distill.app.files import Json
from distill.lessons.curriculum import Curriculum, Job
from distill.models.naming import license_of
from distill.tasks import is_right

_MAX_LISTED = 200
_MAX_LABELS = 20


def settings(config: Config) -> Json:
    """Return the settings that, beside the losses, distinguish the arms of a comparison."""
    return {
        "steps": config.trainer.max_steps,
        "batch_size": config.batch_size,
        "task": config.task.name,
        "teacher": config.teacher.get("name") or config.teacher.model.partition("#")[0],
        "student": config.student.model.partition("#")[0],
    }


def cache_card(job: Job, curriculum: Curriculum) -> Json:
    """Return the cache that was used, and the cost of filling it."""
    store = job.annotation_job.store
    return {
        "dir": str(store.folder),
        "fingerprint": store.digest,
        "positions": job.annotation_job.positions.description,
        "num_records": len(store),
        "num_reused": curriculum.filled.num_reused,
        "num_annotated": curriculum.filled.num_annotated,
        "annotation_seconds": sum(cost["seconds"] for cost in store.costs),
    }


def counts(job: Job, curriculum: Curriculum) -> Json:
    """Return the number of examples, and of those left out for each reason."""
    splits = job.annotation_job.splits
    return {
        "train": len(splits.train),
        "labelled": sum(example.answer is not None for example in splits.train),
        "lessons": len(curriculum.train),
        "validation": len(splits.validation),
        "test": len(splits.test),
        "dropped": {name: lost for name, counts in splits.counts.items() if (lost := sum(counts.lost.values()))},
        "too_long": len(curriculum.too_long),
        "rationales_kept": sum(c.reason is None for c in curriculum.rationales),
        "rationales_rejected": dict(Counter(c.reason for c in curriculum.rationales if c.reason)),
    }


def label_counts(job: Job) -> dict[str, int]:
    """Return the number of training examples of each label; {} if there are many labels."""
    labels = Counter(example.answer for example in job.annotation_job.splits.train if example.answer is not None)
    return dict(sorted(labels.items())) if len(labels) <= _MAX_LABELS else {}


def licenses(job: Job) -> Json:
    """Return the licenses of the student's and the teacher's weights: as configured, or as their folders state."""
    folders = {"student": job.student_folder}
    if job.annotation_job.teacher.gives_soft_targets:
        folders["teacher"] = job.annotation_job.folder
    stated = {part: license_of(folder) for part, folder in folders.items()}
    return {part: job.config[part].get("license") or stated.get(part) for part in ("student", "teacher")}


def contamination(job: Job) -> Json:
    """Return the overlap of train with validation and test; the first overlapping pairs are listed."""
    overlaps, settings = job.annotation_job.overlaps, job.config.overlap
    num_train = len({overlap.train_id for overlap in overlaps})
    is_dropped = settings.action == "drop"
    listed = [asdict(overlap) for overlap in overlaps[:_MAX_LISTED]]
    return {"n": settings.words, "num_train": num_train, "num_dropped": num_train if is_dropped else 0, "found": listed}


def rejected(curriculum: Curriculum) -> list[Json]:
    """Return everything that was left out, with the reason."""
    rejected = [c for c in curriculum.rationales if c.reason]
    rows = [{"id": c.example_id, "reason": c.reason, "text": c.annotation.rationale} for c in rejected]
    return rows + [{"id": i, "reason": "too long", "text": why} for i, why in curriculum.too_long.items()]


def rationales(job: Job, curriculum: Curriculum) -> list[Json]:
    """Return every rationale of the teacher, kept or rejected, with its question and gold answer."""
    splits = job.annotation_job.splits
    examples = {example.id: example for example in (*splits.train, *splits.validation)}
    return [
        {
            "id": c.example_id,
            "question": examples[c.example_id].question,
            "gold": examples[c.example_id].answer,
            "gold_rationale": examples[c.example_id].rationale,
            "answer": c.annotation.answer,
            "is_correct": is_right(job.annotation_job.task, c.annotation.answer, examples[c.example_id]),
            "rationale": c.annotation.rationale,
            "is_sampled": c.annotation.is_sampled,
            "confidence": c.confidence,
            "compared_with": c.compared_with,
            "reason": c.reason,
        }
        for c in curriculum.rationales
    ]
