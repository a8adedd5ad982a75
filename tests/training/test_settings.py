"""Settings of a run: each parameter of Lightning's Trainer, and each value, has its effect or is refused."""

from __future__ import annotations

import copy
import inspect
import typing
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from lightning.pytorch.callbacks import EarlyStopping, ModelSummary
from lightning.pytorch.profilers import SimpleProfiler
from lightning.pytorch.strategies import DDPStrategy
from omegaconf import DictConfig, OmegaConf

from distill.errors import ConfigError
from distill.lessons.curriculum import build_curriculum, prepare
from distill.training.fit import build_training, fit
from distill.training.job import train
from distill.training.settings import PRECISIONS, REFUSED, build_trainer, check_settings, keeps_best, precision
from tests.conftest import compose, tiny_overrides
from tests.training.conftest import logged_losses, open_whole_student

Configured = Callable[..., DictConfig]
# Every other parameter of the Trainer: a value other than that of conf/, and what shows its effect before training.
HONOURED: dict[str, tuple[Any, Callable[[lightning.Trainer], object]]] = {
    "accelerator": ("cpu", lambda trainer: trainer.strategy.root_device.type == "cpu"),
    "strategy": ("ddp", lambda trainer: isinstance(trainer.strategy, DDPStrategy)),
    "devices": (2, lambda trainer: trainer.world_size == 2),
    "num_nodes": (2, lambda trainer: trainer.num_nodes == 2),
    "precision": ("bf16-mixed", lambda trainer: trainer.precision == "bf16-mixed"),
    "max_steps": (3, lambda trainer: trainer.max_steps == 3),
    "min_steps": (2, lambda trainer: trainer.min_steps == 2),
    "num_sanity_val_steps": (1, lambda trainer: trainer.num_sanity_val_steps == 1),
    "log_every_n_steps": (7, lambda trainer: trainer.log_every_n_steps == 7),  # type: ignore[attr-defined]
    "enable_model_summary": (True, lambda trainer: any(isinstance(c, ModelSummary) for c in trainer.callbacks)),  # type: ignore[attr-defined]
    "gradient_clip_val": (0.5, lambda trainer: trainer.gradient_clip_val == 0.5),
    "gradient_clip_algorithm": ("value", lambda trainer: trainer.gradient_clip_algorithm == "value"),
    "deterministic": (True, lambda _: not torch.is_deterministic_algorithms_warn_only_enabled()),
    "benchmark": (True, lambda _: torch.backends.cudnn.benchmark),
    "inference_mode": (False, lambda trainer: not trainer.fit_loop.epoch_loop.val_loop.inference_mode),
    "profiler": ("simple", lambda trainer: isinstance(trainer.profiler, SimpleProfiler)),  # type: ignore[attr-defined]
    "detect_anomaly": (True, lambda trainer: trainer._detect_anomaly),
}
REFUSED_VALUES: dict[str, Any] = {
    "logger": False,
    "callbacks": [],
    "fast_dev_run": True,
    "max_time": "00:01:00:00",
    "limit_train_batches": 0.5,
    "limit_val_batches": 0,
    "limit_test_batches": 1,
    "limit_predict_batches": 1,
    "overfit_batches": 1,
    "check_val_every_n_epoch": 1,
    "enable_checkpointing": True,
    "enable_progress_bar": False,
    "use_distributed_sampler": True,
    "plugins": [],
    "barebones": True,
    "sync_batchnorm": True,
    "default_root_dir": "elsewhere",
    "enable_autolog_hparams": False,
    "model_registry": "name",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, student_folder: Path) -> DictConfig:
    """The configuration of a small run."""
    root = tmp_path_factory.mktemp("settings")
    return compose(*tiny_overrides(root, teacher_folder, student_folder), "loss=[answer]", "callback=[early_stopping]")


@pytest.fixture
def configured(base: DictConfig) -> Configured:
    """Change some values of the configuration; composing it anew takes longer."""

    def configured(*overrides: str) -> DictConfig:
        config = copy.deepcopy(base)
        OmegaConf.update(config, "callback", {}, merge=False)
        for override in OverridesParser.create().parse_overrides(list(overrides)):
            OmegaConf.update(config, override.key_or_group, override.value(), force_add=True)
        return config

    return configured


def problems_of(config: DictConfig) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as raised:
        check_settings(config)
    assert raised.value.exit_code == 2
    return raised.value.problems


def test_every_parameter_of_the_trainer_is_honoured_or_refused() -> None:
    parameters = set(inspect.signature(lightning.Trainer.__init__).parameters) - {"self"}
    assert parameters == REFUSED.keys() | HONOURED.keys()
    assert not REFUSED.keys() & HONOURED.keys()


