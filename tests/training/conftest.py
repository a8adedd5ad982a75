"""Fixtures and helpers shared by the tests of this folder."""

from __future__ import annotations

import csv
import itertools
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from distill.lessons.join import Lesson
from distill.losses.head import head_loss
from distill.records import Batch
from distill.students.causal_lm import open_student
from distill.training.checkpoints import step_of
from distill.training.module import StudentModule
from tests.conftest import WHOLE_STUDENT, environment, objectives, read, start, tiny_overrides

Values = dict[str, Tensor]


BATCH, STEPS, RATE = 8, 2, 0.05


def open_whole_student(folder: Path, dtype: torch.dtype = torch.float64) -> Any:
    return open_student(folder, **WHOLE_STUDENT).to(dtype)


def loss_and_gradients(module: StudentModule, batch: Batch, counts: Mapping[Any, int] | None = None) -> Values:
    """The training loss of one microbatch and its gradient for each weight."""
    module.zero_grad()
    terms = module.terms(batch if counts is None else replace(batch, counts=counts))
    total, _ = head_loss(module.hidden(batch), module.head(), list(terms.values()))
    total.backward()
    return {"loss": total.detach()} | {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def logged_losses(folder: Path) -> list[dict[str, float]]:
    """The logged losses, one row per step."""
    rows = csv.DictReader((folder / "metrics.csv").read_text().splitlines())
    return [{k: float(v) for k, v in row.items() if v and k.startswith(("train/", "val/"))} for row in rows]


def assert_same(actual: Values, expected: Values, tolerance: float = 1e-10) -> None:
    assert set(actual) == set(expected)
    for name, value in expected.items():
        difference = (actual[name] - value).abs().max()
        assert difference <= tolerance * max(1.0, value.abs().max()), f"{name} differs by {difference:.3g}"


def total_counts(lessons: Sequence[Lesson]) -> Counter[Any]:
    return sum((lesson.counts() for lesson in lessons), Counter())


def plain_divergence(name: str, log_q_B: Tensor, log_t_B: Tensor) -> Tensor:
    """The textbook formula, with the settings of conf/loss/."""
    q_B, t_B = log_q_B.exp(), log_t_B.exp()

    def kl(p_B: Tensor, r_B: Tensor) -> Tensor:
        return (p_B * (p_B / r_B).log()).sum()

    half_B = (q_B + t_B) / 2
    divergences = {
        "kl": kl(t_B, q_B),
        "rationale_kl": kl(t_B, q_B),
        "reverse_kl": kl(q_B, t_B),
        "skew_kl": kl(t_B, 0.1 * t_B + 0.9 * q_B),
        "skew_reverse_kl": kl(q_B, 0.9 * t_B + 0.1 * q_B),
        "jensen_shannon": (kl(t_B, half_B) + kl(q_B, half_B)) / 2,
        "total_variation": (q_B - t_B).abs().sum() / 2,
    }
    return divergences[name]


def plain_loss(model: Any, lessons: Sequence[Lesson], vocabulary_size: int) -> Tensor:
    """A second, slow implementation: sequence by sequence, position by position, then a mean per loss."""
    sums: dict[str, Tensor] = {}
    numbers: Counter[str] = Counter()
    for sequence in (s for lesson in lessons for s in lesson.sequences):
        logits_TV = model(torch.tensor([sequence.ids])).logits[0, :, :vocabulary_size]
        for (name, objective), target in itertools.product(objectives().items(), sequence.targets):
            if target.span != objective.span:
                continue
            place = target.soft
            soft = read([place.place]) if place else None
            chosen = (place.chosen or range(place.num_positions)) if place else ()
            for offset, position in enumerate(range(target.start, target.stop)):
                log_q_V = logits_TV[position - 1].log_softmax(-1)
                has_source = {"labels": target.is_labelled, "teacher": not target.is_labelled}
                if has_source.get(objective.source, False):
                    value = cross_entropy(logits_TV[position - 1], torch.tensor(sequence.ids[position]))
                elif objective.source == "soft" and soft is not None and offset in chosen:
                    row = chosen.index(offset)
                    ids, logprobs = list(soft.rows())[row]
                    kept_K = log_q_V[torch.tensor(ids)]
                    log_q_B = torch.cat([kept_K, (1 - kept_K.exp().sum(0, keepdim=True)).log()])
                    tail = torch.tensor([soft.tail_N[row]]).log()
                    log_t_B = torch.cat([torch.tensor(logprobs), tail]).double()
                    value = plain_divergence(name, log_q_B, log_t_B)
                else:
                    continue
                sums[name] = sums.get(name, torch.zeros(())) + value
                numbers[name] += 1
    assert set(sums) == set(objectives())
    return torch.stack([objectives()[name].weight * total / numbers[name] for name, total in sums.items()]).sum()


COMMON = ["loss=[answer,kl,rationale]", "batch_size=4", "checkpoint_every=10", "validate_every=1000"]
COMMON += ["evaluate_before=false", "num_samples=0", "preflight=false"]
COMMON += ["optim.schedule.num_training_steps=1000000"]  # the weights after a step do not depend on max_steps


ENDLESS = "trainer.max_steps=1000000"  # for a run that is interrupted: it cannot end before


TWO_PROCESSES = ["trainer.devices=2", "trainer.strategy=ddp", "microbatch_size=2"]


MAX_SECONDS = 300  # limit for one process, on a busy machine


def wait_for(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Wait for a process; return its exit code and its output."""
    try:
        output, errors = process.communicate(timeout=MAX_SECONDS)
    finally:
        process.kill()
    return process.returncode, output + errors


def launch(root: Path, line: Sequence[str], **variables: str) -> subprocess.Popen[str]:
    """Start a command line, with additional environment variables."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(line, env=environment(**variables), cwd=root, text=True, **pipes)


def wait_until(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Wait until a running process has met the condition."""
    deadline = time.monotonic() + MAX_SECONDS
    while not condition():
        assert process.poll() is None, process.communicate()
        if time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"not met in {MAX_SECONDS} s: {process.communicate()}")
        time.sleep(0.005)


class RunFolder:
    """The folder of one run, in which the same command is started repeatedly."""

    def __init__(self, root: Path, name: str, overrides: Sequence[str]) -> None:
        self.path, self._root = root / "runs" / name, root
        self._overrides = [*overrides, f"hydra.run.dir={self.path}"]

    def start(self, *more: str) -> subprocess.Popen[str]:
        return start(self._root, *self._overrides, *more)

    def checkpoints(self) -> list[Path]:
        return sorted((self.path / "checkpoints").glob("step-*.json"))

    def start_and_wait(self, *more: str) -> subprocess.Popen[str]:
        """Start the run without an end, and wait for two more checkpoints."""
        before = self.checkpoints()[-1:]
        process = self.start(*more, ENDLESS)
        wait_until(lambda: len([path for path in self.checkpoints() if [path] > before]) > 1, process)
        return process

    def end_soon(self) -> str:
        """The override that ends the run some steps after its newest checkpoint."""
        return f"trainer.max_steps={step_of(self.checkpoints()[-1]) + 15}"

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.path / "student" / "model.safetensors")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root folder of this module's runs, which share a cache."""
    return tmp_path_factory.mktemp("survival")


@pytest.fixture(scope="module")
def overrides(root: Path, teacher_folder: Path, student_folder: Path) -> list[str]:
    """The overrides that the runs have in common; their cache is filled."""
    common = [*tiny_overrides(root, teacher_folder, student_folder), *COMMON]
    code, output = wait_for(start(root, *common, "trainer.max_steps=1"))
    assert code == 0, output
    return common


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class FailingHandler(BaseHTTPRequestHandler):
    """Replies to every request with error 500."""

    def fail(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_error(500)

    do_GET = do_POST = do_PUT = fail

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@pytest.fixture
def failing_server() -> Iterator[int]:
    """The port of a server on which every request fails."""
    with ThreadingHTTPServer(("127.0.0.1", 0), FailingHandler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()
