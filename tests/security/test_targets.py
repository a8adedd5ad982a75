"""A `_target_` builds only allowed classes, from configurations and command lines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from distill.app import config as configuration
from distill.errors import ConfigError
from tests.conftest import compose
from tests.security.conftest import MakesFolderWhenUnpickled, TrainCommand

TARGETS = [
    "os.system",
    "torch.load",
    "torch.hub.load",
    "torch.hub.load_state_dict_from_url",
    "torch.jit.load",
    "torch.optim.Optimizer.load_state_dict",
    "torch.utils.cpp_extension.load",
    "lightning.pytorch.cli.instantiate_class",
    "lightning.pytorch.cli.LightningCLI",
    "lightning.pytorch.utilities.migration.migrate_checkpoint",
    "lightning.fabric.utilities.cloud_io._load",
    "lightning.pytorch.callbacks.model_checkpoint.shutil",
    "lightning.pytorch.loggers.wandb.os",
    "transformers.pipeline",
    "transformers.AutoModelForCausalLM",
    "transformers.dynamic_module_utils.get_class_from_dynamic_module",
    "peft.load_peft_weights",
    "peft.PeftModel",
    "hydra.utils.instantiate",
    "distill.models.fetch.subprocess.run",
    "distill.models.fetch.subprocess",
    "distill.models.fetch.tempfile",
    "distill.models.fetch.Path",
    "distill.models.naming.snapshot_download",
    "distill.app.command.importlib",
]


def test_targets_that_could_run_other_code_are_refused() -> None:
    config = compose("task=arithmetic", "tracking=off", "+extra={}")
    config.extra = {f"part{index}": {"_target_": target} for index, target in enumerate(TARGETS)}
    with pytest.raises(ConfigError) as raised:
        configuration.check(config)
    assert len(raised.value.problems) == len(TARGETS)
    for target, problem in zip(TARGETS, raised.value.problems, strict=True):
        assert f"_target_ {target} " in problem


@pytest.mark.parametrize(
    "target",
    [
        "torch.optim.SGD",
        "torch.optim.lr_scheduler.ConstantLR",
        "lightning.pytorch.callbacks.ModelCheckpoint",
        "lightning.pytorch.strategies.FSDPStrategy",
        "lightning.pytorch.strategies.ModelParallelStrategy",
        "lightning.pytorch.loggers.TensorBoardLogger",
        "lightning.pytorch.profilers.SimpleProfiler",
        "transformers.get_cosine_schedule_with_warmup",
        "peft.LoraConfig",
    ],
)
def test_every_part_of_a_run_is_an_allowed_target(target: str) -> None:
    configuration.check(OmegaConf.create({"extra": {"_target_": target, "_partial_": True}}))


@pytest.mark.parametrize(
    "argument",
    [
        "+hydra.callbacks.evil._target_=os.mkdir",
        "+hydra.callbacks.evil={{_target_:subprocess.run,args:[mkdir,'{marker}']}}",
        "+hydra.callbacks.evil={{_target_:torch.hub.load,repo_or_dir:'{marker}'}}",
        "hydra.sweeper._target_=os.mkdir",
        "hydra.launcher._target_=os.mkdir",
        "+hydra.job_logging.handlers.evil={{class:subprocess.Popen,args:[mkdir,'{marker}']}}",
        "+hydra.job_logging.handlers.evil.class=subprocess.Popen",
    ],
)
def test_hydra_builds_no_target_from_the_command_line(
    argument: str, train_command: TrainCommand, hostile_marker: Path
) -> None:
    code, output = train_command("-m", "seed=1", argument.format(marker=hostile_marker))
    assert code == 2, output
    assert "is not from" in output
    assert not list(hostile_marker.parent.iterdir())


@pytest.mark.parametrize("flag", ["--experimental-rerun", "--experimental-r", "--exp"])
@pytest.mark.parametrize("is_one_word", [True, False])
def test_rerunning_from_a_pickle_is_refused(
    flag: str, is_one_word: bool, train_command: TrainCommand, tmp_path: Path, hostile_marker: Path
) -> None:
    torch.save(MakesFolderWhenUnpickled(hostile_marker), tmp_path / "config.pickle")
    pickle_path = str(tmp_path / "config.pickle")
    code, output = train_command(*([f"{flag}={pickle_path}"] if is_one_word else [flag, pickle_path]))
    assert code == 2, output
    assert "reads a pickle" in output


@pytest.mark.parametrize("subdir", ["../x", "/x", "a/../../x"])
def test_a_sweep_job_stays_in_the_sweep_folder(subdir: str, train_command: TrainCommand, tmp_path: Path) -> None:
    code, output = train_command("-m", "seed=1,2", f"hydra.sweep.subdir={subdir}")
    assert code == 2, output
    assert "leads out of the sweep folder" in output
    assert not list(tmp_path.iterdir())
