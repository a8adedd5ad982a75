"""Compose, check, build, save: the one place that knows OmegaConf.

A configuration is checked whole before anything loads: every `_target_` node is bound to the signature of
what it names, and all problems are told together.
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
from distill.app.credentials import HIDDEN, READABLE, disclosures, is_readable, is_secret_name, looks_secret, texts
from distill.app.files import is_url, whole_file
from distill.app.moved import MOVED, current
from distill.app.targets import nodes, problems_of
from distill.errors import ConfigError, DistillError

_PACKAGE = Path(__file__).parent.parent
_BESIDE, _INSIDE = _PACKAGE.parent / "conf", _PACKAGE / "conf"
CONF = _BESIDE if (_BESIDE / "train.yaml").is_file() else _INSIDE
Config = DictConfig
UNUSABLE = (ConfigError, HydraException, OmegaConfBaseException)  # what a configuration that is saved may raise
_EXTRAS = {"joblib": "sweep", "optuna": "sweep", "ray": "ray"}
_EXTRAS |= {"slurm": "slurm", "submitit_local": "slurm", "submitit_slurm": "slurm"}


def of(plain: Mapping[str, Any]) -> Config:
    """A configuration of plain values."""
    return OmegaConf.create(dict(plain))


def check(config: DictConfig) -> None:
    """Raise ConfigError with all that is wrong in `_target_` nodes and in values that must be given."""
    if problems := disclosures(texts(OmegaConf.to_container(config, resolve=False))):
        raise ConfigError(*problems)
    try:
        problems = [f"{key} must be given: {key}=…" for key in sorted(OmegaConf.missing_keys(config))]
        plain = OmegaConf.to_container(config, resolve=not problems, throw_on_missing=False)
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0]) from None
    problems += [f"{path}: {problem}" for path, node in nodes(plain) for problem in problems_of(node)]
    if problems:
        raise ConfigError(*problems)


def renamed(config: DictConfig) -> DictConfig:
    """The configuration with the present name of each part that has moved; a line says what is renamed where."""
    given = OmegaConf.to_container(config, resolve=False)
    moved = [(path, name) for path, node in nodes(given) if (name := str(node["_target_"])) in MOVED]
    if not moved:
        return config
    for path, name in moved:
        say(f"{path}._target_: {name} is now {MOVED[name]}")
    present = OmegaConf.create(current(given))
    assert isinstance(present, DictConfig)
    OmegaConf.set_struct(present, bool(OmegaConf.is_struct(config)))
    return present


def build(node: DictConfig | None, **arguments: Any) -> Any:
    """Call what a node's `_target_` names with the node's values and `arguments`; no node builds None."""
    try:
        return hydra.utils.instantiate(node, _convert_="all", **arguments)
    except InstantiationException as error:
        if isinstance(error.__cause__, DistillError):  # what a part says of its own values needs no frame around it
            raise error.__cause__ from None
        raise


def plain(config: DictConfig) -> dict[str, Any]:
    """The resolved configuration, secrets hidden."""
    resolved = redacted(OmegaConf.to_container(config, resolve=True))
    assert isinstance(resolved, dict)
    return resolved


def differences(config: DictConfig, path: Path, *, besides: tuple[str, ...]) -> list[str]:
    """What is not as in a configuration that was saved, in keys that are not below one of `besides`."""
    left, right = (dict(_leaves(each)) for each in (current(yaml.safe_load(path.read_text())), plain(config)))
    return [
        f"{key} was {left.get(key)!r} and is now {right.get(key)!r}"
        for key in sorted({*left, *right})
        if left.get(key) != right.get(key) and key.partition(".")[0] not in besides
    ]


def save(config: DictConfig, path: Path) -> dict[str, Any]:
    """Write the resolved configuration, secrets hidden, and return it."""
    known = plain(config)
    with whole_file(path) as temporary:
        temporary.write_text(yaml.safe_dump(known, sort_keys=False, allow_unicode=True))
    return known


def redacted(value: Any, name: str = "") -> Any:
    """The same value with every entry hidden whose name or form speaks of a secret."""
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
    """Where models, data and runs are: the root itself, or where that is a URL what would be the root without it."""
    if is_url(root):
        root = os.environ.get("DISTILL_ROOT", "")
    return Path("distill-data" if is_url(root) or not root else root).resolve()


def run_name(otherwise: str) -> str:
    """The name of a run's folder: the same again for a job that a scheduler starts again, and for all its processes."""
    environment = os.environ
    is_batch = environment.get("SLURM_JOB_NAME") not in (None, "bash", "interactive")
    slurm = f"slurm-{environment['SLURM_JOB_ID']}" if is_batch and environment.get("SLURM_JOB_ID") else ""
    elastic = environment.get("TORCHELASTIC_RUN_ID", "none")
    torchrun = f"torchrun-{elastic}" if elastic != "none" else ""
    # A W&B agent runs many in one job, and beside other agents.
    agent = f"wandb-{environment.get('WANDB_RUN_ID')}" if environment.get("WANDB_SWEEP_ID") else ""
    return environment.get("DISTILL_RUN") or agent or slurm or torchrun or otherwise


def register() -> None:
    """Let configurations say ${local:…}, a root's folder on this machine, ${run_name:…}, and little of ${oc.env:…}."""
    OmegaConf.register_new_resolver("local", lambda root: str(local_root(root)), replace=True)
    OmegaConf.register_new_resolver("run_name", run_name, replace=True)
    OmegaConf.register_new_resolver("oc.env", _environment, replace=True)


def _environment(variable: str, *default: Any) -> Any:
    if not is_readable(variable):
        raise ConfigError(f"a configuration may not read {variable:.60}, only {READABLE}")
    if variable not in os.environ and not default:
        raise ConfigError(f"the environment has no {variable}; set it, or give a default: ${{oc.env:{variable},…}}")
    return os.environ.get(variable, *default)


def sweep_name() -> str | None:
    """The name of the sweep that this job belongs to, None for a single run."""
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


def _leaves(plain: Any) -> Iterator[tuple[str, Any]]:
    return ((key, value) for key, value in walk(plain, "") if not isinstance(value, dict))


def walk(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every key of a nested value, dotted, and what it holds."""
    if path:
        yield path, value
    if isinstance(value, dict):
        for key, item in value.items():
            yield from walk(item, f"{path}.{key}".lstrip("."))
