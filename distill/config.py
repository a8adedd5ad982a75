"""Compose, check, build, save: the one place that knows OmegaConf.

A configuration is checked whole before anything loads: every `_target_` node is bound to the signature of
what it names, and all problems are told together.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import inspect
import logging
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_type_hints

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ConfigDict, TypeAdapter, ValidationError

from distill import preemption
from distill.fetch import is_url
from distill.records import ConfigError, DistillError, OutOfMemoryError, PreemptedError

_BESIDE, _INSIDE = Path(__file__).parent.parent / "conf", Path(__file__).parent / "conf"
CONF = _BESIDE if (_BESIDE / "train.yaml").is_file() else _INSIDE
_ALLOWED = ("distill.", "torch.", "lightning.", "transformers.", "peft.")
_SECRET = re.compile(r"(^|[._])(key|token|secret|password|credential)s?$", re.IGNORECASE)
_IO_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)
_LOOK_ONLY = {"--help", "-h", "--hydra-help", "--shell-completion", "-sc", "--version"}
_WITH_VALUE = {"--cfg", "-c", "--package", "-p", "--info", "-i", "--config-path", "-cp"}
_WITH_VALUE |= {"--config-name", "-cn", "--config-dir", "-cd", "--experimental-rerun"}
Work = Callable[[DictConfig], float | None]


def command(name: str, work: Work) -> None:
    """Run `work` on the composed configuration `name`; tell a user's errors in one message, and exit."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)

    def job(config: DictConfig) -> float | None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            return work(config)

    register()
    failed: list[int] = []
    try:
        _check_command_line(name, sys.argv[1:])
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)(_told(job, failed))()
    except DistillError as error:
        failed.append(_tell(error))
    preemption.ignore()
    sys.exit(max(failed, default=0))


def _told(job: Work, failed: list[int]) -> Work:
    process = os.getpid()

    def told(config: DictConfig) -> float | None:
        try:
            return job(config)
        except (DistillError, KeyboardInterrupt, OSError, MemoryError) as error:
            if isinstance(error, OSError) and error.errno not in _IO_ERRORS:
                raise
            failed.append(_tell(error))
            # The next job of a sweep would be asked to stop too.
            if HydraConfig.get().mode == RunMode.RUN or isinstance(error, KeyboardInterrupt | PreemptedError):
                preemption.ignore()
                sys.exit(failed[-1])
            if os.getpid() != process:
                raise RuntimeError(f"job failed with exit code {failed[-1]}") from None
            # The other jobs of a sweep go on; the command fails at the end.
            return math.nan

    return told


def _tell(error: BaseException) -> int:
    if isinstance(error, DistillError):
        print(f"\n{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    if isinstance(error, MemoryError):
        return _tell(OutOfMemoryError("this machine's memory is full; make batches or the model smaller"))
    if isinstance(error, OSError):
        print(
            f"\n{error.strerror}: {error.filename or 'a file'}. Nothing that was finished is lost: free space "
            "or mend the permissions, then run the same command again.",
            file=sys.stderr,
        )
        return 4
    print("\nInterrupted. What was annotated or trained until now is kept.", file=sys.stderr)
    return 130


def _check_command_line(name: str, arguments: list[str]) -> None:
    """Name every override that cannot be applied, each with the nearest thing that can."""
    if _LOOK_ONLY & set(arguments):
        return
    if _is_nameless() and not any(word.startswith("hydra.run.dir=") for word in arguments):
        raise ConfigError(
            "the processes that torchrun starts need one folder for them all: set DISTILL_RUN=<a name for the run>, or "
            "give torchrun --rdzv-id=<name>"
        )
    flags = {index for index, word in enumerate(arguments) if word.startswith("-")}
    values = {index + 1 for index in flags if arguments[index] in _WITH_VALUE}
    words = [word for index, word in enumerate(arguments) if index not in flags | values]
    try:
        overrides = OverridesParser.create().parse_overrides(words)
    except HydraException as error:
        raise ConfigError(f"{str(error).splitlines()[0]}. Overrides read group=option or key=value") from None
    groups = [(_place(o), o.key_or_group, v) for o in overrides for v in _choices(o) if _is_group(o.key_or_group)]
    problems = [problem for _, group, option in groups for problem in _check_option(group, option)]
    if not problems:
        options = {place: option for place, _, option in groups}
        selected = [f"{place}={_written(option)}" for place, option in options.items()]
        known = _keys(compose(name, selected))
        problems += [problem for override in overrides for problem in _check_key(override, known)]
    if problems:
        raise ConfigError(*problems)


def _is_nameless() -> bool:
    several = int(os.environ.get("WORLD_SIZE") or 1) > 1 and "TORCHELASTIC_RUN_ID" in os.environ
    return several and not run_name("")


def check(config: DictConfig) -> None:
    """Raise ConfigError with all that is wrong in `_target_` nodes and in values that must be given."""
    problems = [f"{key} must be given: {key}=…" for key in sorted(OmegaConf.missing_keys(config))]
    plain = OmegaConf.to_container(config, resolve=not problems, throw_on_missing=False)
    for path, node in _targets(plain):
        problems += [f"{path}: {problem}" for problem in _check_target(node)]
    if problems:
        raise ConfigError(*problems)


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
    left, right = (dict(_leaves(each)) for each in (yaml.safe_load(path.read_text()), plain(config)))
    return [
        f"{key} was {left.get(key)!r} and is now {right.get(key)!r}"
        for key in sorted({*left, *right})
        if left.get(key) != right.get(key) and key.partition(".")[0] not in besides
    ]


def save(config: DictConfig, path: Path) -> dict[str, Any]:
    """Write the resolved configuration, secrets hidden, and return it."""
    known = plain(config)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(known, sort_keys=False, allow_unicode=True))
    return known


