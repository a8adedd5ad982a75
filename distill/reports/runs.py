"""Read run folders, whether complete, half written or damaged.

No content of a file is trusted: anything may be missing, and text is made visible before it is shown.
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

import yaml

from distill.app.console import visible
from distill.app.files import Json
from distill.app.moved import current
from distill.errors import ConfigError
from distill.reports.measures import measure_of

FILES = ("config.yaml", "run.json", "metrics.csv", "results.json", "predictions.jsonl", "rejected.jsonl")
OPTIONAL_FILES = ("rationales.jsonl", "judgements.jsonl", "bag_of_words.jsonl")
BAG_OF_WORDS = "bag_of_words"  # its row in results.json
# Sections and single settings that decide where and how a run is made, not what the student learns.
RUN_ONLY = (
    *("root", "resume", "preflight", "plan", "tracking", "cost", "objective", "time_teacher", "evaluate_before"),
    *("bag_of_words", "num_samples", "num_workers", "checkpoint_every", "validate_every", "microbatch_size"),
    *("share_prompt",),
    *("trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy", "trainer.log_every_n_steps"),
    *(
        "trainer.num_sanity_val_steps",
        "trainer.enable_model_summary",
        "trainer.use_distributed_sampler",
        "cache.accept",
    ),
)
# Places of files, plain names of losses, and what only a model card tells.
NO_SETTINGS = re.compile(r"(^|[._])(root|dir|path|files)$|^loss\.[^.]+\.label$|\.(license|language)$")
TEACHER_SECTIONS = ("teacher", "soft_teacher", "rationales", "cache")  # irrelevant to labels alone
IN_FACTS = ("trainer.max_steps", "task.examples.num_labelled", "task.examples.num_unlabelled")  # also in run.json
NULL = str(None)  # a flat setting that is null
SEED_KEYS = re.compile(r"(?<!split_)seed$|(^|\.)fold$")  # of repetitions of one arm

PARSERS: Mapping[str, Callable[[str], Iterable[object]]] = {
    ".yaml": lambda text: [current(yaml.safe_load(text))],
    ".json": lambda text: [json.loads(text)],
    ".jsonl": lambda text: (json.loads(line) for line in text.split("\n") if line.strip()),
    ".csv": lambda text: csv.DictReader(text.split("\n")),
}


@dataclass(frozen=True)
class Run:
    """Contents of a run folder; `problems` names every file that is missing or damaged."""

    folder: Path
    problems: tuple[str, ...]
    facts: Json
    config: Json
    rows: Mapping[str, Json]
    metrics: tuple[Json, ...]
    predictions: tuple[Json, ...]
    rejected: tuple[Json, ...]
    rationales: tuple[Json, ...]
    judgements: tuple[Json, ...]
    bag_of_words: tuple[Json, ...]

    @property
    def name(self) -> str:
        """The run's name, or the folder's if run.json has none."""
        return str(self.facts.get("name") or self.folder.name)

    @property
    def seed(self) -> str:
        """The seed as text; runs with the same seed are paired."""
        return str(self.facts.get("seed"))

    @property
    def num_folds(self) -> int | None:
        """The number of folds of the cross-validation that the run belongs to; None if to none."""
        folds = number(self._examples.get("folds"))
        return None if folds is None else int(folds)

    @property
    def fold(self) -> int:
        """The index of its fold."""
        return int(number(self._examples.get("fold")) or 0)

    @property
    def _examples(self) -> Json:
        return mapping(mapping(self.config.get("task")).get("examples"))

    @property
    def losses(self) -> tuple[str, ...]:
        """Names of the active losses, sorted."""
        return tuple(sorted(map(str, self.facts.get("losses") or ())))

    @property
    def loss_labels(self) -> tuple[str, ...]:
        """Plain names of the active losses: the label in the loss's YAML, or else its name."""
        named = mapping(self.config.get("loss"))
        return tuple(str(mapping(named.get(loss)).get("label") or loss) for loss in self.losses)

    @property
    def is_complete(self) -> bool:
        """Whether the student has the figure that it is judged by, and the run names its losses."""
        row = self.rows.get("student", {})
        return bool(self.losses) and number(row.get(measure_of(row).key)) is not None

    @cached_property
    def settings(self) -> Mapping[str, str]:
        """Flat settings that two runs must share to be seeds of one arm."""
        facts = {key: self.facts.get(key) for key in ("task", "teacher", "steps", "batch_size")}
        counts = mapping(self.facts.get("counts"))
        facts |= {"start": self._start, "labelled": counts.get("labelled"), "test": counts.get("test")}
        facts |= {"unlabelled": self._unlabelled, "cache": mapping(self.facts.get("cache")).get("fingerprint")}
        chosen = {key: value for key, value in self.choices.items() if key not in IN_FACTS}
        return flatten(facts) | {key: value for key, value in chosen.items() if not SEED_KEYS.search(key)}

    @cached_property
    def choices(self) -> Mapping[str, str]:
        """The flat configuration without settings that decide only where and how the run is made."""
        excluded = tuple(f"{part}." for part in (*RUN_ONLY, *(TEACHER_SECTIONS if self.losses == ("answer",) else ())))
        flat = flatten(self.config).items()
        return {k: v for k, v in flat if not (f"{k}.".startswith(excluded) or NO_SETTINGS.search(k))}

    @property
    def _start(self) -> object:
        """Hash of the weights before training; the student's settings if each seed draws some of them."""
        student = mapping(self.config.get("student"))
        has_new_head = "head_rate" in mapping(student.get("kind"))
        if student.get("from_scratch") or student.get("lora") or has_new_head:
            return f"drawn by seed: {shlex.join(flatten(student).values())}"
        return self.facts.get("start")

    @property
    def has_labels(self) -> bool:
        """Whether some of the training examples have a label."""
        return number(mapping(self.facts.get("counts")).get("labelled")) != 0

    @property
    def _unlabelled(self) -> int | None:
        """Number of training examples without a label; None for a student that learns from labels alone."""
        train, labelled = (number(mapping(self.facts.get("counts")).get(key)) for key in ("train", "labelled"))
        return None if train is None or labelled is None or self.losses == ("answer",) else int(train - labelled)


