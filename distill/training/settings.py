"""The settings that a training run takes; every other value is refused before the teacher is asked.

A parameter of Lightning's Trainer that this training sets itself, never reaches or would compute wrongly is an error
that names the setting to use instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Set
from datetime import timedelta
from typing import Any, get_args

import lightning
import torch
from lightning.pytorch import callbacks
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from distill.app import config as configuration
from distill.app.config import Config
from distill.errors import ConfigError
from distill.lessons.loader import Balance, Order, check_batch_size, microbatches_per_step
from distill.models import placement
from distill.models.batches import BatchUnit
from distill.training.best import measure_of

# Lightning's names of the precisions that are supported. A GradScaler (16-mixed) would have to be undone before the
# gradient is checked and clipped; the others convert weights or the log-probabilities of the teacher.
PRECISIONS: dict[int | str | None, str] = {
    **dict.fromkeys((None, 32, "32", "32-true"), "32-true"),
    **dict.fromkeys(("bf16", "bf16-mixed"), "bf16-mixed"),
}
# Parameters of the Trainer that have no effect here or are set by this training, with what to use instead.
REFUSED = {
    "logger": "tracking",
    "callbacks": "callback",
    "fast_dev_run": "trainer.max_steps=1, or preflight=true",
    "max_epochs": "trainer.max_steps",
    "min_epochs": "trainer.min_steps",
    "max_time": "trainer.max_steps; a run that is stopped by a signal can be resumed",
    "limit_train_batches": "trainer.max_steps, or a smaller training split of the task",
    "limit_val_batches": "a smaller validation split of the task",
    "limit_test_batches": "a smaller test split of the task",
    "limit_predict_batches": "smaller splits of the task",
    "overfit_batches": "a smaller training split of the task",
    "val_check_interval": "validate_every",
    "check_val_every_n_epoch": "validate_every",
    "enable_checkpointing": "checkpoint_every",
    "enable_progress_bar": "2> log: only a terminal shows a bar, a file gets lines",
    "accumulate_grad_batches": "microbatch_size",
    "use_distributed_sampler": "false: the order of lessons already divides them among processes",
    "plugins": "trainer.precision and trainer.strategy",
    "sync_batchnorm": "false: language models have no batch normalization",
    "reload_dataloaders_every_n_epochs": "0: the lessons do not change",
    "default_root_dir": "root or hydra.run.dir",
    "barebones": "tracking=off, trainer.log_every_n_steps and validate_every",
    "enable_autolog_hparams": "tracking",
    "model_registry": "tracking",
}
_LEFT_ALONE: dict[str, tuple[Any, ...]] = {  # values that change nothing, beside null
    "fast_dev_run": (False, 0),
    "overfit_batches": (0,),
    "use_distributed_sampler": (False,),
    "sync_batchnorm": (False,),
    "reload_dataloaders_every_n_epochs": (0,),
    "barebones": (False,),
    "accumulate_grad_batches": (1,),
    "enable_autolog_hparams": (True,),
}
_REFUSED_CALLBACKS = {
    callbacks.Checkpoint: "checkpoint_every and keep",
    callbacks.GradientAccumulationScheduler: "microbatch_size",
    callbacks.StochasticWeightAveraging: "callback=[ema]",
    callbacks.BatchSizeFinder: "microbatch_size",
    callbacks.LearningRateFinder: "optim.optimizer.lr",
    callbacks.Timer: "trainer.max_steps",
    callbacks.ProgressBar: "2> log: only a terminal shows a bar, a file gets lines",
}
# How long a process waits for another: the first one evaluates, saves and reports alone. By default 10 or 30 minutes.
_PATIENCE = timedelta(days=7)
_MINIMA = {
    "batch_size": 1,
    "microbatch_size": 1,
    "num_workers": 0,
    "validate_every": 1,
    "checkpoint_every": 1,
    "num_samples": 0,
    "max_new_tokens": 1,
    "trainer.max_steps": 1,
    "trainer.min_steps": 1,
    "trainer.log_every_n_steps": 1,
    "trainer.num_nodes": 1,
    "trainer.gradient_clip_val": 0,
}
_CHOICES: dict[str, tuple[Any, ...]] = {
    "batch_unit": get_args(BatchUnit),
    "order": get_args(Order),
    "balance": get_args(Balance),
    "preflight": ("auto", True, False),
    "bag_of_words": ("auto", True, False),
    "keep": (None, "last", "best"),
    "trainer.deterministic": (None, True, False, "warn"),
    "trainer.benchmark": (None, True, False),
}


def check_settings(config: Config) -> None:
    """Raise ConfigError with every setting of the training that cannot be honoured."""
    problems = [*_out_of_range(config), *_unused(config), *_unsupported_precision(config)]
    if not problems:
        problems = [*_of_optimizer(config), *_of_trainer(config)]
    if problems:
        raise ConfigError(*problems)


def build_trainer(config: Config, **arguments: Any) -> lightning.Trainer:
    """Build the trainer of a configuration; `arguments` are those of Lightning's Trainer that the run itself sets."""
    trainer: lightning.Trainer = configuration.build_or_refuse(
        config.trainer,
        "trainer",
        precision=precision(config),
        check_val_every_n_epoch=None,
        enable_checkpointing=False,
        **arguments,
    )
    if isinstance(trainer.strategy, DDPStrategy | ModelParallelStrategy):
        # Private: in public, a time is taken only with a strategy object, not with its name.
        trainer.strategy._timeout = max(trainer.strategy._timeout or _PATIENCE, _PATIENCE)
    return trainer


