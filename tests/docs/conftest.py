"""The commands of the pages, and small models, files and values to run them with."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from tests.conftest import compose, make_model

ROOT = Path(__file__).parents[2]
PAGES = {path.name: path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
_BLOCK = re.compile(r"^```(console|bash)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"^[^\n]*`([\w./]+)`:\n\n```(?:python|yaml)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_MODULE = re.compile(r"distill\.(train|annotate|evaluate|judge|report|export)$")
_SUBMITTED = re.compile(r"scripts/slurm/(annotate|train)\.sbatch$|scripts/slurm/(pipeline)$")
# Values that make a command a matter of seconds, where its configuration has the key and does not give it itself.
SMALL = {
    "teacher.model": "my/teacher",
    "teacher.kind.dtype": "float32",
    "teacher.kind.max_new_tokens": 6,
    "teacher.calibrate": 0,
    "teacher.num_rationales": 4,
    "soft_teacher.model": "my/teacher",
    "soft_teacher.kind.dtype": "float32",
    "soft_teacher.calibrate": 0,
    "student.model": "my/student",
    "student.keep_layers": "null",
    "student.freeze": "[]",
    "task.examples.file": "my/ratings.tsv",
    "task.examples.num_labelled": 12,
    "task.examples.num_unlabelled": 6,
    "task.examples.num_validation": 4,
    "task.examples.num_test": 4,
    "prompt.num_shots": 2,
    "trainer.max_steps": 2,
    "trainer.accelerator": "cpu",
    "trainer.precision": "32-true",
    "optim.schedule.num_warmup_steps": 1,
    "max_new_tokens": 6,
    "num_samples": 2,
    "validate_every": 1,
    "max_loss": 1,
}


@dataclass(frozen=True)
class Command:
    """A command as a page shows it, on one line."""

    page: str
    line: str

    @property
    def words(self) -> list[str]:
        """The words of the shell, without comments and variables."""
        return [word for word in shlex.split(self.line, comments=True) if word not in self.variables]

    @property
    def variables(self) -> list[str]:
        """The variables that the line sets in front of its command."""
        words = shlex.split(self.line, comments=True)
        first = next(index for index, word in enumerate(words) if not re.match(r"[A-Z_]+=", word))
        return words[:first]

    @property
    def name(self) -> str | None:
        """The command of distill that it runs, here or in a job; None for others."""
        for word in self.words:
            if match := _MODULE.match(word):
                return match[1]
            if match := _SUBMITTED.search(word):
                return match[1] or "train"
        return "train" if self.words[-1] == "distill" and "docker" in self.words[0] else None

    @property
    def overrides(self) -> list[str]:
        """The overrides and flags behind the name."""
        start = next(
            (index for index, word in enumerate(self.words) if _MODULE.match(word) or _SUBMITTED.search(word)), -1
        )
        return [word for word in self.words[start + 1 :] if word != "--"] if start >= 0 else []


def commands() -> list[Command]:
    """All commands of all pages, in order."""
    return [Command(page, line) for page, text in PAGES.items() for line in _lines(text)]


def files_of(page: str) -> dict[str, str]:
    """The files that a page shows, each behind a line that ends with its name."""
    return dict(_FILE.findall(PAGES[page]))


def first_job(command: Command) -> list[str]:
    """The overrides of the first job of a command; those of a single run as they are."""
    parsed = OverridesParser.create().parse_overrides([word for word in command.overrides if "=" in word])
    return [
        f"{o.get_key_element()}={next(o.sweep_string_iterator())}" if o.is_sweep_override() else o.input_line
        for o in parsed
    ]


def composed(command: Command, *more: str) -> DictConfig:
    """The configuration of a command's first job."""
    assert command.name
    words = [word for word in first_job(command) if not word.startswith("hydra")]
    return compose(*words, *more, name=command.name)


def made_small(command: Command) -> list[str]:
    """What is added to a command to have it done in seconds."""
    config = composed(command)
    given = {word.partition("=")[0].lstrip("+") for word in command.overrides}
    if "task.examples.folds" in given:
        given.add("task.examples.num_test")  # test is a fold
    added = [f"{key}={value}" for key, value in SMALL.items() if key not in given and _has(config, key)]
    if "tracking" in config and "tracking" not in given:
        added.append("tracking=off")
    return added


def _has(config: Any, key: str) -> bool:
    parent, _, last = key.rpartition(".")
    node = OmegaConf.select(config, parent, throw_on_missing=False) if parent else config
    return isinstance(node, DictConfig) and last in node


def _lines(text: str) -> Iterator[str]:
    for kind, block in _BLOCK.findall(text):
        whole = re.sub(r"\\\n\s*", "", block)
        for line in whole.splitlines():
            if kind == "console" and line.startswith("$ "):
                yield line[2:]
            elif kind == "bash" and line.strip() and not line.startswith("#"):
                yield line


def module_of(path: Path) -> Any:
    """A module that is imported by its file."""
    spec = importlib.util.spec_from_file_location(f"from_docs_{path.stem}", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def write_files(folder: Path) -> None:
    """The models and data that the pages call my/…: small, and made here."""
    my = folder / "my"
    make_model(my / "teacher", seed=1, num_layers=3)
    make_model(my / "student", seed=2)
    films = [f"{i}\t{2.5 if i % 2 else -2.5}\tThe film number {i} is rated." for i in range(60)]
    (my / "ratings.tsv").write_text("\n".join(films))
    rows = [
        {"title": f"Note {i}", "text": f"Is {i} more than {60 - i}?", "label": ("no", "yes")[i > 30]} for i in range(60)
    ]
    _write(my / "train.jsonl", rows)
    _write(my / "test.jsonl", [row | {"text": f"In truth: {row['text']}"} for row in rows[:8]])
    lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
    (my / "train.csv").write_text("\n".join(lines))
    _write(my / "bought.jsonl", [{**r, "teacher_answer": r["label"], "teacher_rationale": "It is so."} for r in rows])
    sums = [(f"What is {i} plus {i}?", f"{i} + {i} = {2 * i}.", 2 * i) for i in range(40)]
    _write(my / "gsm8k.jsonl", [{"question": q, "human_rationale": r, "answer": a} for q, r, a in sums])
    _write(
        my / "svamp.jsonl",
        [
            {"question": q, "equation": f"( {i} + {i} )", "teacher_answer": f"({i} + {i})", "teacher_rationale": r}
            for i, (q, r, _) in enumerate(sums)
        ],
    )
    facts = [
        {"question": f"Is {i} even?", "facts": ["Even numbers end in 0, 2, ..."], "answer": i % 2 == 0}
        for i in range(40)
    ]
    _write(my / "strategyqa.jsonl", facts)
    turns = (
        ("user", "What is {}?"),
        ("assistant", "It is {}."),
        ("user", "And {} and 1?"),
        ("assistant", "One\nmore."),
    )
    chats = [[{"role": role, "content": content.format(i)} for role, content in turns] for i in range(40)]
    _write(my / "chats.jsonl", [{"messages": chat} for chat in chats])
    own = [{"label": list("ABCDE"), "text": [f"{i + k}" for k in range(5)]} for i in range(40)]
    choices = [{"question": f"What is {i}?", "choices": o, "answerKey": "ABCDE"[i % 5]} for i, o in enumerate(own)]
    _write(my / "commonsense_qa.jsonl", choices)
    quiz = [f'What is {i}?,"{"|".join(o["text"])}",{"ABCDE"[i % 5]}' for i, o in enumerate(own)]
    (my / "quiz.csv").write_text("\n".join(["question,options,key", *quiz]))


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
