"""The command line: every invalid override is reported before anything is built or written."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf

from distill.app.config import CONF, compose, run_name, walk
from distill.app.credentials import (
    READABLE,
    REMEDY,
    is_readable,
    is_secret_name,
    looks_secret,
    secret_problems,
    strings,
)
from distill.app.moved import MOVED
from distill.app.quoting import problems_of_grammar, several_values
from distill.app.targets import suggest
from distill.errors import ConfigError

_ALLOWED_IN_HYDRA = {"_target_": ("hydra.", "hydra_plugins.", "distill."), "class": ("logging.", "colorlog.")}
_RUN_NAME = re.compile(r"(?!\.)[^/\x00-\x1f]{1,60}")
_RANK_VARIABLES = ("LOCAL_RANK", "RANK", "GROUP_RANK", "SLURM_PROCID", "TORCHELASTIC_RUN_ID")
_ENUMERATES = "hydra._internal."  # Hydra's own sweeper
_NOTHING_COMPOSED = {"--help", "-h", "--hydra-help", "--shell-completion", "-sc", "--version"}
_ONLY_SHOWN = {"--cfg", "-c", "--info", "-i"}
_WITH_VALUE = {"--cfg", "-c", "--package", "-p", "--info", "-i", "--config-path", "-cp"}
_WITH_VALUE |= {"--config-name", "-cn", "--config-dir", "-cd", "--experimental-rerun"}


class _Choice(NamedTuple):
    """An option of a group, and the key that it fills: `group`, or `group@package`."""

    key: str
    group: str
    option: Any


def check_command_line(name: str, arguments: Sequence[str]) -> None:
    """Raise ConfigError with all invalid overrides, each with the closest valid name."""
    _check_secrets(arguments)
    if _NOTHING_COMPOSED & set(arguments):
        return
    _check_run_name(arguments)
    flags, words = _split(arguments)
    if not words and _ONLY_SHOWN & {flag.partition("=")[0] for flag in flags}:
        return  # there is no override to check, and nothing is written
    if problems := problems_of_grammar(words):
        raise ConfigError(*problems)
    overrides = OverridesParser.create().parse_overrides(words)
    if not _is_sweep(flags, overrides) and (sweeps := [str(o.input_line) for o in overrides if o.is_sweep_override()]):
        raise ConfigError(*map(several_values, sweeps))
    choices = [_Choice(_key(o), o.key_or_group, v) for o in overrides for v in _values(o) if _is_group(o.key_or_group)]
    problems = [problem for choice in choices for problem in _check_option(choice.group, choice.option)]
    if problems := problems or _check_keys(name, overrides, choices):
        raise ConfigError(*problems)


def _check_keys(name: str, overrides: Sequence[Override], choices: Sequence[_Choice]) -> list[str]:
    """Problems of keys and values, compared with the configuration that the chosen options compose."""
    options = {choice.key: choice.option for choice in choices}
    composed = OmegaConf.to_container(compose(name, [f"{key}={_text(o)}" for key, o in options.items()]), resolve=False)
    known = dict(walk(composed, ""))
    problems = [problem for override in overrides for problem in _check_key(override, known)]
    return secret_problems(strings(composed)) + problems


def _check_run_name(arguments: Sequence[str]) -> None:
    num_processes = int(os.environ.get("WORLD_SIZE") or 1)
    is_named = run_name("") or any(word.startswith("hydra.run.dir=") for word in arguments)
    if num_processes > 1 and "TORCHELASTIC_RUN_ID" in os.environ and not is_named:
        raise ConfigError(
            "the processes of torchrun must share one run folder: set DISTILL_RUN=<name of the run>, or "
            "give torchrun --rdzv-id=<name>"
        )
    if not _RUN_NAME.fullmatch(run_name("default")):
        raise ConfigError(f"invalid run name {run_name('')!r:.80}: expected a folder name, without / or a leading dot")


def check_processes(config: DictConfig) -> None:
    """Refuse a job of a sweep in which Lightning would start the ranks: each of them would run the whole sweep.

    A sweeper that samples values would sample other ones in each rank. A scheduler, torchrun and spawn start ranks
    per job.
    """
    is_sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    if not is_sweep or "trainer" not in config or any(name in os.environ for name in _RANK_VARIABLES):
        return
    trainer, num_nodes = config.trainer, int(config.trainer.get("num_nodes") or 1)
    strategy, num_devices = trainer.get("strategy"), _num_devices(trainer.get("devices"), trainer.get("accelerator"))
    start = strategy.get("start_method", "popen") if isinstance(strategy, DictConfig) else str(strategy)
    if num_devices * num_nodes > 1 and not re.search("spawn|fork|notebook", start):
        raise ConfigError(
            f"a job of a sweep cannot start its own ranks: trainer.devices={trainer.get('devices')} on {num_nodes} "
            f"node{'s' * (num_nodes > 1)} with trainer.strategy={strategy} would run the whole sweep in every rank. "
            "Let a scheduler start them (hydra/launcher=slurm), run each job separately under torchrun, set "
            "trainer.strategy=ddp_spawn on one node, or use one device per job (trainer.devices=1)"
        )


def check_objective(config: DictConfig, hydra: Any) -> None:
    """Refuse a search by the accuracy on test: what is chosen by it could not be measured on it any more.

    Hydra's own sweeper runs every combination and compares nothing; an agent of W&B may run a search.
    """
    sweeper, searches = str(hydra.sweeper._target_), ""
    if hydra.mode == RunMode.MULTIRUN and not sweeper.startswith(_ENUMERATES):
        searches = f"the sweeper {sweeper.rpartition('.')[2]}"
    if "WANDB_SWEEP_ID" in os.environ:
        searches = "an agent of a W&B sweep"
    if searches and config.get("objective") == "test":
        raise ConfigError(
            f"objective=test under {searches}: a choice by the accuracy on test leaves no test set to measure the "
            "choice on. Use objective=validation; test is evaluated and reported all the same"
        )


def check_searched(config: DictConfig) -> None:
    """Raise ConfigError for each key that the sweeper's own configuration searches and this configuration lacks."""
    known = dict(walk(OmegaConf.to_container(config, resolve=False), ""))
    searched = config.hydra.sweeper.get("params") or {}
    missing = [str(key) for key in searched if str(key)[0] not in "+~" and key not in known and not _is_group(str(key))]
    if missing:
        raise ConfigError(
            f"hydra.sweeper.params varies {' and '.join(missing)}, which this configuration does not have; add it, or "
            "set hydra.sweeper.params=null and name what to vary: 'optim.optimizer.lr=tag(log,interval(1e-5,1e-3))'"
        )


