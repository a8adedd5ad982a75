"""One optimizer step of a student: its head alone, and all of it, beside other ways to the same end.

    scripts/benchmark step [repetitions=5] [data=gsm8k.jsonl]

Times are medians of interleaved repetitions in one process; peaks are what a fresh process takes for one run on top
of what it had before. Targets of the head alone are random: they decide neither. `data` is GSM8K as JSON lines:
its solutions are what the student learns to write, supervised behind their questions. Without it these rows are
left out.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

from benchmarks import material
from benchmarks.measure import Row, keep, medians
from distill.cache.store import Store
from distill.data import Join, Lesson, collate
from distill.head import Head, Term, head_loss
from distill.losses.cross_entropy import CrossEntropy
from distill.losses.forward_kl import ForwardKL
from distill.models import flush_denormals, native_dtype
from distill.modules import StudentModule
from distill.records import Batch, Entries

Run = Callable[[], object]
_EXAMPLES = 8


def main(arguments: Sequence[str]) -> None:
    """Measure everything, and keep it; with `peak=<case>/<way>` print what one run takes."""
    given = dict(argument.partition("=")[::2] for argument in arguments)
    if not given.keys() <= {"repetitions", "data", "peak"}:
        sys.exit(f"{__doc__}\nfound: {' '.join(arguments)}")
    flush_denormals()
    data = Path(given.get("data", "gsm8k.jsonl"))
    with tempfile.TemporaryDirectory(prefix="distill-benchmark-") as name:
        if "peak" in given:
            case, _, way = given["peak"].partition("/")
            print(_peak_bytes(_ways(case, Path(name), data)[way]))
        else:
            keep("step", list(_measured(Path(name), int(given.get("repetitions", "5")), data)))


def _measured(folder: Path, repetitions: int, data: Path) -> Iterator[Row]:
    for case in _HEADS:
        yield from _head_rows(case, repetitions)
    if not data.is_file():
        print(f"data={data} is no file: rows on GSM8K are left out", file=sys.stderr)
        return
    for case in _STEPS:
        yield from _step_rows(case, folder, repetitions, data)


def _ways(case: str, folder: Path, data: Path) -> Mapping[str, Run]:
    return _HEADS[case].ways() if case in _HEADS else _steps(case, folder, data)


# The head alone


@dataclass(frozen=True)
class HeadCase:
    """Hidden states of N positions before a head, with k kept entries for each."""

    num_positions: int
    vocabulary: int
    hidden: int
    k: int = 64

    def ways(self) -> dict[str, Run]:
        """Forward and backward in different ways, all to the gradients of hidden states and weight."""
        torch.manual_seed(0)
        n, v = self.num_positions, self.vocabulary
        hidden_NH = torch.randn(n, self.hidden, requires_grad=True)
        weight_VH = (torch.randn(v, self.hidden) / self.hidden**0.5).requires_grad_()
        label_N, ids_NK = torch.randint(v, (n,)), torch.randint(v, (n, self.k))
        kept_NK = torch.randn(n, self.k).log_softmax(-1) + np.log(0.9)
        every_N, position_N = torch.ones(n, dtype=torch.bool), torch.arange(n)
        labels = Entries(np.arange(1, n + 1), position_N, label_N, torch.zeros(n), None)
        position_E, ends_N = position_N.repeat_interleave(self.k), self.k * np.arange(1, n + 1)
        soft = Entries(ends_N, position_E, ids_NK.flatten(), kept_NK.flatten(), torch.full((n,), 0.1))
        terms = [
            Term(CrossEntropy(), labels, every_N, 1.0, 0.5 / n),
            Term(ForwardKL(), soft, every_N, 1.0, 0.5 / n),
        ]

        def differentiated(loss: Callable[[], Tensor]) -> Run:
            def run() -> None:
                hidden_NH.grad = weight_VH.grad = None
                loss().backward()

            return run

        def sparse() -> Tensor:
            log_q_NV = (hidden_NH @ weight_VH.T).log_softmax(-1)
            kept_q_NK = log_q_NV.gather(-1, ids_NK)
            rest_N = (1 - kept_q_NK.exp().sum(-1)).clamp(min=1e-9).log()
            kl = (kept_NK.exp() * (kept_NK - kept_q_NK)).sum() + (0.1 * (np.log(0.1) - rest_N)).sum()
            return 0.5 / n * (kl - log_q_NV.gather(-1, label_N.unsqueeze(-1)).sum())

        return {
            "ours": differentiated(lambda: head_loss(hidden_NH, Head(weight_VH), terms)[0]),
            "CE alone": differentiated(lambda: cross_entropy((hidden_NH @ weight_VH.T).float(), label_N)),
            "CE + sparse KL, full logits": differentiated(sparse),
        }

    @property
    def weight_bytes(self) -> int:
        """Of the head, and of its gradient."""
        return 4 * self.vocabulary * self.hidden


_HEADS = {
    "head V=49152, 2048 positions": HeadCase(2048, 49152, 576),
    "head V=151936, 512 positions": HeadCase(512, 151936, 896),
    "head V=49152, 1024 positions": HeadCase(1024, 49152, 576),
    "head V=49152, 4096 positions": HeadCase(4096, 49152, 576),
}


def _head_rows(case: str, repetitions: int) -> Iterator[Row]:
    extra = _peak(case, "ours") - _HEADS[case].weight_bytes
    yield Row(f"{case}: ours, peak less dW, MB", extra / 2**20, None, "lower")
    if case in list(_HEADS)[2:]:  # for the growth of memory alone
        return
    seconds = medians(_HEADS[case].ways(), repetitions)
    yield Row(f"{case}: CE alone, seconds", seconds["CE alone"], None, "lower")
    yield Row(
        f"{case}: time, CE + KL / CE alone with full logits", seconds["ours"] / seconds["CE alone"], 1.05, "lower"
    )
    full = "CE + sparse KL, full logits"
    yield Row(f"{case}: time, ours / {full}", seconds["ours"] / seconds[full], 0.9, "lower")
    yield Row(f"{case}: peak less dW / peak of CE alone", extra / _peak(case, "CE alone"), 0.10, "lower")


# The whole step


_STEPS = {"solutions": "supervised behind their questions", "texts": "every token supervised"}


def _step_rows(case: str, folder: Path, repetitions: int, data: Path) -> Iterator[Row]:
    seconds = medians(_steps(case, folder, data), repetitions)
    peaks = {way: _peak(case, way, data) for way in seconds}
    most = {"solutions": 0.80, "texts": 1.05}[case]
    bars: dict[str, tuple[float | None, float | None]] = {
        "CE alone": (most, 0.6 if case == "solutions" else None),
        "KD from the cache, full logits": (1.0, 1.0),
        "online KD": (0.40, 0.30) if case == "solutions" else (None, None),
        "body alone": (None, None),
    }
    yield Row(f"step on {case}: ours, seconds", seconds["ours"], None, "lower")
    yield Row(f"step on {case}: ours, peak, MB", peaks["ours"] / 2**20, None, "lower")
    for way, (time_bar, peak_bar) in bars.items():
        yield Row(f"step on {case}: time, ours / {way}", seconds["ours"] / seconds[way], time_bar, "lower")
        yield Row(f"step on {case}: peak, ours / {way}", peaks["ours"] / peaks[way], peak_bar, "lower")


@dataclass(frozen=True)
class Texts:
    """One batch of the default student: lessons with soft targets in a store, and their plain tensors."""

    module: StudentModule
    optimizer: torch.optim.Optimizer
    lessons: Sequence[Lesson]
    store: Store
    counts: Mapping[Any, int]
    batch: Batch

    @property
    def labels_BT(self) -> Int[Tensor, "B T"]:  # noqa: N802 - a tensor's dimensions stand in its name
        """As Hugging Face wants them: -100 where nothing is to be learned."""
        labels_BT = torch.full_like(self.batch.input_ids_BT, -100)
        labels_BT[self.batch.sequence_N, self.batch.before_N + 1] = self.batch.label_N
        return labels_BT


def _steps(case: str, folder: Path, data: Path) -> dict[str, Run]:
    """The default student's step on a batch of solutions, from the batch's making to the optimizer's step."""
    config = material.compose("student.freeze=[]", "loss=[answer,kl]")
    source = material.default_source(folder)
    ask = material.solutions_asked if case == "solutions" else material.texts_asked
    asked = ask(source, material.solutions(data)[:_EXAMPLES], "topk", _EXAMPLES)
    store, teacher = asked.fill(folder), asked.model
    texts = _texts(config, source.folder, asked, store)
    model, batch, labels_BT = texts.module.model, texts.batch, texts.labels_BT

    def stepped(loss: Callable[[], Tensor]) -> Run:
        def run() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=native_dtype() == torch.bfloat16):
                value = loss()
            texts.optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            texts.optimizer.step()

        return run

    def ours() -> Tensor:
        made = collate(texts.lessons, texts.counts, 0, store.soft_targets)
        return head_loss(texts.module.hidden(made), texts.module.head(), list(texts.module.terms(made).values()))[0]

    def plain(logprobs: Callable[[], Float[Tensor, "N V"]]) -> Tensor:
        out = model(batch.input_ids_BT, attention_mask=batch.mask_BT, labels=labels_BT)
        log_q_NV = out.logits.float().log_softmax(-1)[batch.sequence_N, batch.before_N]
        total: Tensor = out.loss + kl_div(log_q_NV, logprobs(), log_target=True, reduction="batchmean")
        return total

    def cached() -> Float[Tensor, "N V"]:
        made = collate(texts.lessons, texts.counts, 0, store.soft_targets).soft
        assert made is not None
        whole_NV = torch.full((len(batch.label_N), asked.prompts.vocabulary_size), -30.0)
        whole_NV[made.position_E, made.ids_E] = made.logprobs_E
        return whole_NV

    def online() -> Float[Tensor, "N V"]:
        with torch.no_grad():
            logits_BTV = teacher(batch.input_ids_BT, attention_mask=batch.mask_BT).logits
            log_t_NV: Tensor = logits_BTV.float().log_softmax(-1)[batch.sequence_N, batch.before_N]
        return log_t_NV

    def body() -> Tensor:
        total: Tensor = model.base_model(batch.input_ids_BT, attention_mask=batch.mask_BT).last_hidden_state.sum()
        return total

    return {
        "ours": stepped(ours),
        "CE alone": stepped(lambda: model(batch.input_ids_BT, attention_mask=batch.mask_BT, labels=labels_BT).loss),
        "KD from the cache, full logits": stepped(partial(plain, cached)),
        "online KD": stepped(partial(plain, online)),
        "body alone": stepped(body),
    }


def _texts(config: Any, folder: Path, asked: material.Asked, store: Store) -> Texts:
    by_place = {(request.example.id, request.span): request for request in asked.requests}
    needed = frozenset({("answer", "labels"), ("answer", "soft")})
    join = Join(prompts=asked.prompts, store=store, requests=by_place, rationales={}, answer="direct", needed=needed)
    lessons = join.lessons([request.example for request in asked.requests])
    module, optimizer = material.student(folder, config, asked.prompts.vocabulary_size, asked.codec)
    counts = sum((lesson.counts() for lesson in lessons), Counter[Any]())
    batch = collate(lessons, counts, 0, store.soft_targets)
    return Texts(module, optimizer, lessons, store, counts, batch)


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
    main(sys.argv[1:])
