"""The files of a student with a class head, and what each loses: both classify the test questions of the run."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.special import log_softmax, rel_entr

from distill.app.console import say
from distill.app.files import Json, sha256
from distill.app.machine import timings
from distill.errors import ConfigError
from distill.exports import onnx
from distill.exports.card import files_line
from distill.models.classifiers import class_logits
from distill.prompts.classes import ClassPrompts
from distill.records import Example
from distill.reports.statistics import calibration_error, paired_interval
from distill.tasks import Task, is_right

_NUM_TIMED, _NUM_ROUNDS, _SECONDS = 20, 5, 2.0


@dataclass(frozen=True)
class Texts:
    """The test questions of a run that are not too long, as token ids."""

    prompts: ClassPrompts
    task: Task
    examples: tuple[Example, ...]
    ids: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, prompts: ClassPrompts, task: Task, examples: Sequence[Example]) -> Texts:
        """Leave out those that are too long."""
        kept = list[tuple[Example, tuple[int, ...]]]()
        for example in examples:
            try:
                kept.append((example, prompts.question(example, "answer")))
            except ValueError:
                continue
        return cls(prompts, task, tuple(example for example, _ in kept), tuple(ids for _, ids in kept))

    def are_right(self, logits_NC: Float[np.ndarray, "N C"]) -> list[bool]:
        """Whether the most probable class of each text is right."""
        answers = [self.prompts.labels[index] for index in logits_NC.argmax(-1)]
        return [is_right(self.task, answer, example) for answer, example in zip(answers, self.examples, strict=True)]


def write_onnx(
    model: Any, texts: Texts, to: Path, kinds: Sequence[str], max_loss: float
) -> tuple[list[Json], list[str]]:
    """Write and measure ONNX files; return the rows of export.json, and why others were removed or not made."""
    rows, problems = list[Json](), list[str]()
    for kind in dict.fromkeys(kinds):
        file = to / f"student.{kind}.onnx"
        try:
            onnx.write(model, file, kind)
            rows.append(_measured(file, kind, model, texts, max_loss))
        except ConfigError as error:  # no file stays that was not measured
            file.unlink(missing_ok=True)
            problems += error.problems
    return rows, problems


def _measured(file: Path, kind: str, model: Any, texts: Texts, max_loss: float) -> Json:
    say(f"classifying {len(texts.examples)} test questions with {file.name} ...")
    engine = onnx.OnnxClassifier(file)
    row: Json = {"file": file.name, "format": "onnx", "weights": kind, "size_bytes": file.stat().st_size}
    row |= {"sha256": sha256(file), "engine": engine.version, "num_examples": len(texts.examples)}
    if texts.examples:
        row |= compared(engine, model, texts)
    if (row.get("student_accuracy") or 0) - (row.get("accuracy") or 0) > max_loss:
        raise ConfigError(f"{file.name} loses more than max_loss={max_loss} and was removed: {files_line(row)}")
    return row


@torch.inference_mode()
def compared(engine: onnx.OnnxClassifier, model: Any, texts: Texts) -> Json:
    """Return a file's accuracy beside the student's, agreement, KL(student || file), calibration and milliseconds."""
    padding = texts.prompts.end
    ours_NC = np.stack([engine.logits(ids) for ids in texts.ids])
    theirs_NC = np.concatenate([class_logits(model, [ids], padding).float().numpy() for ids in texts.ids])
    ours, theirs = texts.are_right(ours_NC), texts.are_right(theirs_NC)
    interval = paired_interval(*(np.array([side], np.float64) for side in (ours, theirs)))
    p_NC, q_NC = (np.exp(log_softmax(logits_NC.astype(np.float64), -1)) for logits_NC in (theirs_NC, ours_NC))
    answering = {"file": engine.logits, "student": lambda ids: class_logits(model, [ids], padding)}
    times = timings(answering, texts.ids[:_NUM_TIMED], num_rounds=_NUM_ROUNDS, max_seconds=_SECONDS)
    return {
        "accuracy": statistics.fmean(ours),
        "student_accuracy": statistics.fmean(theirs),
        "difference": [interval.low, interval.high],
        "agreement": float((ours_NC.argmax(-1) == theirs_NC.argmax(-1)).mean()),
        "kl": float(rel_entr(p_NC, q_NC).sum(-1).mean()),
        "ece": calibration_error(q_NC.max(-1).tolist(), ours),
        "ms_per_example": times["file"].median,
        "student_ms_per_example": times["student"].median,
    }


def usage(labels: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """The section of the card that says how to use the model."""
    text = (
        "\n## Use\n\nThe text goes in as it is, without a prompt.\n\n```python\nfrom transformers import pipeline\n\n"
        'classify = pipeline("text-classification", model=".", top_k=None)\n'
        'classify("a text", truncation=True)\n```\n\n'
        f"The classes, in the order of the logits, are {', '.join(f'`{label}`' for label in labels)}. `example.py` "
        "does the same on the command line.\n"
    )
    if not rows:
        return text
    return (
        f"{text}\nThe ONNX files take `input_ids` and `attention_mask`, of any number and length of texts, and give "
        "`logits`:\n\n```python\nimport onnxruntime\nfrom transformers import AutoTokenizer\n\n"
        f'tokens = AutoTokenizer.from_pretrained(".")(["a text"], return_tensors="np", truncation=True)\n'
        f'session = onnxruntime.InferenceSession("{rows[0]["file"]}")\n'
        'session.run(["logits"], {name: tokens[name] for name in ("input_ids", "attention_mask")})\n```\n'
    )
