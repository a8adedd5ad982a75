"""A student's curriculum: compatible parts, and the teacher's annotations, filtered and joined into lessons."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from distill.annotation.annotation_job import AnnotationJob, open_annotation_job
from distill.annotation.answers import TaughtAnswers, choose_answers
from distill.annotation.fill import fill, filter_rationales
from distill.annotation.reader import AnnotationReader
from distill.annotation.requests import AnnotationRequests, examples_to_reason, without_labels
from distill.annotation.row_counts import rationale_counts, say_answers, table
from distill.app import config as configuration
from distill.app.config import Config
from distill.app.console import say
from distill.cache import Codec
from distill.cache.codecs.dense import Dense
from distill.errors import ConfigError
from distill.lessons.choices import ChoiceReader, ReadChoices
from distill.lessons.join import Join, Joined, Lesson, Read, Records, first_span
from distill.losses import Objective
from distill.models import loading, naming
from distill.prompts.classes import ClassPrompts
from distill.prompts.rendering import Prompts
from distill.prompts.vocabularies import Pairing, pair_vocabularies
from distill.records import Annotation, Example, FilteredRationale, Request, RowCounts, Span
from distill.students import StudentKind
from distill.tasks.splitting import require_examples


@dataclass(frozen=True)
class Job:
    """The parts that a configuration names, built and checked against each other; no model is in memory."""

    config: Config
    run_dir: Path
    annotation_job: AnnotationJob
    soft_annotation_job: AnnotationJob | None  # a second teacher, whose soft targets replace those of the first
    objectives: Mapping[str, Objective]
    student_folder: Path
    kind: StudentKind
    pairing: Pairing | None  # of the vocabularies of the teacher that gives soft targets and the student, if shared

    @property
    def prompts(self) -> Prompts | ClassPrompts:
        """What the student reads and learns."""
        return self.kind.prompts

    @property
    def is_vocabulary_shared(self) -> bool:
        """Whether the student can learn the teacher's distributions."""
        return self.pairing is not None

    def reader(self, annotation_job: AnnotationJob, requests: Mapping[tuple[str, Span], Request]) -> Records:
        """Return a reader of these requests' records, with targets that the student can learn."""
        return readable(annotation_job.reader(requests), self.prompts)

    @property
    def read(self) -> Read:
        """Reads the soft targets of a batch."""
        store = (self.soft_annotation_job or self.annotation_job).store
        if isinstance(self.prompts, ClassPrompts):
            return ReadChoices(store)
        return partial(self.pairing.read, store.soft_targets) if self.pairing else store.soft_targets

    @property
    def codec(self) -> Codec:
        """The form of the soft targets that the student learns; distributions over classes are complete."""
        return learned_codec(self.annotation_job, self.prompts)


@dataclass(frozen=True)
class Curriculum:
    """The lessons of a student, and what was left out of them.

    `rows` counts the rows of train, validation, test and rationales from the files to the lessons.
    """

    filled: AnnotationRequests
    soft_filled: AnnotationRequests | None
    train: Sequence[Lesson]
    validation: Sequence[Lesson]
    read: Read
    rationales: Sequence[FilteredRationale]
    too_long: Mapping[str, str]
    rows: Mapping[str, RowCounts]


def prepare(config: Config, run_dir: Path) -> Job:
    """Build the parts and raise ConfigError if they are incompatible, before any model is loaded."""
    objectives: dict[str, Objective] = {
        name: configuration.build(node) for name, node in config.get("loss", {}).items()
    }
    annotation_job = open_annotation_job(config)
    require_examples(annotation_job.splits, ("validation", "test"))
    soft_annotation_job = open_annotation_job(config, name="soft_teacher") if config.get("soft_teacher") else None
    folder = naming.resolve(config.student.model, configuration.local_root(config.root))
    kind = student_kind(config, folder, annotation_job)
    _check_models(config, folder, kind, soft_annotation_job)
    soft_job = soft_annotation_job or annotation_job
    check_parts(objectives, soft_job, learned_codec(soft_job, kind.prompts), config.task.answer_mode)
    if problems := kind.problems(objectives):
        raise ConfigError(*problems)
    pairing = _pairing(objectives, soft_job, kind.prompts)
    return Job(config, run_dir, annotation_job, soft_annotation_job, objectives, folder, kind, pairing)


