"""The forecast of a run: the examples, tokens, bytes, hours and memory that it needs, and the resources available.

Records in the cache are counted. Missing records are bounded: each answer and rationale is assumed to have its
maximum length, each soft target the maximum size that its codec produces. A few requests are annotated to measure
the speed; nothing is stored.
"""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from distill.annotation.annotation_job import AnnotationJob
from distill.annotation.fill import filter_rationales, loaded
from distill.annotation.inspection import TOKEN_BYTES, Estimate, estimate
from distill.annotation.positions import Positions
from distill.annotation.reader import AnnotationReader
from distill.annotation.requests import AnnotationRequests, collect_requests, group_requests
from distill.app.machine import free_memory
from distill.cache.shard import pack_annotation
from distill.lessons.choices import choice_targets
from distill.lessons.curriculum import (
    Curriculum,
    Job,
    build_curriculum,
    examples_to_annotate,
    join_for,
    kept_rationales,
    readable,
    require_lessons,
    row_counts,
    texts_to_score,
)
from distill.lessons.join import Lesson, Read
from distill.models import hub, placement
from distill.prompts.classes import ClassPrompts
from distill.prompts.rendering import Prompts
from distill.prompts.tokenizers import tokenizer_fingerprint
from distill.records import (
    SPANS,
    Annotation,
    Example,
    FilteredRationale,
    Request,
    SoftTargets,
    SoftTargetsKey,
    Span,
    Target,
)
from distill.tasks import choices_of
from distill.training.preflight import Finding, PreflightInput, resource_findings
from distill.training.preflight.resources import format_bytes, format_seconds, kept_bytes

# Bytes of a shard's headers and manifest line; of a record's key (twice), lengths and flags; of a token's text.
_SHARD_BYTES, _RECORD_BYTES, _TEXT_BYTES = 12_288, 256, 16
_NUM_PACKED = 64  # equal soft targets packed together to measure their mean size
_UNLIKELY = -30.0  # log of a negligible probability that is still valid in a distribution
Rows = Callable[[int], SoftTargets]
Texts = Mapping[tuple[str, Span], str]


@dataclass(frozen=True)
class TeacherWork:
    """The requests to one teacher; `is_bound` if another teacher has yet to write the texts that it scores."""

    name: str
    annotation_job: AnnotationJob
    filled: AnnotationRequests
    missing: Sequence[Request]
    max_tokens: int  # of a generated text
    text_bytes: int  # of recorded texts
    is_bound: bool

    @property
    def needs_model(self) -> bool:
        """Whether a model has to be loaded."""
        return bool(self.missing) and self.annotation_job.teacher.gives_soft_targets

    def num_written(self, request: Request) -> int:
        """Return the maximum number of tokens that the teacher generates for a request."""
        longest = _longest_choice(self.annotation_job, request.example)
        if request.given_ids or not self.annotation_job.teacher.gives_soft_targets:
            return 0
        if request.span == "answer":
            return longest or self.max_tokens + 1
        return self.max_tokens + longest + 2  # a space before rationale and answer, an end token after them


@dataclass(frozen=True)
class Forecast:
    """The findings on the teachers, and the student's curriculum, or one with lessons at least as long."""

    findings: Sequence[Finding]
    curriculum: Curriculum
    is_bound: bool
    cache_bytes: Mapping[Path, int]  # maximum growth of each cache


def forecast_run(job: Job) -> Forecast:
    """Count what the caches hold and measure the teachers; no teacher is in memory on return."""
    work, curriculum = _work(job)
    findings, growth = [_examples(job, work)], dict[Path, int]()
    for teacher in work:
        growth[teacher.annotation_job.store.folder] = _max_growth(teacher)
        findings += _annotation_findings(teacher, growth[teacher.annotation_job.store.folder])
    return Forecast(findings, curriculum, any(teacher.missing for teacher in work), growth)


def training_findings(forecast: Forecast, inputs: PreflightInput) -> list[Finding]:
    """Return the findings on training, for the forecast's lessons and soft targets."""
    findings = [*_steps(forecast, inputs), *resource_findings(inputs)]
    disk: dict[int, int] = {}
    for folder, num_bytes in (*forecast.cache_bytes.items(), (inputs.run_dir, kept_bytes(inputs))):
        mount = _existing(folder).stat().st_dev
        disk[mount] = disk.get(mount, 0) + num_bytes
    mount = inputs.run_dir.stat().st_dev
    if any(forecast.cache_bytes.values()) and disk[mount] > kept_bytes(inputs):
        findings.append(_disk("total disk", disk[mount], inputs.run_dir, "for cache, checkpoints and student", True))
    return findings


