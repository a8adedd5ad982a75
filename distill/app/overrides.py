"""The command line: every override that cannot be applied is named before anything is built."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf

from distill.app.config import CONF, compose, run_name, walk
from distill.app.credentials import READABLE, REMEDY, disclosures, is_readable, is_secret_name, looks_secret, texts
from distill.app.moved import MOVED
from distill.app.targets import suggest
from distill.errors import ConfigError

_ALLOWED_IN_HYDRA = {"_target_": ("hydra.", "hydra_plugins.", "distill."), "class": ("logging.", "colorlog.")}
_RUN_NAME = re.compile(r"(?!\.)[^/\x00-\x1f]{1,60}")
_RANKS_ARE_MADE = ("LOCAL_RANK", "RANK", "GROUP_RANK", "SLURM_PROCID", "TORCHELASTIC_RUN_ID")
_LOOK_ONLY = {"--help", "-h", "--hydra-help", "--shell-completion", "-sc", "--version"}
_SHOWS = {"--cfg", "-c", "--info", "-i"}
_WITH_VALUE = {"--cfg", "-c", "--package", "-p", "--info", "-i", "--config-path", "-cp"}
_WITH_VALUE |= {"--config-name", "-cn", "--config-dir", "-cd", "--experimental-rerun"}


def check_command_line(name: str, arguments: list[str]) -> None:
    """Name every override that cannot be applied, each with the nearest thing that can."""
    _check_words(arguments)
    if _LOOK_ONLY & set(arguments):
        return
    if _is_nameless() and not any(word.startswith("hydra.run.dir=") for word in arguments):
        raise ConfigError(
            "the processes that torchrun starts need one folder for them all: set DISTILL_RUN=<a name for the run>, or "
            "give torchrun --rdzv-id=<name>"
        )
    if not _RUN_NAME.fullmatch(run_name("plain")):
        raise ConfigError(f"the run is called {run_name('')!r:.80}; wanted the name of one folder: no /, no . in front")
    flags = {index for index, word in enumerate(arguments) if word.startswith("-")}
    values = {index + 1 for index in flags if arguments[index] in _WITH_VALUE}
    words = [word for index, word in enumerate(arguments) if index not in flags | values]
    if not words and any(arguments[index].partition("=")[0] in _SHOWS for index in flags):
        return  # there is no override to check, and Hydra composes the configuration itself
    try:
        overrides = OverridesParser.create().parse_overrides(words)
    except HydraException as error:
        raise ConfigError(f"{str(error).splitlines()[0]}. Overrides read group=option or key=value") from None
    groups = [(_place(o), o.key_or_group, v) for o in overrides for v in _choices(o) if _is_group(o.key_or_group)]
    problems = [problem for _, group, option in groups for problem in _check_option(group, option)]
    if not problems:
        options = {place: option for place, _, option in groups}
        selected = [f"{place}={_written(option)}" for place, option in options.items()]
        composed = OmegaConf.to_container(compose(name, selected), resolve=False)
        problems += disclosures(texts(composed))
        known = _keys(composed)
        problems += [problem for override in overrides for problem in _check_key(override, known)]
    if problems:
        raise ConfigError(*problems)


def check_processes(config: DictConfig) -> None:
    """Refuse a job of a sweep for which Lightning would start the ranks: it runs the whole sweep in each of them.

    A sweeper that draws values then draws other ones for each rank. A scheduler, torchrun and spawn make ranks of jobs.
    """
    is_sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    if not is_sweep or "trainer" not in config or any(name in os.environ for name in _RANKS_ARE_MADE):
        return
    trainer, nodes = config.trainer, int(config.trainer.get("num_nodes") or 1)
    strategy, devices = trainer.get("strategy"), _num_devices(trainer.get("devices"), trainer.get("accelerator"))
    start = strategy.get("start_method", "popen") if isinstance(strategy, DictConfig) else str(strategy)
    if devices * nodes > 1 and not re.search("spawn|fork|notebook", start):
        raise ConfigError(
            f"a job of a sweep cannot start its own ranks: trainer.devices={trainer.get('devices')} on {nodes} "
            f"node{'s' * (nodes > 1)} with trainer.strategy={strategy} would run the whole sweep in every rank. "
            "Let a scheduler start them (hydra/launcher=slurm), run each job by itself under torchrun, take "
            "trainer.strategy=ddp_spawn on one node, or one device for each job (trainer.devices=1)"
        )


def _num_devices(devices: Any, accelerator: Any) -> int:
    """How many a Trainer takes: a number, a list, either as text, or all that there are (auto, -1)."""
    if isinstance(devices, ListConfig):
        return len(devices)
    if str(devices) in ("auto", "-1", "None"):
        import torch  # not at the top: the report needs none

        return 1 if accelerator == "cpu" else max(1, torch.cuda.device_count())
    return len(devices.split(",")) if "," in str(devices) else int(devices)


def _is_nameless() -> bool:
    several = int(os.environ.get("WORLD_SIZE") or 1) > 1 and "TORCHELASTIC_RUN_ID" in os.environ
    return several and not run_name("")


def _check_words(arguments: list[str]) -> None:
    """Refuse what would be logged, or run, before anything is made of it."""
    keys = [word.partition("=")[0] for word in arguments if looks_secret(word)]
    problems = [f"{'an argument' if looks_secret(key) else key}: {REMEDY}" for key in keys]
    if any(len(word) > 2 and "--experimental-rerun".startswith(word.partition("=")[0]) for word in arguments):
        problems.append("--experimental-rerun reads a pickle, which can run anything; give the overrides again instead")
    if problems:
        raise ConfigError(*problems)


def _place(override: Any) -> str:
    """A group, with the key that it fills where that has another name."""
    return f"{override.key_or_group}@{override.package}" if override.package else str(override.key_or_group)


def _is_group(key: str) -> bool:
    return key.startswith("hydra/") or (CONF / key).is_dir()


def _choices(override: Any) -> Iterator[Any]:
    """Values that an override takes, one after the other in a sweep."""
    if override.is_choice_sweep():
        yield from override.sweep_iterator()
    else:
        yield override.value()


def _written(option: Any) -> str:
    return f"[{','.join(map(str, option))}]" if isinstance(option, list) else str(option)


def _check_option(group: str, option: Any) -> list[str]:
    if group.startswith("hydra/"):
        return []  # launchers and sweepers are plugins': composing finds what is missing
    there = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
    asked = option if isinstance(option, list) else str(option).strip("[]").split(",")
    names = [str(name).strip() for name in asked]
    return [
        f"{group}={name}: there is {', '.join(there)}{suggest(name, there)}"
        for name in names
        if name and name not in there and name not in ("null", "None")
    ]


def _keys(config: Any) -> dict[str, Any]:
    """Every key of an unresolved configuration, dotted, and its value."""
    return dict(walk(config, ""))


def _check_key(override: Any, known: Mapping[str, Any]) -> list[str]:
    key = override.key_or_group
    if _is_group(key) or override.is_delete():
        return []
    given = [pair for value in _choices(override) for pair in texts(value, key)]
    if problems := disclosures(given):
        return problems
    if key.startswith("hydra."):
        return [problem for path, text in given for problem in _check_hydra(path, text)]
    if key in known:
        return [] if override.is_sweep_override() else _check_kind(key, override.value(), known[key])
    if is_secret_name(key):
        return [f"{key}: {REMEDY}"]
    return [] if override.is_add() else [f"{key} is no key of this configuration{suggest(key, known)}"]


def _check_hydra(path: str, text: str) -> list[str]:
    """Hydra builds parts of its own, and copies variables of the environment into files."""
    allowed = _ALLOWED_IN_HYDRA.get(path.rpartition(".")[2])
    if allowed and not text.startswith(allowed):
        return [f"{path}={text}: it is not from {', '.join(allowed)}"]
    if allowed and text in MOVED:
        return [f"{path}={text}: it is now {MOVED[text]}"]
    if path == "hydra.job.env_copy" and not is_readable(text):
        return [f"{path}: {text} would be written down; only {READABLE} may be copied"]
    if path == "hydra.sweep.subdir" and (Path(text).is_absolute() or ".." in Path(text).parts):
        return [f"{path}={text} leads out of the sweep's folder; wanted the name of a folder in it"]
    return []


def _check_kind(key: str, value: Any, default: Any) -> list[str]:
    """A number stays a number, a switch a switch; other kinds are checked against signatures."""
    kinds: dict[type, tuple[Any, str]] = {
        bool: (bool, "true or false"),
        int: (int, "a whole number"),
        float: ((int, float), "a number"),
    }
    kind, wanted = kinds.get(type(default), (object, ""))
    is_reference = (isinstance(value, str) and "${" in str(value)) or key == "trainer.devices"  # auto, or which of them
    return [] if is_reference or isinstance(value, kind) else [f"{key}={value}: wanted {wanted}"]
