"""This machine: how much memory is free or taken, how long something takes."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

import psutil
import torch

# psutil reads a process's resident size, but it neither reads nor resets the peak: see proc(5).
_RESET_PEAK, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_MIN_ROUNDS = 3
T = TypeVar("T")


class Timing(NamedTuple):
    """Milliseconds per question: the median of the rounds' means, and the fastest and the slowest round."""

    median: float
    fastest: float
    slowest: float


@contextmanager
def paused_collector() -> Iterator[None]:
    """Keep Python's garbage collector from running inside the block, which makes many objects and no cycles.

    It would walk all objects again and again: the time per object would grow with their number.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def median_milliseconds(
    answering: Mapping[str, Callable[[T], object]], questions: Sequence[T]
) -> dict[str, float | None]:
    """Median time of each to answer one question alone, in turn at each question; the first is not counted."""
    times: dict[str, list[float]] = {name: [] for name in answering}
    for question in questions:
        for name, answer in answering.items():
            times[name].append(_milliseconds(answer, question))
    return {name: round(statistics.median(each[1:] or each), 3) if each else None for name, each in times.items()}


def timings(
    answering: Mapping[str, Callable[[T], object]], questions: Sequence[T], *, num_rounds: int, max_seconds: float
) -> dict[str, Timing]:
    """Time models on the same questions in several rounds, one question at a time, in an order that changes by round.

    Rounds have equal work, so they differ by noise alone. After three rounds, no further one starts once
    `max_seconds` have passed. The caller has answered each question once before, so that nothing is done first here.
    """
    start = time.perf_counter()
    rounds: list[dict[str, float]] = []
    while len(rounds) < num_rounds and (len(rounds) < _MIN_ROUNDS or time.perf_counter() - start < max_seconds):
        names = list(answering)
        shift = len(rounds) % len(names)
        order = names[shift:] + names[:shift]
        spent = [{name: _milliseconds(answering[name], question) for name in order} for question in questions]
        rounds.append({name: statistics.fmean(times[name] for times in spent) for name in names})
    means = {name: [times[name] for times in rounds] for name in answering}
    return {name: Timing(statistics.median(times), min(times), max(times)) for name, times in means.items()}


def _milliseconds(answer: Callable[[T], object], question: T) -> float:
    start = time.perf_counter()
    answer(question)
    return 1000 * (time.perf_counter() - start)


def extra_bytes(work: Callable[[], object]) -> int | None:
    """How far `work` raises memory, the GPU's or else this process's; None where the system keeps no peak."""
    if torch.cuda.is_available():
        rise = gpu_memory_rise(torch.device("cuda"))
        work()
        return rise()
    # Freed memory is returned to the system first, or it would be used again without a rise.
    with suppress(AttributeError):  # psutil has it for some allocators only
        psutil.heap_trim()
    try:
        _RESET_PEAK.write_text("5")  # the peak becomes the present resident size
        resident: int = psutil.Process().memory_info().rss
        work()
        return max(0, _peak_resident_bytes() - resident)
    except OSError:
        return None


def gpu_memory_rise(device: torch.device) -> Callable[[], int]:
    """Return a function that waits for the GPU and returns by how many bytes its memory has risen meanwhile."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)

    def rise() -> int:
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before

    return rise


def gpu_name() -> str | None:
    """Name of the GPU, None without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def num_gpus() -> int:
    """Number of GPUs that this process sees."""
    return torch.cuda.device_count()


def is_gpu(device: torch.device) -> bool:
    """Whether the device is a GPU whose memory can be measured."""
    return device.type == "cuda"


def _peak_resident_bytes() -> int:
    lines = _STATUS.read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def free_memory(device: torch.device, root: Path = Path("/")) -> int | None:
    """Bytes available on a GPU, or on the host within the limits of its cgroups; None for other devices."""
    if is_gpu(device):
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu":
        return None
    return int(min(psutil.virtual_memory().available, *_cgroup_rooms(root)))


def _cgroup_rooms(root: Path) -> Iterator[float]:
    """What each memory limit above this process leaves; pages of files can be given up, so they do not count.

    psutil does not read the limits of cgroups.
    """
    yield math.inf
    own = root / "proc/self/cgroup"
    lines = own.read_text().splitlines() if own.is_file() else []
    place = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    top = root / "sys/fs/cgroup"
    for folder in {top, top / place, *(top / parent for parent in Path(place).parents)}:
        files = [folder / name for name in ("memory.max", "memory.current", "memory.stat")]
        if all(file.is_file() for file in files):
            limit, used, stat = (file.read_text().split() for file in files)
            of_files = int(stat[stat.index("file") + 1]) if "file" in stat else 0
            if limit != ["max"]:
                yield max(0, int(limit[0]) - int(used[0]) + of_files)
