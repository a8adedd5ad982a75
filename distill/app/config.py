"""Compose, check, build and save configurations.

The whole configuration is checked before anything loads: the values of every `_target_` node are compared with the
signature that it names, and all problems are listed together.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distill.app.console import say
from distill.app.credentials import (
    HIDDEN,
    READABLE,
    is_readable,
    is_secret_name,
    looks_secret,
    secret_problems,
    strings,
)
from distill.app.files import atomic_write, is_url
from distill.app.moved import MOVED, current
from distill.app.targets import nodes, problems_of
from distill.errors import ConfigError, DistillError

_PACKAGE = Path(__file__).parent.parent
_IN_REPOSITORY, _INSTALLED = _PACKAGE.parent / "conf", _PACKAGE / "conf"
CONF = _IN_REPOSITORY if (_IN_REPOSITORY / "train.yaml").is_file() else _INSTALLED
Config = DictConfig
INVALID_CONFIG = (ConfigError, HydraException, OmegaConfBaseException)  # raised by a damaged saved configuration
_EXTRAS = {"joblib": "sweep", "optuna": "sweep", "ray": "ray"}
_EXTRAS |= {"slurm": "slurm", "submitit_local": "slurm", "submitit_slurm": "slurm"}


def of(values: Mapping[str, Any]) -> Config:
    """A configuration with these values."""
    return OmegaConf.create(dict(values))


def check(config: DictConfig) -> None:
    """Raise ConfigError with all secrets, missing values and invalid `_target_` nodes; imports what these name."""
    if problems := secret_problems(strings(OmegaConf.to_container(config, resolve=False))):
        raise ConfigError(*problems)
    try:
        problems = [f"{key} must be given: {key}=…" for key in sorted(OmegaConf.missing_keys(config))]
        values = OmegaConf.to_container(config, resolve=not problems, throw_on_missing=False)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}" if error.full_key else str(error)) from None
    problems += [f"{path}: {problem}" for path, node in nodes(values) for problem in problems_of(node)]
    if problems:
        raise ConfigError(*problems)


def renamed(config: DictConfig) -> DictConfig:
    """The configuration with every `_target_` of an earlier version renamed; each is reported in a line."""
    values = OmegaConf.to_container(config, resolve=False)
    moved = [(path, name) for path, node in nodes(values) if (name := str(node["_target_"])) in MOVED]
    if not moved:
        return config
    for path, name in moved:
        say(f"{path}._target_: {name} has moved to {MOVED[name]}")
    present = OmegaConf.create(current(values))
    assert isinstance(present, DictConfig)
    OmegaConf.set_struct(present, bool(OmegaConf.is_struct(config)))
    return present


def build(node: DictConfig | None, **arguments: Any) -> Any:
    """Call the `_target_` of a node with the values of the node and `arguments`; None builds None."""
    try:
        return hydra.utils.instantiate(node, _convert_="all", **arguments)
    except InstantiationException as error:
        if isinstance(error.__cause__, DistillError):  # the message of a part needs no context from Hydra
            raise error.__cause__ from None
        raise


def build_or_refuse(node: DictConfig, name: str, **arguments: Any) -> Any:
    """Like `build`; raise ConfigError with the first line of any other error that the target raises."""
    try:
        return build(node, **arguments)
    except InstantiationException as error:
        reason = str(error.__cause__ or error).partition("\n")[0]
        raise ConfigError(f"{name}: {reason}") from None


def plain(config: DictConfig) -> dict[str, Any]:
    """The resolved configuration as plain values, without secrets."""
    resolved = redacted(OmegaConf.to_container(config, resolve=True))
    assert isinstance(resolved, dict)
    return resolved


def without_labels(config: dict[str, Any]) -> dict[str, Any]:
    """A plain configuration without the labels of its losses, which only reports show."""
    losses = config.get("loss") or {}
    unlabelled = {name: {key: value for key, value in losses[name].items() if key != "label"} for name in losses}
    return {**config, "loss": unlabelled} if losses else config


def differences(config: DictConfig, path: Path, *, ignored: tuple[str, ...]) -> list[str]:
    """Keys whose values differ from a saved configuration; sections and last parts of keys in `ignored` are ignored."""
    values = current(yaml.safe_load(path.read_text()))
    saved, present = (dict(_leaves(without_labels(tree))) for tree in (values, plain(config)))
    return [
        f"{key} was {saved.get(key)!r} and is now {present.get(key)!r}"
        for key in sorted({*saved, *present})
        if saved.get(key) != present.get(key) and not {key.partition(".")[0], key.rpartition(".")[2]} & {*ignored}
    ]


def save(config: DictConfig, path: Path) -> dict[str, Any]:
    """Write the resolved configuration without secrets, and return it."""
    values = plain(config)
    with atomic_write(path) as temporary:
        temporary.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    return values


def redacted(value: Any, name: str = "") -> Any:
    """The value with every secret replaced, recognised by its name or its format."""
    if isinstance(value, dict):
        return {key: redacted(item, str(key)) for key, item in value.items()}
    if isinstance(value, list):
        return [redacted(item, name) for item in value]
    is_secret = isinstance(value, str) and value and (is_secret_name(name) or looks_secret(value))
    return HIDDEN if is_secret else value


def run_dir() -> Path:
    """The folder of this run."""
    return Path(HydraConfig.get().runtime.output_dir)


def local_root(root: str) -> Path:
    """The local folder of models, data and runs: `root`, or if that is a URL, $DISTILL_ROOT or the default."""
    if is_url(root):
        root = os.environ.get("DISTILL_ROOT", "")
    return Path("distill-data" if is_url(root) or not root else root).resolve()


def run_name(default: str) -> str:
    """The name of the run's folder. All processes of a job have the same one, also after a scheduler restarts it."""
    environment = os.environ
    is_batch = environment.get("SLURM_JOB_NAME") not in (None, "bash", "interactive")
    slurm = f"slurm-{environment['SLURM_JOB_ID']}" if is_batch and environment.get("SLURM_JOB_ID") else ""
    elastic = environment.get("TORCHELASTIC_RUN_ID", "none")
    torchrun = f"torchrun-{elastic}" if elastic != "none" else ""
    # A W&B agent runs several runs in one job, and next to other agents.
    agent = f"wandb-{environment.get('WANDB_RUN_ID')}" if environment.get("WANDB_SWEEP_ID") else ""
    return environment.get("DISTILL_RUN") or agent or slurm or torchrun or default


