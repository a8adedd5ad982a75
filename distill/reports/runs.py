"""Run folders as they are found: whole, half written or damaged.

Nothing here trusts what a file holds: everything may be missing, and text is made visible before it is shown.
"""

from __future__ import annotations

import csv
import json
import math
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from distill.app.console import visible
from distill.app.moved import current
from distill.errors import ConfigError

FILES = ("config.yaml", "run.json", "metrics.csv", "results.json", "predictions.jsonl", "rejected.jsonl")
OPTIONAL_FILES = ("rationales.jsonl",)
# What says where and how a run is made, and not what is learned: whole sections, and single settings.
HOW = (
    *("root", "resume", "preflight", "plan", "tracking", "cost", "objective", "time_teacher", "evaluate_before"),
    *("num_samples", "num_workers", "checkpoint_every", "validate_every", "microbatch_size", "share_prompt"),
    *("trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy", "trainer.log_every_n_steps"),
    *("trainer.num_sanity_val_steps", "trainer.enable_model_summary", "trainer.use_distributed_sampler"),
)
PLACES = re.compile(r"(^|[._])(root|dir|path|files)$")
TEACHING = ("teacher", "soft_teacher", "rationales", "cache")  # of no matter to who learns from labels alone
COUNTED = ("trainer.max_steps", "task.examples.num_labelled", "task.examples.num_unlabelled")  # the facts have these
NULL = str(None)  # a setting without a value, flat
SEEDS = re.compile(r"(?<!split_)seed$")

Json = Mapping[str, Any]
PARSERS: Mapping[str, Callable[[str], Iterable[object]]] = {
    ".yaml": lambda text: [current(yaml.safe_load(text))],
    ".json": lambda text: [json.loads(text)],
    ".jsonl": lambda text: (json.loads(line) for line in text.split("\n") if line.strip()),
    ".csv": lambda text: csv.DictReader(text.split("\n")),
}


@dataclass(frozen=True)
class Run:
    """What a run folder holds; `problems` names each file that is missing or damaged."""

    folder: Path
    problems: tuple[str, ...]
    facts: Json
    config: Json
    rows: Mapping[str, Json]
    metrics: tuple[Json, ...]
    predictions: tuple[Json, ...]
    rejected: tuple[Json, ...]
    rationales: tuple[Json, ...]

    @property
    def name(self) -> str:
        """The name that the train command gave, or the folder's."""
        return str(self.facts.get("name") or self.folder.name)

    @property
    def seed(self) -> str:
        """The seed as text; runs of one seed are paired."""
        return str(self.facts.get("seed"))

    @property
    def losses(self) -> tuple[str, ...]:
        """Names of the active losses, sorted."""
        return tuple(sorted(map(str, self.facts.get("losses") or ())))

    @property
    def is_complete(self) -> bool:
        """Whether the student was evaluated and the run says what trained it."""
        return bool(self.losses) and number(self.rows.get("student", {}).get("accuracy")) is not None

    @cached_property
    def settings(self) -> Mapping[str, str]:
        """Everything that two runs must share to be seeds of one arm, flat."""
        facts = {key: self.facts.get(key) for key in ("task", "teacher", "steps", "batch_size")}
        counts = mapping(self.facts.get("counts"))
        facts |= {"start": self._start, "labelled": counts.get("labelled"), "test": counts.get("test")}
        facts |= {"unlabelled": self._unlabelled, "cache": mapping(self.facts.get("cache")).get("fingerprint")}
        chosen = {key: value for key, value in self.choices.items() if key not in COUNTED}
        return flatten(facts) | {key: value for key, value in chosen.items() if not SEEDS.search(key)}

    @cached_property
    def choices(self) -> Mapping[str, str]:
        """The configuration, flat, without what says only where and how the run was made."""
        others = tuple(f"{part}." for part in (*HOW, *(TEACHING if self.losses == ("answer",) else ())))
        flat = flatten(self.config).items()
        return {k: v for k, v in flat if not (f"{k}.".startswith(others) or PLACES.search(k))}

    @property
    def _start(self) -> object:
        """Hash of the weights before training; what they were drawn for, where each seed draws its own."""
        student = mapping(self.config.get("student"))
        if student.get("from_scratch") or student.get("lora"):
            return f"drawn by seed: {shlex.join(flatten(student).values())}"
        return self.facts.get("start")

    @property
    def _unlabelled(self) -> int | None:
        """Number of training examples without a label; of no matter to who learns from labels alone."""
        train, labelled = (number(mapping(self.facts.get("counts")).get(key)) for key in ("train", "labelled"))
        return None if train is None or labelled is None or self.losses == ("answer",) else int(train - labelled)


