"""Join the folds of a cross-validation: the runs of one seed whose test splits are the parts of one data set.

Each example is then predicted once per seed, by the student that did not see it, so that arms are paired by seed and
example as they are on one test split. Students of one seed share most training examples; the spread between them is
not that of independent repetitions, and is not used (Y. Bengio, Y. Grandvalet, JMLR 5, 2004).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace

from distill.app.files import Json
from distill.reports.runs import Run, mapping, number

_SUMS = ("num_examples", "num_unmeasured", "num_unreadable")
_OF_ONE_TEST = ("interval", "reliability")  # figures of one test split that their mean does not stand for


def join_folds(runs: Sequence[Run], notes: list[str]) -> list[Run]:
    """Return the runs with one for all folds of an arm and seed; a fold that was run twice counts once, the later.

    A joint run has all predictions, the mean of the figures and learning curves, and the sum of the test examples.
    """
    groups: dict[tuple[object, ...], dict[int, Run]] = {}
    for run in sorted(runs, key=lambda run: str(run.facts.get("started"))):
        folds = groups.setdefault(_key(run), {})
        if run.fold in folds:
            notes.append(f"{folds[run.fold].folder} is ignored: {run.folder} is a later run of the same fold")
        folds[run.fold] = run
    return [_joined(folds, notes) for folds in groups.values()]


def _key(run: Run) -> tuple[object, ...]:
    """What the folds of one arm and seed share; their splits may differ by an example."""
    if run.num_folds is None:
        return (run.folder,)
    chosen = {key: value for key, value in run.settings.items() if key not in ("labelled", "unlabelled", "test")}
    return (run.losses, run.seed, *sorted(chosen.items()))


def _joined(folds: dict[int, Run], notes: list[str]) -> Run:
    first, *others = members = [run for _, run in sorted(folds.items())]
    if first.num_folds is not None and len(members) < first.num_folds:
        present = ", ".join(map(str, sorted(folds)))
        notes.append(f"{first.name}: only {len(members)} of {first.num_folds} folds are complete: {present}")
    if not others:
        return first
    kinds = [kind for kind in first.rows if all(kind in run.rows for run in members)]
    counts, seconds, cache, calibration = (
        [mapping(run.facts.get(name)) for run in members] for name in ("counts", "seconds", "cache", "calibration")
    )
    tested = {"test": sum(int(number(part.get("test")) or 0) for part in counts)}
    annotated = _combined([{"annotation_seconds": part.get("annotation_seconds")} for part in cache], math.fsum)
    return replace(
        first,
        facts={
            **first.facts,
            "counts": counts[0] | tested,
            "cache": cache[0] | annotated,
            "seconds": _combined(seconds, statistics.fmean),
            "calibration": _combined(calibration, statistics.fmean),
        },
        rows={kind: _row([run.rows[kind] for run in members]) for kind in kinds},
        metrics=_curves(members),
        predictions=tuple(line for run in members for line in run.predictions),
        judgements=tuple(line for run in members for line in run.judgements),
        bag_of_words=tuple(line for run in members for line in run.bag_of_words),
    )


def _row(rows: Sequence[Json]) -> Json:
    """Sums of the numbers of examples, means over examples of other figures; what is no number as in the first row."""
    sizes = [number(row.get("num_examples")) or 0.0 for row in rows]
    means = _combined(rows, lambda values: statistics.fmean(values, sizes if any(sizes) else None))
    sums = _combined([{key: row.get(key) for key in _SUMS} for row in rows], math.fsum)
    return {key: value for key, value in {**rows[0], **means, **sums}.items() if key not in _OF_ONE_TEST}


def _combined(parts: Sequence[Json], combine: Callable[[list[float]], float]) -> Json:
    """The numbers that all parts have, combined by key."""
    values = {key: [number(part.get(key)) for part in parts] for key in parts[0]}
    return {key: combine([v for v in row if v is not None]) for key, row in values.items() if None not in row}


def _curves(members: Sequence[Run]) -> tuple[Json, ...]:
    """Mean of what all members logged at a step, one line for each set of names."""
    lines: dict[tuple[object, ...], list[Json]] = {}
    for run in members:
        for line in run.metrics:
            names = tuple(sorted(key for key, value in line.items() if number(value) is not None))
            lines.setdefault((line.get("step"), names), []).append(line)
    return tuple(_combined(same, statistics.fmean) for same in lines.values() if len(same) == len(members))
