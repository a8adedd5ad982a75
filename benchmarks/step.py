"""One optimizer step of a student, and its head alone, beside other implementations.

    scripts/benchmark step [repetitions=5] [data=gsm8k.jsonl] [trl=<python>] [only=<part of a case's name>]

Times are medians of interleaved repetitions in one run. Peaks are the memory that one step adds to a new process.
`data` is GSM8K as JSON lines, whose solutions are the targets; without it the rows on GSM8K are skipped. `trl` is the
Python of an environment with benchmarks/requirements.txt; without it the rows of TRL are skipped. `only` measures the
matching cases and saves nothing.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, final

from benchmarks import material
from benchmarks.heads import HEADS
from benchmarks.measure import Row, Variant, medians, printed, save
from benchmarks.pairs import (
    PAIRS,
    TURNS,
    TWO_TASKS,
    loop_step_seconds,
    padding_fraction,
    step_variants,
    turn_lessons,
    turn_variants,
    two_task_variants,
)
from distill.lessons.join import with_shared_turns
from distill.models.loading import flush_denormals


@dataclass(frozen=True)
class Settings:
    """The command line."""

    repetitions: int = 5
    data: Path = Path("gsm8k.jsonl")
    trl: Path | None = None
    only: str = ""
    peak: str = ""

    @classmethod
    def read(cls, arguments: Sequence[str]) -> Settings:
        """Parse `key=value` arguments; exit with the usage if a key is unknown."""
        options = dict(argument.partition("=")[::2] for argument in arguments)
        if not options.keys() <= {"repetitions", "data", "trl", "only", "peak"}:
            sys.exit(f"{__doc__}\ngot: {' '.join(arguments)}")
        parsers: dict[str, Callable[[str], Any]] = {"repetitions": int, "data": Path, "trl": Path}
        return cls(**{key: parsers.get(key, str)(value) for key, value in options.items()})


def main(settings: Settings) -> None:
    """Measure everything and save the figures; with `peak=<case>/<variant>` print the peak of one run in bytes."""
    flush_denormals()
    with tempfile.TemporaryDirectory(prefix="distill-benchmark-") as name:
        if settings.peak:
            case, _, variant = settings.peak.partition("/")
            print(_peak_bytes(_variants(case, Path(name), settings.data)[variant]))
        elif settings.only:
            list(printed(_rows(Path(name), settings)))
        else:
            save("step", _rows(Path(name), settings))


def _rows(folder: Path, settings: Settings) -> Iterator[Row]:
    sections: dict[str, Callable[[], Iterator[Row]]] = {case: partial(_head_rows, case, settings) for case in HEADS}
    if settings.data.is_file():
        sections |= {case: partial(_step_rows, case, folder, settings) for case in PAIRS}
        sections |= {case: partial(_two_task_rows, case, folder, settings) for case in TWO_TASKS}
        sections[TURNS] = partial(_turn_rows, folder, settings)
    else:
        print(f"data={settings.data} is not a file: rows on GSM8K are skipped", file=sys.stderr)
    sections |= {"the training loop": partial(_loop_rows, folder, settings), "padding": partial(_padding_rows, folder)}
    for case, make_rows in sections.items():
        if settings.only in case:
            print(f"{case} ...", file=sys.stderr, flush=True)
            yield from make_rows()


def _variants(case: str, folder: Path, data: Path) -> Mapping[str, Variant]:
    if case in HEADS:
        return HEADS[case].variants()
    return step_variants(PAIRS[case](folder, data)) if case in PAIRS else two_task_variants(case, folder, data)


def _head_rows(case: str, settings: Settings) -> Iterator[Row]:
    extra = _peak_in_new_process(case, "ours") - HEADS[case].weight_bytes
    yield Row(f"{case}: ours, peak less dW, MB", extra / 2**20, None, "lower")
    if case in list(HEADS)[2:]:  # measured only for the growth of memory
        return
    seconds = medians(HEADS[case].variants(), settings.repetitions)
    yield Row(f"{case}: CE alone, seconds", seconds["CE alone"], None, "lower")
    yield Row(
        f"{case}: time, CE + KL / CE alone with full logits", seconds["ours"] / seconds["CE alone"], 1.05, "lower"
    )
    full = "CE + sparse KL, full logits"
    yield Row(f"{case}: time, ours / {full}", seconds["ours"] / seconds[full], 0.9, "lower")
    yield Row(f"{case}: peak less dW / peak of CE alone", extra / _peak_in_new_process(case, "CE alone"), 0.10, "lower")


_BARS: Mapping[str, Mapping[str, tuple[float | None, float | None]]] = {  # bars for (time, peak)
    "CE alone": {"step on solutions": (0.80, 0.6), "step on texts": (1.05, None), "": (0.80, 0.6)},
    "KD from the cache, full logits": {"": (1.0, 1.0)},
    "online KD": {"step on texts": (None, None), "": (0.40, 0.30)},
    "TRL's GKD": {"": (1.0, 1.0)},
    "backbone alone": {"": (None, None)},
}


def _step_rows(case: str, folder: Path, settings: Settings) -> Iterator[Row]:
    pair = PAIRS[case](folder, settings.data)
    runs = step_variants(pair)
    peaks: dict[str, float] = {}
    with ExitStack() as stack:
        if settings.trl:
            pair.save(folder / "peer")
            with Peer(settings.trl, folder / "peer") as peer:
                peaks["TRL's GKD"] = peer.peak()
            runs["TRL's GKD"] = stack.enter_context(Peer(settings.trl, folder / "peer")).step
        seconds = medians(runs, settings.repetitions)
    del pair, runs
    peaks |= {
        variant: _peak_in_new_process(case, variant, settings.data)
        for variant in seconds
        if variant not in (*peaks, "backbone alone")
    }
    yield Row(f"{case}: ours, seconds", seconds["ours"], None, "lower")
    yield Row(f"{case}: ours, peak, MB", peaks["ours"] / 2**20, None, "lower")
    for variant in [variant for variant in seconds if variant != "ours"]:
        time_bar, peak_bar = _BARS[variant].get(case, _BARS[variant][""])
        yield Row(f"{case}: time, ours / {variant}", seconds["ours"] / seconds[variant], time_bar, "lower")
        if variant in peaks:
            yield Row(f"{case}: peak, ours / {variant}", peaks["ours"] / peaks[variant], peak_bar, "lower")


def _two_task_rows(case: str, folder: Path, settings: Settings) -> Iterator[Row]:
    seconds = medians(two_task_variants(case, folder, settings.data), settings.repetitions)
    peaks = {variant: _peak_in_new_process(case, variant, settings.data) for variant in ("ours", "two passes")}
    yield Row(f"{case}: ours, seconds", seconds["ours"], None, "lower")
    yield Row(f"{case}: time, one sequence / two passes", seconds["ours"] / seconds["two passes"], 0.50, "lower")
    yield Row(f"{case}: peak, one sequence / two passes", peaks["ours"] / peaks["two passes"], None, "lower")
    yield Row(f"{case}: time, one sequence / ours in two", seconds["ours"] / seconds["ours in two"], 1.0, "lower")


def _turn_rows(folder: Path, settings: Settings) -> Iterator[Row]:
    separate = turn_lessons(material.default_source(folder).prompts, settings.data)
    num_tokens, num_separate = (
        sum(lesson.num_tokens for lesson in lessons) for lessons in (with_shared_turns(separate), separate)
    )
    yield Row(f"{TURNS}: tokens, one sequence / one for each turn", num_tokens / num_separate, None, "lower")
    seconds = medians(turn_variants(folder, settings.data), settings.repetitions)
    ratio = seconds["one sequence"] / seconds["one for each turn"]
    yield Row(f"{TURNS}: one sequence, seconds", seconds["one sequence"], None, "lower")
    yield Row(f"{TURNS}: time, one sequence / one for each turn", ratio, 1.0, "lower")


def _loop_rows(folder: Path, settings: Settings) -> Iterator[Row]:
    """Both loops make the same steps; repetitions alternate which loop runs first."""
    loops = loop_step_seconds(folder)
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for repetition in range(settings.repetitions + 1):
        for name in sorted(loops, reverse=repetition % 2 == 1):
            step_seconds = loops[name]()
            if repetition:
                seconds[name] += step_seconds
    lightning, plain = (statistics.median(seconds[name]) for name in ("Lightning", "plain"))
    yield Row("training loop: a step, seconds", plain, None, "lower")
    yield Row("training loop: time, Lightning / plain", lightning / plain, 1.02, "lower")


def _padding_rows(folder: Path) -> Iterator[Row]:
    yield Row("default task: padding, fraction of all tokens", padding_fraction(folder), 0.05, "lower")


@final
class Peer:
    """TRL's trainer in a separate process and environment; it makes one step per request."""

    def __init__(self, python: Path, folder: Path) -> None:
        """`folder` holds the models and the batch."""
        command = [str(python), str(Path(__file__).with_name("peer_trl.py")), str(folder)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Peer:
        """Wait until the process accepts requests."""
        if self._read_reply() != "ready":
            sys.exit("TRL's process failed to start; see its output above")
        return self

    def __exit__(self, *_: object) -> None:
        """Close its input and wait for its exit."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def step(self) -> None:
        """Make one optimizer step."""
        self._request("step")

    def peak(self) -> float:
        """Peak memory of one optimizer step, in bytes."""
        return float(self._request("peak"))

    def _request(self, command: str) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()
        return self._read_reply()

    def _read_reply(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


# Memory


def _peak_in_new_process(case: str, variant: str, data: Path | None = None) -> float:
    """Memory that one run adds to a new process, in bytes."""
    command = [sys.executable, "-m", "benchmarks.step", f"peak={case}/{variant}", *([f"data={data}"] if data else [])]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(process.stdout.split()[-1])


def _peak_bytes(run: Variant) -> int:
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    run()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    main(Settings.read(sys.argv[1:]))