def build_callbacks(config: Config) -> dict[str, Any]:
    """Build the callbacks of a configuration by name."""
    nodes = config.get("callback", {}).items()
    return {name: configuration.build_or_refuse(node, f"callback.{name}") for name, node in nodes}


def precision(config: Config) -> str:
    """Return Lightning's name of the precision of a run."""
    setting = config.trainer.get("precision")
    if setting != "auto":
        return PRECISIONS[setting]
    return "bf16-mixed" if placement.native_dtype() == torch.bfloat16 else "32-true"


def _out_of_range(config: Config) -> Iterator[str]:
    for key, minimum in _MINIMA.items():
        value = _value(config, key)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (is_number and minimum <= value < math.inf):
            yield f"{key}={value}: expected a number of at least {minimum}"
    dropout = config.student.get("dropout")
    if dropout is not None and not (type(dropout) in (int, float) and 0 <= dropout < 1):
        yield f"student.dropout={dropout}: expected null or a probability of at least 0 and below 1"
    for name, node in config.get("loss", {}).items():
        if not math.isfinite(node.weight):
            yield f"loss.{name}.weight={node.weight}: expected a finite number"
    for key, choices in _CHOICES.items():
        if (value := _value(config, key)) not in choices:
            yield f"{key}={value}: expected one of {', '.join(_text(choice) for choice in choices)}"


def _unused(config: Config) -> Iterator[str]:
    """Find parameters of the trainer, and callbacks, that would have no effect."""
    for name, instead in REFUSED.items():
        value = config.trainer.get(name)
        if value is not None and value not in _LEFT_ALONE.get(name, ()):
            yield f"trainer.{name}={_text(value)} is not supported; use {instead}"
    if config.trainer.get("benchmark") is True and config.trainer.get("deterministic"):
        yield (
            "trainer.benchmark=true chooses kernels by their speed, so a run is not deterministic; set "
            "trainer.deterministic=false too"
        )


def _unsupported_precision(config: Config) -> Iterator[str]:
    value = config.trainer.get("precision")
    if value != "auto" and value not in PRECISIONS:
        names = ", ".join(dict.fromkeys(PRECISIONS.values()))
        yield f"trainer.precision={value} is not supported; expected auto, {names}"


