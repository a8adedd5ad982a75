"""The main job: fill the cache, release the teacher, train a student, evaluate it, report."""

from __future__ import annotations

import gc
import json
import math
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.loggers import Logger

from distill.annotation.fill import loaded
from distill.app import config as configuration
from distill.app.config import Config
from distill.app.console import is_first_process, say, terminal_width
from distill.app.files import Json, write_json, write_json_lines
from distill.app.provenance import provenance
from distill.app.tracking import Tracking
from distill.errors import ConfigError
from distill.evaluation.answers import Evaluation, model_row, speeds, teacher_row
from distill.evaluation.kinds import AnyEvaluation, evaluation_of
from distill.evaluation.texts import require_text_measures
from distill.lessons.curriculum import Curriculum, Job, build_curriculum, prepare
from distill.models.batches import BatchLimit
from distill.records import Annotation, Example, Span
from distill.reports.measures import ACCURACY, measure_of
from distill.reports.page import write_report
from distill.reports.tables import tables
from distill.reports.text import to_text
from distill.reports.verdicts import Summary
from distill.students.causal_lm import compiled, merge_adapters
from distill.students.saving import SavedStudent, SavedStudentError, saved_dtype, size_bytes
from distill.training.bag_of_words import bag_of_words_rows, check_bag_of_words
from distill.training.fit import (
    Training,
    build_training,
    fit,
    open_job_student,
    preflight_input,
    run_preflight,
    stop_on_failures,
)
from distill.training.forecast import forecast_run, training_findings, verdict
from distill.training.preflight import table
from distill.training.run_facts import (
    cache_card,
    contamination,
    counts,
    label_counts,
    licenses,
    rationales,
    rejected,
    settings,
)
from distill.training.settings import check_settings
from distill.training.temperature import calibrated, calibration_facts
from distill.training.untrained import untrained_row

_OBJECTIVES = {"test": "", "validation": "validation_"}  # the beginning of the objective's key in results.json
# What the student before training shares with the trained one.
_OF_ARCHITECTURE = ("size_bytes", "dtype", "ms_per_example", "ms_fastest", "ms_slowest", "architecture", "peak_bytes")
# Settings that may differ between a complete run and its repetition.
_MAY_DIFFER = (
    *("root", "resume", "preflight", "plan", "tracking", "checkpoint_every"),
    *("license", "language", "bag_of_words"),
)


def train(config: Config) -> float:
    """Run the main job; return the student's score on the objective's split, the same in all processes."""
    if config.objective not in _OBJECTIVES:
        raise ConfigError(f"objective={config.objective}: expected {' or '.join(_OBJECTIVES)}")
    check_settings(config)
    run_dir = configuration.run_dir()
    if config.plan:
        return plan(prepare(config, run_dir)) if is_first_process() else 0.0
    if (score := _finished(config, run_dir)) is not None:
        say(f"{run_dir} holds this run and is complete; resume=never runs it again")
        return score
    job = prepare(config, run_dir)
    require_text_measures(job.annotation_job.task)
    check_bag_of_words(job)
    if not is_first_process():
        return _score(config, distill(job, [], {}))
    check_student(job)
    name = f"{'+'.join(job.objectives)}-seed{config.seed}"
    run: Json = {"name": name, "losses": list(job.objectives), "seed": config.seed, **settings(config), **provenance()}
    tracking: Tracking = configuration.build(config.tracking)
    plain = configuration.save(config, run_dir / "config.yaml")  # from here on the folder holds a run
    exit_code = 1
    try:
        tracking.start(run_dir, name=name, group=configuration.sweep_name(), job_type="train", config=plain)
        results = distill(job, tracking.loggers(), run)
        if results:
            write_json(run_dir / "run.json", run)
            summary = write_report([run_dir], run_dir)
            shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)  # not needed once the run is complete
            _track(tracking, results, run, job, summary)
        exit_code = 0
    finally:
        gc.collect()  # break Lightning's reference cycles, or a sweep would keep this student in memory
        run["tracking"] = tracking.finish(exit_code)
        write_json(run_dir / "run.json", run)
    if not results:
        print("preflight passed; remove preflight=true to start the run")
        return 0.0
    _print_results(run_dir, results, run, summary)
    return _score(config, results)


