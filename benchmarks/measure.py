"""Interleaved timing: every repetition runs all variants, so that other load on the machine affects all of them."""

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

FOLDER = Path(__file__).parent
Variant = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One figure with its bar (None: no bar) and which direction is better."""

    name: str
    value: float
    bar: float | None
    better: Literal["lower", "higher"]


def medians(
    variants: Mapping[str, Variant], repetitions: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Median seconds of each variant by `clock`, over interleaved repetitions after one uncounted warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for repetition in range(repetitions + 1):
        for name, variant in variants.items():
            start = clock()
            result = variant()
            elapsed = clock() - start
            del result  # freeing the result is not part of the measurement
            if repetition:
                seconds[name].append(elapsed)
    return {name: statistics.median(measurements) for name, measurements in seconds.items()}


def save(name: str, rows: Iterable[Row]) -> None:
    """Print the rows as they arrive, then write them to `<name>.json` with the device and the commit."""
    rows = list(printed(rows))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{_processor()}, {_cores()}"
    content = {"device": device, "commit": _commit(), "rows": [asdict(row) for row in rows]}
    (FOLDER / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def printed(rows: Iterable[Row]) -> Iterator[Row]:
    """Yield the rows unchanged; print each as it arrives, with its bar and whether it is met."""
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
    process = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=FOLDER, capture_output=True, text=True, check=False
    )
    return process.stdout.strip() or "unknown"
