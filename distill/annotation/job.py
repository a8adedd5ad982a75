"""The work of the annotate command: fill the cache, or inspect it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from distill.annotation.annotation_job import AnnotationJob, open_annotation_job
from distill.annotation.answers import choose_answers
from distill.annotation.codec_probe import candidate_codecs, compare_codecs, format_fidelity, sample_distributions
from distill.annotation.fill import Part, fill, filter_rationales, loaded
from distill.annotation.inspection import estimate, export_parquet, format_record, rescore
from distill.annotation.requests import collect_requests, examples_to_reason, without_labels
from distill.annotation.row_counts import rationale_counts, say_answers, table
from distill.app.config import Config
from distill.app.console import is_first_process, say
from distill.app.progress import token_speed
from distill.cache.codecs.dense import Dense
from distill.errors import CacheError, ConfigError
from distill.records import SPANS, Example, Request, Span, unique_requests

_NUM_RESCORED = 32


def annotate(config: Config) -> float:
    """Fill the cache for all splits, or inspect it; return the number of new records."""
    job = open_annotation_job(config)
    examples = _examples_by_span(config, job)
    if not (config.show or config.export or config.dry_run or config.verify or config.probe):
        return _fill(job, examples, _part(config))
    requests = collect_requests(job, examples)
    if config.show:
        print(_show(job, requests.all_requests, str(config.show)))
    elif config.export:
        num_rows = export_parquet(
            job.reader(requests.requests), requests.all_requests, job.prompts, Path(config.export)
        )
        print(f"{config.export}\n{num_rows} targets with their tokens, ids and log-probabilities")
    elif config.dry_run:
        print(_estimate(job, requests.all_requests))
    elif config.probe:
        print(_probe(config, job, unique_requests(requests.requests.values())))
    else:  # without sampled rationales, which may differ by rounding
        print(_verify(job, unique_requests(requests.requests.values()), config.seed))
    return 0.0


def _examples_by_span(config: Config, job: AnnotationJob) -> dict[Span, Sequence[Example]]:
    splits, examples = job.splits, dict[Span, Sequence[Example]]()
    if "answer" in config.spans:
        examples["answer"] = [*splits.train, *splits.validation, *without_labels(splits.test)]
    if "rationale" in config.spans:
        is_reasoned = config.task.answer_mode == "reasoned"
        examples["rationale"] = examples_to_reason(splits, job.num_rationales, is_answer_reasoned=is_reasoned)
    return examples


def _part(config: Config) -> Part:
    number, _, num_parts = str(config.part).partition("/")
    if not (number.isdecimal() and num_parts.isdecimal() and 1 <= int(number) <= int(num_parts)):
        raise ConfigError(f"part={config.part}: expected number/parts, for example part=3/16 for the third of sixteen")
    return Part(int(number), int(num_parts), config.devices)


def _fill(job: AnnotationJob, examples: Mapping[Span, Sequence[Example]], part: Part) -> float:
    filled = fill(job, examples, part=part)
    say_answers(job, filled)
    rationales = rationale_counts(filled, filter_rationales(job, filled))
    rows = {**job.splits.counts, "rationales": rationales}
    if filled.answers:
        rows["answers"] = choose_answers(job, filled).counts
    if is_first_process():
        print(
            f"{job.store.location}\n{len(job.store)} records, {filled.num_annotated} of them new in "
            f"{filled.seconds:.0f} s; kept {rationales.kept} of {rationales.read} rationales; "
            f"{len(filled.too_long)} examples too long\n{table(rows)}"
        )
    return float(filled.num_annotated)


def _show(job: AnnotationJob, requests: Sequence[Request], selector: str) -> str:
    matches = [
        request
        for request in requests
        if selector in (request.key, request.example.id) or request.example.question.startswith(selector)
    ]
    stored = [request for request in matches if request.key in job.store]
    if not stored:
        raise ConfigError(
            f"show={selector} matches {len(matches)} requests, none of them with a record in {job.store.folder}; "
            "expected the id of an example, the key of a record or the beginning of a question"
        )
    reader = job.reader({})
    return "\n\n".join(format_record(request, reader.read(request), job.prompts) for request in stored)


def _estimate(job: AnnotationJob, requests: Sequence[Request]) -> str:
    missing = job.store.missing(requests)
    summary = f"{job.store.location}\n{len(requests) - len(missing)} records exist, {len(missing)} are missing"
    if not missing:
        return summary
    with loaded(job.teacher):
        result = estimate(job, missing)
    return (
        f"{summary}; they will take about {result.seconds:.0f} s and {result.num_bytes / 1e6:.2f} MB "
        f"({token_speed(result.num_read, result.num_written, result.seconds)}; measured on {result.num_sampled} of "
        "them; nothing was written)"
    )


def _probe(config: Config, job: AnnotationJob, requests: Sequence[Request]) -> str:
    teacher = job.build_teacher(codec=job.positions.cut(Dense()))
    say(f"reading full distributions of some of {len(requests)} targets to compare codecs; nothing is written")
    with loaded(teacher):
        distributions = sample_distributions(teacher, job.positions, requests, config.seed)
    if not distributions:
        raise ConfigError("this teacher gives no soft targets, so there are no codecs to compare")
    fidelities = compare_codecs(distributions, candidate_codecs(config.cache.codec.get("temperature", 1.0)))
    return format_fidelity(fidelities, sum(map(len, distributions)))


def _verify(job: AnnotationJob, requests: Sequence[Request], seed: int) -> str:
    problems = job.store.check()
    if problems:
        raise CacheError("\n".join(problems))
    lines = [f"{job.store.location}\n{len(job.store)} records: all checksums are correct"]
    with loaded(job.teacher):
        for span in SPANS:
            of_span = [request for request in requests if request.span == span]
            result = rescore(job.store, job.teacher, of_span, _NUM_RESCORED, seed)
            lines.append(
                f"{result.num_records} {span}s annotated again: total variation from the live teacher at most "
                f"{result.distance:.4f}, between batch sizes {result.noise_floor:.4f}"
            )
            if not result.is_close:
                raise CacheError(f"{lines[0]}, but {lines[-1]}. Another teacher or machine annotated these records")
    return "\n".join(lines)
