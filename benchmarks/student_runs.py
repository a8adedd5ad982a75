"""Finished runs of `benchmarks.students`: reading them back, and the report on all of them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import Row, save

SAMPLED = "sampled n=64 k_min=1"
RS_KD = "rs_kd, same bytes"
TOP_13 = "topk k=13"
TOP_50 = "topk k=50"
CODECS = (SAMPLED, TOP_13, TOP_50, RS_KD)
ARMS = ("answers", "dense", *CODECS)


@dataclass(frozen=True)
class Run:
    """One student: means over all held-out positions; `accuracy` and `ece` are of its predicted tokens against gold."""

    arm: str
    seed: int
    num_bytes: float
    codec: Mapping[str, Any]
    kl: float
    agreement: float
    accuracy: float
    ece: float
    seconds: float


def finished_runs(notes: Path, settings: Mapping[str, Any]) -> dict[tuple[str, int], Run]:
    """Recorded runs with the same settings, by arm and seed."""
    lines = notes.read_text().split("\n") if notes.is_file() else []
    parsed_notes = [note for line in lines if (note := _parse_note(line))]
    runs = [Run(**note) for note in parsed_notes if note.pop("settings") == settings]
    return {(run.arm, run.seed): run for run in runs}


def _parse_note(line: str) -> dict[str, Any] | None:
    """Parse a line; None if it is incomplete."""
    try:
        note: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    return note


def report(runs: Sequence[Run]) -> None:
    """Save the figures with their bars, and print a table."""
    by_arm = {name: [run for run in runs if run.arm == name] for name in ARMS}
    kl = {(run.arm, run.seed): run.kl for run in runs}
    fractions = {name: [_fraction_kept(kl, run) for run in arm_runs] for name, arm_runs in by_arm.items()}
    fraction = {name: statistics.mean(values) for name, values in fractions.items()}
    ece = {name: statistics.mean(run.ece for run in arm_runs) for name, arm_runs in by_arm.items()}
    rows = []
    for name in CODECS:
        is_judged = name == SAMPLED
        rows += [
            Row(f"{name}: bytes per position", by_arm[name][0].num_bytes, None, "lower"),
            Row(f"{name}: fraction of the gap kept", fraction[name], 0.95 if is_judged else None, "higher"),
            Row(f"{name}: |ECE - ECE of dense|", abs(ece[name] - ece["dense"]), 0.003 if is_judged else None, "lower"),
        ]
    rows += [
        Row(f"fraction of {SAMPLED} - {name}", fraction[SAMPLED] - fraction[name], 0, "higher")
        for name in (RS_KD, TOP_50)
    ]
    save("students", rows)
    print(f"\n{'arm':24} {'bytes':>8} {'KL':>17} {'fraction of gap':>17} {'agreement':>10} {'accuracy':>9} {'ECE':>7}")
    for name, arm_runs in by_arm.items():
        means = [statistics.mean(getattr(run, name) for run in arm_runs) for name in ("agreement", "accuracy", "ece")]
        columns = f"{arm_runs[0].num_bytes:8.1f} {_mean_std([run.kl for run in arm_runs])} {_mean_std(fractions[name])}"
        print(f"{name:24} {columns} {means[0]:10.4f} {means[1]:9.4f} {means[2]:7.4f}")


def _fraction_kept(kl: Mapping[tuple[str, int], float], run: Run) -> float:
    """Fraction of the gap between `answers` and `dense` of the same seed that the run closes."""
    worst, best = kl["answers", run.seed], kl["dense", run.seed]
    return (worst - run.kl) / (worst - best)


def _mean_std(values: Sequence[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):8.4f} ± {deviation:6.4f}"
