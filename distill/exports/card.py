"""The model card of an exported student: what it is made from, its prompt, its figures."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from distill.app.console import visible
from distill.app.files import Json
from distill.exports.recipe import PLACE, Recipe
from distill.reports.runs import Run, mapping, number
from distill.reports.text import to_markdown
from distill.reports.verdicts import summarise

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_LICENSE_ID = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_NOT_STATED = "not stated"
_MAX_LABELS = 20


def card(
    run: Run,
    recipe: Recipe | None,
    num_literal: int,
    usage: str,
    files: Sequence[Json] = (),
    *,
    classes: Sequence[str] = (),
) -> str:
    """Write the card; without a recipe, it has no prompt. `files` are the rows of export.json.

    `classes` are the labels of a student with a class head.
    """
    choices = ", ".join(classes) or (_choices(recipe) if recipe else _NOT_STATED)
    facts = "\n".join(f"- {name}: {visible(text)}" for name, text in _facts(run, choices))
    parts = [
        _front_matter(run, "text-classification" if classes else "text-generation"),
        f"# {visible(run.name)}",
        facts,
    ]
    if recipe:
        parts += [_prompt(recipe, [not row.get("history") for row in run.predictions], num_literal)]
    if files:
        parts.append("\n".join(["## Files", "", *(f"- `{row['file']}`: {files_line(row)}" for row in files)]))
    return "\n\n".join([*parts, to_markdown(summarise([run])).strip()]) + f"\n{usage}"


def files_line(row: Json) -> str:
    """What a file is and what it lost, in a line."""
    parts = [f"{row['size_bytes'] / 1e6:.1f} MB"]
    if row.get("accuracy") is not None:
        low, high = (f"{100 * end:+.1f}" for end in row["difference"])
        as_written = "" if row["format"] == "onnx" else " as written"
        parts.append(
            f"accuracy{as_written} {100 * row['accuracy']:.1f} %, the student's {100 * row['student_accuracy']:.1f} % "
            f"({100 * (row['accuracy'] - row['student_accuracy']):+.1f} points [{low}, {high}])"
        )
    if row.get("agreement") is not None:
        parts.append(f"{100 * row['agreement']:.1f} % of {row['num_examples']} answers are the student's")
    if row.get("kl") is not None:
        parts.append(f"KL(student || file) {row['kl']:.2g} nats per {'text' if row['format'] == 'onnx' else 'token'}")
    if row.get("ece") is not None:
        parts.append(f"calibration error {row['ece']:.3f}")
    if row.get("ms_per_example") is not None:
        theirs = row.get("student_ms_per_example")
        beside = f", the student in torch {theirs:.1f}" if theirs is not None else ""
        parts.append(f"{row['ms_per_example']:.1f} ms per answer on one thread{beside}")
    if row.get("num_chats"):
        parts.append(f"{row['num_chats_alike']} of {row['num_chats']} answers to chat messages are the same")
    return "; ".join(parts)


def is_taught(run: Run) -> bool:
    """Whether the student learned anything that the teacher said."""
    losses = [mapping(mapping(run.config.get("loss")).get(name)) for name in run.losses]
    has_rationales = bool(number(mapping(run.facts.get("counts")).get("rationales_kept")))
    return any(
        loss.get("source") != "labels" or (loss.get("span") == "rationale" and has_rationales) for loss in losses
    )


def _front_matter(run: Run, pipeline_tag: str) -> str:
    settings: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": pipeline_tag}
    settings |= {"tags": ["distillation"]}
    base, licence, language = _name(run, "student"), _license(run, "student"), _task(run, "language")
    if base and _HUB_ID.fullmatch(base):
        settings |= {"base_model": base}
    if licence:
        is_id = _LICENSE_ID.fullmatch(licence)
        settings |= {"license": licence} if is_id else {"license": "other", "license_name": licence}
    if language:
        settings |= {"language": language}
    return f"---\n{yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)}---"


def _facts(run: Run, choices: str) -> Iterator[tuple[str, str]]:
    yield "Base model", f"{_name(run, 'student') or _NOT_STATED} (license: {_license(run, 'student') or _NOT_STATED})"
    if is_taught(run):
        yield "Teacher", f"{_name(run, 'teacher') or _NOT_STATED} (license: {_license(run, 'teacher') or _NOT_STATED})"
    counts = mapping(run.facts.get("counts"))
    sizes = f"{counts.get('train', '?')} training examples, {counts.get('labelled', '?')} of them labelled"
    yield "Data", f"{run.facts.get('task')}: {sizes} (license: {_task(run, 'license') or _NOT_STATED})"
    yield "Trained on", f"{', '.join(run.loss_labels) or _NOT_STATED}; {counts.get('lessons', '?')} lessons"
    yield "Language", _task(run, "language") or _NOT_STATED
    yield "Choices", choices
    for split, labels in _labels(run).items():
        yield f"Labels in {split}", ", ".join(f"{label} {count}" for label, count in labels.items())
    yield "Weights", str(mapping(run.facts.get("saved")).get("dtype") or "float32")


def _choices(recipe: Recipe) -> str:
    if recipe.has_own_choices:
        return "those of each question"
    return ", ".join(recipe.choices) or "none, its answers are free text"


def _labels(run: Run) -> Mapping[str, Mapping[str, int]]:
    """Number of examples of each label, where labels repeat."""
    tested = Counter(str(row.get("gold")) for row in run.predictions)
    splits = {"train": Counter(mapping(run.facts.get("labels"))), "test": tested}
    return {split: dict(sorted(labels.items())) for split, labels in splits.items() if 0 < len(labels) <= _MAX_LABELS}


def _prompt(recipe: Recipe, is_single: Sequence[bool], num_literal: int) -> str:
    """How to ask a student; `is_single` says which test questions were a conversation's first message."""
    num_questions = sum(is_single)
    way = "one message of the user, the question alone" if all(is_single) else "the messages of a conversation"
    fence = "`" * (1 + max(map(len, re.findall("`+", f"{recipe.text}``"))))
    goes_on = "its reasoning" if recipe.mode == "reasoned" else "its answer"
    if num_literal == num_questions:
        ids = "Its token ids are exactly those of training"
    else:
        ids = (
            "In training its pieces were tokenized one by one, as `example.py` does: as one text, it has other tokens "
            f"for {num_questions - num_literal} of {num_questions} test questions"
        )
    return (
        f"## Prompt\n\nAsk it by {way}: the chat template makes the prompt that it has "
        'learned.\n\n```python\nfrom transformers import pipeline\n\nstudent = pipeline("text-generation", '
        'model=".")\nstudent([{"role": "user", "content": "a question"}])\n```\n\nThe prompt of a question is this '
        f"text, with it in place of `{PLACE}`:\n\n{fence}text\n{recipe.text}\n{fence}\n\n{ids}. The student goes on "
        f"with {goes_on}, and ends it with `{recipe.end}`. `example.py` answers as the student was evaluated:\n\n"
        f"```bash\npython {recipe.usage}\n```{_own_choices(recipe)}"
    )


def _own_choices(recipe: Recipe) -> str:
    if not recipe.has_own_choices:
        return ""
    return (
        "\n\nA question has choices of its own: `choices` are its possible answers, and the text of the question shows "
        f"them as in training, if they were shown. A test question:\n\n```json\n{recipe.example}\n```"
    )


def _name(run: Run, part: str) -> str:
    """Name of the base model or the teacher; of a folder its last part."""
    name = str(run.facts.get(part) or "")
    return Path(name).name if name.startswith(("/", ".", "~")) else name


def _license(run: Run, part: str) -> str:
    return str(mapping(run.facts.get("licenses")).get(part) or "")


def _task(run: Run, key: str) -> str:
    return str(mapping(run.config.get("task")).get(key) or "")