def verdict(findings: Sequence[Finding], is_bound: bool) -> str:
    """Say in one sentence whether the run fits, and what to do."""
    failed = [finding.check for finding in findings if finding.stops]
    unknown = [finding.check for finding in findings if finding.passed is None]
    if failed:
        hint = ". These are upper bounds: fill the cache with python -m distill.annotate for exact figures" * is_bound
        return f"The run does not fit: {', '.join(failed)}; see the remedies above{hint}."
    caveat = f" as far as is known (unknown: {', '.join(unknown)})" if unknown else ""
    return f"The run fits{caveat}{', even at these upper bounds' * is_bound}; remove plan=true to start it."


def _work(job: Job) -> tuple[list[TeacherWork], Curriculum]:
    """Return the requests to each teacher, and the curriculum that results from them."""
    first = collect_requests(job.annotation_job, examples_to_annotate(job))
    missing = job.annotation_job.store.missing(first.all_requests)
    max_tokens = _max_tokens(job)
    texts = sum(Path(file).stat().st_size for file in job.config.teacher.kind.get("files", ()))
    work = [TeacherWork("", job.annotation_job, first, missing, max_tokens, texts, False)]
    annotations, kept = job.annotation_job.reader(first.requests), {}
    largest = _largest_target(job.soft_annotation_job or job.annotation_job)
    rows = functools.cache(functools.partial(_copies, largest))
    if missing:
        texts_by_key = _longest_texts(job, first, max_tokens)
        annotations = _longest(job.annotation_job, first, texts_by_key, rows)
        kept = _longest_rationales(job, first, annotations)
    else:
        kept = kept_rationales(filter_rationales(job.annotation_job, first))
    soft_annotations = None
    if job.soft_annotation_job:
        scored_texts = texts_to_score(job, annotations, kept)
        second = collect_requests(job.soft_annotation_job, scored_texts, use_given_rationales=True)
        unscored = job.soft_annotation_job.store.missing(second.all_requests)
        work.append(TeacherWork("soft ", job.soft_annotation_job, second, unscored, max_tokens, 0, bool(missing)))
        soft_annotations = _longest(job.soft_annotation_job, second, _texts_by_key(scored_texts), rows)
    if not any(teacher.missing for teacher in work):
        return work, build_curriculum(job)
    too_long = {id_: why for teacher in work for id_, why in teacher.filled.too_long.items()}
    further = {id_: _further_longest(annotations, id_, len(samples) - 1) for id_, samples in first.answers.items()}
    own = readable(annotations, job.prompts)
    soft_own = readable(soft_annotations, job.prompts) if soft_annotations else None
    join = join_for(job, own, soft_own, kept, further, too_long)
    train, validation = join.join(job.annotation_job.splits.train), join.join(job.annotation_job.splits.validation)
    rationales = [rationale for of_example in kept.values() for rationale in of_example]
    counts = row_counts(job, first, rationales, train, validation)
    require_lessons(job, counts)
    lessons = train.lessons, validation.lessons
    learned = _any_class(job.prompts) if isinstance(job.prompts, ClassPrompts) else largest
    read = _reader([*lessons[0], *lessons[1]], learned)
    too_long = {**too_long, **train.too_long, **validation.too_long}
    return work, Curriculum(first, None, *lessons, read, rationales, too_long, counts)


@dataclass(frozen=True)
class LongestAnnotations(AnnotationReader):
    """The annotations that a teacher would leave for `texts`, each token with the largest soft target."""

    positions: Positions
    texts: Texts
    rows: Rows

    def find(self, example_id: str, span: Span) -> Annotation | None:
        """Return the annotation, or None if none is requested."""
        request = self.requests.get((example_id, span))
        text = self.texts.get((example_id, span))
        if request is None or text is None:
            return None
        ids = self.prompts.answer_ids(text) if span == "answer" else self.prompts.rationale_ids(text)
        parts = {"answer": text} if span == "answer" else {"answer": None, "rationale": text}
        number = len(self.task.choices)
        scores = (-math.log(number),) * number if number else ()
        whole = Annotation(request.key, {span: Target(ids, self.rows(len(ids)))}, choice_logprobs=scores, **parts)
        return self.positions.reduced([request], [whole])[0]

    find_words = find

    def largest_soft_id(self, places: Sequence[SoftTargetsKey]) -> int:
        """Return the largest id of the soft targets that the teacher would leave."""
        return int(self.rows(1).ids_E.max(initial=-1)) if places else -1