def number(value: object) -> float | None:
    """Return a finite number, or None for anything else."""
    try:
        result = float(value) if isinstance(value, int | float | str) else math.nan
    except (ValueError, OverflowError):
        return None
    return result if math.isfinite(result) and not isinstance(value, bool) else None


def mapping(value: object) -> Json:
    """Return the value if it is a mapping, else an empty mapping."""
    return value if isinstance(value, dict) else {}


def mappings(value: object) -> list[Json]:
    """Return the mappings in a list; an empty list for any other value."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list | tuple) else []


def flatten(tree: Json, prefix: str = "") -> dict[str, str]:
    """Flatten nested mappings: dotted keys, values as text."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        text = shlex.join(map(str, value)) if isinstance(value, list) else str(value)
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": text}
    return flat


def read_run(folder: str | Path) -> Run:
    """Read a run folder, complete or not; raises ConfigError for any other folder."""
    folder = Path(folder)
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else None
    if names is None or not {"config.yaml", "run.json"} & set(names):
        content = "no such folder" if names is None else ", ".join(names[:8]) or "an empty folder"
        raise ConfigError(
            f"{visible(str(folder))} is not a run folder: got {visible(content)}; expected config.yaml or run.json, "
            "as written by `python -m distill.train`. Give run folders: runs=[dir,dir,...]"
        )
    problems: list[str] = []
    config, facts, metrics, results, predictions, rejected = (_read(folder / name, problems) for name in FILES)
    optional = [_read(folder / name, problems) if name in names else () for name in OPTIONAL_FILES]
    rows = {key: mapping(row) for item in results for key, row in mapping(item.get("rows")).items()}
    completed = tuple(map(_with_comparisons, predictions))
    return Run(folder, tuple(problems), dict(*facts), dict(*config), rows, metrics, completed, rejected, *optional)


def _read(path: Path, problems: list[str]) -> tuple[Json, ...]:
    """Return the mappings in a file up to the first damaged line; what is wrong is added to `problems`."""
    items: list[Json] = []
    if path.is_symlink() and not path.resolve().is_relative_to(path.parent.resolve()):
        problems.append(f"{path.name} is a link to a file outside the folder and is not read")
        return ()
    try:
        for item in PARSERS[path.suffix](path.read_text(encoding="utf-8", errors="replace")):
            if not isinstance(item, dict):
                raise ValueError("not a mapping")
            items.append(item)
    except FileNotFoundError:
        problems.append(f"{path.name} is missing")
    except (OSError, ValueError, RecursionError, csv.Error, yaml.YAMLError) as error:
        problems.append(f"{path.name} is damaged after {len(items)} lines: {' '.join(str(error).split())}")
    return tuple(items)


def _with_comparisons(line: Json) -> Json:
    """Add to a prediction what equality of texts shows, where the run did not record it; not to free texts."""
    teacher = None if line.get("is_correct") is None else line.get("teacher_answer")
    derived = {"is_teacher_correct": teacher == line.get("gold"), "agrees": teacher == line.get("student_answer")}
    missing = {key: None if teacher is None else value for key, value in derived.items() if line.get(key) is None}
    return {**line, **missing}


def read_runs(folders: Iterable[str | Path]) -> list[Run]:
    """Read each folder once; raises ConfigError that lists every folder that is not a run folder."""
    runs: list[Run] = []
    problems: list[str] = []
    for folder in dict.fromkeys(Path(folder).resolve() for folder in folders):
        try:
            runs.append(read_run(folder))
        except ConfigError as error:
            problems.extend(error.problems)
    if not runs and not problems:
        problems = ["no run folder was given; give at least one: runs=[dir,dir,...]"]
    if problems:
        raise ConfigError(*problems)
    return runs


def find_runs(folders: Sequence[str]) -> list[Path]:
    """Return the run folders among `folders` and directly below them, in order of name."""
    run_dirs: list[Path] = []
    for folder in map(Path, folders):
        below = sorted(
            (path.parent for path in folder.glob("*/run.json")), key=lambda path: (len(path.name), path.name)
        )
        run_dirs += [folder] if (folder / "run.json").is_file() or not below else below
    return run_dirs
