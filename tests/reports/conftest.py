"""Makers of run folders and pages, shared by the tests of reports."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill.reports.runs import read_run
from distill.reports.verdicts import Summary, summarise

Make = Callable[..., Path]
HOSTILE = "<script>alert(1)</script> \x1b[31mred\x1b[0m \u202eright-to-left \ud800 | `code` **bold** $x_1$"


def row(accuracy: float, num_examples: int = 500, **more: Any) -> dict[str, Any]:
    """A row of results.json with the normal 95 % interval of one run."""
    half = 1.96 * math.sqrt(accuracy * (1 - accuracy) / num_examples)
    bins = [
        {"confidence": c, "accuracy": min(1, accuracy * c / 0.75), "num": n}
        for c, n in ((0.55, 60), (0.75, 200), (0.95, 240))
    ]
    return {
        "accuracy": accuracy,
        "interval": [accuracy - half, accuracy + half],
        "num_examples": num_examples,
        "generated_accuracy": accuracy - 0.01,
        "num_unreadable": 2,
        "agreement": 0.8,
        "kl": 0.123,
        "ece": 0.051,
        "parameters": 50_000_000,
        "size_bytes": 200_000_000,
        "ms_per_example": 12.0,
        "training_seconds": 42.1,
        "reliability": bins,
        **more,
    }


def facts(losses: tuple[str, ...], seed: int) -> dict[str, Any]:
    """A run.json as written by the train command."""
    name = f"{'+'.join(losses)}-seed{seed}"
    return {
        "name": name,
        "losses": list(losses),
        "seed": seed,
        "command": ["distill.train", f"seed={seed}"],
        "started": f"2026-11-21T21:0{seed}:00+00:00",
        "seconds": {"annotate": 0.0, "train": 42.1, "evaluate": 9.0},
        "steps": 120,
        "batch_size": 16,
        "start": "5f3a9c0d77e1",
        "version": "0.1.0",
        "commit": None,
        "is_dirty": True,
        "packages": {"torch": "2.13.0", "transformers": "5.0.0"},
        "device": "cpu, 2 cores",
        "task": "movie_reviews",
        "teacher": "big-instruct-4b",
        "student": "small-50m",
        "cache": {
            "dir": "/cache/0f",
            "fingerprint": "0f" * 8,
            "num_records": 2800,
            "annotation_seconds": 123.4,
        },
        "counts": {
            "train": 2100,
            "labelled": 100,
            "validation": 200,
            "test": 500,
            "dropped": {"train": 3},
            "rationales_kept": 150,
            "rationales_rejected": {"disagrees": 40, "truncated": 3},
        },
        "tracking": {"mode": "offline", "where": "/runs/wandb", "upload": "wandb sync /runs/wandb"},
    }


def prediction(index: int, is_correct: bool, agrees: bool) -> dict[str, Any]:
    """One line of predictions.jsonl."""
    student = "positive" if is_correct else "negative"
    teacher = student if agrees else {"positive": "negative", "negative": "positive"}[student]
    return {
        "id": f"{index:032x}",
        "question": f"Review {index}: the plot is thin, but the two leads carry every scene that they share.",
        "gold": "positive",
        "teacher_answer": teacher,
        "teacher_rationale": "The praise of the leads outweighs the complaint about the plot.",
        "student_answer": student,
        "student_confidence": 0.81,
        "student_rationale": "The review likes the leads." if index % 3 else None,
        "is_correct": is_correct,
    }


SWAPPED = {"positive": "negative", "negative": "positive"}


def two_classes(lines: list[dict[str, Any]], every: int = 2) -> list[dict[str, Any]]:
    """The predictions with the classes of every second (third, ...) line swapped; correctness stays."""
    keys = ("gold", "teacher_answer", "student_answer")
    return [
        line | ({key: SWAPPED[line[key]] for key in keys} if k % every == 0 else {}) for k, line in enumerate(lines)
    ]


def shuffled(share: float, number: int, name: str) -> list[bool]:
    """True for `share` of the examples, at random places seeded by `name`."""
    values = [k < round(share * number) for k in range(number)]
    random.Random(name).shuffle(values)
    return values


def answers(losses: tuple[str, ...], accuracy: float, seed: int, number: int = 500) -> list[dict[str, Any]]:
    """Predictions with the given accuracy, independent between runs; the teacher has 82 % in every run."""
    student, teacher = shuffled(accuracy, number, f"{losses}{seed}"), shuffled(0.82, number, "teacher")
    return [prediction(k, student[k], student[k] == teacher[k]) for k in range(number)]


def learning_curve(losses: tuple[str, ...], accuracy: float) -> str:
    """A metrics.csv with alternating training and validation rows and empty cells."""
    lines = ["step,epoch," + ",".join(f"train/{loss}" for loss in losses) + ",val/answer,val/accuracy"]
    for step in range(10, 121, 10):
        fall = math.exp(-step / 50)
        train = ",".join(f"{0.4 + fall + 0.1 * index:.4f}" for index, _ in enumerate(losses))
        lines.append(f"{step},0,{train},,")
        lines.append(f"{step},0,{',' * (len(losses) - 1)},{0.5 + fall / 2:.4f},{accuracy - 0.2 * fall:.4f}")
    return "\n".join(lines) + "\n"


def write_run(
    folder: Path,
    losses: tuple[str, ...] = ("answer", "kl", "rationale"),
    accuracy: float = 0.74,
    seed: int = 0,
    *,
    config: Mapping[str, Any] | None = None,
    student: Mapping[str, Any] | None = None,
    predictions: list[dict[str, Any]] | None = None,
    rationales: list[dict[str, Any]] | None = None,
    without: tuple[str, ...] = (),
    **changes: Any,
) -> Path:
    """Write a run folder without the files named in `without`; other keywords replace facts."""
    folder.mkdir()
    num_test = (student or {}).get("num_examples", 500)
    rows = {"teacher": row(0.82, agreement=None, kl=None), "before": row(0.52)}
    rows["student"] = row(accuracy, num_test) | dict(student or {})
    if predictions is None:
        predictions = answers(losses, accuracy, seed, num_test)
    rejected = [{"id": f"{k:032x}", "reason": "disagrees", "text": "So it is good."} for k in range(3)]
    seeded = {"seed": seed, "loss": {loss: {"weight": 1.0} for loss in losses}, "optim": {"lr": 3e-4, "seed": seed}}
    texts = {
        "config.yaml": yaml.safe_dump(seeded | dict(config or {})),
        "run.json": json.dumps(facts(losses, seed) | changes),
        "metrics.csv": learning_curve(losses, accuracy),
        "results.json": json.dumps({"rows": rows}),
        "predictions.jsonl": "".join(json.dumps(line) + "\n" for line in predictions),
        "rejected.jsonl": "".join(json.dumps(line) + "\n" for line in rejected),
    }
    if rationales is not None:
        texts["rationales.jsonl"] = "".join(json.dumps(line) + "\n" for line in rationales)
    for name, text in texts.items():
        if name not in without:
            (folder / name).write_bytes(text.encode("utf-8", "surrogatepass"))
    return folder


SOFT_AND_LABELS = {"labels": 100, "teacher": 0, "soft": 1700}


def with_words(
    folder: Path, accuracy: float, *, name: str = "words", number: int = 500, targets: dict[str, int] | None = None
) -> Path:
    """The run with a bag of words of this accuracy; its answers stand in another order than the student's."""
    results = json.loads((folder / "results.json").read_text())
    own = {"digest": f"bow-{name}", "targets": targets or SOFT_AND_LABELS, "strength": 1.0}
    results["rows"]["bag_of_words"] = row(accuracy, number, kl=None, generated_accuracy=None) | own
    (folder / "results.json").write_text(json.dumps(results))
    right = shuffled(accuracy, number, name)
    lines = [{"id": f"{k:032x}", "answer": "positive", "is_correct": is_right} for k, is_right in enumerate(right)]
    random.Random(0).shuffle(lines)
    (folder / "bag_of_words.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def make_run(tmp_path: Path) -> Make:
    """Write a new run folder below `tmp_path`."""
    return lambda *values, **more: write_run(tmp_path / f"run{len(list(tmp_path.iterdir()))}", *values, **more)


def summary_of(*folders: Path) -> Summary:
    """Read and summarise run folders."""
    return summarise([read_run(folder) for folder in folders])


class Page(HTMLParser):
    """The tags, links and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [
            value or "" for name, value in attrs if name in ("src", "href", "srcset") or name.startswith("on")
        ]

    def handle_data(self, data: str) -> None:
        self.text += data


def rationale_line(index: int, answer: str, reason: str | None) -> dict[str, Any]:
    """One line of rationales.jsonl."""
    return {
        "id": f"{index:032x}",
        "sample": 0,
        "question": f"Review {index}?",
        "gold": "positive",
        "answer": answer,
        "rationale": f"Thought {index}.",
        "gold_rationale": None,
        "confidence": 0.9,
        "reason": reason,
    }


def with_latency(milliseconds: float) -> dict[str, Any]:
    return {"ms_per_example": milliseconds}


CONFIG: dict[str, Any] = {
    "order": "shuffled",
    "balance": "none",
    "rationales": {"arithmetic": True},
    "teacher": {"num_rationales": 60, "kind": {"files": ["/a/answers.jsonl"]}},
    "overlap": {"action": "report"},
    "trainer": {"gradient_clip_val": 1.0, "devices": 1, "max_steps": 120},
    "task": {"path": "/a/train.jsonl", "answer_mode": "direct", "examples": {"split_seed": 0}},
    "microbatch_size": 8,
    "root": "/a",
    "cache": {"dir": "/a/cache"},
}