def _longest(
    annotation_job: AnnotationJob, requests: AnnotationRequests, texts: Texts, rows: Rows
) -> LongestAnnotations:
    parts = annotation_job.store, requests.requests, annotation_job.task, annotation_job.prompts
    return LongestAnnotations(*parts, annotation_job.positions, texts, rows)


def _longest_texts(job: Job, first: AnnotationRequests, max_tokens: int) -> Texts:
    """Return the longest possible text of each answer and rationale that still makes a lesson."""
    prompts, texts = job.prompts, dict[tuple[str, Span], str]()
    if isinstance(prompts, ClassPrompts):
        choices = job.annotation_job.task.choices
        return {place: request.example.answer or choices[0] for place, request in first.requests.items()}
    filler = _filler(prompts)
    for (id_, span), request in sorted(first.requests.items()):  # answers sort first
        example, room = request.example, _room(prompts, request.example, span) - 1
        if span == "answer":
            own = choices_of(job.annotation_job.task, example)
            choices = sorted(own, key=lambda choice: len(prompts.answer_ids(choice)))
            texts[id_, span] = example.answer or (choices[-1] if choices else filler(min(max_tokens, room)))
        else:
            if job.config.task.answer_mode == "reasoned":
                answer = example.answer or texts.get((id_, "answer"), "")
                room -= len(prompts.separator_ids()) + len(prompts.answer_ids(answer))
            texts[id_, span] = filler(min(max_tokens, room))
    return texts


def _longest_rationales(
    job: Job, first: AnnotationRequests, annotations: LongestAnnotations
) -> dict[str, list[FilteredRationale]]:
    rationales = {}
    for id_, samples in first.samples.items():
        reasoned, direct = annotations.find(id_, "rationale"), annotations.find(id_, "answer")
        assert reasoned is not None
        targets = {**(direct.targets if direct else {}), **reasoned.targets}
        answer = first.requests[id_, "rationale"].example.answer or (direct.answer if direct else None)
        annotation = Annotation(reasoned.key, targets, answer, reasoned.rationale)
        confidence = 1.0 if job.annotation_job.rationales_each > 1 else None
        rationales[id_] = [FilteredRationale(id_, annotation, "teacher", None, confidence)] * len(samples)
    return rationales


def _further_longest(annotations: AnnotationReader, example_id: str, number: int) -> list[Annotation]:
    longest = annotations.find_words(example_id, "answer")
    return [longest] * number if longest else []


def _texts_by_key(examples_by_span: Mapping[Span, Sequence[Example]]) -> Texts:
    return {
        (example.id, span): text
        for span, examples in examples_by_span.items()
        for example in examples
        if (text := example.answer if span == "answer" else example.rationale) is not None
    }


def _max_tokens(job: Job) -> int:
    """Return the maximum length of a text that the first teacher generates, in the student's tokens.

    The text is decoded and tokenized again: a space is put before it, and a token that is part of a character comes
    back as the replacement character.
    """
    annotation_job, prompts = job.annotation_job, job.prompts
    max_new_tokens = annotation_job.store.fingerprint["teacher"].get("max_new_tokens")
    ours, theirs = (tokenizer_fingerprint(part.tokenizer) for part in (prompts, annotation_job.prompts))
    if max_new_tokens is None or isinstance(prompts, ClassPrompts) or ours != theirs:
        return prompts.max_length
    return 1 + int(max_new_tokens) * len(prompts.encode("\N{REPLACEMENT CHARACTER}"))


def _room(prompts: Prompts, example: Example, span: Span) -> int:
    """Return how many tokens fit after a question."""
    try:
        return prompts.max_length - len(prompts.question(example, span))
    except ValueError:  # the question alone is too long, so it makes no lesson
        return 1


def _filler(prompts: Prompts) -> Callable[[int], str]:
    """Return a maker of texts of a given number of tokens, at least one: a single-token word, repeated."""
    pieces = ((token_id, prompts.token_text(token_id)) for token_id in range(prompts.vocabulary_size))
    words = (piece for token_id, piece in pieces if piece[:1] == " " and prompts.encode(piece * 3) == (token_id,) * 3)
    word = next((word.strip() for word in words if word.strip().isalpha()), "a")
    return lambda num_tokens: " ".join([word] * max(1, num_tokens))


