"""A student's training: put together, looked ahead at, and run from where it broke off."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from distill.app import config as configuration
from distill.app import preemption
from distill.app.config import Config
from distill.app.console import say
from distill.app.progress import progress
from distill.errors import ConfigError, OutOfMemoryError, PreemptedError
from distill.lessons.collate import collate
from distill.lessons.curriculum import Curriculum, Job, identity_of
from distill.lessons.loader import Arrangement, DistillData
from distill.models import loading
from distill.students.causal_lm import open_student, weights_hash
from distill.training.checkpoints import Checkpoints, Identity, WholeFiles, checked, newest, step_of
from distill.training.curves import Curves
from distill.training.module import StudentModule
from distill.training.preflight import Finding, Plan, preflight, table

Json = dict[str, Any]


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


def opened_student(job: Job) -> Any:
    """The student as the configuration wants it, from its start."""
    settings = job.config.student
    return open_student(
        job.student_folder,
        keep_layers=settings.keep_layers,
        freeze=list(settings.freeze),
        from_scratch=settings.from_scratch,
        lora=configuration.build(settings.lora),
        gradient_checkpointing=settings.gradient_checkpointing,
    )


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


def _check_sharded(config: Config, trainer: lightning.Trainer) -> None:
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
    findings = preflight(plan_of(job, training))
    if config.preflight is True or not all(finding.passed in (True, None) for finding in findings):
        say(table(findings))
    else:
        say(f"preflight: {sum(finding.passed is True for finding in findings)} checks passed")
    stop_at(findings)
    return [asdict(finding) for finding in findings]


def stop_at(findings: Sequence[Finding]) -> None:
    """Raise ConfigError with all that must stop the run."""
    if stops := [finding.problem for finding in findings if finding.stops]:
        raise ConfigError(*stops)


def plan_of(job: Job, training: Training) -> Plan:
    """What preflight and forecast look at."""
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
    return "bf16-mixed" if loading.native_dtype() == torch.bfloat16 else "32-true"