def number(value: object) -> float | None:
    """A finite number, or None for anything else."""
    try:
        result = float(value) if isinstance(value, int | float | str) else math.nan
    except (ValueError, OverflowError):
        return None
    return result if math.isfinite(result) and not isinstance(value, bool) else None


def mapping(value: object) -> Json:
    """The value if it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def mappings(value: object) -> list[Json]:
    """The mappings in a list; none where the value is something else."""
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list | tuple) else []


def flatten(tree: Json, prefix: str = "") -> dict[str, str]:
    """Nested mappings as one flat one with dotted keys and text for values."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        text = shlex.join(map(str, value)) if isinstance(value, list) else str(value)
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": text}
    return flat


def read_run(folder: str | Path) -> Run:
    """Read a run folder, however much of it there is; ConfigError where it is none."""
    folder = Path(folder)
    held = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else None
    if held is None or not {"config.yaml", "run.json"} & set(held):
        found = "no such folder" if held is None else f"only {', '.join(held[:8]) or 'an empty folder'}"
        raise ConfigError(
            f"{visible(str(folder))} is not a run folder: found {visible(found)}; wanted config.yaml or "
            "run.json, as `python -m distill.train` writes them. Name folders of runs: runs=[dir,dir,...]"
        )
    problems: list[str] = []
    config, facts, metrics, results, predictions, rejected = (_read(folder / name, problems) for name in FILES)
    rationales = [_read(folder / name, problems) if name in held else () for name in OPTIONAL_FILES]
    rows = {key: mapping(row) for item in results for key, row in mapping(item.get("rows")).items()}
    compared = tuple(map(_compared, predictions))
    return Run(folder, tuple(problems), dict(*facts), dict(*config), rows, metrics, compared, rejected, *rationales)


def _read(path: Path, problems: list[str]) -> tuple[Json, ...]:
    """The mappings in a file up to the first damage, which is added to `problems`."""
    items: list[Json] = []
    if path.is_symlink() and not path.resolve().is_relative_to(path.parent.resolve()):
        problems.append(f"{path.name} is a link that leads out of the folder, and is not followed")
        return ()
    try:
        for item in PARSERS[path.suffix](path.read_text(encoding="utf-8", errors="replace")):
            if not isinstance(item, Mapping):
                raise ValueError("not a mapping")
            items.append(item)
    except FileNotFoundError:
        problems.append(f"{path.name} is missing")
    except (OSError, ValueError, RecursionError, csv.Error, yaml.YAMLError) as error:
        problems.append(f"{path.name} is damaged after {len(items)} lines: {' '.join(str(error).split())}")
    return tuple(items)


def _compared(line: Json) -> Json:
    """A prediction with what follows from equality of texts, where the run did not say it."""
    teacher, is_told = line.get("teacher_answer"), line.get("teacher_answer") is not None
    derived = {"is_teacher_correct": teacher == line.get("gold"), "agrees": teacher == line.get("student_answer")}
    absent = {key: value if is_told else None for key, value in derived.items() if line.get(key) is None}
    return {**line, **absent}


def read_runs(folders: Iterable[str | Path]) -> list[Run]:
    """Read each folder once; ConfigError lists every one that is no run folder."""
    runs: list[Run] = []
    problems: list[str] = []
    for folder in dict.fromkeys(Path(folder).resolve() for folder in folders):
        try:
            runs.append(read_run(folder))
        except ConfigError as error:
            problems.extend(error.problems)
    if not runs and not problems:
        problems = ["no run folder was given; wanted at least one: runs=[dir,dir,...]"]
    if problems:
        raise ConfigError(*problems)
    return runs


def find_runs(folders: Sequence[str]) -> list[Path]:
    """Folders of runs among and directly below `folders`, in order of name."""
    found: list[Path] = []
    for folder in map(Path, folders):
        below = sorted(
            (path.parent for path in folder.glob("*/run.json")), key=lambda path: (len(path.name), path.name)
        )
        found += [folder] if (folder / "run.json").is_file() or not below else below
    return found
