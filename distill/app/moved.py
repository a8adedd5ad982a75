"""Configurations of earlier versions: the present names of their classes, and the arguments that these have gained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MOVED: Mapping[str, str] = {
    "distill.cache.dense.Dense": "distill.cache.codecs.dense.Dense",
    "distill.cache.rs_kd.RandomSampling": "distill.cache.codecs.rs_kd.RandomSampling",
    "distill.cache.sampled.Sampled": "distill.cache.codecs.sampled.Sampled",
    "distill.cache.topk.TopK": "distill.cache.codecs.topk.TopK",
    "distill.prompts.Layout": "distill.prompts.cues.Layout",
    "distill.rationales.Checks": "distill.annotation.rationales.RationaleFilter",
    "distill.report.AfterSweep": "distill.reports.after_sweep.AfterSweep",
    "distill.sweeps.FailedJobs": "distill.app.sweeps.FailedJobs",
    "distill.tasks.files.AnswerFormat": "distill.tasks.answers.AnswerFormat",
    "distill.tracking.NoTracking": "distill.app.tracking.NoTracking",
    "distill.tracking.WandbTracking": "distill.app.tracking.WandbTracking",
}

# Arguments that a configuration saved before does not have, and their present defaults.
ADDED: Mapping[str, Mapping[str, Any]] = {
    "distill.prompts.chat.Layout": {"reasoning_marks": None},
    "distill.tasks.files.Columns": {"options": None},
    "distill.tasks.files.FileTask": {"conflicts": None, "split_names": None},
}

# Arguments that are now those of a part: the argument that holds it, its class, and their names.
GROUPED: Mapping[str, tuple[str, str, tuple[str, ...]]] = {
    "distill.tasks.files.FileTask": ("rows", "distill.tasks.files.Columns", ("question", "answer", "rationale")),
}


def current(value: Any) -> Any:
    """A configuration, or a part of one, whose parts have their present names and all of their arguments."""
    if isinstance(value, dict):
        present = {key: _moved(item) if key == "_target_" else current(item) for key, item in value.items()}
        return _grouped({**ADDED.get(str(present.get("_target_")), {}), **present})
    return [current(item) for item in value] if isinstance(value, list) else value


def _grouped(part: dict[str, Any]) -> dict[str, Any]:
    """A part whose arguments stand where they belong now."""
    argument, class_name, names = GROUPED.get(str(part.get("_target_")), ("", "", ()))
    if not set(names) & set(part):
        return part
    arguments = {name: part[name] for name in names if name in part}
    group = {"_target_": class_name, **ADDED.get(class_name, {}), **arguments}
    return {argument: group, **{key: value for key, value in part.items() if key not in names}}


def _moved(name: Any) -> Any:
    return MOVED.get(name, name) if isinstance(name, str) else name