def _num_devices(devices: Any, accelerator: Any) -> int:
    """How many devices a Trainer uses: a number, a list, either as a string, or all devices (auto, -1)."""
    if isinstance(devices, ListConfig):
        return len(devices)
    if str(devices) in ("auto", "-1", "None"):
        from distill.app.machine import num_gpus  # here, because the report command does not import torch

        return 1 if accelerator == "cpu" else max(1, num_gpus())
    return len(devices.split(",")) if "," in str(devices) else int(devices)


def _check_secrets(arguments: Sequence[str]) -> None:
    """Refuse arguments that would write down a secret, or run code from a file."""
    keys = [word.partition("=")[0] for word in arguments if looks_secret(word)]
    problems = [f"{'an argument' if looks_secret(key) else key}: {REMEDY}" for key in keys]
    if any(len(word) > 2 and "--experimental-rerun".startswith(word.partition("=")[0]) for word in arguments):
        problems.append("--experimental-rerun reads a pickle, which can run any code; repeat the overrides instead")
    if problems:
        raise ConfigError(*problems)


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Hydra's flags, and the overrides."""
    flags = {index for index, word in enumerate(arguments) if word.startswith("-")}
    values = {index + 1 for index in flags if arguments[index] in _WITH_VALUE}
    words = [word for index, word in enumerate(arguments) if index not in flags | values]
    return [arguments[index] for index in sorted(flags)], words