def student_kind(config: Config, folder: Path, annotation_job: AnnotationJob) -> StudentKind:
    """Build the student's kind for a model folder; it is asked like its teacher, without shots."""
    kind: StudentKind = configuration.build(config.student.kind)(
        folder=folder,
        teacher=annotation_job.prompts,
        task=annotation_job.task,
        first_span=first_span(config.task.answer_mode),
        max_new_tokens=config.max_new_tokens,
    )
    return kind


def _pairing(
    objectives: Mapping[str, Objective], annotation_job: AnnotationJob, student: Prompts | ClassPrompts
) -> Pairing | None:
    """Pair the vocabularies; None if they are too different and no loss needs it. Classes need no pairing."""
    if isinstance(student, ClassPrompts):
        return Pairing()
    soft = {name: objective for name, objective in objectives.items() if objective.source == "soft"}
    try:
        teacher = annotation_job.prompts
        if soft and teacher.frame.target_lead != student.frame.target_lead:
            raise ConfigError(
                f"{', '.join(soft)}: an answer begins with {teacher.frame.target_lead!r} in the prompt of the teacher "
                f"and with {student.frame.target_lead!r} in that of the student, so its first tokens differ; choose "
                "models whose chat templates agree, give the student without a template another one "
                "(prompt.without_template), set prompt=cues, or train without these losses"
            )
        pairing = pair_vocabularies(teacher.tokenizer, student.tokenizer, ends=(teacher.end, student.end))
    except ConfigError:
        if soft:
            raise
        return None
    if soft and pairing.num_unpaired:
        say(
            f"{pairing.num_unpaired} added tokens of the teacher have no counterpart in the student; their probability "
            "counts as the rest of a distribution"
        )
        hot = [name for name, objective in soft.items() if objective.temperature != 1]
        if hot and isinstance(annotation_job.codec, Dense):  # its normaliser would need the tokens that are left out
            raise ConfigError(
                f"{', '.join(hot)} has a temperature, and the teacher has tokens that the student lacks; set "
                "cache=topk with cache.codec.temperature, or choose models with the same tokens"
            )
    return pairing


def _check_models(
    config: Config, student_folder: Path, kind: StudentKind, soft_annotation_job: AnnotationJob | None
) -> None:
    """Raise ConfigError if a model that is opened only after the first teacher has annotated cannot be opened."""
    if method := loading.quantization(student_folder):
        raise ConfigError(
            f"student.model={config.student.model} is quantized ({method}), and quantized weights cannot be trained; "
            "use the model that is not quantized"
        )
    if not config.student.from_scratch:
        kind.check_weights()
    if soft_annotation_job and soft_annotation_job.teacher.gives_soft_targets:
        loading.check_weights(soft_annotation_job.folder)


def learned_codec(annotation_job: AnnotationJob, prompts: Prompts | ClassPrompts) -> Codec:
    """The form of the soft targets that a student of these prompts learns."""
    return Dense() if isinstance(prompts, ClassPrompts) else annotation_job.codec


