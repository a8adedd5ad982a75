"""The main job: annotate what the cache lacks, free the teacher, train a student, evaluate it, report."""

from __future__ import annotations

from distill import preemption

if __name__ == "__main__":  # before the imports that take seconds
    preemption.watch()

import gc
import json
import math
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import ModelParallelStrategy
from omegaconf import DictConfig
from torch import nn

from distill import config as configuration
from distill import models
from distill.accounts import cache_card, contamination, counts, rationales, rejected, settings
from distill.annotate import loaded
from distill.checkpoints import Checkpoints, Identity, WholeFiles, checked, digest, newest, step_of
from distill.curriculum import Curriculum, Job, identity_of, prepare, teach
from distill.data import Arrangement, DistillData, collate
from distill.evaluate import Evaluation, row_of, speeds, teacher_row
from distill.fetch import whole_file
from distill.forecast import foresee, verdict
from distill.forecast import training as training_needs
from distill.lessons import Records
from distill.modules import StudentModule
from distill.preflight import Finding, Plan, preflight, table
from distill.records import Annotation, ConfigError, Example, OutOfMemoryError, PreemptedError, Span
from distill.report import tables, to_text, write_report
from distill.sharding import in_one_piece
from distill.student import compiled, merge_adapters, open_student, save_student, size_bytes, weights_hash
from distill.tracking import Curves, Tracking, is_first_process, progress, provenance, say
from distill.verdicts import Summary

Json = dict[str, Any]
_OBJECTIVES = {"test": "accuracy", "validation": "validation_accuracy"}
# Between a run and its repetition.
_MAY_DIFFER = ("root", "resume", "preflight", "plan", "tracking", "checkpoint_every")


@dataclass(frozen=True)
class Training:
    """All that trains a student, put together and not yet started."""

    module: StudentModule
    data: DistillData
    trainer: lightning.Trainer
    checkpoints: Checkpoints
    curves: Curves
    curriculum: Curriculum
    identity: Identity


def main(config: DictConfig) -> float:
    """Run the main job; return the student's accuracy, on test if not on validation, the same in all processes."""
    configuration.check(config)
    if config.objective not in _OBJECTIVES:
        raise ConfigError(f"objective={config.objective}: wanted {' or '.join(_OBJECTIVES)}")
    run_dir = configuration.run_dir()
    if config.plan:
        return forecast(prepare(config, run_dir)) if is_first_process() else 0.0
    if (accuracy := _finished(config, run_dir)) is not None:
        say(f"{run_dir} holds this run already, and it is complete; resume=never runs it again")
        return accuracy
    if not is_first_process():
        return _accuracy(config, distill(prepare(config, run_dir), [], {}))
    plain = configuration.save(config, run_dir / "config.yaml")
    job = prepare(config, run_dir)
    name = f"{'+'.join(job.objectives)}-seed{config.seed}"
    run: Json = {"name": name, "losses": list(job.objectives), "seed": config.seed, **settings(config), **provenance()}
    tracking: Tracking = configuration.build(config.tracking)
    exit_code = 1
    try:
        tracking.start(run_dir, name=name, group=configuration.sweep_name(), job_type="train", config=plain)
        results = distill(job, tracking.loggers(), run)
        if results:
            _write(run_dir / "run.json", run)
            summary = write_report([run_dir], run_dir)
            shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)  # were for a run that breaks off
            _track(tracking, results, run, job, summary)
        exit_code = 0
    finally:
        gc.collect()  # Lightning's parts refer to each other: a sweep would keep this student beside the next
        run["tracking"] = tracking.finish(exit_code)
        _write(run_dir / "run.json", run)
    if not results:
        print("preflight: nothing stands against this run; leave out preflight=true to start it")
        return 0.0
    print(f"\n{to_text(summary)}\n")
    print(f"run folder  {run_dir}\nreport      {run_dir / 'report.html'}\nstudent     {run_dir / 'student'}")
    print(f"tracking    {run['tracking']['upload'] or run['tracking']['where'] or 'off'}")
    return _accuracy(config, results)


