"""Compose, check, build, save: the one place that knows OmegaConf.

A configuration is checked whole before anything loads: every `_target_` node is bound to the signature of
what it names, and all problems are told together.
"""

from __future__ import annotations

import errno
import importlib
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distill import preemption
from distill.credentials import HIDDEN, READABLE, REMEDY, disclosures, is_readable, is_secret_name, looks_secret, texts
from distill.fetch import is_url, whole_file
from distill.parts import nodes, problems_of, suggest
from distill.records import ConfigError, DistillError, OutOfMemoryError, PreemptedError
from distill.runs import visible

_BESIDE, _INSIDE = Path(__file__).parent.parent / "conf", Path(__file__).parent / "conf"
CONF = _BESIDE if (_BESIDE / "train.yaml").is_file() else _INSIDE
_ALLOWED_IN_HYDRA = {"_target_": ("hydra.", "hydra_plugins.", "distill."), "class": ("logging.", "colorlog.")}
_MOST_CHARACTERS = 10_000  # of a message
_RUN_NAME = re.compile(r"(?!\.)[^/\x00-\x1f]{1,60}")
_IO_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)
_RANKS_ARE_MADE = ("LOCAL_RANK", "RANK", "GROUP_RANK", "SLURM_PROCID", "TORCHELASTIC_RUN_ID")
_EXTRAS = {"joblib": "sweep", "optuna": "sweep", "ray": "ray"}
_EXTRAS |= {"slurm": "slurm", "submitit_local": "slurm", "submitit_slurm": "slurm"}
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
            _check_processes(config)
            return work(config)

    register()
    if work.__module__ == "__main__":  # launchers send the job to other processes, where that is something else
        work = importlib.import_module(f"distill.{name}").main
    try:
        _check_command_line(name, sys.argv[1:])
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)(_told(job))()
    except DistillError as error:
        sys.exit(tell(error))
    finally:
        preemption.ignore()


def _told(job: Work) -> Work:
    def told(config: DictConfig) -> float | None:
        try:
            return job(config)
        except (DistillError, KeyboardInterrupt, OSError, MemoryError) as error:
            # The next job of a sweep would be interrupted or asked to stop too.
            is_last = HydraConfig.get().mode == RunMode.RUN or isinstance(error, KeyboardInterrupt | PreemptedError)
            if not is_last or (isinstance(error, OSError) and error.errno not in _IO_ERRORS):
                raise  # sweeps.FailedJobs tells it, and the other jobs go on
            code = tell(error)
            preemption.ignore()  # here too: this may be a process that a launcher started
            sys.exit(code)

    return told


def tell(error: BaseException) -> int:
    """Say what ended a command or a job; return its exit code."""
    if isinstance(error, DistillError):
        print(f"\n{type(error).__name__}: {visible(str(error), _MOST_CHARACTERS)}", file=sys.stderr)
        return error.exit_code
    if isinstance(error, MemoryError):
        return tell(OutOfMemoryError("this machine's memory is full; make batches or the model smaller"))
    if isinstance(error, OSError) and error.errno in _IO_ERRORS:
        print(
            f"\n{error.strerror}: {error.filename or 'a file'}. Nothing that was finished is lost: free space "
            "or mend the permissions, then run the same command again.",
            file=sys.stderr,
        )
        return 4
    if isinstance(error, Exception):
        traceback.print_exception(error)
        return 1
    print("\nInterrupted. What was annotated or trained until now is kept.", file=sys.stderr)
    return 130


def _check_command_line(name: str, arguments: list[str]) -> None:
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


def _check_processes(config: DictConfig) -> None:
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
    return dict(_walk(config, ""))


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