def _of_optimizer(config: Config) -> Iterator[str]:
    """Build the optimizer and its schedule for one small parameter."""
    parameter = nn.Parameter(torch.zeros(2, 2))
    try:
        optimizer = configuration.build_or_refuse(config.optim.optimizer, "optim")([parameter])
        schedule = configuration.build_or_refuse(config.optim.schedule, "optim")(optimizer)
    except (ValueError, TypeError, RuntimeError) as error:  # the targets are partial: this is the call itself
        yield f"optim: {error}"
        return
    rates = [group["initial_lr"] if "initial_lr" in group else group["lr"] for group in optimizer.param_groups]
    if not all(math.isfinite(rate) for rate in rates):
        yield f"optim.optimizer.lr={rates[0]}: expected a finite number"
    if isinstance(schedule, ReduceLROnPlateau):
        yield "optim.schedule: ReduceLROnPlateau depends on a metric, which is not supported; use another schedule"


def _of_trainer(config: Config) -> Iterator[str]:
    """Build the trainer and its callbacks as the run will, without loggers."""
    parts = build_callbacks(config)
    # Determinism is a setting of the whole process, and the teacher annotates without it.
    idle = {"callbacks": [], "logger": False, "enable_progress_bar": False}
    trainer = build_trainer(config, **idle, deterministic=None, benchmark=None)
    for name, part in parts.items():
        for kind, instead in _REFUSED_CALLBACKS.items():
            if isinstance(part, kind):
                yield f"callback.{name} is not supported; use {instead}"
    if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy | ModelParallelStrategy):
        yield (
            f"trainer.strategy={_text(config.trainer.strategy)} is not supported; expected auto, ddp, ddp_spawn or "
            "trainer=fsdp2"
        )
        return
    yield from _not_sharded(config, trainer, parts)
    losses = {f"val/{name}" for name in config.get("loss", {})}
    check_monitored(config, parts, {"val/loss", "val/accuracy", "val/cross_entropy", *losses})
    num_microbatches = microbatches_per_step(config.batch_size, config.microbatch_size, trainer.world_size)
    check_batch_size(config.batch_size, num_microbatches, trainer.world_size)


def _not_sharded(config: Config, trainer: lightning.Trainer, parts: dict[str, Any]) -> Iterator[str]:
    """Find the settings that a sharded student does not support."""
    if not isinstance(trainer.strategy, ModelParallelStrategy):
        return
    averaged = [f"callback.{name}" for name, part in parts.items() if isinstance(part, callbacks.WeightAveraging)]
    compiled = ["student.compile=true"] if config.student.compile else []
    for setting in (*averaged, *compiled):
        yield f"trainer=fsdp2 does not support {setting}; remove one"


def keeps_best(config: Config, parts: Mapping[str, Any]) -> bool:
    """Whether the student of the best validation is kept: if asked for, and with early stopping unless refused."""
    stops_early = any(isinstance(part, callbacks.EarlyStopping) for part in parts.values())
    setting: str | None = config.get("keep")
    return setting == "best" or (setting is None and stops_early)


def check_monitored(config: Config, parts: Mapping[str, Any], measured: Set[str]) -> None:
    """Raise ConfigError if a decision depends on a metric that no validation will measure."""
    monitored = {
        f"callback.{name}": part.monitor for name, part in parts.items() if isinstance(part, callbacks.EarlyStopping)
    }
    if keeps_best(config, parts):
        monitored["keep"] = measure_of(parts).metric
    problems = [
        f"{key} compares validations by {metric}, which is not measured; measured: {', '.join(sorted(measured)) or '-'}"
        for key, metric in monitored.items()
        if metric not in measured
    ]
    problems += _turned_round(parts)
    if monitored and not problems and config.validate_every > config.trainer.max_steps:
        problems.append(
            f"{' and '.join(monitored)} needs a validation, but validate_every={config.validate_every} is more than "
            f"trainer.max_steps={config.trainer.max_steps}"
        )
    if problems:
        raise ConfigError(*problems)


def _turned_round(parts: Mapping[str, Any]) -> Iterator[str]:
    """Find early stopping that would keep the worst student."""
    for name, part in parts.items():
        if isinstance(part, callbacks.EarlyStopping):
            mode = "max" if part.monitor == "val/accuracy" else "min"
            if part.mode != mode:
                yield (
                    f"callback.{name}.mode={part.mode} keeps the worst student by {part.monitor}; set "
                    f"callback.{name}.mode={mode}"
                )


def _value(config: Config, key: str) -> Any:
    for part in key.split("."):
        config = config.get(part)
    return config


def _text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
