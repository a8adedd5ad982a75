"""The evaluate command: one model folder on one task."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch

from distill.app import config as configuration
from distill.app.config import Config
from distill.app.files import write_json
from distill.errors import ConfigError
from distill.evaluation.answers import model_row, speeds
from distill.evaluation.kinds import evaluation_of
from distill.evaluation.texts import require_text_measures
from distill.models import loading, naming
from distill.models.batches import BatchLimit, BatchUnit
from distill.models.classifiers import is_classifier
from distill.prompts.classes import ClassPrompts
from distill.prompts.rendering import Prompts, build_prompts
from distill.records import SPLITS
from distill.reports.measures import ACCURACY, measure_of
from distill.students.classifier import saved_classifier
from distill.students.saving import size_bytes
from distill.tasks import Task
from distill.tasks.splitting import require_examples


def evaluate(config: Config) -> float:
    """Evaluate a model folder, print and write its results, and return its score; higher is better."""
    loading.flush_denormals()
    limit = _batch_limit(config)
    folder = naming.resolve(config.model, configuration.local_root(config.root))
    task: Task = configuration.build(config.task.examples)
    require_text_measures(task)
    if config.split not in SPLITS:
        raise ConfigError(f"split={config.split}: expected {', '.join(SPLITS)}")
    splits = task.splits()
    require_examples(splits, (config.split,))
    examples = getattr(splits, config.split)
    if all(example.answer is None for example in examples):
        raise ConfigError(
            f"split={config.split}: none of its {len(examples)} examples has a gold answer to compare with; a run's "
            "report compares with the teacher's texts"
        )
    prompts, model = _opened(config, folder, task)
    mode = config.task.answer_mode, config.max_new_tokens
    evaluation = evaluation_of(model, prompts, task, *mode, limit)
    row: dict[str, Any] = model_row(evaluation.predict(examples, {}), model)
    row |= {"size_bytes": size_bytes(folder), **speeds({"model": evaluation}, examples)["model"]}
    out = configuration.run_dir() / "evaluation.json"
    write_json(out, row)
    print(f"{folder}\n{_text(row, config.split)}\nresults  {out}")
    return measure_of(row).score(row) or 0.0


def _opened(config: Config, folder: Path, task: Task) -> tuple[Prompts | ClassPrompts, Any]:
    """Open a model that writes, or one with a class head, with its prompts."""
    if not is_classifier(folder):
        return build_prompts(config, folder, task.shots()), loading.load(folder, torch.float32).eval()
    prompts, model = saved_classifier(folder, config.prompt.max_length, config.prompt.too_long)
    if set(prompts.labels) != set(task.choices):
        raise ConfigError(
            f"{folder} has the classes {', '.join(prompts.labels)[:100]}, and the task the choices "
            f"{', '.join(task.choices)[:100] or '(none)'}; they must be the same"
        )
    return prompts, model


def _text(row: Mapping[str, Any], split: str) -> str:
    """Return the figures in two lines."""
    if measure_of(row) is ACCURACY:
        low, high = row["interval"]
        accuracy = f"{split} accuracy {row['accuracy']:.3f} [{low:.3f}, {high:.3f}] on {row['num_examples']} examples"
        if row["generated_accuracy"] is None:  # a class head writes nothing
            return accuracy
        return f"{accuracy}\ngenerated accuracy {row['generated_accuracy']:.3f}, {row['num_unreadable']} unreadable"
    figures = (
        ("cross_entropy", "cross-entropy", "nats per token"),
        ("cross_entropy_per_byte", "or", "nats per byte"),
        ("chrf", "chrF", "of 100"),
        ("rouge_l", "ROUGE-L", "of 100"),
        ("length_ratio", "length", "of the reference texts"),
        ("ended", "ended by themselves", "of 1"),
    )
    parts = [f"{name} {row[key]:.3f} {unit}" for key, name, unit in figures if row[key] is not None]
    return f"{split}: {', '.join(parts)}; {row['num_examples']} examples, {row['num_unmeasured']} not measured"


def _batch_limit(config: Config) -> BatchLimit:
    if config.batch_unit not in get_args(BatchUnit):
        raise ConfigError(f"batch_unit={config.batch_unit}: expected {' or '.join(get_args(BatchUnit))}")
    if config.microbatch_size < 1:
        raise ConfigError(f"microbatch_size={config.microbatch_size}: expected at least 1")
    return BatchLimit(config.microbatch_size, config.batch_unit)