def register() -> None:
    """Register the resolvers local and run_name, and restrict oc.env to variables that hold no secrets."""
    OmegaConf.register_new_resolver("local", lambda root: str(local_root(root)), replace=True)
    OmegaConf.register_new_resolver("run_name", run_name, replace=True)
    OmegaConf.register_new_resolver("oc.env", _environment, replace=True)


def _environment(variable: str, *default: Any) -> Any:
    if not is_readable(variable):
        raise ConfigError(f"a configuration may not read {variable:.60}, only {READABLE}")
    if variable not in os.environ and not default:
        raise ConfigError(f"the environment variable {variable} is not set; add a default: ${{oc.env:{variable},…}}")
    return os.environ.get(variable, *default)


def sweep_name() -> str | None:
    """The name of the sweep that this job belongs to; None for a single run."""
    settings = HydraConfig.get()
    return Path(settings.sweep.dir).name if settings.mode == RunMode.MULTIRUN else None


def compose(name: str, overrides: list[str]) -> DictConfig:
    """The configuration of a command line; raises ConfigError."""
    register()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        try:
            return hydra.compose(name, overrides, return_hydra_config=False)
        except (HydraException, OmegaConfBaseException) as error:
            line = str(error).splitlines()[0]
            plugin = re.search(r"hydra/(?:launcher|sweeper)/(\w+)", line)
            extra = _EXTRAS.get(plugin[1]) if plugin else None
            raise ConfigError(f"{line}; pip install 'distill[{extra}]'" if extra else line) from None


def _leaves(values: Any) -> Iterator[tuple[str, Any]]:
    return ((key, value) for key, value in walk(values, "") if not isinstance(value, dict))


def walk(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """All keys of a nested value as dotted paths, with their values."""
    if path:
        yield path, value
    if isinstance(value, dict):
        for key, item in value.items():
            yield from walk(item, f"{path}.{key}".lstrip("."))