def forecast(job: Job) -> float:
    """Print what the run would need beside what there is; raises ConfigError with all that lacks."""
    job.run_dir.mkdir(parents=True, exist_ok=True)  # whose disk is looked at
    foreseen = foresee(job)
    student = _opened_student(job)
    what = _plan(job, arrange(job, foreseen.curriculum, student, []))
    findings = [*foreseen.findings, *training_needs(foreseen, what)]
    print(f"{table(findings)}\n\n{verdict(findings, foreseen.is_bound)}")
    _stop_at(findings)
    return 0.0


def _accuracy(config: DictConfig, results: Json) -> float:
    return float(results["rows"]["student"][_OBJECTIVES[config.objective]]) if results else 0.0


def _finished(config: DictConfig, run_dir: Path) -> float | None:
    """The accuracy of a run that is complete in this folder; raises ConfigError where it is another run."""
    results = run_dir / "results.json"
    if config.resume != "auto" or not (results.is_file() and (run_dir / "report.html").is_file()):
        return None
    if differing := configuration.differences(config, run_dir / "config.yaml", besides=_MAY_DIFFER):
        raise ConfigError(
            f"{run_dir} holds another run: {'; '.join(differing)}. Name another folder (hydra.run.dir, in a sweep "
            "hydra.sweep.dir), or replace it with resume=never"
        )
    return _accuracy(config, json.loads(results.read_text()))


def distill(job: Job, loggers: Sequence[Logger], run: Json) -> Json:
    """Annotate, train, evaluate; write the student and all figures to the run folder, and return these.

    Returns nothing where only the preflight was asked for. Of several processes the first evaluates and writes; the
    others return what it found.
    """
    curriculum = teach(job)
    lightning.seed_everything(job.config.seed, workers=True, verbose=False)
    student = _opened_student(job)
    training = arrange(job, curriculum, student, loggers)
    is_first = is_first_process()
    if is_first:
        run |= {"cache": cache_card(job, curriculum), "counts": counts(job, curriculum)}
        run |= {"start": training.identity["student"], "contamination": contamination(job)}
        _write_lines(job.run_dir / "rejected.jsonl", rejected(curriculum))
        _write_lines(job.run_dir / "rationales.jsonl", rationales(job, curriculum))
    run["preflight"] = look_ahead(job, training)
    if job.config.preflight is True:
        return {}
    evaluation = Evaluation(
        student, job.prompts, job.source.task, job.config.task.answer_mode, job.config.max_new_tokens
    )
    teacher = _said_on_test(job, curriculum)
    rows = _rows_before(job, training, evaluation, teacher) if is_first else {}
    with compiled(student) if job.config.student.compile else nullcontext():
        seconds = fit(job, training)
    student = in_one_piece(training.module, lambda: _opened_student(job))
    merge_adapters(student)
    evaluation = evaluation.of(student)
    found = _judged(job, curriculum, evaluation, teacher, rows, run, seconds) if is_first else {}
    shared: Json = training.trainer.strategy.broadcast(found)
    return shared


def _opened_student(job: Job) -> Any:
    settings = job.config.student
    return open_student(
        job.student_folder,
        keep_layers=settings.keep_layers,
        freeze=list(settings.freeze),
        from_scratch=settings.from_scratch,
        lora=configuration.build(settings.lora),
        gradient_checkpointing=settings.gradient_checkpointing,
    )


def _said_on_test(job: Job, curriculum: Curriculum) -> dict[str, Annotation]:
    """The teacher's answers to the test questions, with the soft targets that a student's are compared with."""
    teacher = _annotations(job, curriculum, job.source.splits.test, "answer")
    if job.soft_source and curriculum.soft_filled:
        soft = Records(job.soft_source.store, curriculum.soft_filled.requests)
        read = {id_: soft.find(id_, "answer") for id_ in teacher}
        teacher = {id_: replace(a, targets=s.targets if (s := read[id_]) else {}) for id_, a in teacher.items()}
    if not job.is_vocabulary_shared:
        teacher = {key: replace(annotation, targets={}) for key, annotation in teacher.items()}
    return teacher


