"""Makers that the tests of this folder share."""

from __future__ import annotations

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


def opened(folder: Path, dtype: torch.dtype = torch.float64) -> Any:
    return open_student(folder, **WHOLE_STUDENT).to(dtype)


def loss_and_gradients(module: StudentModule, batch: Batch, counts: Mapping[Any, int] | None = None) -> Values:
    """The training loss of one microbatch and what it asks of each weight."""
    module.zero_grad()
    terms = module.terms(batch if counts is None else replace(batch, counts=counts))
    total, _ = head_loss(module.hidden(batch), module.head(), list(terms.values()))
    total.backward()
    return {"loss": total.detach()} | {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def assert_same(found: Values, wanted: Values, tolerance: float = 1e-10) -> None:
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        gap = (found[name] - value).abs().max()
        assert gap <= tolerance * max(1.0, value.abs().max()), f"{name} differs by {gap:.3g}"


def counts_of(given: Sequence[Lesson]) -> Counter[Any]:
    return sum((lesson.counts() for lesson in given), Counter())


def plain_divergence(name: str, log_q_B: Tensor, log_t_B: Tensor) -> Tensor:
    """By the textbook, with the settings of conf/loss/."""
    q_B, t_B = log_q_B.exp(), log_t_B.exp()

    def kl(p_B: Tensor, r_B: Tensor) -> Tensor:
        return (p_B * (p_B / r_B).log()).sum()

    half_B = (q_B + t_B) / 2
    found = {
        "kl": kl(t_B, q_B),
        "rationale_kl": kl(t_B, q_B),
        "reverse_kl": kl(q_B, t_B),
        "skew_kl": kl(t_B, 0.1 * t_B + 0.9 * q_B),
        "skew_reverse_kl": kl(q_B, 0.9 * t_B + 0.1 * q_B),
        "jensen_shannon": (kl(t_B, half_B) + kl(q_B, half_B)) / 2,
        "total_variation": (q_B - t_B).abs().sum() / 2,
    }
    return found[name]


def plain_loss(model: Any, given: Sequence[Lesson], vocabulary_size: int) -> Tensor:
    """A second, slow implementation: each sequence by itself, each position by itself, then means per loss."""
    sums: dict[str, Tensor] = {}
    numbers: Counter[str] = Counter()
    for sequence in (s for lesson in given for s in lesson.sequences):
        logits_TV = model(torch.tensor([sequence.prompt.ids])).logits[0, :, :vocabulary_size]
        for name, objective in objectives().items():
            start, stop = sequence.prompt.spans.get(objective.span, (0, 0))
            soft = read([sequence.soft[objective.span].place]) if objective.span in sequence.soft else None
            for row, place in enumerate(range(start, stop)):
                log_q_V = logits_TV[place - 1].log_softmax(-1)
                is_given = {
                    "labels": objective.span in sequence.labelled,
                    "teacher": objective.span not in sequence.labelled,
                }
                if is_given.get(objective.source, False):
                    value = cross_entropy(logits_TV[place - 1], torch.tensor(sequence.prompt.ids[place]))
                elif objective.source == "soft" and soft is not None and row < len(soft):
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


ALIKE = ["loss=[answer,kl,rationale]", "batch_size=4", "checkpoint_every=10", "validate_every=1000"]
ALIKE += ["evaluate_before=false", "num_samples=0", "preflight=false"]
ALIKE += ["optim.schedule.num_training_steps=1000000"]  # so the weights after a step are the same however many follow


ENDLESS = "trainer.max_steps=1000000"  # of a run that is to be struck: it cannot end before it is


TOGETHER = ["trainer.devices=2", "trainer.strategy=ddp", "microbatch_size=2"]


SECONDS = 300  # that one process may take, on a machine that does other things too


def finished(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Its exit code, and all that it said."""
    try:
        output, errors = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    return process.returncode, output + errors


def launch(root: Path, line: Sequence[str], **more: str) -> subprocess.Popen[str]:
    """Start a command line of any kind, with more in its environment."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(line, env=environment(**more), cwd=root, text=True, **pipes)


def until(is_so: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Wait for something that a process does."""
    limit = time.monotonic() + SECONDS
    while not is_so():
        assert process.poll() is None, process.communicate()
        if time.monotonic() > limit:
            process.kill()
            pytest.fail(f"waited in vain: {process.communicate()}")
        time.sleep(0.005)


class Folder:
    """One run's folder, to which the same command is started again and again."""

    def __init__(self, root: Path, name: str, overrides: Sequence[str]) -> None:
        self.path, self._root = root / "runs" / name, root
        self._overrides = [*overrides, f"hydra.run.dir={self.path}"]

    def start(self, *more: str) -> subprocess.Popen[str]:
        return start(self._root, *self._overrides, *more)

    def checkpoints(self) -> list[Path]:
        return sorted((self.path / "checkpoints").glob("step-*.json"))

    def start_and_wait(self, *more: str) -> subprocess.Popen[str]:
        """Start it without an end, and wait until it has made two more checkpoints."""
        before = self.checkpoints()[-1:]
        process = self.start(*more, ENDLESS)
        until(lambda: len([path for path in self.checkpoints() if [path] > before]) > 1, process)
        return process

    def soon(self) -> str:
        """What lets it end, some steps after its newest checkpoint."""
        return f"trainer.max_steps={step_of(self.checkpoints()[-1]) + 15}"

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.path / "student" / "model.safetensors")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs of this module share a cache."""
    return tmp_path_factory.mktemp("survival")


@pytest.fixture(scope="module")
def overrides(root: Path, teacher_folder: Path, student_folder: Path) -> list[str]:
    """What the runs have in common; their cache is filled."""
    alike = [*tiny_overrides(root, teacher_folder, student_folder), *ALIKE]
    code, said = finished(start(root, *alike, "trainer.max_steps=1"))
    assert code == 0, said
    return alike


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Broken(BaseHTTPRequestHandler):
    """Answers everything with an error of its own."""

    def fail(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_error(500)

    do_GET = do_POST = do_PUT = fail

    def log_message(self, *_: object) -> None:
        """Nobody is told."""


@pytest.fixture
def broken() -> Iterator[int]:
    """A port on which every request fails."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Broken) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()