@pytest.mark.parametrize("name", REFUSED)
def test_a_parameter_without_effect_is_refused_with_what_to_use(name: str, configured: Configured) -> None:
    config = configured()
    OmegaConf.update(config, f"trainer.{name}", REFUSED_VALUES.get(name, 4), force_add=True)
    (problem,) = problems_of(config)
    assert problem.startswith(f"trainer.{name}=")
    assert problem.endswith(f"use {REFUSED[name]}")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("accumulate_grad_batches", 2),
        ("reload_dataloaders_every_n_epochs", 1),
        ("fast_dev_run", 1),
        ("overfit_batches", 0.5),
        ("overfit_batches", 2),
    ],
)
def test_the_first_value_beyond_the_one_without_effect_is_refused(
    name: str, value: float, configured: Configured
) -> None:
    (problem,) = problems_of(configured(f"trainer.{name}={value}"))
    assert problem == f"trainer.{name}={value} is not supported; use {REFUSED[name]}"


def test_a_refused_setting_stops_before_the_teacher_is_asked(configured: Configured, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="use microbatch_size"):
        train(configured("+trainer.accumulate_grad_batches=4", "+trainer.max_epochs=1"))
    assert not list(tmp_path.glob("cache/*"))


@pytest.fixture
def _torch_settings() -> Iterator[None]:
    """Restore the settings of torch that a Trainer changes for the process."""
    state = torch.get_deterministic_debug_mode(), torch.backends.cudnn.benchmark
    yield
    torch.set_deterministic_debug_mode(state[0])
    torch.backends.cudnn.benchmark = state[1]


@pytest.mark.usefixtures("_torch_settings")
@pytest.mark.parametrize("name", HONOURED)
def test_a_parameter_of_the_trainer_is_honoured(name: str, configured: Configured) -> None:
    value, has_effect = HONOURED[name]
    config = configured("microbatch_size=4", *["trainer.deterministic=false"] * (name == "benchmark"))
    OmegaConf.update(config, f"trainer.{name}", value, force_add=True)
    check_settings(config)
    assert has_effect(build_trainer(config, callbacks=[], logger=False, enable_progress_bar=False))


def test_checking_the_settings_changes_no_setting_of_the_process(configured: Configured) -> None:
    before = torch.get_deterministic_debug_mode(), torch.backends.cudnn.benchmark
    check_settings(configured("trainer.deterministic=true"))
    check_settings(configured("trainer.deterministic=false", "+trainer.benchmark=true"))
    assert (torch.get_deterministic_debug_mode(), torch.backends.cudnn.benchmark) == before


def precisions() -> list[Any]:
    """Every value that Lightning's Trainer takes for its precision."""
    hint = typing.get_type_hints(lightning.Trainer.__init__)["precision"]
    return [value for part in typing.get_args(hint) for value in typing.get_args(part) or (None,)]


@pytest.mark.parametrize("value", precisions())
def test_every_precision_trains_or_is_refused_with_the_supported_ones(value: Any, configured: Configured) -> None:
    config = configured()
    OmegaConf.update(config, "trainer.precision", value)
    if value not in PRECISIONS:
        assert problems_of(config) == (
            f"trainer.precision={value} is not supported; expected auto, 32-true, bf16-mixed",
        )
        return
    check_settings(config)
    trainer = build_trainer(config, callbacks=[], logger=False, enable_progress_bar=False)
    assert trainer.precision == PRECISIONS[value]


