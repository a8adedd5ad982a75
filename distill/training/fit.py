"""A student's training: built, checked by preflight, and run or resumed."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.loggers import Logger
from torch import nn

from distill.app import config as configuration
from distill.app import preemption
from distill.app.config import Config
from distill.app.console import say
from distill.app.files import Json
from distill.app.progress import progress
from distill.errors import ConfigError, OutOfMemoryError, PreemptedError
from distill.lessons.collate import collate
from distill.lessons.curriculum import Curriculum, Job, identity_of
from distill.lessons.join import Lesson
from distill.lessons.loader import Arrangement, DistillData
from distill.prompts.classes import ClassPrompts
from distill.prompts.vocabularies import Pairing
from distill.records import Span
from distill.students import Changes
from distill.students.causal_lm import weights_hash
from distill.training.best import BestValidation, measure_of
from distill.training.checkpoints import (
    Checkpoints,
    Identity,
    WholeFiles,
    checked,
    last,
    newest,
    restore_callbacks,
    step_of,
)
from distill.training.curves import Curves
from distill.training.module import StudentModule
from distill.training.preflight import Finding, PreflightInput, example, preflight, table
from distill.training.settings import build_callbacks, build_trainer, check_monitored, keeps_best
from distill.training.sharding import gather_model


@dataclass(frozen=True)
class Training:
    """Everything that trains a student, built and not yet started."""

    module: StudentModule
    data: DistillData
    trainer: lightning.Trainer
    checkpoints: Checkpoints
    best: BestValidation
    curves: Curves
    curriculum: Curriculum
    identity: Identity


@dataclass(frozen=True)
class Trained:
    """A trained student, whole and on the first process, and what its training took."""

    student: Any
    seconds: float
    facts: Json  # for run.json: the steps taken, and the step whose student was kept


def open_job_student(job: Job) -> Any:
    """Open the student as configured, before training."""
    settings = job.config.student
    changes = Changes(
        keep_layers=settings.keep_layers,
        freeze=list(settings.freeze),
        from_scratch=settings.from_scratch,
        lora=configuration.build(settings.lora),
        dropout=settings.get("dropout"),
        gradient_checkpointing=settings.gradient_checkpointing,
    )
    return job.kind.open(changes)


def build_training(job: Job, curriculum: Curriculum, student: nn.Module, loggers: Sequence[Logger]) -> Training:
    """Build everything that trains the student in place."""
    config, parts = job.config, build_callbacks(job.config)
    check_monitored(config, parts, _measured(job, curriculum))
    keeps, measure = keeps_best(config, parts), measure_of(parts)
    identity = identity_of(job, curriculum, weights_hash(student)) | ({"keep": measure.metric} if keeps else {})
    module = StudentModule(
        student,
        objectives=job.objectives,
        seam=job.kind.seam,
        retemper=job.codec.at_temperature,
        make_optimizer=configuration.build(config.optim.optimizer),
        make_schedule=configuration.build(config.optim.schedule),
        seed=config.seed,
        measures_accuracy=not job.annotation_job.task.is_free_text,
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
    curves, best = Curves(job.run_dir), BestValidation(measure, keeps_weights=keeps)
    checkpoints = Checkpoints(job.run_dir / "checkpoints", every=config.checkpoint_every, identity=identity)
    trainer = build_trainer(
        config,
        enable_progress_bar=sys.stderr.isatty(),
        plugins=[WholeFiles()],
        callbacks=[
            progress("steps", config.trainer.max_steps),
            best,  # before callbacks that exchange the weights during validation
            *parts.values(),
            checkpoints,  # after callbacks that change weights at the end
        ],
        logger=[curves, *loggers],
    )
    trainer.accumulate_grad_batches = data.num_microbatches(trainer.world_size)
    trainer.val_check_interval = config.validate_every * trainer.accumulate_grad_batches
    # Deterministic mode also fills all new memory to reveal uninitialised reads, which costs an eighth of a step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return Training(module, data, trainer, checkpoints, best, curves, curriculum, identity)


def _measured(job: Job, curriculum: Curriculum) -> set[str]:
    """Return the names of the metrics that validation will measure."""
    counts = sum((lesson.counts() for lesson in curriculum.validation), Counter[tuple[Span, str]]())
    losses = {f"val/{name}" for name, o in job.objectives.items() if counts[o.span, o.source]}
    measured = losses | ({"val/loss"} if losses else set())
    if job.annotation_job.task.is_free_text:
        has_texts = counts["answer", "labels"] or counts["answer", "teacher"]
        return measured | ({"val/cross_entropy"} if has_texts else set())
    return measured | ({"val/cross_entropy", "val/accuracy"} if counts["answer", "labels"] else set())


def run_preflight(job: Job, training: Training) -> list[Json]:
    """Run preflight on the first lessons; return its findings, or raise ConfigError if a check failed."""
    config = job.config
    if config.preflight is False:
        return []
    inputs = preflight_input(job, training)
    say(example(inputs))
    findings = preflight(inputs)
    if config.preflight is True:
        say(table(findings))
    else:
        failed = [finding for finding in findings if finding.passed is False]
        passed = f"preflight: {sum(finding.passed is True for finding in findings)} checks passed"
        say(f"{passed}; these did not:\n{table(failed)}" if failed else passed)
    stop_on_failures(findings)
    return [asdict(finding) for finding in findings]


def stop_on_failures(findings: Sequence[Finding]) -> None:
    """Raise ConfigError with every finding that must stop the run."""
    if stops := [finding.problem for finding in findings if finding.stops]:
        raise ConfigError(*stops)


def preflight_input(job: Job, training: Training) -> PreflightInput:
    """Collect what preflight and the forecast inspect."""
    config, trainer = job.config, training.trainer
    store = (job.soft_annotation_job or job.annotation_job).store
    return PreflightInput(
        module=training.module,
        objectives=job.objectives,
        lessons=training.curriculum.train,
        rows=training.curriculum.rows,
        read=training.curriculum.read,
        annotation=lambda key: (job.pairing or Pairing()).annotation(store.read(key)),
        has_second_teacher=job.soft_annotation_job is not None,
        example=lambda id_: next(e for e in job.annotation_job.splits.train if e.id == id_),
        prompts=job.prompts,
        seam=job.kind.seam,
        is_vocabulary_shared=job.is_vocabulary_shared,
        is_from_scratch=config.student.from_scratch,
        open_uncut=_uncut(job),
        make_optimizer=configuration.build(config.optim.optimizer),
        batch_size=config.batch_size,
        microbatch_size=config.microbatch_size,
        batch_unit=config.batch_unit,
        num_steps=config.trainer.max_steps,
        checkpoint_every=config.checkpoint_every,
        is_averaged=any(isinstance(part, WeightAveraging) for part in trainer.callbacks),  # type: ignore[attr-defined]
        keeps_best=training.best.keeps_weights,
        num_devices=trainer.world_size,
        run_dir=job.run_dir,
        device=trainer.strategy.root_device,
        precision=trainer.precision_plugin.forward_context,
    )


def _uncut(job: Job) -> Callable[[], Any] | None:
    """Return how to open the model that the student was cut from, if its weights, all trained, had more layers."""
    settings = job.config.student
    if settings.keep_layers is None or settings.from_scratch or isinstance(job.prompts, ClassPrompts):
        return None
    return lambda: job.kind.open(Changes())


def fit(job: Job, training: Training) -> Trained:
    """Train the student, resuming the folder's run if there is one; its weights are those of the step to keep."""
    config, trainer = job.config, training.trainer
    checkpoint = _checkpoint_to_resume(config.resume, job.run_dir / "checkpoints", training.identity)
    say(_what_is_trained(training.curriculum.train, config))
    if checkpoint:
        say(f"resuming from {checkpoint}")
    training.curves.resume(step_of(checkpoint) if checkpoint else 0)
    training.module.model.train()
    try:
        trainer.fit(training.module, training.data, ckpt_path=checkpoint, weights_only=True)
    except SystemExit:  # Lightning raises this on Ctrl-C, and on a signal that arrives before its handlers are disabled
        if preemption.is_stop_requested():
            raise PreemptedError("stopped on request before the first step; run the same command to start it") from None
        say(f"to resume from the last checkpoint, add hydra.run.dir={job.run_dir}")
        raise KeyboardInterrupt from None
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        longest = max(lesson.num_tokens for lesson in training.curriculum.train)
        raise OutOfMemoryError(
            f"out of memory at step {trainer.global_step} with microbatch_size={config.microbatch_size} and lessons of "
            f"up to {longest} tokens. A smaller microbatch_size gives the same result in less memory; so does "
            "student.gradient_checkpointing=true"
        ) from None
    return _trained(job, training)


