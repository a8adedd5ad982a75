"""The student's row before training: evaluated once, then shared by all runs that begin with the same student."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch

from distill.app import config as configuration
from distill.app.console import say
from distill.app.files import Json, write_json
from distill.evaluation.answers import model_row
from distill.evaluation.kinds import AnyEvaluation
from distill.lessons.curriculum import Job
from distill.models import placement
from distill.records import Annotation


def untrained_row(job: Job, evaluation: AnyEvaluation, teacher: Mapping[str, Annotation], weights: str) -> Json:
    """The row of the student as it is now; `weights` is the hash of its weights.

    The row is kept below the root under the hash of all that decides it, so the arms and the seeds of a sweep, and a
    run that is resumed, evaluate the same student once.
    """
    test, key = job.annotation_job.splits.test, _key(job, evaluation.model, teacher, weights)
    path = configuration.local_root(job.config.root) / "untrained" / f"{key}.json"
    if path.is_file():
        say("the student before training was evaluated by an earlier run")
    else:
        say(f"evaluating the student before training on {len(test)} test examples ...")
        row = model_row(evaluation.predict(test, teacher), evaluation.model)
        write_json(path, row)
    known: Json = json.loads(path.read_text())
    return known


def _key(job: Job, student: Any, teacher: Mapping[str, Annotation], weights: str) -> str:
    """Hash of all that decides the row: the student, the prompts, the test examples and the teacher's answers."""
    config = configuration.plain(job.config)
    settings = {
        "weights": weights,
        "config": student.config.to_json_string(use_diff=False),
        "torch": torch.__version__,
        "device": str(placement.device()),
        "prompts": job.prompts.fingerprint(),
        "task": config["task"],
        "version": job.annotation_job.task.version,
        "max_new_tokens": config["max_new_tokens"],
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for example in job.annotation_job.splits.test:
        digest.update(repr((example.id, example.question, *example.right_answers)).encode())
        if example.id in teacher:
            _add(digest, teacher[example.id])
    return digest.hexdigest()[:16]


def _add(digest: Any, annotation: Annotation) -> None:
    """Add what the student is compared with: the teacher's answer, its confidence and its soft targets."""
    target = annotation.targets.get("answer")
    token_ids = target.token_ids if target else None
    digest.update(repr((annotation.answer, annotation.choice_logprobs, token_ids)).encode())
    if target and target.soft:
        soft = target.soft
        for array in (soft.ids_E, soft.logprobs_E, soft.tail_N, soft.num_exact_N):
            digest.update(array.tobytes())
