"""One optimizer step of a student: its head alone, and all of it, beside other ways to the same end.

    scripts/benchmark step [repetitions=5] [data=gsm8k.jsonl] [trl=<python>] [only=<part of a case's name>]

Times are medians of interleaved repetitions in one run; peaks are what a fresh process takes for one step on top of
what it had before. `data` is GSM8K as JSON lines: its solutions are what the student learns to write, supervised
behind their questions. Without it these rows are left out. `trl` is the Python of an environment with
benchmarks/requirements.txt; without it TRL's rows are left out. `only` measures some cases, and keeps nothing.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from benchmarks.heads import HEADS
from benchmarks.measure import Row, Run, keep, medians, shown
from benchmarks.pairs import PAIRS, TWO_TASKS, padding, per_step, two_tasks, ways
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
        """Exit with the way to call it where an argument is unknown."""
        given = dict(argument.partition("=")[::2] for argument in arguments)
        if not given.keys() <= {"repetitions", "data", "trl", "only", "peak"}:
            sys.exit(f"{__doc__}\nfound: {' '.join(arguments)}")
        kinds: dict[str, Callable[[str], Any]] = {"repetitions": int, "data": Path, "trl": Path}
        return cls(**{key: kinds.get(key, str)(value) for key, value in given.items()})


def main(settings: Settings) -> None:
    """Measure everything, and keep it; with `peak=<case>/<way>` print what one run takes."""
    flush_denormals()
    with tempfile.TemporaryDirectory(prefix="distill-benchmark-") as name:
        if settings.peak:
            case, _, way = settings.peak.partition("/")
            print(_peak_bytes(_ways(case, Path(name), settings.data)[way]))
        elif settings.only:
            list(shown(_measured(Path(name), settings)))
        else:
            keep("step", _measured(Path(name), settings))


def _measured(folder: Path, settings: Settings) -> Iterator[Row]:
    parts: dict[str, Callable[[], Iterator[Row]]] = {case: lambda c=case: _head_rows(c, settings) for case in HEADS}
    if settings.data.is_file():
        parts |= {case: lambda c=case: _step_rows(c, folder, settings) for case in PAIRS}
        parts |= {case: lambda c=case: _two_task_rows(c, folder, settings) for case in TWO_TASKS}
    else:
        print(f"data={settings.data} is no file: rows on GSM8K are left out", file=sys.stderr)
    parts["the training loop"] = lambda: _loop_rows(folder, settings)
    parts["padding"] = lambda: iter([Row("default task: padding, share of all tokens", padding(folder), 0.05, "lower")])
    for case, rows in parts.items():
        if settings.only in case:
            print(f"{case} ...", file=sys.stderr, flush=True)
            yield from rows()


def _ways(case: str, folder: Path, data: Path) -> Mapping[str, Run]:
    if case in HEADS:
        return HEADS[case].ways()
    return ways(PAIRS[case](folder, data)) if case in PAIRS else two_tasks(case, folder, data)


def _head_rows(case: str, settings: Settings) -> Iterator[Row]:
    extra = _peak(case, "ours") - HEADS[case].weight_bytes
    yield Row(f"{case}: ours, peak less dW, MB", extra / 2**20, None, "lower")
    if case in list(HEADS)[2:]:  # for the growth of memory alone
        return
    seconds = medians(HEADS[case].ways(), settings.repetitions)
    yield Row(f"{case}: CE alone, seconds", seconds["CE alone"], None, "lower")
    yield Row(
        f"{case}: time, CE + KL / CE alone with full logits", seconds["ours"] / seconds["CE alone"], 1.05, "lower"
    )
    full = "CE + sparse KL, full logits"
    yield Row(f"{case}: time, ours / {full}", seconds["ours"] / seconds[full], 0.9, "lower")
    yield Row(f"{case}: peak less dW / peak of CE alone", extra / _peak(case, "CE alone"), 0.10, "lower")


_BARS: Mapping[str, Mapping[str, tuple[float | None, float | None]]] = {  # for time, for the peak
    "CE alone": {"step on solutions": (0.80, 0.6), "step on texts": (1.05, None), "": (0.80, 0.6)},
    "KD from the cache, full logits": {"": (1.0, 1.0)},
    "online KD": {"step on texts": (None, None), "": (0.40, 0.30)},
    "TRL's GKD": {"": (1.0, 1.0)},
    "body alone": {"": (None, None)},
}


def _step_rows(case: str, folder: Path, settings: Settings) -> Iterator[Row]:
    pair = PAIRS[case](folder, settings.data)
    runs = ways(pair)
    peaks: dict[str, float] = {}
    with ExitStack() as stack:
        if settings.trl:
            pair.save(folder / "peer")
            with Peer(settings.trl, folder / "peer") as fresh:
                peaks["TRL's GKD"] = fresh.peak()
            runs["TRL's GKD"] = stack.enter_context(Peer(settings.trl, folder / "peer")).step
        seconds = medians(runs, settings.repetitions)
    del pair, runs
    peaks |= {way: _peak(case, way, settings.data) for way in seconds if way not in (*peaks, "body alone")}
    yield Row(f"{case}: ours, seconds", seconds["ours"], None, "lower")
    yield Row(f"{case}: ours, peak, MB", peaks["ours"] / 2**20, None, "lower")
    for way in [way for way in seconds if way != "ours"]:
        time_bar, peak_bar = _BARS[way].get(case, _BARS[way][""])
        yield Row(f"{case}: time, ours / {way}", seconds["ours"] / seconds[way], time_bar, "lower")
        if way in peaks:
            yield Row(f"{case}: peak, ours / {way}", peaks["ours"] / peaks[way], peak_bar, "lower")


def _two_task_rows(case: str, folder: Path, settings: Settings) -> Iterator[Row]:
    seconds = medians(two_tasks(case, folder, settings.data), settings.repetitions)
    peaks = {way: _peak(case, way, settings.data) for way in ("ours", "two passes")}
    yield Row(f"{case}: ours, seconds", seconds["ours"], None, "lower")
    yield Row(f"{case}: time, one sequence / two passes", seconds["ours"] / seconds["two passes"], 0.50, "lower")
    yield Row(f"{case}: peak, one sequence / two passes", peaks["ours"] / peaks["two passes"], None, "lower")
    yield Row(f"{case}: time, one sequence / ours in two", seconds["ours"] / seconds["ours in two"], 1.0, "lower")


def _loop_rows(folder: Path, settings: Settings) -> Iterator[Row]:
    """Both loops take the same steps; which of them begins changes from one repetition to the next."""
    loops = per_step(folder)
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for repetition in range(settings.repetitions + 1):
        for name in sorted(loops, reverse=repetition % 2 == 1):
            taken = loops[name]()
            if repetition:
                seconds[name] += taken
    lightning, plain = (statistics.median(seconds[name]) for name in ("Lightning", "plain"))
    yield Row("training loop: a step, seconds", plain, None, "lower")
    yield Row("training loop: time, Lightning / plain", lightning / plain, 1.02, "lower")


@final
class Peer:
    """TRL's trainer in a process and an environment of its own, which takes a step when it is told to."""

    def __init__(self, python: Path, folder: Path) -> None:
        """`folder` holds the models and the batch."""
        command = [str(python), str(Path(__file__).with_name("peer_trl.py")), str(folder)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Peer:
        """Wait until it can be asked."""
        if self._answer() != "ready":
            sys.exit("TRL's process did not come up; see what it says above")
        return self

    def __exit__(self, *_: object) -> None:
        """Let it end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def step(self) -> None:
        """One optimizer step."""
        self._ask("step")

    def peak(self) -> float:
        """What one takes, in bytes."""
        return float(self._ask("peak"))

    def _ask(self, what: str) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


# Memory


def _peak(case: str, way: str, data: Path | None = None) -> float:
    """What one run takes in a fresh process, in bytes."""
    command = [sys.executable, "-m", "benchmarks.step", f"peak={case}/{way}", *([f"data={data}"] if data else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def _peak_bytes(run: Run) -> int:
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    run()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    main(Settings.read(sys.argv[1:]))
