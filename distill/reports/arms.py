"""Group runs into arms: an *arm* is all runs that differ only in their seed, or a model that was not trained."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np

from distill.app.console import visible
from distill.app.files import Json
from distill.reports.measures import ACCURACY, CROSS_ENTROPY, TEACHER_CROSS_ENTROPY, Measure, measure_of
from distill.reports.proportions import wilson_interval
from distill.reports.runs import BAG_OF_WORDS, NULL, SEED_KEYS, Run, mapping, number
from distill.reports.statistics import Matrix, linearized_ratio, paired_interval, student_t

BUDGET = ("start", "steps", "batch_size", "labelled", "test")
PERCENT = ((0.01, " %"),)
BYTES = ((1e9, " GB"), (1e6, " MB"), (1e3, " kB"), (1.0, " B"))

# What a student learns from without distillation, by whether there are labels; without any, the least that a teacher
# gives is its answers as labels.
BASELINES = {True: "labels alone", False: "the teacher's answers alone"}
BASELINE_LOSSES = {True: ("answer",), False: ("teacher_answer",)}

Kind = Literal["teacher", "before", "words", "baseline", "distilled"]
# What a bag of words was fitted on: the names of its sources in results.json, in plain words.
SOURCES = {"labels": "labels", "teacher": "teacher's answers", "soft": "teacher's soft targets"}


class Stat(NamedTuple):
    """Mean over seeds (NaN if not measured) and, with several seeds, standard deviation."""

    mean: float
    deviation: float | None


@dataclass(frozen=True)
class Arm:
    """One line of the results: a model with a row of numbers per seed (no rows: it was not run)."""

    kind: Kind
    label: str
    settings: Mapping[str, str]
    runs: tuple[Run, ...]
    rows: tuple[Json, ...]

    def stat(self, key: str) -> Stat:
        """Mean and deviation of the number `key` over the seeds that have it."""
        values = [value for row in self.rows if (value := number(row.get(key))) is not None]
        mean = statistics.fmean(values) if values else math.nan
        return Stat(mean, statistics.stdev(values) if len(values) > 1 else None)

    @property
    def losses(self) -> tuple[str, ...]:
        """Names of the active losses, sorted; empty for a model that was not trained."""
        return self.runs[0].losses if self.runs else ()

    @property
    def name(self) -> str:
        """What the student learned from, in words."""
        return self.baseline if self.kind == "baseline" else " + ".join(self.runs[0].loss_labels)

    @property
    def baseline(self) -> str:
        """What a baseline learns from, in words."""
        return BASELINES[self.has_labels]

    @property
    def has_labels(self) -> bool:
        """Whether some training examples have a label."""
        return all(run.has_labels for run in self.runs)

    @property
    def choices(self) -> Mapping[str, str]:
        """The configuration's choices except seeds; empty for a model that was not trained."""
        chosen = self.runs[0].choices if self.runs else {}
        return {key: value for key, value in chosen.items() if not SEED_KEYS.search(key)}

    @property
    def has_hard_labels(self) -> bool:
        """Whether the student learned nothing from the teacher but its answers as labels."""
        return set(self.losses) - {"answer"} == {"teacher_answer"}

    @property
    def accuracy(self) -> float:
        """Mean accuracy over seeds."""
        return self.stat("accuracy").mean

    @property
    def measure(self) -> Measure:
        """What the arm is judged by."""
        return measure_of(self.rows[0]) if self.rows else ACCURACY

    @property
    def score(self) -> float:
        """Mean over seeds of what the arm is judged by, such that higher is better."""
        return self.measure.sign * self.stat(self.measure.key).mean

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the accuracy, or of what the arm is judged by."""
        return self.interval_at(0.95)

    def interval_at(self, level: float) -> tuple[float, float]:
        """Interval of the accuracy: of one seed Wilson's, of several also over the spread between seeds.

        Each end is sqrt(h_test² + h_seed²) from the mean; h_test reaches to Wilson's end, which has a width at 0 %
        and at 100 % too, and h_seed = t(s - 1) sd/sqrt(s). Of another measure: that of its mean over the examples that
        all seeds have.
        """
        if self.measure is not ACCURACY:
            return self._mean_interval(level)
        (mean, deviation), num_examples = self.stat("accuracy"), self.stat("num_examples").mean
        recorded = self.rows[0].get("interval") if len(self.rows) == 1 else None
        if recorded and (level == 0.95 or math.isnan(num_examples)):
            return float(recorded[0]), float(recorded[1])
        if math.isnan(mean + num_examples):
            return math.nan, math.nan
        low, high = wilson_interval(mean * num_examples, num_examples, level)
        seeds = 0.0
        if deviation is not None:
            num_seeds = len(self.rows)
            seeds = student_t(level, num_seeds - 1) * deviation / math.sqrt(num_seeds)
        return max(0.0, mean - math.hypot(mean - low, seeds)), min(1.0, mean + math.hypot(high - mean, seeds))

    def _mean_interval(self, level: float) -> tuple[float, float]:
        seeds = [seed for seed, lines in self.predictions.items() if lines]
        ids = sorted(set.intersection(*(set(self.predictions[seed]) for seed in seeds))) if seeds else []
        if not ids:
            return math.nan, math.nan
        scores = self.scores(seeds, ids)
        interval = paired_interval(scores, 0 * scores, level=level, is_proportion=False)
        low, high = sorted(self.measure.shown(end) for end in (interval.low, interval.high))
        return low, high

    def scores(self, seeds: Sequence[str], ids: Sequence[str]) -> Matrix:
        """Scores by seed and example: correctness, or values whose mean is the cross-entropy with a minus sign."""
        lines, measure = [[self.predictions[seed][id_] for id_ in ids] for seed in seeds], self.measure
        if measure is ACCURACY:
            return np.array([[line["is_correct"] is True for line in row] for row in lines], np.float64)
        pairs = [
            [(number(line[measure.nats]) or 0.0, number(line[measure.num_bytes]) or 0.0) for line in row]
            for row in lines
        ]
        return -np.array([linearized_ratio(*zip(*row, strict=True)) for row in pairs], np.float64)

    @cached_property
    def predictions(self) -> Mapping[str, Mapping[str, Json]]:
        """Predictions by seed and example id; those in which the student was not measured are left out."""
        measure = self.measure
        return {
            run.seed: {str(line.get("id")): line for line in run.predictions if _is_measured(line, measure)}
            for run in self.runs
        }

    @property
    def seeds(self) -> tuple[Arm, ...]:
        """Each run as a separate arm."""
        return tuple(
            replace(self, label=f"{self.label}, seed {run.seed}", runs=(run,), rows=(row,))
            for run, row in zip(self.runs, self.rows, strict=True)
        )


def _is_measured(line: Json, measure: Measure) -> bool:
    if measure is ACCURACY:
        return line.get("is_correct") is not None
    return number(line.get(measure.nats)) is not None and (number(line.get(measure.num_bytes)) or 0) > 0


class Column(NamedTuple):
    """A column of the results: key in results.json, headings (page, terminal), digits and units."""

    key: str
    title: str
    short: str
    digits: int = 1
    units: tuple[tuple[float, str], ...] = ((1.0, ""),)


PEAK = Column("peak_bytes", "peak memory", "peak", 1, BYTES)
COLUMNS = (
    Column("accuracy", "accuracy [95 % interval]", "acc. % [95 %]", 1, PERCENT),
    Column("generated_accuracy", "generated accuracy", "gen. %", 1, PERCENT),
    Column("agreement", "agrees with teacher", "agree %", 1, PERCENT),
    Column("kl", "KL to teacher, nats", "KL", 3),
    Column("ece", "ECE", "ECE", 3),
    Column("parameters", "parameters", "params", 1, ((1e9, " B"), (1e6, " M"), (1e3, " k"), (1.0, ""))),
    Column("size_bytes", "size on disk", "size", 1, BYTES),
    Column("ms_per_example", "ms per example", "ms/ex."),
    Column("training_seconds", "training time", "train", 1, ((3600.0, " h"), (60.0, " min"), (1.0, " s"))),
)
SEED_COLUMNS = (*COLUMNS[:5], COLUMNS[8], Column("num_unreadable", "unreadable answers", "unread.", 0))
OF_TEXTS = (
    Column(CROSS_ENTROPY.key, "cross-entropy, nats per byte [95 % interval]", "CE/byte [95 %]", CROSS_ENTROPY.digits),
    Column(
        TEACHER_CROSS_ENTROPY.key,
        "cross-entropy along the teacher's texts, nats per byte [95 % interval]",
        "CE/byte [95 %]",
        TEACHER_CROSS_ENTROPY.digits,
    ),
    Column("cross_entropy", "cross-entropy, nats per token", "CE/token", 3),
    COLUMNS[3],
    Column("teacher_cross_entropy", "cross-entropy along the teacher's texts", "CE teacher", 3),
    Column("chrf", "chrF", "chrF", 1),
    Column("teacher_chrf", "chrF to the teacher", "chrF teacher", 1),
    Column("rouge_l", "ROUGE-L", "ROUGE-L", 1),
    Column("teacher_rouge_l", "ROUGE-L to the teacher", "ROUGE-L teacher", 1),
    Column("length_ratio", "length, of the reference texts", "length", 2),
    Column("ended", "ended by themselves", "ended %", 1, PERCENT),
)
_KEYS_ALONG = {  # figures that only texts with a reference of this kind have
    CROSS_ENTROPY: (CROSS_ENTROPY.key, "cross_entropy", "chrf", "rouge_l"),
    TEACHER_CROSS_ENTROPY: (TEACHER_CROSS_ENTROPY.key,),
}
_OF_ANSWERS = COLUMNS[:5] + SEED_COLUMNS[-1:]  # that are right or wrong
MAIN_COLUMNS = {column.key: column for column in (COLUMNS[0], *OF_TEXTS[:2])}


def judged_columns(arms: Sequence[Arm], columns: Sequence[Column]) -> tuple[Column, ...]:
    """Return the columns that the arms have figures for: those of free texts, and the others unless all are texts."""
    measures = {arm.measure for arm in arms if arm.rows}
    missing = {key for keys in _KEYS_ALONG.values() for key in keys}
    missing -= {key for arm in arms for key in _KEYS_ALONG.get(arm.measure, ()) if arm.runs}
    of_texts = [c for c in OF_TEXTS if c.key not in missing] if measures - {ACCURACY} else []
    left_out = [*of_texts, *(_OF_ANSWERS if measures and ACCURACY not in measures else ())]
    return (*of_texts, *(column for column in columns if column not in left_out))


def cell(arm: Arm, column: Column, is_narrow: bool = False) -> str:
    """Format one cell: mean ± standard deviation over seeds (`is_narrow`: deviation of the first figure only)."""
    stat, is_main = arm.stat(column.key), column.key in MAIN_COLUMNS
    if math.isnan(stat.mean):
        return "not run" if is_main and not arm.rows else "-"
    factor, unit = next((unit for unit in column.units if stat.mean >= unit[0]), column.units[-1])
    text = f"{stat.mean / factor:.{column.digits}f}"
    if stat.deviation is not None and (is_main or (stat.deviation and not is_narrow)):
        text += f" ± {stat.deviation / factor:.{column.digits}f}"
    text += unit.replace(" %", "") if is_narrow else unit
    if column.key == arm.measure.key:
        low, high = (f"{arm.measure.factor * end:.{arm.measure.digits}f}" for end in arm.interval)
        return text if math.isnan(arm.interval[0]) else f"{text} [{low}, {high}]"
    return text if is_narrow else text + _beside(arm, column)


def _beside(arm: Arm, column: Column) -> str:
    """What is shown under a number: the spread of a time, the type behind a size."""
    types = sorted({str(row["dtype"]) for row in arm.rows if row.get("dtype")})
    if column.key == "size_bytes" and types:
        return f" [{', '.join(types)}]"
    low, high = arm.stat("ms_fastest").mean, arm.stat("ms_slowest").mean
    return f" [{low:.1f}, {high:.1f}]" if column.key == "ms_per_example" and low < high else ""


def group(runs: Sequence[Run], notes: list[str]) -> list[Arm]:
    """Group finished runs into arms: teachers, students before training, bags of words, baselines, distilled students.

    If a seed was run twice, the later run counts, and a note says so.
    """
    runs = sorted(runs, key=lambda run: str(run.facts.get("started")))
    trained = _trained(runs, notes)
    baselines = [arm for arm in trained if arm.kind == "baseline"]
    missing = BASELINES[not runs or any(run.has_labels for run in runs)]
    not_run = [] if baselines else [Arm("baseline", f"student on {missing}", {}, (), ())]
    teachers = _references("teacher", "teacher", ("task", "teacher", "test"), runs)
    before = _references("before", "student before training", ("task", "start", "test"), runs)
    distilled = [arm for arm in trained if arm.kind == "distilled"]
    return [*teachers, *before, *_bags_of_words(runs), *baselines, *not_run, *distilled]


def _trained(runs: Sequence[Run], notes: list[str]) -> list[Arm]:
    groups: dict[tuple[object, ...], dict[str, Run]] = {}
    for run in runs:
        # A null setting is the same as one that an earlier version lacks.
        chosen = sorted(item for item in run.settings.items() if item[1] != NULL)
        seeds = groups.setdefault((run.losses, *chosen), {})
        seed = run.seed.zfill(9)
        if seed in seeds:
            notes.append(f"{seeds[seed].folder} is ignored: {run.folder} is a later run with the same seed")
        seeds[seed] = run
    arms = []
    for key, seeds in sorted(groups.items(), key=lambda item: _natural(str(item[0]))):
        members = tuple(run for _, run in sorted(seeds.items()))
        has_labels = members[0].has_labels
        kind: Kind = "baseline" if key[0] == BASELINE_LOSSES[has_labels] else "distilled"
        label = f"student on {BASELINES[has_labels]}" if kind == "baseline" else " + ".join(members[0].loss_labels)
        rows = tuple(run.rows["student"] for run in members)
        arms.append(Arm(kind, label, members[0].settings, members, rows))
    return _with_distinct_labels(arms, BUDGET)


def _natural(text: str) -> str:
    """Sort key that puts 400 before 1600."""
    return re.sub(r"\d+", lambda digits: digits[0].zfill(20), text)


def _references(kind: Kind, label: str, keys: Sequence[str], runs: Sequence[Run]) -> list[Arm]:
    """Return one arm per distinct untrained model, with the numbers of its latest run."""
    arms: dict[str, Arm] = {}
    for run in runs:
        row = run.rows.get(kind, {})
        if number(row.get(ACCURACY.key)) is not None or measure_of(row) is not ACCURACY:
            settings = {key: run.settings[key] for key in keys}
            arms[str(settings)] = Arm(kind, label, settings, (), (run.rows[kind],))
    return _with_distinct_labels(list(arms.values()))


def _bags_of_words(runs: Sequence[Run]) -> list[Arm]:
    """Return one arm per distinct bag of words: runs that learn the same targets of the same examples share one."""
    arms: dict[str, Arm] = {}
    for run in runs:
        row = run.rows.get(BAG_OF_WORDS, {})
        if number(row.get(ACCURACY.key)) is not None:
            keys = ("task", "test", "labelled", "unlabelled", "teacher")
            settings = {key: run.settings.get(key, NULL) for key in keys} | {"targets": str(row.get("digest"))}
            sources = " + ".join(name for key, name in SOURCES.items() if mapping(row.get("targets")).get(key))
            key = tuple(settings[name] for name in ("task", "test", "targets"))
            arms[str(key)] = Arm("words", f"bag of words ({sources})", settings, (), (row,))
    return _with_distinct_labels(list(arms.values()))


def _with_distinct_labels(arms: Sequence[Arm], always: Sequence[str] = ()) -> list[Arm]:
    """Add to each label the settings that distinguish it: those in `always` from all arms, others from namesakes."""
    labelled = []
    for arm in arms:
        namesakes = [other for other in arms if other.label == arm.label]
        differing = [
            f"{key}={visible(value, 24)}"
            for key, value in arm.settings.items()
            if any(other.settings.get(key, NULL) != value for other in (arms if key in always else namesakes))
        ]
        labelled.append(replace(arm, label=f"{arm.label} ({', '.join(differing[:5])})") if differing else arm)
    return labelled