def _print_results(run_dir: Path, results: Json, run: Json, summary: Summary) -> None:
    row = results["rows"]["student"]
    if configuration.sweep_name():  # a sweep ends in one report on all its runs; this run has nothing to compare with
        measure = measure_of(row)
        validated = row.get(f"validation_{measure.key}")
        beside = "" if validated is None else f", {measure.text(validated)} on validation"
        figure = f"{measure.text(row[measure.key])} on {row['num_examples']} test examples{beside}"
        print(f"\n{measure.name:<12}{figure}")
    else:
        print(f"\n{to_text(summary, width=terminal_width())}\n")
    print(f"run folder  {run_dir}\nreport      {run_dir / 'report.html'}\nstudent     {run_dir / 'student'}")
    print(f"tracking    {run['tracking']['upload'] or run['tracking']['where'] or 'off'}\n")


def plan(job: Job) -> float:
    """Print the resources that the run needs and those available; raise ConfigError with all that are missing."""
    job.run_dir.mkdir(parents=True, exist_ok=True)  # free disk space is measured there
    forecast = forecast_run(job)
    student = open_job_student(job)
    inputs = preflight_input(job, build_training(job, forecast.curriculum, student, []))
    findings = [*forecast.findings, *training_findings(forecast, inputs)]
    print(f"{table(findings)}\n\n{verdict(findings, forecast.is_bound)}")
    stop_on_failures(findings)
    return 0.0


def _score(config: Config, results: Json) -> float:
    """The value that a sweeper maximizes: the accuracy or, of free texts, the cross-entropy with a minus sign.

    NaN, a failed trial to a search, where there is no validation example.
    """
    row = results["rows"]["student"] if results else {ACCURACY.key: 0.0}
    score = measure_of(row).score(row, _OBJECTIVES[config.objective] if results else "")
    return math.nan if score is None else score


def _finished(config: Config, run_dir: Path) -> float | None:
    """Return the score of the folder's run if it is complete; raise ConfigError if it is another run."""
    results = run_dir / "results.json"
    if config.resume != "auto" or not (results.is_file() and (run_dir / "report.html").is_file()):
        return None
    if differences := configuration.differences(config, run_dir / "config.yaml", ignored=_MAY_DIFFER):
        raise ConfigError(
            f"{run_dir} holds another run: {'; '.join(differences)}. Choose another folder (hydra.run.dir, or in a "
            "sweep hydra.sweep.dir), or replace the run with resume=never"
        )
    return _score(config, json.loads(results.read_text()))


def distill(job: Job, loggers: Sequence[Logger], run: Json) -> Json:
    """Annotate, train, evaluate; write the student and all figures to the run folder; return the figures.

    Returns {} for preflight=true. With several processes, the first evaluates and writes; all return its results.
    """
    curriculum = build_curriculum(job)
    lightning.seed_everything(job.config.seed, workers=True, verbose=False)
    student = open_job_student(job)
    training = build_training(job, curriculum, student, loggers)
    is_first = is_first_process()
    if is_first:
        run |= {"cache": cache_card(job, curriculum), "counts": counts(job, curriculum)}
        run |= {"rows": {name: asdict(rows) for name, rows in curriculum.rows.items()}}
        run |= {"labels": label_counts(job), "licenses": licenses(job)}
        run |= {"start": training.identity["student"], "contamination": contamination(job)}
        write_json_lines(job.run_dir / "rejected.jsonl", rejected(curriculum))
        write_json_lines(job.run_dir / "rationales.jsonl", rationales(job, curriculum))
    run["preflight"] = run_preflight(job, training)
    if job.config.preflight is True:
        return {}
    limit = BatchLimit(job.config.microbatch_size, job.config.batch_unit)
    mode = job.config.task.answer_mode, job.config.max_new_tokens
    evaluation = evaluation_of(student, job.prompts, job.annotation_job.task, *mode, limit)
    teacher = _teacher_on_test(job, curriculum)
    rows = _rows_before(job, training, evaluation, teacher) if is_first else {}
    rows |= bag_of_words_rows(job, curriculum, teacher) if is_first else {}
    with compiled(student) if job.config.student.compile else nullcontext():
        trained = fit(job, training)
    run["training"], results = trained.facts, Json()
    if is_first:
        temperature = calibrated(job, evaluation.with_model(trained.student))
        saved = _save(job, trained.student, job.run_dir / "student")
        run["saved"] = {"dtype": saved.dtype, "rounding": saved.rounding}
        evaluation = evaluation.with_model(saved.model)
        results = _results(job, curriculum, evaluation, teacher, rows, run, trained.seconds)
        if temperature is not None:
            run["calibration"] = calibration_facts(job, evaluation, temperature)
    shared: Json = training.trainer.strategy.broadcast(results)
    return shared