def check_parts(objectives: Mapping[str, Objective], annotation_job: AnnotationJob, codec: Codec, answer: str) -> None:
    """Raise ConfigError with every reason why this teacher, or soft targets of this form, do not fit these losses."""
    problems = []
    for name, objective in objectives.items():
        if objective.source == "soft":
            if not annotation_job.teacher.gives_soft_targets:
                problems.append(
                    f"loss.{name} needs soft targets, which this teacher does not provide; remove the loss, or add a "
                    "second teacher of the student's vocabulary to score these texts: teacher@soft_teacher=smollm2_135m"
                )
            if objective.divergence.needs_rest and codec.seed is not None:
                problems.append(
                    f"loss.{name} needs the rest of each distribution as one bucket, but this cache samples it; set "
                    "cache=topk (annotates again), or choose a loss that supports sampled targets, such as loss.kl"
                )
            try:
                codec.check_temperature(objective.temperature)
            except ConfigError as error:
                problems.append(f"loss.{name}: {error}")
    if not objectives:
        problems.append("loss is empty: choose at least one, for example loss=[answer,kl]")
    if answer == "reasoned" and not any(o.span == "rationale" and o.source == "labels" for o in objectives.values()):
        problems.append(
            "task.answer_mode=reasoned needs a loss on the words of rationales, which also teaches to end them and to "
            "answer: loss=[answer,kl,rationale]"
        )
    if problems:
        raise ConfigError(*problems)


def build_curriculum(job: Job) -> Curriculum:
    """Fill the cache with what the losses and the evaluation read, and join it with the examples."""
    check_lessons(job)
    annotation_job, splits = job.annotation_job, job.annotation_job.splits
    filled = fill(annotation_job, examples_to_annotate(job))
    say_answers(annotation_job, filled)
    rationales = filter_rationales(annotation_job, filled)
    kept = kept_rationales(rationales)
    answers = choose_answers(annotation_job, filled)
    annotations = job.reader(annotation_job, answers.requests)
    soft_filled, soft_annotations = None, None
    if job.soft_annotation_job:
        soft_filled = fill(job.soft_annotation_job, texts_to_score(job, annotations, kept), use_given_rationales=True)
        soft_annotations = job.reader(job.soft_annotation_job, soft_filled.requests)
    too_long = {**filled.too_long, **(soft_filled.too_long if soft_filled else {})}
    join = join_for(job, annotations, soft_annotations, kept, answers.further, too_long)
    train, validation = join.join(splits.train), join.join(splits.validation)
    rows = row_counts(job, filled, rationales, train, validation) | _answer_counts(answers, train)
    say(table(rows))
    require_lessons(job, rows)
    too_long = {**too_long, **train.too_long, **validation.too_long}
    return Curriculum(filled, soft_filled, train.lessons, validation.lessons, job.read, rationales, too_long, rows)


def readable(annotations: AnnotationReader, prompts: Prompts | ClassPrompts) -> Records:
    """Return annotations with targets that a student of these prompts can learn: of tokens, or of classes."""
    return ChoiceReader(annotations, prompts) if isinstance(prompts, ClassPrompts) else annotations


def row_counts(
    job: Job, filled: AnnotationRequests, rationales: Sequence[FilteredRationale], train: Joined, validation: Joined
) -> dict[str, RowCounts]:
    """Count what became of the rows of each split, and of the teacher's rationales."""
    rows = dict(job.annotation_job.splits.counts)
    rows |= {"train": rows["train"].then(train.counts), "validation": rows["validation"].then(validation.counts)}
    return rows | {
        "rationales": rationale_counts(filled, rationales).then(_learned_rationales(rationales, train, validation))
    }


def _learned_rationales(rationales: Sequence[FilteredRationale], *parts: Joined) -> RowCounts:
    """Count the kept rationales that are in lessons of these splits, and the others by their reason."""
    kept = Counter(rationale.example_id for rationale in rationales if rationale.reason is None)
    targets = (target for part in parts for lesson in part.lessons for target in lesson.targets)
    learned = Counter(t.example_id for t in targets if t.span == "rationale" and t.example_id in kept)
    too_long, lost = {id_ for part in parts for id_ in part.too_long}, Counter[str]()
    for id_, number in (kept - learned).items():
        lost["too long" if id_ in too_long else "no soft targets"] += number
    return RowCounts(kept.total(), dict(lost.most_common()), learned.total())