def _rows_before(job: Job, training: Training, evaluation: Evaluation, teacher: Mapping[str, Annotation]) -> Json:
    """What is known before the student learns: the teacher's row, and its own; found once, also where a run goes on."""
    test, path = job.source.splits.test, job.run_dir / "before.json"
    folder = job.source.folder if job.source.teacher.gives_soft_targets else None
    rows = {"teacher": teacher_row(test, teacher, job.source.task, job.source.store, folder)}
    if not job.config.evaluate_before:
        return rows
    known = json.loads(path.read_text()) if path.is_file() else {}
    if known.get("of") != digest(training.identity):
        say(f"evaluating the student before training on {len(test)} test examples ...")
        row = row_of(evaluation.predict(test, teacher), job.source.task, training.module.model)
        known = {"of": digest(training.identity), "row": row}
        _write(path, known)
    return rows | {"before": known["row"]}


def _judged(
    job: Job,
    curriculum: Curriculum,
    evaluation: Evaluation,
    teacher: Mapping[str, Annotation],
    rows: Json,
    run: Json,
    seconds: float,
) -> Json:
    """Save the student and what it answers to the test questions; return all figures."""
    test, student = job.source.splits.test, evaluation.model
    save_student(student, job.prompts.tokenizer, job.run_dir / "student")
    say(f"evaluating the student on {len(test)} test examples ...")
    start = time.monotonic()
    predictions = evaluation.predict(test, teacher)
    rows["student"] = row_of(predictions, job.source.task, student) | {"training_seconds": seconds}
    rows["student"] |= {"size_bytes": size_bytes(job.run_dir / "student")}
    if job.config.objective == "validation":
        on_validation = row_of(evaluation.predict(job.source.splits.validation, {}), job.source.task, student)
        rows["student"] |= {"validation_accuracy": on_validation["accuracy"]}
    for name, measured in _speeds(job, evaluation).items():
        rows[name] |= measured
    shape = {key: rows["student"][key] for key in ("size_bytes", "ms_per_example", "peak_bytes")}
    rows |= {"before": rows["before"] | shape} if "before" in rows else {}
    told = _with_reasoning([p.as_row() for p in predictions], job, curriculum, evaluation)
    seconds_read = curriculum.soft_filled.seconds if curriculum.soft_filled else 0.0
    run["seconds"] = {
        "annotate": curriculum.filled.seconds + seconds_read,
        "train": seconds,
        "evaluate": time.monotonic() - start,
    }
    _write_lines(job.run_dir / "predictions.jsonl", told)
    _write(job.run_dir / "results.json", {"rows": rows})
    return {"rows": rows, "predictions": told}


def _speeds(job: Job, student: Evaluation) -> dict[str, dict[str, float | None]]:
    """Time and memory of an answer: the student's, and where it was asked for the teacher's beside it."""
    test, source = job.source.splits.test, job.source
    if not job.config.time_teacher or not source.teacher.gives_soft_targets:
        return speeds({"student": student}, test)
    say("timing teacher and student in turn ...")
    with loaded(source.teacher) as model:
        asked = job.config.task.answer_mode, job.config.max_new_tokens
        return speeds({"teacher": Evaluation(model, source.prompts, source.task, *asked), "student": student}, test)


def arrange(job: Job, curriculum: Curriculum, student: nn.Module, loggers: Sequence[Logger]) -> Training:
    """Put together what trains the student in place."""
    config = job.config
    identity = identity_of(job, curriculum, weights_hash(student))
    module = StudentModule(
        student,
        objectives=job.objectives,
        vocabulary_size=job.prompts.vocabulary_size,
        retemper=job.source.codec.at_temperature,
        make_optimizer=configuration.build(config.optim.optimizer),
        make_schedule=configuration.build(config.optim.schedule),
        seed=config.seed,
    )
    if config.share_prompt:
        curriculum = _with_shared_prompts(curriculum, module, job.prompts.end)
    data = DistillData(
        train=curriculum.train,
        validation=curriculum.validation,
        read=curriculum.read,
        batch_size=config.batch_size,
        microbatch_size=config.microbatch_size,
        batch_unit=config.batch_unit,
        arrangement=Arrangement(config.order, config.balance),
        num_steps=config.trainer.max_steps,
        seed=config.seed,
        padding_id=job.prompts.end,
        num_workers=config.num_workers,
    )
    curves = Curves(job.run_dir)
    checkpoints = Checkpoints(job.run_dir / "checkpoints", every=config.checkpoint_every, identity=identity)
    trainer: lightning.Trainer = configuration.build(
        config.trainer,
        precision=_precision(config.trainer.precision),
        check_val_every_n_epoch=None,
        enable_checkpointing=False,
        enable_progress_bar=sys.stderr.isatty(),
        plugins=[WholeFiles()],
        callbacks=[
            progress("steps", config.trainer.max_steps),
            *(configuration.build(node) for node in config.get("callback", {}).values()),
            checkpoints,  # after those that change weights in the end
        ],
        logger=[curves, *loggers],
    )
    _check_sharded(config, trainer)
    trainer.accumulate_grad_batches = data.num_microbatches(trainer.world_size)
    trainer.val_check_interval = config.validate_every * trainer.accumulate_grad_batches
    # Deterministic mode also overwrites all new memory, to show reads of what was never written: an eighth of a step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return Training(module, data, trainer, checkpoints, curves, curriculum, identity)