def check_student(job: Job) -> None:
    """Raise ConfigError, before the teacher is asked, if the student cannot be opened, read, or saved and reopened."""
    job.run_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".student-", dir=job.run_dir) as folder:
        try:
            saved = _save(job, open_job_student(job), Path(folder) / "student")
            job.kind.check_reading(saved.model.eval())
        except SavedStudentError as error:
            raise ConfigError(str(error)) from None


def _save(job: Job, student: Any, folder: Path) -> SavedStudent:
    """Save the student as it is shipped, its adapters merged."""
    dtype = saved_dtype(job.config.student.get("save_dtype"), job.student_folder)
    merge_adapters(student)
    return job.kind.save(student, folder, dtype)


def _teacher_on_test(job: Job, curriculum: Curriculum) -> dict[str, Annotation]:
    """Return the teacher's annotations of the test examples, with the soft targets that the student is compared to."""
    teacher = _annotations(job, curriculum, job.annotation_job.splits.test, "answer")
    if job.soft_annotation_job and curriculum.soft_filled:
        soft = job.reader(job.soft_annotation_job, curriculum.soft_filled.requests)
        scored = {id_: soft.find(id_, "answer") for id_ in teacher}
        teacher = {id_: replace(a, targets=s.targets if (s := scored[id_]) else {}) for id_, a in teacher.items()}
    if job.pairing is None:
        return {key: replace(annotation, targets={}) for key, annotation in teacher.items()}
    return {key: job.pairing.annotation(annotation) for key, annotation in teacher.items()}


def _rows_before(job: Job, training: Training, evaluation: AnyEvaluation, teacher: Mapping[str, Annotation]) -> Json:
    """The rows that are known before the student learns: the teacher's, and that of the student before training."""
    test = job.annotation_job.splits.test
    folder = job.annotation_job.folder if job.annotation_job.teacher.gives_soft_targets else None
    rows = {
        "teacher": teacher_row(
            test, teacher, job.annotation_job.task, job.annotation_job.prompts, job.annotation_job.store, folder
        )
    }
    if job.config.evaluate_before:
        rows["before"] = untrained_row(job, evaluation, teacher, training.identity["student"])
    return rows


