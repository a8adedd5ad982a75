"""Finished runs of tiny students, without training in between."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from distill.app import config as configuration
from distill.app.files import write_json, write_json_lines
from distill.evaluation.answers import Evaluation, model_row
from distill.lessons.curriculum import Job, prepare
from distill.lessons.join import first_span
from distill.prompts.serving import served_tokenizer
from distill.students.causal_lm import open_student
from distill.students.saving import save_student
from distill.tasks.files import FileTask
from distill.training.run_facts import label_counts, licenses, settings
from tests.conftest import WHOLE_STUDENT, compose, make_model, reviews, tiny_overrides
from tests.prompts.templates import TEMPLATES
from tests.tasks.conftest import answer_format
from tests.tasks.test_files import task

MakeRun = Callable[..., Path]


def taught(model: Any, job: Job) -> None:
    """Teach the model its test examples by heart, so that its answers differ."""
    examples = [example for example in job.annotation_job.splits.test if example.answer]
    if job.config.task.answer_mode == "reasoned":
        learned = [job.prompts.rationale_prompt(e, f"so {e.answer}", e.answer) for e in examples]
    else:
        learned = [job.prompts.answer_prompt(e, str(e.answer)) for e in examples]
    longest = max(len(prompt.ids) for prompt in learned)
    ids_BT = torch.tensor([[*p.ids, *[job.prompts.end] * (longest - len(p.ids))] for p in learned])
    is_learned_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    for row, prompt in enumerate(learned):
        for start, stop in prompt.spans.values():
            is_learned_BT[row, start:stop] = True
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(60):
        logits_BTV = model(ids_BT).logits[:, :-1]
        labels_BT = ids_BT[:, 1:].masked_fill(~is_learned_BT[:, 1:], -100)
        torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def add_template(folder: Path) -> None:
    """Give a model's tokenizer a chat template."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template, _, _ = TEMPLATES["Zephyr"]
    tokenizer.save_pretrained(folder)


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Make a run folder with a student that knows its test questions."""
    return functools.partial(make_run_in, tmp_path)


def make_run_in(root: Path, *overrides: str, prepare_model: Callable[[Path], None] = lambda _: None) -> Path:
    folder = make_model(root / "start", seed=1)
    if "prompt=chat" in overrides:
        add_template(folder)
    prepare_model(folder)
    tiny = [o for o in tiny_overrides(root, folder, folder) if not o.startswith("task")]
    sizes = [f"task.examples.num_{name}=6" for name in ("labelled", "unlabelled", "validation", "test")]
    task = [] if {"task=jsonl", "task=chat"} & {*overrides} else reviews(root)
    config = compose(*task, *tiny, *sizes, "max_new_tokens=40", "loss=[answer]", *overrides)
    return write_run(prepare(config, root / "run"), folder)


def choosing(*choices: str, kind: str = "choice") -> FileTask:
    """A task with these choices, from a file that is never read."""
    return task(Path("none.jsonl"), read=answer_format(kind if choices else "line", choices=list(choices)))


def write_run(job: Job, folder: Path) -> Path:
    model = open_student(folder, **WHOLE_STUDENT)
    taught(model, job)
    tokenizer = served_tokenizer(job.prompts, first_span(job.config.task.answer_mode))
    saved = save_student(model, tokenizer, job.run_dir / "student", dtype=torch.float32, max_new_tokens=40)
    task = job.annotation_job.task
    evaluation = Evaluation(saved.model, job.prompts, task, job.config.task.answer_mode, job.config.max_new_tokens)
    predictions = evaluation.predict(job.annotation_job.splits.test, {})
    facts = {"name": "tiny", "losses": list(job.objectives), "seed": 0, **settings(job.config)}
    counts = {"train": 12, "labelled": 6, "lessons": 6, "rationales_kept": 3}
    facts |= {"counts": counts, "labels": label_counts(job), "licenses": licenses(job), "saved": {"dtype": "float32"}}
    configuration.save(job.config, job.run_dir / "config.yaml")
    write_json(job.run_dir / "run.json", facts)
    write_json(job.run_dir / "results.json", {"rows": {"student": model_row(predictions, saved.model)}})
    write_json_lines(job.run_dir / "predictions.jsonl", [prediction.as_row() for prediction in predictions])
    return job.run_dir