def _check_sharded(config: DictConfig, trainer: lightning.Trainer) -> None:
    """Raise ConfigError with what a sharded student cannot have."""
    if not isinstance(trainer.strategy, ModelParallelStrategy):
        return
    averaged = [name for name, node in config.get("callback", {}).items() if "WeightAveraging" in node._target_]
    wrong = [*(f"callback.{name}" for name in averaged), *(["student.compile=true"] if config.student.compile else [])]
    if wrong:
        raise ConfigError(*(f"trainer=fsdp2 does not go with {each}; leave one of them out" for each in wrong))


def look_ahead(job: Job, training: Training) -> list[Json]:
    """Find out on the first lessons what cannot work, and stop there, before hours are spent."""
    config = job.config
    if config.preflight is False:
        return []
    findings = preflight(_plan(job, training))
    if config.preflight is True or not all(finding.passed in (True, None) for finding in findings):
        say(table(findings))
    else:
        say(f"preflight: {sum(finding.passed is True for finding in findings)} checks passed")
    _stop_at(findings)
    return [asdict(finding) for finding in findings]


def _stop_at(findings: Sequence[Finding]) -> None:
    """Raise ConfigError with all that must stop the run."""
    if stops := [finding.problem for finding in findings if finding.stops]:
        raise ConfigError(*stops)


def _plan(job: Job, training: Training) -> Plan:
    config, trainer = job.config, training.trainer
    return Plan(
        module=training.module,
        objectives=job.objectives,
        lessons=training.curriculum.train,
        read=training.curriculum.read,
        annotation=(job.soft_source or job.source).store.read,
        prompts=job.prompts,
        is_vocabulary_shared=job.is_vocabulary_shared,
        is_from_scratch=config.student.from_scratch,
        make_optimizer=configuration.build(config.optim.optimizer),
        batch_size=config.batch_size,
        microbatch_size=config.microbatch_size,
        batch_unit=config.batch_unit,
        num_steps=config.trainer.max_steps,
        num_devices=trainer.world_size,
        run_dir=job.run_dir,
        device=trainer.strategy.root_device,
        precision=trainer.precision_plugin.forward_context,
    )


def fit(job: Job, training: Training) -> float:
    """Train the student in place, from where a run of this folder broke off; return the seconds it took in all."""
    config, trainer = job.config, training.trainer
    checkpoint = _resumed(config.resume, job.run_dir / "checkpoints", training.identity)
    num_lessons = len(training.curriculum.train)
    say(f"training on {num_lessons} examples, {config.trainer.max_steps} steps of {config.batch_size}")
    if checkpoint:
        say(f"going on from {checkpoint}")
    training.curves.go_on(step_of(checkpoint) if checkpoint else 0)
    training.module.model.train()
    try:
        trainer.fit(training.module, training.data, ckpt_path=checkpoint, weights_only=True)
    except SystemExit:  # what Lightning makes of Ctrl-C, and of a signal before it was told to leave these alone
        if preemption.is_asked():
            raise PreemptedError("asked to stop before the first step; the same command begins it") from None
        say(f"to go on from the last checkpoint add hydra.run.dir={job.run_dir}")
        raise KeyboardInterrupt from None
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        longest = max(lesson.num_tokens for lesson in training.curriculum.train)
        raise OutOfMemoryError(
            f"memory is full at step {trainer.global_step}, with microbatch_size={config.microbatch_size} and lessons "
            f"of up to {longest} tokens. A smaller microbatch_size gives the same result in less memory; so does "
            "student.gradient_checkpointing=true"
        ) from None
    return training.checkpoints.seconds