def _what_is_trained(lessons: Sequence[Lesson], config: Config) -> str:
    num_examples = len({id_ for lesson in lessons for id_ in lesson.example_ids})
    # A conversation's turns may share a lesson; each further rationale of an example has one of its own.
    are_same = num_examples == len(lessons)
    unit = "lessons" if config.batch_unit == "examples" and not are_same else config.batch_unit
    examples = f"{num_examples} examples" if are_same else f"{num_examples} examples in {len(lessons)} lessons"
    return f"training on {examples}: {config.trainer.max_steps} steps of {config.batch_size} {unit}"


def _trained(job: Job, training: Training) -> Trained:
    """Gather the student and restore the weights of the step to keep."""
    folder, best = job.run_dir / "checkpoints", training.best
    if not training.checkpoints.has_run:  # spawned processes trained; their state is in the last checkpoint
        restore_callbacks(last(folder), [training.checkpoints, best])
    student = gather_model(training.module, lambda: open_job_student(job))
    best.restore(student)
    steps = step_of(last(folder))
    if message := best.message(steps):
        say(message)
    return Trained(student, training.checkpoints.seconds, best.facts(steps))


def _checkpoint_to_resume(choice: str, folder: Path, identity: Identity) -> Path | None:
    """Return the checkpoint to resume from, if any."""
    if choice == "never":
        shutil.rmtree(folder, ignore_errors=True)
        return None
    if choice == "auto":
        return newest(folder, identity, say)
    if not checked(Path(choice), identity):
        raise ConfigError(
            f"resume={choice} is not a complete checkpoint; expected <run folder>/checkpoints/step-….ckpt"
        )
    return Path(choice)


def _is_out_of_memory(error: BaseException) -> bool:
    """Recognise both: torch has an exception class for devices, but only a message for the host."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _with_shared_prompts(curriculum: Curriculum, module: StudentModule, padding_id: int) -> Curriculum:
    """Put answer and rationale into one sequence, if the student computes the same for one as for two."""
    train, validation = ([lesson.branched() for lesson in part] for part in (curriculum.train, curriculum.validation))
    lessons = zip([*curriculum.train, *curriculum.validation], [*train, *validation], strict=True)
    pairs = sorted((pair for pair in lessons if pair[0] is not pair[1]), key=lambda pair: pair[1].num_tokens)
    if not pairs:
        return curriculum
    # The longest pair reveals a limited attention window; the shortest beside it, an effect of padding.
    separate, branched = (
        collate(part, {}, padding_id, curriculum.read) for part in zip(pairs[0], pairs[-1], strict=True)
    )
    if not module.sees_alike(separate, branched):
        say("this student does not support a shared prompt; answer and rationale become separate sequences")
        return curriculum
    return replace(curriculum, train=train, validation=validation)