def _longest_choice(annotation_job: AnnotationJob, example: Example) -> int:
    return max(map(len, annotation_job.prompts.choice_ids(choices_of(annotation_job.task, example))), default=0)


def _largest_target(annotation_job: AnnotationJob) -> SoftTargets:
    """Return the soft target that takes most bytes: uniform over a part of the vocabulary, of several sizes."""
    size, targets = annotation_job.prompts.vocabulary_size, list[SoftTargets]()
    cut = annotation_job.positions.cut(annotation_job.codec)
    for num_likely in {size, *(2**power - 1 for power in range(1, size.bit_length()))}:
        logprobs_1V = torch.full((1, size), _UNLIKELY)
        logprobs_1V[:, -num_likely:] = 0.0  # ids above 16 bits take more bytes
        targets.append(cut.cut(logprobs_1V.log_softmax(-1), torch.zeros(1, dtype=torch.float64)))
    return max(targets, key=lambda row: _packed_bytes(row, annotation_job))


def _any_class(prompts: ClassPrompts) -> SoftTargets:
    """Return the soft target of a teacher that knows nothing."""
    size = prompts.vocabulary_size
    return choice_targets([Annotation("", {}, None, choice_logprobs=(0.0,) * size)])


def _copies(row: SoftTargets, number: int) -> SoftTargets:
    return row[np.zeros(number, np.int64)]


def _packed_bytes(row: SoftTargets, annotation_job: AnnotationJob) -> float:
    """Return the bytes of one such soft target, packed with others like it."""
    soft = _copies(row, _NUM_PACKED)
    annotation = Annotation("", {"answer": Target((0,) * len(soft), soft)}, None)
    return sum(array.nbytes for array in pack_annotation(annotation, annotation_job.codec).values()) / len(soft)


def _reader(lessons: Sequence[Lesson], row: SoftTargets) -> Read:
    targets = (target for lesson in lessons for target in lesson.targets)
    num_positions = {target.soft.place: target.soft.num_positions for target in targets if target.soft}
    return lambda places: _copies(row, sum(num_positions[place] for place in places))


def _max_growth(work: TeacherWork) -> int:
    """Return the maximum number of bytes that the cache will grow by."""
    annotation_job, missing_keys = work.annotation_job, {request.key for request in work.missing}
    if not missing_keys:
        return 0
    groups = group_requests(work.filled.all_requests, annotation_job.group_size)
    num_shards = sum(any(request.key in missing_keys for request in group.requests) for group in groups)
    fixed = num_shards * _SHARD_BYTES + len(missing_keys) * _RECORD_BYTES + 2 * work.text_bytes
    if not annotation_job.teacher.gives_soft_targets:
        return fixed
    per_position = _packed_bytes(_largest_target(annotation_job), annotation_job)
    num_tokens = {request.key: work.num_written(request) + len(request.given_ids) for request in work.missing}
    num_positions = sum(annotation_job.positions.most(request, num_tokens[request.key]) for request in work.missing)
    return fixed + round(sum(num_tokens.values()) * (TOKEN_BYTES + _TEXT_BYTES) + num_positions * per_position)


def _examples(job: Job, work: Sequence[TeacherWork]) -> Finding:
    splits, num_too_long = job.annotation_job.splits, len({id_ for teacher in work for id_ in teacher.filled.too_long})
    sizes = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    counts = ", ".join(f"{len(examples)} {name}" for name, examples in sizes.items())
    labelled = sum(example.answer is not None for example in splits.train)
    rest = f"; {labelled} of train are labelled; {num_too_long} exceed max_length={job.prompts.max_length}"
    return _known("examples", counts + rest)


def _annotation_findings(work: TeacherWork, max_bytes: int) -> list[Finding]:
    """Return what one teacher will read and generate, the time it takes, and the disk its records need."""
    num_records = len(work.filled.all_requests)
    missing = f"{len(work.missing)} of {num_records} are missing" + (" at most" if work.is_bound else "")
    findings = [_known(f"{work.name}records", missing, f"{num_records - len(work.missing)} in the cache")]
    if not work.missing:
        return findings
    if work.needs_model:
        weights = _weights(work)
        findings += [_tokens(work), weights]
        if not weights.stops:
            findings.append(_hours(work, _measured(work)))
    folder, store = work.annotation_job.store.folder, work.annotation_job.store
    where = f"for records at {store.location} (free space unknown)" if store.location != str(folder) else "for records"
    return [*findings, _disk(f"{work.name}cache", max_bytes, folder, where, False)]


