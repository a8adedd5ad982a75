"""The row of the bag of words: what a run's targets teach without a language model, measured on test like a student."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from distill.annotation.answers import choose_answers
from distill.annotation.reader import AnnotationReader
from distill.app.console import say
from distill.app.files import Json, write_json_lines
from distill.app.machine import timings
from distill.errors import ConfigError
from distill.evaluation.answers import as_prediction
from distill.evaluation.bag_of_words import BagOfWords, Source, Targets, can_be_fitted, fit, targets_of
from distill.evaluation.metrics import Prediction, score
from distill.lessons.curriculum import Curriculum, Job
from distill.records import Annotation, Example

MAX_EXAMPLES, MAX_PAIRS = 20_000, 400_000  # of training, and of them with each choice; the labelled ones first
_TIMED_EXAMPLES, _TIMED_ROUNDS, _TIMED_SECONDS = 6, 5, 1.0


def check_bag_of_words(job: Job) -> None:
    """Raise ConfigError if a bag of words is required of a task without fixed choices."""
    if job.config.bag_of_words is True and not job.annotation_job.task.choices:
        raise ConfigError(
            "bag_of_words=true: this task has no fixed choices for a classifier to choose from; set bag_of_words=auto"
        )


def bag_of_words_rows(job: Job, curriculum: Curriculum, teacher: Mapping[str, Annotation]) -> Json:
    """Return the row by its name, and write its answers to bag_of_words.jsonl; {} if it is off or cannot be fitted.

    `teacher` has the annotations of the test examples.
    """
    task, test = job.annotation_job.task, job.annotation_job.splits.test
    if job.config.bag_of_words is False or not task.choices:
        return {}
    start = time.monotonic()
    annotations = job.annotation_job.reader(choose_answers(job.annotation_job, curriculum.filled).requests)
    targets, validation = _targets(job, curriculum, annotations), _validation(job, annotations)
    if not can_be_fitted(targets):
        say("no bag of words: the losses read no answers to at least two choices")
        return {}
    bag = fit(targets, validation, len(task.choices))
    seconds = time.monotonic() - start
    predictions = _predictions(job, bag, test, teacher)
    write_json_lines(job.run_dir / "bag_of_words.jsonl", map(_line, predictions))
    measured = {"parameters": bag.num_parameters, "size_bytes": bag.size_bytes, "training_seconds": seconds}
    chosen = {"strength": bag.strength, "targets": dict(targets.counts), "digest": targets.digest(validation)}
    return {"bag_of_words": score(predictions) | measured | _speed(bag, test) | chosen}


def _targets(job: Job, curriculum: Curriculum, annotations: AnnotationReader) -> Targets:
    """What the losses on answers read of the examples in lessons."""
    weights = dict[Source, float]()
    for objective in job.objectives.values():
        if objective.span == "answer":
            weights[objective.source] = weights.get(objective.source, 0.0) + objective.weight
    soft = annotations
    if job.soft_annotation_job and curriculum.soft_filled:
        soft = job.soft_annotation_job.reader(curriculum.soft_filled.requests)
    if job.config.task.answer_mode == "reasoned":  # what a student then says after its reasoning is not in these
        soft = annotations = job.annotation_job.reader({})
    find, find_soft = (partial(reader.find_words, span="answer") for reader in (annotations, soft))
    return targets_of(_learned(job, curriculum), find, find_soft, job.annotation_job.task.choices, weights)


def _learned(job: Job, curriculum: Curriculum) -> Sequence[Example]:
    """The training examples in lessons, or so many of them that fitting takes seconds."""
    ids = {id_ for lesson in curriculum.train for id_ in lesson.example_ids}
    examples = [example for example in job.annotation_job.splits.train if example.id in ids]
    limit = min(MAX_EXAMPLES, MAX_PAIRS // len(job.annotation_job.task.choices))
    if len(examples) <= limit:
        return examples
    say(f"bag of words: fitted on {limit} of {len(examples)} training examples, the labelled ones first")
    return sorted(examples, key=lambda example: (example.answer is None, example.id))[:limit]


def _validation(job: Job, annotations: AnnotationReader) -> list[tuple[str, int]]:
    """Texts of validation with the places of their gold answers, or of the teacher's where they have none."""
    places = {choice: place for place, choice in enumerate(job.annotation_job.task.choices)}
    answers = list[tuple[str, int]]()
    for example in job.annotation_job.splits.validation:
        annotation = annotations.find_words(example.id, "answer")
        answer = example.answer or (annotation.whole_answer if annotation else None)
        if answer in places:
            answers.append((example.text, places[answer]))
    return answers


def _predictions(
    job: Job, bag: BagOfWords, test: Sequence[Example], teacher: Mapping[str, Annotation]
) -> list[Prediction]:
    task, probability_EC = job.annotation_job.task, bag.probabilities([example.text for example in test])
    return [
        replace(
            as_prediction(task, example, task.choices[int(probability_C.argmax())], None, teacher.get(example.id)),
            is_written_correct=None,
            confidence=float(probability_C.max()),
        )
        for example, probability_C in zip(test, probability_EC, strict=True)
    ]


def _line(predicted: Prediction) -> Json:
    return {
        "id": predicted.example_id,
        "answer": predicted.answer,
        "confidence": predicted.confidence,
        "is_correct": predicted.is_correct,
    }


def _speed(bag: BagOfWords, test: Sequence[Example]) -> Json:
    """Measure the time of answering a single question."""
    texts, name = [example.text for example in test[:_TIMED_EXAMPLES]], "bag of words"
    answering = {name: lambda text: bag.probabilities([text])}
    times = timings(answering, texts, num_rounds=_TIMED_ROUNDS, max_seconds=_TIMED_SECONDS)[name]
    spent = {"ms_per_example": times.median, "ms_fastest": times.fastest, "ms_slowest": times.slowest}
    return {key: round(value, 3) for key, value in spent.items()}