def redacted(value: Any, name: str = "") -> Any:
    """The same value with every entry hidden whose name speaks of a secret."""
    if isinstance(value, dict):
        return {key: redacted(item, str(key)) for key, item in value.items()}
    if isinstance(value, list):
        return [redacted(item, name) for item in value]
    return "hidden" if _SECRET.search(name) and isinstance(value, str) and value else value


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
    return environment.get("DISTILL_RUN") or slurm or torchrun or otherwise


def is_first_process() -> bool:
    """Whether this one writes and speaks for all that train or annotate together."""
    return not any(int(os.environ.get(name) or 0) for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


def register() -> None:
    """Let configurations say ${local:…}, a root's folder on this machine, and ${run_name:…}."""
    OmegaConf.register_new_resolver("local", lambda root: str(local_root(root)), replace=True)
    OmegaConf.register_new_resolver("run_name", run_name, replace=True)


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
            raise ConfigError(str(error).splitlines()[0]) from None


def _place(override: Any) -> str:
    """A group, with the key that it fills where that has another name."""
    return f"{override.key_or_group}@{override.package}" if override.package else str(override.key_or_group)


def _is_group(key: str) -> bool:
    return (CONF / key).is_dir()


def _choices(override: Any) -> Iterator[Any]:
    """Values that an override takes, one after the other in a sweep."""
    if override.is_choice_sweep():
        yield from override.sweep_iterator()
    else:
        yield override.value()


def _written(option: Any) -> str:
    return f"[{','.join(map(str, option))}]" if isinstance(option, list) else str(option)


def _check_option(group: str, option: Any) -> list[str]:
    there = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
    asked = option if isinstance(option, list) else str(option).strip("[]").split(",")
    names = [str(name).strip() for name in asked]
    return [
        f"{group}={name}: there is {', '.join(there)}{_suggest(name, there)}"
        for name in names
        if name and name not in there and name not in ("null", "None")
    ]


def _keys(config: DictConfig) -> dict[str, Any]:
    """Every key of the configuration, dotted, and its value."""
    return dict(_walk(OmegaConf.to_container(config, resolve=False), ""))


def _leaves(plain: Any) -> Iterator[tuple[str, Any]]:
    return ((key, value) for key, value in _walk(plain, "") if not isinstance(value, dict))


def _walk(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if path:
        yield path, value
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _walk(item, f"{path}.{key}".lstrip("."))


def _check_key(override: Any, known: Mapping[str, Any]) -> list[str]:
    key = override.key_or_group
    if _is_group(key) or key.startswith("hydra.") or override.is_delete():
        return []
    if key in known:
        return [] if override.is_sweep_override() else _check_kind(key, override.value(), known[key])
    if _SECRET.search(key):
        return [f"{key}: a command line is logged, so it may hold no secret; use the environment"]
    return [] if override.is_add() else [f"{key} is no key of this configuration{_suggest(key, known)}"]


def _check_kind(key: str, value: Any, default: Any) -> list[str]:
    """A number stays a number, a switch a switch; other kinds are checked against signatures."""
    kinds: dict[type, tuple[Any, str]] = {
        bool: (bool, "true or false"),
        int: (int, "a whole number"),
        float: ((int, float), "a number"),
    }
    kind, wanted = kinds.get(type(default), (object, ""))
    is_reference = isinstance(value, str) and "${" in str(value)
    return [] if is_reference or isinstance(value, kind) else [f"{key}={value}: wanted {wanted}"]


def _suggest(word: str, among: Any) -> str:
    close = difflib.get_close_matches(word, list(among), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def _targets(value: Any, path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    if isinstance(value, dict):
        if "_target_" in value:
            yield path, value
        for key, item in value.items():
            yield from _targets(item, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _targets(item, f"{path}[{index}]")


def _check_target(node: Mapping[str, Any]) -> list[str]:
    name = str(node["_target_"])
    if not name.startswith(_ALLOWED):
        return [f"_target_ {name} is not from {', '.join(p.rstrip('.') for p in _ALLOWED)}"]
    try:
        target = _locate(name)
    except (ImportError, AttributeError) as error:
        hint = "; pip install 'distill[lora]'" if error.name == "peft" else ""
        return [f"_target_ {name} does not exist: {error}{hint}"]
    given = {key: value for key, value in node.items() if not key.startswith("_")}
    parameters = inspect.signature(target).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return []
    problems = [f"{name} takes no {key!r}{_suggest(key, parameters)}" for key in given if key not in parameters]
    required = [key for key, p in parameters.items() if p.default is p.empty and p.kind is not p.VAR_POSITIONAL]
    if not node.get("_partial_"):
        problems += [f"{name} needs {key!r}" for key in required if key not in given]
    return problems + _check_types(target, name, given)


def _check_types(target: Any, name: str, given: Mapping[str, Any]) -> list[str]:
    if not name.startswith("distill."):
        return []
    hints = get_type_hints(target.__init__ if inspect.isclass(target) else target)
    problems = []
    for key, value in given.items():
        is_open = isinstance(value, str) and "${" in value  # refers to what must be given first
        if key in hints and not is_open and not (isinstance(value, dict) and "_target_" in value):
            try:
                TypeAdapter(hints[key], config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
            except ValidationError as error:
                problems.append(f"{key}={value!r}: {error.errors()[0]['msg']}")
    return problems


def _locate(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)