def _resumed(asked: str, folder: Path, identity: Identity) -> Path | None:
    """The checkpoint to go on from, if any."""
    if asked == "never":
        shutil.rmtree(folder, ignore_errors=True)
        return None
    if asked == "auto":
        return newest(folder, identity, say)
    if not checked(Path(asked), identity):
        raise ConfigError(f"resume={asked} is no whole checkpoint: wanted <run folder>/checkpoints/step-….ckpt")
    return Path(asked)


def _is_out_of_memory(error: BaseException) -> bool:
    """Of a device torch says so by a class of its own, of the host in words alone."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _with_shared_prompts(curriculum: Curriculum, module: StudentModule, padding_id: int) -> Curriculum:
    """One sequence for answer and rationale, where this student makes of it what it makes of two."""
    train, validation = ([lesson.branched() for lesson in part] for part in (curriculum.train, curriculum.validation))
    every = zip([*curriculum.train, *curriculum.validation], [*train, *validation], strict=True)
    pairs = sorted((pair for pair in every if pair[0] is not pair[1]), key=lambda pair: pair[1].num_tokens)
    if not pairs:
        return curriculum
    # The longest would show a window of attention, the shortest beside it what padding does.
    apart, branched = (collate(part, {}, padding_id, curriculum.read) for part in zip(pairs[0], pairs[-1], strict=True))
    if not module.sees_alike(apart, branched):
        say("this student cannot read answer and rationale behind one prompt; each has a sequence of its own")
        return curriculum
    return replace(curriculum, train=train, validation=validation)


def _precision(asked: str) -> Any:
    if asked != "auto":
        return asked
    return "bf16-mixed" if models.native_dtype() == torch.bfloat16 else "32-true"


def _annotations(job: Job, curriculum: Curriculum, examples: Sequence[Example], span: Span) -> dict[str, Annotation]:
    said = Records(job.source.store, curriculum.filled.requests)
    return {example.id: found for example in examples if (found := said.find(example.id, span))}


def _with_reasoning(rows: list[Json], job: Job, curriculum: Curriculum, evaluation: Evaluation) -> list[Json]:
    """Add the teacher's and the student's reasoning to the first rows."""
    chosen = job.source.splits.test[: job.config.num_samples]
    theirs = _annotations(job, curriculum, chosen, "rationale")
    for row, example, text in zip(rows, chosen, evaluation.rationales(chosen), strict=False):
        row["student_rationale"] = row["student_rationale"] or text
        row["teacher_rationale"] = theirs[example.id].rationale if example.id in theirs else None
        row["gold_rationale"] = example.rationale
    return rows


def _track(tracking: Tracking, results: Json, run: Json, job: Job, summary: Summary) -> None:
    rows = {
        name: {key: value for key, value in row.items() if not isinstance(value, list)}
        for name, row in results["rows"].items()
    }
    tracking.summary({f"test/{key}": value for key, value in rows["student"].items() if value is not None})
    tracking.summary({f"test/{name}/accuracy": row["accuracy"] for name, row in rows.items() if name != "student"})
    for name, lines in tables(summary).items():
        tracking.table(name, [{key: _plain(value) for key, value in line.items()} for line in lines])
    tracking.table("predictions", results["predictions"][: job.config.num_samples])
    tracking.page("report", job.run_dir / "report.html")
    cache = job.source.store.folder
    tracking.artifact(f"cache-{cache.name}", "cache", cache, run["cache"])
    lineage = {"cache": run["cache"]["fingerprint"], "start": run["start"]}
    tracking.artifact(f"student-{run['name']}", "model", job.run_dir / "student", lineage)


def _plain(value: Any) -> Any:
    """A number or a text; None for what was not measured."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(path: Path, content: Json) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1))


def _write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with whole_file(path) as temporary:
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


if __name__ == "__main__":
    configuration.command("train", main)