def _is_sweep(flags: Sequence[str], overrides: Sequence[Override]) -> bool:
    """Whether the command runs several jobs: Hydra also takes the beginning of --multirun, and hydra.mode."""
    has_flag = any(flag == "-m" or (len(flag) > 2 and "--multirun".startswith(flag)) for flag in flags)
    return has_flag or any(o.key_or_group == "hydra.mode" and str(o.value()) == "MULTIRUN" for o in overrides)


def _key(override: Override) -> str:
    """The group of an override, with its package if it has one."""
    return f"{override.key_or_group}@{override.package}" if override.package else str(override.key_or_group)


def _is_group(key: str) -> bool:
    return key.startswith("hydra/") or (CONF / key).is_dir()


def _values(override: Override) -> Iterator[Any]:
    """The value of an override, or all values of a sweep."""
    if override.is_choice_sweep():
        yield from override.sweep_iterator()
    else:
        yield override.value()


def _text(option: Any) -> str:
    return f"[{','.join(map(str, option))}]" if isinstance(option, list) else str(option)


def _check_option(group: str, option: Any) -> list[str]:
    if group.startswith("hydra/"):
        return []  # from plugins; composing reports missing ones
    available = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
    options = option if isinstance(option, list) else str(option).strip("[]").split(",")
    names = [str(name).strip() for name in options]
    return [
        f"{group}={name} does not exist; available: {', '.join(available)}{suggest(name, available)}"
        for name in names
        if name and name not in available and name not in ("null", "None")
    ]


def _check_key(override: Override, known: Mapping[str, Any]) -> list[str]:
    key = override.key_or_group
    if _is_group(key) or override.is_delete():
        return []
    texts = [pair for value in _values(override) for pair in strings(value, key)]
    if problems := secret_problems(texts):
        return problems
    if key.startswith("hydra."):
        return [problem for path, text in texts for problem in _check_hydra(path, text)]
    if key in known:
        return [] if override.is_sweep_override() else _check_type(key, override.value(), known[key])
    if is_secret_name(key):
        return [f"{key}: {REMEDY}"]
    return [] if override.is_add() else [f"{key} is not a key of this configuration{suggest(key, known)}"]


def _check_hydra(path: str, text: str) -> list[str]:
    """Problems of Hydra's own settings, which can build objects and copy environment variables into files."""
    allowed = _ALLOWED_IN_HYDRA.get(path.rpartition(".")[2])
    if allowed and not text.startswith(allowed):
        return [f"{path}={text} is not from {', '.join(allowed)}"]
    if allowed and text in MOVED:
        return [f"{path}={text}: the class has moved to {MOVED[text]}"]
    if path == "hydra.job.env_copy" and not is_readable(text):
        return [f"{path}: {text} would be written to a file; only {READABLE} may be copied"]
    if path == "hydra.sweep.subdir" and (Path(text).is_absolute() or ".." in Path(text).parts):
        return [f"{path}={text} leads out of the sweep folder; expected the name of a folder inside it"]
    return []


def _check_type(key: str, value: Any, default: Any) -> list[str]:
    """A number must stay a number and a boolean a boolean; other types are checked against signatures."""
    types: dict[type, tuple[Any, str]] = {
        bool: (bool, "true or false"),
        int: (int, "an integer"),
        float: ((int, float), "a number"),
    }
    expected, description = types.get(type(default), (object, ""))
    is_reference = isinstance(value, str) and "${" in value
    is_exempt = is_reference or key == "trainer.devices"  # a number, a list or auto
    return [] if is_exempt or isinstance(value, expected) else [f"{key}={value}: expected {description}"]