def _tokens(work: TeacherWork) -> Finding:
    """Count the tokens to read (prompts and texts to score, each shared prefix once) and to generate."""
    prompts, spans = work.annotation_job.prompts, {request.span for request in work.missing}
    num_read = sum(len(prompts.prefix(span)) for span in SPANS if span in spans)
    num_read += sum(len(request.question_ids) + len(request.given_ids) for request in work.missing)
    num_written = sum(map(work.num_written, work.missing))
    at_most = " at most" if work.is_bound else ""
    return _known(f"{work.name}tokens", f"{num_read:,} to read{at_most}, at most {num_written:,} to generate")


def _weights(work: TeacherWork) -> Finding:
    hub.download_weights(work.annotation_job.folder)  # they are about to be measured
    size, dtype = 0, work.annotation_job.store.backend.get("dtype", "float32")
    for file in work.annotation_job.folder.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            size += sum(int(np.prod(weights.get_slice(name).get_shape())) for name in weights.keys())  # noqa: SIM118
    num_bytes, free_bytes = size * getattr(torch, dtype).itemsize, free_memory(placement.device())
    return Finding(
        f"{work.name}weights",
        None if free_bytes is None else num_bytes <= free_bytes,
        f"{format_bytes(num_bytes)} for the teacher in {dtype} on {placement.device()}",
        f"<= {'unknown' if free_bytes is None else format_bytes(free_bytes)}",
        "Use a smaller teacher or a machine with more memory; this teacher was not measured",
        True,
    )


def _measured(work: TeacherWork) -> Estimate | None:
    """Measure a few requests; return None if they do not fit into memory."""
    annotation_job = work.annotation_job
    try:
        with loaded(annotation_job.teacher):
            return estimate(annotation_job, work.missing)
    except torch.OutOfMemoryError:
        return None


def _hours(work: TeacherWork, measured: Estimate | None) -> Finding:
    duration = "unknown"
    if measured:
        duration = f"about {format_seconds(measured.seconds)}, measured on {measured.num_sampled} requests"
    return Finding(
        f"{work.name}annotation",
        measured is not None,
        duration + ("; its cache will be about " + format_bytes(measured.num_bytes) if measured else ""),
        "memory for one batch",
        f"Reduce {'soft_' if work.name else ''}teacher.batch_size",
        True,
    )


def _steps(forecast: Forecast, inputs: PreflightInput) -> list[Finding]:
    """Return the number of lessons, tokens and epochs; upper bounds while records are missing."""
    at_most = " at most" if forecast.is_bound else ""
    num_lessons, total = len(inputs.lessons), sum(lesson.num_tokens for lesson in inputs.lessons)
    is_counted = inputs.batch_unit == "examples"
    per_step = inputs.batch_size * total / num_lessons if is_counted else inputs.batch_size
    epochs = inputs.num_steps * inputs.batch_size / (num_lessons if is_counted else total)
    return [
        _known(
            "lessons",
            f"{num_lessons:,}{at_most}, of at most {max(lesson.num_tokens for lesson in inputs.lessons)} tokens",
        ),
        _known("steps", f"{inputs.num_steps:,} of {inputs.batch_size} {inputs.batch_unit}, {epochs:.1f} epochs"),
        _known(
            "lesson tokens",
            f"{per_step:,.0f} per step{at_most}, {per_step * inputs.num_steps:,.0f} in total, without padding",
        ),
        _known("devices", f"{inputs.num_devices} of kind {inputs.device.type}"),
    ]


def _disk(check: str, num_bytes: int, folder: Path, purpose: str, is_total: bool) -> Finding:
    free = shutil.disk_usage(_existing(folder)).free
    return Finding(
        check,
        num_bytes <= free,
        f"{format_bytes(num_bytes)} at most {purpose}",
        f"<= {format_bytes(free)}",
        f"Free space on the disk of {folder}, "
        + ("or set root to a folder elsewhere" if is_total else "or set cache.dir to a folder elsewhere"),
        True,
    )


def _known(check: str, found: str, available: str = "") -> Finding:
    return Finding(check, True, found, available, "", False)


def _existing(folder: Path) -> Path:
    """Return the folder, or its nearest existing parent."""
    return next(path for path in (folder, *folder.parents) if path.exists())