def _answer_counts(answers: TaughtAnswers, train: Joined) -> dict[str, RowCounts]:
    """Count the answers of examples with several that are in lessons, and the others by their reason."""
    if not answers.counts.read:
        return {}
    targets = (target for lesson in train.lessons for target in lesson.targets)
    learned = Counter(t.example_id for t in targets if t.span == "answer" and t.example_id in answers.num_taught)
    lost = Counter[str]({"too long": train.num_answers_too_long})
    for id_, number in answers.num_taught.items():
        lost[train.lost.get(id_, "no soft targets")] += number - learned[id_]
    lost["no soft targets"] -= train.num_answers_too_long
    reasons = {reason: number for reason, number in lost.most_common() if number}
    return {"answers": answers.counts.then(RowCounts(answers.counts.kept, reasons, learned.total()))}


def require_lessons(job: Job, rows: Mapping[str, RowCounts]) -> None:
    """Raise ConfigError if a split, of those in `rows`, has nothing to learn from or to validate on."""
    problems = []
    for split in ("train", "validation"):
        if split in rows and not rows[split].kept:
            lost = ", ".join(f"{number} {reason}" for reason, number in rows[split].lost.items())
            losses = sorted(job.objectives)
            problems.append(f"no {split} example has targets for the losses {losses}; rows left out: {lost}")
    if problems:
        raise ConfigError(*problems)


def check_lessons(job: Job) -> None:
    """Raise ConfigError if no example of a split can become a lesson, whatever the teachers answer; asks none of them.

    Stops at the first example that can, so it takes no time on data that can be learned.
    """
    splits, rows = job.annotation_job.splits, dict[str, RowCounts]()
    rationale_ids = {example.id for example in examples_to_annotate(job).get("rationale", ())}
    unannotated = job.reader(job.annotation_job, {})
    without_teacher = join_for(job, unannotated, None, {}, {}, {})
    for name in ("train", "validation"):
        examples = getattr(splits, name)
        if not any(without_teacher.join([e]).lessons or _awaits_teacher(job, e, rationale_ids) for e in examples):
            too_long = {example.id: "" for example in examples if not _can_be_read(job, example, "answer")}
            joined = join_for(job, unannotated, None, {}, {}, too_long).join(examples)
            rows[name] = splits.counts[name].then(joined.counts)
    require_lessons(job, rows)


def _awaits_teacher(job: Job, example: Example, rationale_ids: Set[str]) -> bool:
    """Whether what a teacher writes or scores could make a lesson of an example."""
    needed, spans = _needed(job), list[Span]()
    is_answered = ("answer", "soft") in needed or (example.answer is None and ("answer", "teacher") in needed)
    if is_answered and job.config.task.answer_mode == "direct":
        spans.append("answer")
    is_scored = job.soft_annotation_job and ("rationale", "soft") in needed and example.rationale is not None
    if is_scored or example.id in rationale_ids:
        spans.append("rationale")
    return any(_can_be_read(job, example, span) for span in spans)


def _can_be_read(job: Job, example: Example, span: Span) -> bool:
    """Whether the student and a teacher can read the question."""
    teachers = [part.prompts for part in (job.annotation_job, job.soft_annotation_job) if part]
    return _fits(job.prompts, example, span) and any(_fits(prompts, example, span) for prompts in teachers)


def _fits(prompts: Prompts | ClassPrompts, example: Example, span: Span) -> bool:
    try:
        return bool(prompts.question(example, span))
    except ValueError:
        return False


def kept_rationales(rationales: Sequence[FilteredRationale]) -> dict[str, list[FilteredRationale]]:
    """Return the rationales to learn from, by example id."""
    kept: dict[str, list[FilteredRationale]] = {}
    for rationale in rationales:
        if rationale.reason is None:
            kept.setdefault(rationale.example_id, []).append(rationale)
    return kept


def join_for(
    job: Job,
    annotations: Records,
    soft_annotations: Records | None,
    kept: Mapping[str, Sequence[FilteredRationale]],
    further_answers: Mapping[str, Sequence[Annotation]],
    too_long: Mapping[str, str],
) -> Join:
    """Return the join of the teachers' annotations with the examples, of which some are `too_long` for a teacher."""
    return Join(
        prompts=job.prompts,
        teacher=annotations,
        soft_teacher=soft_annotations,
        rationales=kept,
        further_answers=further_answers,
        answer=job.config.task.answer_mode,
        needed=_needed(job),
        pairing=job.pairing or Pairing(),
        too_long=too_long,
    )


