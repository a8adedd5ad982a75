"""Run folders to tables, plots and one HTML page that says whether distillation helped.

    run folders -> read_run -> Run -> summarise -> Summary -> to_text | to_markdown | to_html

An *arm* is the runs that differ only in their seed. The verdict compares each distilled arm with the arm that
had the labels alone and the same budget, and claims a difference only where the 95 % intervals are disjoint.
"""

from __future__ import annotations

import csv
import json
import math
import re
import shlex
import statistics
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jinja2
import yaml
from omegaconf import DictConfig

from distill import config as configuration
from distill.fetch import whole_file
from distill.records import ConfigError

BASELINE_COMMAND = "python -m distill.train 'loss=[answer]'"
FILES = ("config.yaml", "run.json", "metrics.csv", "results.json", "predictions.jsonl", "rejected.jsonl")
BUDGET = ("start", "steps", "batch_size", "labelled", "test")
SECTIONS = ("loss", "optim", "prompt", "student")
T_975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
NUM_SAMPLES, TEXT_WIDTH, MAX_CHARACTERS = 20, 110, 500
PERCENT = ((0.01, " %"),)
KEPT = "\n\t\u00a0\u200c\u200d\u202f\u3000"  # not printable to Python, yet plain parts of text

Json = Mapping[str, Any]
Kind = Literal["teacher", "before", "baseline", "distilled"]
PARSERS: Mapping[str, Callable[[str], Iterable[object]]] = {
    ".yaml": lambda text: [yaml.safe_load(text)],
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

    @property
    def name(self) -> str:
        """The name that the train command gave, or the folder's."""
        return str(self.facts.get("name") or self.folder.name)

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
        facts = {key: self.facts.get(key) for key in ("task", "teacher", "start", "steps", "batch_size")}
        counts = mapping(self.facts.get("counts"))
        facts |= {"labelled": counts.get("labelled"), "test": counts.get("test")}
        facts |= {"cache": mapping(self.facts.get("cache")).get("fingerprint")}
        parts = flatten({key: value for key, value in self.config.items() if key in SECTIONS})
        return flatten(facts) | {k: v for k, v in parts.items() if not re.search(r"(seed|_dir|_path)$", k)}


class Column(NamedTuple):
    """One number of the table: its key in results.json, headings (page, terminal), form and units."""

    key: str
    title: str
    short: str
    digits: int = 1
    units: tuple[tuple[float, str], ...] = ((1, ""),)


COLUMNS = (
    Column("accuracy", "accuracy [95 % interval]", "acc. % [95 %]", 1, PERCENT),
    Column("generated_accuracy", "generated accuracy", "gen. %", 1, PERCENT),
    Column("agreement", "agrees with teacher", "agree %", 1, PERCENT),
    Column("kl", "KL to teacher, nats", "KL", 3),
    Column("ece", "ECE", "ECE", 3),
    Column("parameters", "parameters", "params", 1, ((1e9, " B"), (1e6, " M"), (1e3, " k"), (1, ""))),
    Column("size_bytes", "size on disk", "size", 1, ((1e9, " GB"), (1e6, " MB"), (1e3, " kB"), (1, " B"))),
    Column("ms_per_example", "ms per example", "ms/ex."),
    Column("training_seconds", "training time", "train", 1, ((3600, " h"), (60, " min"), (1, " s"))),
)
SEED_COLUMNS = (*COLUMNS[:5], COLUMNS[8], Column("num_unreadable", "unreadable answers", "unread.", 0))


class Stat(NamedTuple):
    """Mean over seeds (not a number: nobody measured it); standard deviation where there are several."""

    mean: float
    deviation: float | None


@dataclass(frozen=True)
class Arm:
    """One line of the results: a model with a row of numbers for each seed (no row: it was not run)."""

    kind: Kind
    label: str
    settings: Mapping[str, str]
    runs: tuple[Run, ...]
    rows: tuple[Json, ...]

    def stat(self, key: str) -> Stat:
        """The number `key` over the seeds that have it."""
        values = [value for row in self.rows if (value := number(row.get(key))) is not None]
        mean = statistics.fmean(values) if values else math.nan
        return Stat(mean, statistics.stdev(values) if len(values) > 1 else None)

    @property
    def accuracy(self) -> float:
        """Mean accuracy over seeds."""
        return self.stat("accuracy").mean

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the accuracy: one seed's own; over seeds, test sampling and seeds together.

        Half-width² = h_test² + h_seed²; h_test = 1.96 sqrt(p(1 - p)/n), h_seed = t_975(s - 1) sd/sqrt(s).
        """
        mean, deviation = self.stat("accuracy")
        if deviation is None:
            ends = [row.get("interval") for row in self.rows]
            low, high = ends[0] if ends and ends[0] else (math.nan, math.nan)
            return float(low), float(high)
        seeds = (t_975(len(self.rows) - 1) * deviation) ** 2 / len(self.rows)
        half = math.sqrt(1.96**2 * mean * (1 - mean) / self.stat("num_examples").mean + seeds)
        return max(0.0, mean - half), min(1.0, mean + half)


@dataclass(frozen=True)
class Verdict:
    """Whether one distilled arm beat the labels alone; `points` is the difference in percentage points."""

    status: Literal["better", "not shown", "worse", "no baseline", "not compared"]
    points: float | None
    sentence: str
    caveats: tuple[str, ...] = ()


@dataclass(frozen=True)
class Summary:
    """All that the report says: arms in the order of the table, a verdict for each distilled arm."""

    runs: tuple[Run, ...]
    arms: tuple[Arm, ...]
    verdicts: tuple[Verdict, ...]
    notes: tuple[str, ...]

    @property
    def trained(self) -> tuple[Arm, ...]:
        """The arms that were trained, the baseline first."""
        return tuple(arm for arm in self.arms if arm.runs)

    @property
    def seeds(self) -> tuple[Arm, ...]:
        """Each trained run as an arm of its own."""
        return tuple(
            replace(arm, label=f"{arm.label}, seed {run.facts.get('seed')}", runs=(run,), rows=(row,))
            for arm in self.trained
            for run, row in zip(arm.runs, arm.rows, strict=True)
        )


def t_975(freedom: int) -> float:
    """The 0.975 quantile of Student's t (Cornish-Fisher beyond the table, good to 1e-3)."""
    z, v = 1.959964, freedom
    second = (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    return T_975[v - 1] if v <= len(T_975) else z + (z**3 + z) / (4 * v) + second + third


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


def flatten(tree: Json, prefix: str = "") -> dict[str, str]:
    """Nested mappings as one flat one with dotted keys and text for values."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        text = shlex.join(map(str, value)) if isinstance(value, list) else str(value)
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": text}
    return flat


def visible(text: str, limit: int = MAX_CHARACTERS) -> str:
    """The text with control, bidi and surrogate characters spelt out, cut to `limit` characters."""
    shown = "".join(c if c.isprintable() or c in KEPT else f"⟨U+{ord(c):04X}⟩" for c in text[:limit])
    return f"{shown}… ({len(text) - limit} more)" if len(text) > limit else shown


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
    config, facts, metrics, results, *lists = (_read(folder / name, problems) for name in FILES)
    rows = {key: mapping(row) for item in results for key, row in mapping(item.get("rows")).items()}
    return Run(folder, tuple(problems), dict(*facts), dict(*config), rows, metrics, *lists)


def _read(path: Path, problems: list[str]) -> tuple[Json, ...]:
    """The mappings in a file up to the first damage, which is added to `problems`."""
    items: list[Json] = []
    try:
        for item in PARSERS[path.suffix](path.read_text(encoding="utf-8", errors="replace")):
            if not isinstance(item, Mapping):
                raise ValueError("not a mapping")
            items.append(item)
    except FileNotFoundError:
        problems.append(f"{path.name} is missing")
    except (OSError, ValueError, csv.Error, yaml.YAMLError) as error:
        problems.append(f"{path.name} is damaged after {len(items)} lines: {' '.join(str(error).split())}")
    return tuple(items)


def summarise(runs: Sequence[Run]) -> Summary:
    """Group the finished runs into arms, in the order of the table, and judge each distilled arm."""
    done = sorted((run for run in runs if run.is_complete), key=lambda run: str(run.facts.get("started")))
    notes = [f"{run.name}: {problem}" for run in runs for problem in run.problems]
    notes += [f"{run.name} is incomplete: it has no result" for run in runs if not run.is_complete]
    trained = _trained(done, notes)
    baselines = [arm for arm in trained if arm.kind == "baseline"]
    distilled = [arm for arm in trained if arm.kind == "distilled"]
    before = _references("before", "student before training", ("task", "start", "test"), done)
    teachers = _references("teacher", "teacher", ("task", "teacher", "test"), done)
    absent = [] if baselines else [Arm("baseline", "student on labels alone", {}, (), ())]
    arms = (*teachers, *before, *baselines, *absent, *distilled)
    verdicts = tuple(_judge(arm, baselines, before) for arm in distilled)
    return Summary(tuple(runs), arms, verdicts, tuple(notes))


def _trained(runs: Sequence[Run], notes: list[str]) -> list[Arm]:
    groups: dict[tuple[object, ...], dict[str, Run]] = {}
    for run in runs:
        seeds = groups.setdefault((run.losses, *sorted(run.settings.items())), {})
        seed = str(run.facts.get("seed")).zfill(9)
        if seed in seeds:
            notes.append(f"{seeds[seed].folder} is left out: {run.folder} is a later run of the same seed")
        seeds[seed] = run
    arms = []
    for key, seeds in sorted(groups.items(), key=lambda item: str(item[0])):
        members = tuple(run for _, run in sorted(seeds.items()))
        kind: Kind = "baseline" if key[0] == ("answer",) else "distilled"
        label = "student on labels alone" if kind == "baseline" else " + ".join(members[0].losses)
        rows = tuple(run.rows["student"] for run in members)
        arms.append(Arm(kind, label, members[0].settings, members, rows))
    return _told_apart(arms, BUDGET)


def _references(kind: Kind, label: str, keys: Sequence[str], runs: Sequence[Run]) -> list[Arm]:
    """One arm per distinct model that was only measured, with the numbers of the latest run."""
    arms: dict[str, Arm] = {}
    for run in runs:
        if number(run.rows.get(kind, {}).get("accuracy")) is not None:
            settings = {key: run.settings[key] for key in keys}
            arms[str(settings)] = Arm(kind, label, settings, (), (run.rows[kind],))
    return _told_apart(list(arms.values()))


def _told_apart(arms: Sequence[Arm], always: Sequence[str] = ()) -> list[Arm]:
    """Add to each label the settings in which it differs: `always` from any arm, else from its namesakes."""
    labelled = []
    for arm in arms:
        twins = [other for other in arms if other.label == arm.label]
        differing = [
            f"{key}={visible(value, 12)}"
            for key, value in arm.settings.items()
            if any(other.settings.get(key) != value for other in (arms if key in always else twins))
        ]
        labelled.append(replace(arm, label=f"{arm.label} ({', '.join(differing[:5])})") if differing else arm)
    return labelled


def _judge(arm: Arm, baselines: Sequence[Arm], before: Sequence[Arm]) -> Verdict:
    rivals = [other for other in baselines if other.settings["task"] == arm.settings["task"]]
    unlike = [[key for key in BUDGET if arm.settings[key] != other.settings[key]] for other in rivals]
    equal = [other for other, keys in zip(rivals, unlike, strict=True) if not keys]
    caveats = [
        f"The student is not better than before training ({100 * start.accuracy:.1f} %)."
        for start in before
        if start.settings.items() <= arm.settings.items() and arm.accuracy <= start.accuracy
    ]
    if equal:
        return _compare(arm, max(equal, key=lambda other: other.accuracy), len(equal), caveats)
    if not rivals:
        lead = f"{arm.label}: no baseline was run, so nothing can be said about whether distillation helped."
        return Verdict("no baseline", None, lead, (f"To run it: {BASELINE_COMMAND}", *caveats))
    keys, rival = min(zip(unlike, rivals, strict=True), key=lambda pair: len(pair[0]))
    terms = ", ".join(f"{key} {arm.settings[key][:16]} against {rival.settings[key][:16]}" for key in keys)
    lead = f"{arm.label}: not compared with labels alone, because the budgets differ ({terms})."
    return Verdict("not compared", None, lead, tuple(caveats))


def _compare(arm: Arm, baseline: Arm, num_baselines: int, caveats: list[str]) -> Verdict:
    points = 100 * (arm.accuracy - baseline.accuracy)
    where = f"{abs(points):.1f} points {'above' if points > 0 else 'below'} labels alone at equal budget"
    where += f" ({cell(arm, COLUMNS[0])} against {cell(baseline, COLUMNS[0])})"
    if min(len(arm.rows), len(baseline.rows)) == 1:
        caveats.append("With one seed the interval holds test sampling only, not the spread between seeds.")
    if num_baselines > 1:
        caveats.append(f"{num_baselines} baselines had this budget; the best of them is taken.")
    mine, theirs = arm.interval, baseline.interval
    if mine[0] > theirs[1] or mine[1] < theirs[0]:
        word: Literal["better", "worse"] = "better" if points > 0 else "worse"
        lead = f"{arm.label} is {word}: {where}. The 95 % intervals do not overlap."
        return Verdict(word, points, lead, tuple(caveats))
    why = "an interval is missing" if math.isnan(mine[0] + theirs[0]) else "the 95 % intervals overlap"
    end = "It is not shown that the student is better." if points > 0 else "The student is not better."
    return Verdict("not shown", points, f"{arm.label}: {where}, but {why}. {end}", tuple(caveats))


def cell(arm: Arm, column: Column, is_narrow: bool = False) -> str:
    """A number of the table: mean ± standard deviation over seeds (narrow: the accuracy alone has it)."""
    stat, is_accuracy = arm.stat(column.key), column.key == "accuracy"
    if math.isnan(stat.mean):
        return "not run" if is_accuracy else "-"
    factor, unit = next((unit for unit in column.units if stat.mean >= unit[0]), column.units[-1])
    text = f"{stat.mean / factor:.{column.digits}f}"
    if stat.deviation is not None and (is_accuracy or (stat.deviation and not is_narrow)):
        text += f" ± {stat.deviation / factor:.{column.digits}f}"
    text += unit.replace(" %", "") if is_narrow else unit
    return f"{text} [{100 * arm.interval[0]:.1f}, {100 * arm.interval[1]:.1f}]" if is_accuracy else text


def samples(summary: Summary) -> tuple[Run | None, list[Json]]:
    """Test examples in turn from right or wrong, like or unlike the teacher; of the run with most losses."""
    arms = sorted(summary.trained, key=lambda arm: (arm.kind != "distilled", -len(arm.runs[0].losses)))
    run = next((run for arm in arms for run in arm.runs if run.predictions), None)
    groups: dict[tuple[bool, bool], list[Json]] = {}
    told = run.predictions if run else ()
    reasoned = [item for item in told if item.get("student_rationale")]
    for item in sorted(reasoned or told, key=lambda item: str(item.get("id"))):
        agrees = item.get("student_answer") == item.get("teacher_answer")
        groups.setdefault((item.get("is_correct") is True, agrees), []).append(item)
    turns = zip_longest(*(group for _, group in sorted(groups.items())))
    return run, [item for turn in turns for item in turn if item is not None][:NUM_SAMPLES]


def to_text(summary: Summary) -> str:
    """The verdicts and the table for a terminal, at most 110 columns wide."""
    lines = [[column.short for column in COLUMNS]]
    lines += [[cell(arm, column, is_narrow=True) for column in COLUMNS] for arm in summary.arms]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    room = max(12, TEXT_WIDTH - sum(widths) - 2 * len(widths))
    table = []
    for label, cells in zip(["model", *(visible(arm.label) for arm in summary.arms)], lines, strict=True):
        first, *rest = textwrap.wrap(label, room)
        numbers = "  ".join(text.rjust(width) for text, width in zip(cells, widths, strict=True))
        table += [f"{first:{room}}  {numbers}", *rest]
    said = [textwrap.fill(visible(text), TEXT_WIDTH) for text in _remarks(summary)]
    return "\n".join([*table, "", *said, ""])


def to_markdown(summary: Summary) -> str:
    """The verdicts and both tables as GitHub Markdown."""
    lines = ["# Distillation report", "", *(f"- {_plain(text)}" for text in _remarks(summary))]
    tables = (("Results", summary.arms, COLUMNS), ("Each seed", summary.seeds, SEED_COLUMNS))
    for heading, arms, columns in tables:
        rows = [["model", *(column.title for column in columns)], ["---"] * (len(columns) + 1)]
        rows += [[_plain(arm.label), *(cell(arm, column) for column in columns)] for arm in arms]
        lines += ["", f"## {heading}", "", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join([*lines, ""])


def _plain(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>|#~$&])", r"\\\1", visible(text).replace("\n", " "))


def _remarks(summary: Summary) -> list[str]:
    """Verdicts with their caveats, then all else that a reader must know, a sentence each."""
    said = [" ".join((verdict.sentence, *verdict.caveats)) for verdict in summary.verdicts]
    said += [] if said else ["No distilled student was evaluated, so there is nothing to judge."]
    return said + list(summary.notes)


def to_html(summary: Summary) -> str:
    """One page that needs no network; all text in it is escaped, made visible and cut to 500 characters."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    pages = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    pages.trim_blocks = pages.lstrip_blocks = True
    pages.finalize = lambda value: visible(value) if type(value) is str else value
    run, items = samples(summary)
    names = {"cell": cell, "columns": COLUMNS, "seed_columns": SEED_COLUMNS, "command": BASELINE_COMMAND}
    plain = {"flatten": flatten, "mapping": mapping, "number": number, "math": math}
    page = pages.get_template("report.html.j2")
    return page.render(summary=summary, sampled=run, samples=items, **names, **plain)


def write_report(run_dirs: Sequence[str | Path], out_dir: str | Path) -> Summary:
    """Write report.html and report.md, each whole or not at all; ConfigError lists every unfit folder."""
    runs: list[Run] = []
    problems = [] if run_dirs else ["no run folder was given; wanted at least one: runs=[dir,dir,...]"]
    for folder in dict.fromkeys(Path(folder).resolve() for folder in run_dirs):
        try:
            runs.append(read_run(folder))
        except ConfigError as error:
            problems.extend(error.problems)
    if problems:
        raise ConfigError(*problems)
    summary = summarise(runs)
    for name, text in (("report.html", to_html(summary)), ("report.md", to_markdown(summary))):
        with whole_file(Path(out_dir) / name) as part:
            part.write_text(text, encoding="utf-8")
    return summary


def find_runs(folders: Sequence[str]) -> list[Path]:
    """Folders of runs among and directly below `folders`, in order of name."""
    found: list[Path] = []
    for folder in map(Path, folders):
        below = sorted(
            (path.parent for path in folder.glob("*/run.json")), key=lambda path: (len(path.name), path.name)
        )
        found += [folder] if (folder / "run.json").is_file() or not below else below
    return found


def main(config: DictConfig) -> None:
    """Report on run folders, print the table and say where the page is."""
    configuration.check(config)
    named = [config.runs] if isinstance(config.runs, str) else list(config.runs)
    out = Path(config.out or named[0]).resolve()
    print(f"{to_text(write_report(find_runs(named), out))}\n\nreport  {out / 'report.html'}")


if __name__ == "__main__":
    configuration.command("report", main)