@pytest.mark.parametrize(("native", "expected"), [(torch.bfloat16, "bf16-mixed"), (torch.float32, "32-true")])
def test_the_precision_is_by_default_the_one_that_the_machine_is_fast_in(
    native: torch.dtype, expected: str, configured: Configured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill.models.placement.native_dtype", lambda: native)
    assert precision(configured("trainer.precision=auto")) == expected


def test_a_schedule_that_depends_on_a_metric_is_refused(configured: Configured) -> None:
    config = configured()
    config.optim.schedule = {"_target_": "torch.optim.lr_scheduler.ReduceLROnPlateau", "_partial_": True}
    (problem,) = problems_of(config)
    assert problem.startswith("optim.schedule: ReduceLROnPlateau depends on a metric")


RUN = [
    "trainer.log_every_n_steps=1",
    "trainer.max_steps=3",
    "validate_every=1",
    "batch_size=4",
    "teacher.num_rationales=0",
]
RUN += ["num_samples=0", "optim.schedule.num_warmup_steps=0"]


def weights_after(config: DictConfig, folder: Path) -> dict[str, torch.Tensor]:
    job = prepare(config, folder)
    student = open_whole_student(job.student_folder, torch.float32)
    return dict(fit(job, build_training(job, build_curriculum(job), student, [])).student.named_parameters())


def test_mixed_precision_trains(configured: Configured, tmp_path: Path, student_folder: Path) -> None:
    after = weights_after(configured(*RUN, "trainer.precision=bf16-mixed"), tmp_path / "run")
    before = dict(open_whole_student(student_folder, torch.float32).named_parameters())
    assert all(weight.dtype == torch.float32 and weight.isfinite().all() for weight in after.values())
    assert not torch.equal(after["lm_head.weight"], before["lm_head.weight"])


@pytest.mark.usefixtures("_torch_settings")
def test_settings_that_only_watch_a_run_do_not_change_the_student(configured: Configured, tmp_path: Path) -> None:
    watching = ["trainer.num_sanity_val_steps=2", "trainer.enable_model_summary=true", "+trainer.profiler=simple"]
    watching += ["+trainer.inference_mode=false", "+trainer.detect_anomaly=true", "+trainer.min_steps=3"]
    plain = weights_after(configured(*RUN), tmp_path / "plain")
    watched = weights_after(configured(*RUN, *watching), tmp_path / "watched")
    assert all(torch.equal(weight, watched[name]) for name, weight in plain.items())
    assert logged_losses(tmp_path / "plain") == logged_losses(tmp_path / "watched")


INVALID = {
    "batch_size=0": "batch_size=0: expected a number of at least 1",
    "batch_size=-8": "batch_size=-8: expected a number of at least 1",
    "microbatch_size=0": "microbatch_size=0: expected",
    "num_workers=-1": "num_workers=-1: expected a number of at least 0",
    "validate_every=0": "validate_every=0: expected",
    "checkpoint_every=0": "checkpoint_every=0: expected",
    "max_new_tokens=0": "max_new_tokens=0: expected",
    "student.dropout=1": "student.dropout=1: expected null or a probability of at least 0 and below 1",
    "student.dropout=-0.1": "student.dropout=-0.1: expected null or a probability",
    "student.dropout=nan": "student.dropout=nan: expected null or a probability",
    "student.dropout=true": "student.dropout=True: expected null or a probability",
    "student.dropout=much": "student.dropout=much: expected null or a probability",
    "num_samples=-1": "num_samples=-1: expected",
    "trainer.max_steps=0": "trainer.max_steps=0: expected",
    "trainer.max_steps=-1": "trainer.max_steps=-1: expected",
    "+trainer.min_steps=0": "trainer.min_steps=0: expected a number of at least 1",
    "trainer.log_every_n_steps=0": "trainer.log_every_n_steps=0: expected",
    "trainer.gradient_clip_val=-1": "trainer.gradient_clip_val=-1: expected a number of at least 0",
    "trainer.gradient_clip_val=nan": "trainer.gradient_clip_val=nan: expected",
    "+trainer.gradient_clip_algorithm=l1": "trainer: `gradient_clip_algorithm` l1 is invalid",
    "+trainer.profiler=fast": "trainer: When passing string value for the `profiler`",
    "+trainer.benchmark=maybe": "trainer.benchmark=maybe: expected one of null, true, false",
    "+trainer.benchmark=true": "trainer.benchmark=true chooses kernels by their speed",
    "trainer.deterministic=maybe": "trainer.deterministic=maybe: expected one of null, true, false, warn",
    "trainer.accelerator=gpx": "trainer: You selected an invalid accelerator name",
    "trainer.strategy=dpd": "trainer: You selected an invalid strategy name",
    "trainer.devices=0": "trainer: `Trainer(devices=0)` value is not a valid input",
    "trainer.num_nodes=0": "trainer.num_nodes=0: expected",
    "trainer.devices=16": "batch_size=8 is too small for 16 processes x 1 microbatches",
    "order=shuffle": "order=shuffle: expected one of shuffled, short_first, confident_first",
    "balance=answers": "balance=answers: expected one of none, answer, confidence",
    "batch_unit=words": "batch_unit=words: expected one of examples, tokens",
    "preflight=maybe": "preflight=maybe: expected one of auto, true, false",
    "keep=first": "keep=first: expected one of null, last, best",
    "loss.answer.weight=inf": "loss.answer.weight=inf: expected a finite number",
    "loss.answer.weight=nan": "loss.answer.weight=nan: expected a finite number",
    "optim.optimizer.lr=-0.1": "optim: Invalid learning rate: -0.1",
    "optim.optimizer.lr=nan": "optim: Invalid learning rate: nan",
    "optim.optimizer.lr=inf": "optim.optimizer.lr=inf: expected a finite number",
    "optim.optimizer.betas=[0.9,1.5]": "optim: Invalid beta parameter at index 1: 1.5",
    "optim.optimizer.weight_decay=-1": "optim: Invalid weight_decay value: -1",
    "optim.schedule._target_=torch.optim.lr_scheduler.ExponentialLR": "optim: ",
}


@pytest.mark.parametrize("override", INVALID)
def test_an_impossible_value_is_refused_before_the_teacher_is_asked(override: str, configured: Configured) -> None:
    problems = problems_of(configured("checkpoint_every=5", override))
    assert [problem for problem in problems if problem.startswith(INVALID[override])] == list(problems)


CALLBACKS = {
    "ModelCheckpoint": "checkpoint_every and keep",
    "GradientAccumulationScheduler, scheduling: {0: 2}": "microbatch_size",
    "StochasticWeightAveraging, swa_lrs: 0.1": "callback=[ema]",
    "BatchSizeFinder": "microbatch_size",
    "LearningRateFinder": "optim.optimizer.lr",
    "Timer": "trainer.max_steps",
    "RichProgressBar": "2> log",
}


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_callback_that_would_break_the_training_is_refused(name: str, configured: Configured) -> None:
    (problem,) = problems_of(configured(f"callback.other={{_target_: lightning.pytorch.callbacks.{name}}}"))
    assert problem.startswith("callback.other is not supported; use " + CALLBACKS[name])


def test_a_strategy_of_which_the_step_is_not_known_to_be_exact_is_refused(
    configured: Configured, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured()
    trainer = build_trainer(config, callbacks=[], logger=False, enable_progress_bar=False)
    other = SimpleNamespace(strategy=object(), world_size=trainer.world_size)  # Lightning builds those only on a GPU
    monkeypatch.setattr("distill.training.settings.build_trainer", lambda *_, **__: other)
    (problem,) = problems_of(config)
    assert problem.startswith("trainer.strategy=auto is not supported; expected auto, ddp, ddp_spawn or trainer=fsdp2")


@pytest.mark.parametrize("setting", ["student.compile=true", "callback.ema=EMA"])
def test_what_a_sharded_student_does_not_support_is_refused(setting: str, configured: Configured) -> None:
    ema = "callback.ema={_target_: lightning.pytorch.callbacks.EMAWeightAveraging}"
    config = configured(ema if "ema" in setting else setting)
    config.trainer.strategy = {"_target_": "lightning.pytorch.strategies.ModelParallelStrategy"}
    (problem,) = problems_of(config)
    assert problem == f"trainer=fsdp2 does not support {setting.removesuffix('=EMA')}; remove one"


@pytest.mark.parametrize(
    ("setting", "stops_early", "expected"),
    [("best", False, True), ("last", True, False), (None, True, True), (None, False, False)],
)
def test_the_best_student_is_kept_if_chosen_or_with_early_stopping(
    setting: str | None, stops_early: bool, expected: bool, configured: Configured
) -> None:
    config = configured()
    config.keep = setting
    parts = {"stop": EarlyStopping("val/answer")} if stops_early else {}
    assert keeps_best(config, parts) == expected


def test_all_problems_of_the_settings_are_listed_together(configured: Configured) -> None:
    problems = problems_of(configured("batch_size=0", "+trainer.max_epochs=3", "trainer.precision=16-mixed"))
    assert [problem.partition("=")[0] for problem in problems] == [
        "batch_size",
        "trainer.max_epochs",
        "trainer.precision",
    ]


@pytest.mark.parametrize("strategy", ["trainer.strategy=ddp", "trainer.strategy=ddp_spawn", "trainer=fsdp2"])
def test_processes_wait_for_the_first_one_for_days(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first process evaluates alone, which can take longer than the minutes after which torch gives up."""
    waits = list[timedelta]()
    for module in (lightning.pytorch.strategies.ddp, lightning.pytorch.strategies.model_parallel):
        monkeypatch.setattr(module, "_init_dist_connection", lambda *_, timeout, **__: waits.append(timeout))
    config = compose("task=arithmetic", strategy, "trainer.devices=2", "trainer.accelerator=cpu")
    trainer = build_trainer(config, logger=False, callbacks=[], enable_progress_bar=False)
    name = "setup_distributed" if isinstance(trainer.strategy, DDPStrategy) else "_setup_distributed"
    getattr(trainer.strategy, name)()
    assert waits == [timedelta(days=7)]