def _needed(job: Job) -> frozenset[tuple[Span, str]]:
    return frozenset((objective.span, objective.source) for objective in job.objectives.values())


def texts_to_score(
    job: Job, annotations: Records, kept: Mapping[str, Sequence[FilteredRationale]]
) -> dict[Span, list[Example]]:
    """Return the texts that the second teacher scores: gold ones, else those of the first teacher."""
    splits, texts = job.annotation_job.splits, dict[Span, list[Example]]()
    for example in (*splits.train, *splits.validation, *without_labels(splits.test)):
        annotation = annotations.find_words(example.id, "answer")
        answer = example.answer or (annotation.whole_answer if annotation else None)
        if answer is not None:
            texts.setdefault("answer", []).append(replace(example, answer=answer))
        rationale = example.rationale or (kept[example.id][0].annotation.rationale if example.id in kept else None)
        if rationale is not None:
            texts.setdefault("rationale", []).append(replace(example, rationale=rationale))
    return {span: examples for span, examples in texts.items() if (span, "soft") in _needed(job)}


def examples_to_annotate(job: Job) -> dict[Span, Sequence[Example]]:
    """Return the examples that the first teacher annotates: those that the losses and the evaluation read."""
    splits, objectives = job.annotation_job.splits, job.objectives.values()
    is_reasoned = job.config.task.answer_mode == "reasoned"
    candidates = examples_to_reason(splits, job.annotation_job.num_rationales, is_answer_reasoned=is_reasoned)
    examples: dict[Span, Sequence[Example]] = {"answer": without_labels(splits.test)}
    if any(objective.span == "rationale" for objective in objectives):
        without_rationale = [example for example in candidates if example.rationale is None]
        examples["rationale"] = [*without_rationale, *without_labels(splits.test[: job.config.num_samples])]
        examples["answer"] = [*examples["answer"], *without_rationale]
    if any(objective.source != "labels" for objective in objectives):
        examples["answer"] = [*examples["answer"], *splits.train, *splits.validation]
    return examples


def identity_of(job: Job, curriculum: Curriculum, student: str) -> dict[str, Any]:
    """Return what must be equal in a run that resumes from a checkpoint; steps, devices and logging may differ.

    `student` is the hash of the initial weights.
    """
    config = configuration.without_labels(configuration.plain(job.config))
    splits = job.annotation_job.splits
    return {
        "cache": job.annotation_job.store.digest,
        "soft_cache": job.soft_annotation_job.store.digest if job.soft_annotation_job else None,
        "train": _hash_of(curriculum.train),
        "validation": _hash_of(curriculum.validation),
        "test": hashlib.sha256("".join(example.id for example in splits.test).encode()).hexdigest()[:16],
        "student": student,
        **{key: config[key] for key in ("seed", "batch_size", "batch_unit", "order", "balance", "loss")},
        "optimizer": config["optim"]["optimizer"],
        "dropout": config["student"].get("dropout"),
        "kind": config["student"]["kind"],
    }


def _hash_of(lessons: Sequence[Lesson]) -> str:
    """Hash everything that is learned except the soft targets, which the cache's fingerprint identifies."""
    content = hashlib.sha256()
    for lesson in lessons:
        for sequence in lesson.sequences:
            for example_id, grouped in itertools.groupby(sequence.targets, key=lambda target: target.example_id):
                targets = sorted(grouped, key=lambda target: target.span)
                spans = [(target.span, (target.start, target.stop)) for target in targets]
                labelled, soft = [t.span for t in targets if t.is_labelled], [t.span for t in targets if t.soft]
                content.update(repr((example_id, spans, labelled, soft)).encode())
            content.update(np.array(sequence.ids, np.int64).tobytes())
    return content.hexdigest()[:16]