def _results(
    job: Job,
    curriculum: Curriculum,
    evaluation: AnyEvaluation,
    teacher: Mapping[str, Annotation],
    rows: Json,
    run: Json,
    seconds: float,
) -> Json:
    """Evaluate the saved student on test, save its predictions; return all figures."""
    test, student = job.annotation_job.splits.test, evaluation.model
    say(f"evaluating the student on {len(test)} test examples ...")
    start = time.monotonic()
    predictions = evaluation.predict(test, teacher)
    rows["student"] = model_row(predictions, student) | {"training_seconds": seconds}
    rows["student"] |= {"size_bytes": size_bytes(job.run_dir / "student")}
    if job.config.objective == "validation" and (validation := job.annotation_job.splits.validation):
        annotations = _annotations(job, curriculum, validation, "answer")
        on_validation = model_row(evaluation.predict(validation, annotations), student)
        key = measure_of(on_validation).key
        rows["student"] |= {f"validation_{key}": on_validation[key]}
    for name, speed in _speeds(job, evaluation).items():
        rows[name] |= speed
    shape = {key: rows["student"].get(key) for key in _OF_ARCHITECTURE}
    rows |= {"before": rows["before"] | shape} if "before" in rows else {}
    predicted_rows = _with_reasoning([p.as_row() for p in predictions], job, curriculum, evaluation)
    scoring_seconds = curriculum.soft_filled.seconds if curriculum.soft_filled else 0.0
    run["seconds"] = {
        "annotate": curriculum.filled.seconds + scoring_seconds,
        "train": seconds,
        "evaluate": time.monotonic() - start,
    }
    write_json_lines(job.run_dir / "predictions.jsonl", predicted_rows)
    write_json(job.run_dir / "results.json", {"rows": rows})
    return {"rows": rows, "predictions": predicted_rows}


def _speeds(job: Job, student: AnyEvaluation) -> dict[str, Json]:
    """Measure time and memory per answer of the student and, with time_teacher=true, of the teacher in turn."""
    test, annotation_job = job.annotation_job.splits.test, job.annotation_job
    if not job.config.time_teacher or not annotation_job.teacher.gives_soft_targets:
        return speeds({"student": student}, test)
    say("timing teacher and student in turn ...")
    with loaded(annotation_job.teacher) as model:
        mode = job.config.task.answer_mode, job.config.max_new_tokens
        return speeds(
            {"teacher": Evaluation(model, annotation_job.prompts, annotation_job.task, *mode), "student": student}, test
        )


def _annotations(job: Job, curriculum: Curriculum, examples: Sequence[Example], span: Span) -> dict[str, Annotation]:
    reader = job.reader(job.annotation_job, curriculum.filled.requests)
    return {example.id: a for example in examples if (a := reader.find(example.id, span))}


def _with_reasoning(rows: list[Json], job: Job, curriculum: Curriculum, evaluation: AnyEvaluation) -> list[Json]:
    """Add the teacher's and the student's reasoning to the first rows."""
    samples = job.annotation_job.splits.test[: job.config.num_samples]
    teacher = _annotations(job, curriculum, samples, "rationale")
    for row, example, text in zip(rows, samples, evaluation.rationales(samples), strict=False):
        row["student_rationale"] = row["student_rationale"] or text
        row["teacher_rationale"] = teacher[example.id].rationale if example.id in teacher else None
        row["gold_rationale"] = example.rationale
    return rows


def _track(tracking: Tracking, results: Json, run: Json, job: Job, summary: Summary) -> None:
    rows = {
        name: {key: value for key, value in row.items() if not isinstance(value, list)}
        for name, row in results["rows"].items()
    }
    measured = {key: value for key, value in rows["student"].items() if value is not None}
    key = measure_of(rows["student"]).key
    if (validated := measured.pop(f"validation_{key}", None)) is not None:
        tracking.summary({f"val/{key}": validated})  # of the student that was saved, for a sweep of W&B
    tracking.summary({f"test/{key}": value for key, value in measured.items()})
    tracking.summary({f"test/{name}/{key}": row[key] for name, row in rows.items() if name != "student"})
    for name, lines in tables(summary).items():
        tracking.table(name, [{key: _plain(value) for key, value in line.items()} for line in lines])
    tracking.table("predictions", results["predictions"][: job.config.num_samples])
    tracking.page("report", job.run_dir / "report.html")
    cache = job.annotation_job.store.folder
    tracking.artifact(f"cache-{cache.name}", "cache", cache, run["cache"])
    lineage = {"cache": run["cache"]["fingerprint"], "start": run["start"]}
    tracking.artifact(f"student-{run['name']}", "model", job.run_dir / "student", lineage)


def _plain(value: Any) -> Any:
    """Return the value, or None if it is NaN or infinite."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
