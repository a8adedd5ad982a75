"""The main job: annotate what the cache lacks, free the teacher, train a student, evaluate it, report."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from omegaconf import DictConfig

from distill import __version__, metrics, models
from distill import config as configuration
from distill.annotate import Filled, Source, check_rationales, fill, open_source, without_answers
from distill.data import DistillData, Join, Lesson
from distill.evaluate import Evaluation, teacher_predictions
from distill.losses import Objective
from distill.modules import StudentModule
from distill.prompts import Prompts, check_shared_vocabulary, load_tokenizer
from distill.records import SPANS, CheckedRationale, ConfigError, Example, Span
from distill.report import to_text, write_report
from distill.student import open_student, save_student, size_bytes, weights_hash
from distill.tracking import Tracking, progress


@dataclass(frozen=True)
class Curriculum:
    """What a student is taught, and what was left out of it."""

    prompts: Prompts
    train: Sequence[Lesson]
    validation: Sequence[Lesson]
    rationales: Sequence[CheckedRationale]
    skipped: Mapping[str, str]


def main(config: DictConfig) -> float:
    """Run the main job; return the student's accuracy on validation's successor, the test split."""
    configuration.check(config)
    run_dir = configuration.run_dir()
    plain = configuration.save(config, run_dir / "config.yaml")
    objectives: dict[str, Objective] = {n: configuration.build(node) for n, node in config.loss.items()}
    source = open_source(config)
    check_parts(config, source, objectives)
    tracking: Tracking = configuration.build(config.tracking)
    name = f"{'+'.join(objectives)}-seed{config.seed}"
    exit_code = 1
    tracking.start(run_dir, name=name, group=configuration.sweep_name(), job_type="train", config=plain)
    run: dict[str, Any] = {"name": name, "losses": list(objectives), "seed": config.seed} | provenance(config)
    try:
        filled, curriculum = teach(config, source, objectives)
        results = learn(config, source, filled, curriculum, objectives, tracking, run, run_dir)
        exit_code = 0
    finally:
        run["tracking"] = tracking.finish(exit_code)
        (run_dir / "run.json").write_text(json.dumps(run, indent=1))
    summary = write_report([run_dir], run_dir)
    print(f"\n{to_text(summary)}\n\nrun folder  {run_dir}\nreport      {run_dir / 'report.html'}")
    print(f"student     {run_dir / 'student'}\ntracking    {run['tracking']['upload'] or run['tracking']['where']}")
    return float(results["student"]["accuracy"])


def check_parts(config: DictConfig, source: Source, objectives: Mapping[str, Objective]) -> None:
    """Refuse parts that cannot work together, before anything heavy is loaded."""
    problems = []
    for name, objective in objectives.items():
        if objective.source == "soft" and not source.teacher.gives_soft_targets:
            problems.append(f"loss.{name} needs soft targets, and this teacher gives none")
        if objective.source == "soft":
            try:
                source.codec.check_temperature(objective.temperature)
            except ConfigError as error:
                problems.append(f"loss.{name}: {error}")
    if not objectives:
        problems.append("loss is empty: name at least one, for example loss=[answer,kl]")
    if config.task.answer == "reasoned" and not any(o.span == "rationale" for o in objectives.values()):
        problems.append("task.answer=reasoned needs a loss on rationales: loss=[answer,kl,rationale]")
    if problems:
        raise ConfigError(*problems)


def teach(config: DictConfig, source: Source, objectives: Mapping[str, Objective]) -> tuple[Filled, Curriculum]:
    """Fill the cache for what the losses read, and join it with the examples."""
    splits = source.splits
    spans = {o.span for o in objectives.values()} | {"answer"}
    wanted: dict[Span, Sequence[Example]] = {
        "answer": [*splits.train, *splits.validation, *without_answers(splits.test)]
    }
    if "rationale" in spans:
        unexplained = [e for e in splits.train[: source.num_rationales] if e.rationale is None]
        wanted["rationale"] = [*unexplained, *without_answers(splits.test[: config.num_samples])]
    filled = fill(source, wanted)
    checked = check_rationales(splits.train, filled, source.store, source.task)
    folder = models.resolve(config.student.model, Path(config.root).resolve())
    tokenizer = load_tokenizer(folder)
    if any(o.source == "soft" for o in objectives.values()):
        check_shared_vocabulary(source.prompts.tokenizer, tokenizer)
    prompts = Prompts(
        tokenizer, source.prompts.layout, (), max_length=config.prompt.max_length, too_long=config.prompt.too_long
    )
    join = Join(
        prompts=prompts,
        store=source.store,
        requests=filled.requests,
        rationales={c.example_id: c for c in checked if c.reason is None},
        answer=config.task.answer,
        needed=frozenset((o.span, o.source) for o in objectives.values()),
    )
    train, validation = join.lessons(splits.train), join.lessons(splits.validation)
    if not train:
        raise ConfigError(f"no train example has anything that the losses {sorted(objectives)} read")
    return filled, Curriculum(prompts, train, validation, checked, {**filled.too_long, **join.skipped})


def learn(
    config: DictConfig,
    source: Source,
    filled: Filled,
    curriculum: Curriculum,
    objectives: Mapping[str, Objective],
    tracking: Tracking,
    run: dict[str, Any],
    run_dir: Path,
) -> dict[str, Any]:
    """Train, save and evaluate the student; fill in `run`, write results and predictions."""
    lightning.seed_everything(config.seed, workers=True, verbose=False)
    folder = models.resolve(config.student.model, Path(config.root).resolve())
    student = open_student(
        folder,
        keep_layers=config.student.keep_layers,
        freeze=list(config.student.freeze),
        from_scratch=config.student.from_scratch,
    )
    run["start"] = weights_hash(student)
    run["cache"] = _cache_card(source, filled)
    run["counts"] = _counts(source, curriculum)
    _write_lines(run_dir / "rejected.jsonl", _rejected(curriculum))
    test, teacher = source.splits.test, _test_annotations(source, filled)
    evaluation = Evaluation(student, curriculum.prompts, source.task, config.task.answer)
    limit = config.teacher.kind.max_new_tokens
    started = time.monotonic()
    rows = {"teacher": _teacher_row(source, test, teacher, folder)}
    if config.evaluate_before:
        _say(f"evaluating the student before training on {len(test)} test examples ...")
        rows["before"] = _row(evaluation.predict(test, teacher, limit), source, student, None)
    evaluating = time.monotonic() - started
    training = fit(config, curriculum, objectives, source, student, tracking, run_dir)
    save_student(student, curriculum.prompts.tokenizer, run_dir / "student")
    _say(f"evaluating the student on {len(test)} test examples ...")
    started = time.monotonic()
    predictions = evaluation.predict(test, teacher, limit)
    rows["student"] = _row(predictions, source, student, training)
    rows["student"]["ms_per_example"] = evaluation.milliseconds(test, limit)
    size = size_bytes(run_dir / "student")
    for name in ("before", "student"):
        if name in rows:
            rows[name] |= {"size_bytes": size, "ms_per_example": rows["student"]["ms_per_example"]}
    samples = _samples(config, source, filled, evaluation, limit)
    run["seconds"] = {"annotate": filled.seconds, "train": training, "evaluate": evaluating + time.monotonic() - started}
    told = [_prediction_row(prediction, samples) for prediction in predictions]
    _write_lines(run_dir / "predictions.jsonl", told)
    (run_dir / "results.json").write_text(json.dumps({"rows": rows}, indent=1))
    _track(tracking, rows, told, run, run_dir, source)
    return rows


def fit(
    config: DictConfig,
    curriculum: Curriculum,
    objectives: Mapping[str, Objective],
    source: Source,
    student: Any,
    tracking: Tracking,
    run_dir: Path,
) -> float:
    """Train the student in place; return the seconds it took."""
    data = DistillData(
        train=curriculum.train,
        validation=curriculum.validation,
        batch_size=config.batch_size,
        microbatch_size=config.microbatch_size,
        num_steps=config.trainer.max_steps,
        seed=config.seed,
        padding_id=curriculum.prompts.end,
    )
    module = StudentModule(
        student,
        objectives=objectives,
        vocabulary_size=curriculum.prompts.vocabulary_size,
        retemper=source.codec.at_temperature,
        make_optimizer=configuration.build(config.optim.optimizer),
        make_schedule=configuration.build(config.optim.schedule),
    )
    devices = config.trainer.devices if isinstance(config.trainer.devices, int) else 1
    per_step = data.num_microbatches(devices)
    checkpoint = ModelCheckpoint(run_dir / "checkpoints", save_last=True, save_top_k=0, save_on_exception=True)
    trainer: lightning.Trainer = configuration.build(
        config.trainer,
        precision=_precision(config.trainer.precision),
        accumulate_grad_batches=per_step,
        val_check_interval=config.validate_every * per_step,
        check_val_every_n_epoch=None,
        enable_progress_bar=sys.stderr.isatty(),
        callbacks=[checkpoint, progress("steps")],
        logger=[CSVLogger(run_dir, name="", version=""), *tracking.loggers()],
    )
    _say(f"training on {len(curriculum.train)} examples, {config.trainer.max_steps} steps of {config.batch_size}")
    student.train()
    start = time.monotonic()
    trainer.fit(module, data, ckpt_path=config.resume, weights_only=True)
    return time.monotonic() - start


def provenance(config: DictConfig) -> dict[str, Any]:
    """What produced a run: command, versions, commit, machine."""
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "steps": config.trainer.max_steps,
        "batch_size": config.batch_size,
        "version": __version__,
        "commit": _git("rev-parse", "HEAD"),
        "is_dirty": bool(_git("status", "--porcelain")),
        "packages": {name: version(name) for name in ("torch", "lightning", "transformers", "wandb")},
        "device": f"{platform.machine()}, {torch.get_num_threads()} threads"
        if not torch.cuda.is_available()
        else torch.cuda.get_device_name(),
        "task": config.task.name,
        "teacher": config.teacher.model,
        "student": config.student.model,
    }


def _git(*arguments: str) -> str | None:
    folder = Path(__file__).parent
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _precision(asked: str) -> Any:
    if asked != "auto":
        return asked
    return "bf16-mixed" if models.native_dtype() == torch.bfloat16 else "32-true"


def _cache_card(source: Source, filled: Filled) -> dict[str, Any]:
    return {
        "dir": str(source.store.folder),
        "fingerprint": source.store.folder.name.rpartition("-")[2],
        "num_records": len(source.store),
        "num_reused": filled.num_reused,
        "num_annotated": filled.num_annotated,
        "annotation_seconds": sum(cost["seconds"] for cost in source.store.costs()),
    }


def _counts(source: Source, curriculum: Curriculum) -> dict[str, Any]:
    reasons = Counter(c.reason for c in curriculum.rationales if c.reason)
    return {
        "train": len(source.splits.train),
        "labelled": sum(example.answer is not None for example in source.splits.train),
        "lessons": len(curriculum.train),
        "validation": len(source.splits.validation),
        "test": len(source.splits.test),
        "dropped": dict(source.splits.dropped),
        "too_long": len(curriculum.skipped),
        "rationales_kept": sum(c.reason is None for c in curriculum.rationales),
        "rationales_rejected": dict(reasons),
    }


def _rejected(curriculum: Curriculum) -> list[dict[str, Any]]:
    rows = [
        {"id": c.example_id, "reason": c.reason, "text": c.annotation.rationale}
        for c in curriculum.rationales
        if c.reason
    ]
    return rows + [{"id": i, "reason": "too long", "text": why} for i, why in curriculum.skipped.items()]


def _test_annotations(source: Source, filled: Filled) -> dict[str, Any]:
    keys = {e.id: filled.requests.get((e.id, "answer")) for e in source.splits.test}
    return {example_id: source.store.read(request.key) for example_id, request in keys.items() if request}


def _teacher_row(source: Source, test: Sequence[Example], teacher: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    cost = next((c for c in reversed(source.store.costs()) if c.get("ms_per_example")), {})
    return metrics.score(teacher_predictions(test, teacher), source.task.choices) | {
        "parameters": cost.get("parameters"),
        "size_bytes": size_bytes(folder),
        "ms_per_example": cost.get("ms_per_example"),
        "training_seconds": None,
    }


def _row(predictions: Sequence[metrics.Prediction], source: Source, student: Any, seconds: float | None) -> dict[str, Any]:
    return metrics.score(predictions, source.task.choices) | {
        "parameters": sum(parameter.numel() for parameter in student.parameters()),
        "training_seconds": seconds,
    }


def _samples(
    config: DictConfig, source: Source, filled: Filled, evaluation: Evaluation, limit: int
) -> dict[str, tuple[str, str | None]]:
    """Student's and teacher's rationale for some test examples, by id."""
    chosen = source.splits.test[: config.num_samples]
    if not chosen:
        return {}
    requests = {e.id: filled.requests.get((e.id, "rationale")) for e in chosen}
    theirs = {i: source.store.read(request.key).rationale for i, request in requests.items() if request}
    mine = evaluation.rationales(chosen, limit)
    return {e.id: (text, theirs.get(e.id)) for e, text in zip(chosen, mine, strict=True)}


def _prediction_row(prediction: metrics.Prediction, samples: Mapping[str, tuple[str, str | None]]) -> dict[str, Any]:
    student, teacher = samples.get(prediction.example_id, (prediction.rationale, None))
    return {
        "id": prediction.example_id,
        "question": prediction.question,
        "gold": prediction.gold,
        "teacher_answer": prediction.teacher_answer,
        "teacher_rationale": teacher,
        "student_answer": prediction.answer,
        "student_written_answer": prediction.written_answer,
        "student_confidence": prediction.confidence,
        "student_rationale": student,
        "is_correct": prediction.is_correct,
    }


def _track(
    tracking: Tracking,
    rows: Mapping[str, Mapping[str, Any]],
    predictions: Sequence[Mapping[str, Any]],
    run: Mapping[str, Any],
    run_dir: Path,
    source: Source,
) -> None:
    plain = {n: {k: v for k, v in row.items() if k not in ("reliability", "interval")} for n, row in rows.items()}
    tracking.summary({f"test/{k}": v for k, v in plain["student"].items() if v is not None})
    tracking.summary({f"test/{name}/accuracy": row["accuracy"] for name, row in plain.items() if name != "student"})
    tracking.table("comparison", [{"model": name, **row} for name, row in plain.items()])
    tracking.table("predictions", predictions[:20])
    cache = {"fingerprint": run["cache"]["fingerprint"], "num_records": run["cache"]["num_records"]}
    tracking.artifact(f"cache-{source.store.folder.name}", "cache", source.store.folder, cache)
    tracking.artifact(f"student-{run_dir.name}", "model", run_dir / "student", {"cache": cache, "start": run["start"]})


def _write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    configuration.command("train", main)
