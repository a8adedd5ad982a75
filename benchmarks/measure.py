"""Measuring side by side: repetitions of all variants in turn, so that what else the machine does hits all alike."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

HERE = Path(__file__).parent
Run = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One figure, what it is held to (None: nothing), and which way is good."""

    name: str
    value: float
    bar: float | None
    better: Literal["lower", "higher"]


def medians(
    variants: Mapping[str, Run], repetitions: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Median seconds of each variant by `clock`, all variants in each repetition; a first one is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for repetition in range(repetitions + 1):
        for name, variant in variants.items():
            start = clock()
            made = variant()
            taken = clock() - start
            del made  # taking it away again is not what is measured
            if repetition:
                seconds[name].append(taken)
    return {name: statistics.median(each) for name, each in seconds.items()}


def keep(name: str, rows: Iterable[Row]) -> None:
    """Print the rows as they come, and write them to `<name>.json` with the device and the commit that they are of."""
    rows = list(shown(rows))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{_processor()}, {_cores()}"
    content = {"device": device, "commit": _commit(), "rows": [asdict(row) for row in rows]}
    (HERE / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def shown(rows: Iterable[Row]) -> Iterator[Row]:
    """The same rows; each is printed as it comes, with its bar and whether it is met."""
    for row in rows:
        bar = "" if row.bar is None else f"{'<=' if row.better == 'lower' else '>='} {row.bar:g}"
        print(f"{row.name:72} {row.value:12.4g}  {bar:10} {_verdict(row)}", flush=True)
        yield row


def _verdict(row: Row) -> str:
    if row.bar is None:
        return ""
    return "met" if (row.value <= row.bar if row.better == "lower" else row.value >= row.bar) else "NOT met"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _cores() -> str:
    return f"{torch.get_num_threads()} threads"


def _commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"
