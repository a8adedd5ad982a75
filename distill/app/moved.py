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
    "distill.models.generation.Generation": {
        "temperature": 0.0,
        "top_k": None,
        "from_model": False,
        "min_new_tokens": 0,
        "stops": [],
    },
    "distill.tasks.files.Columns": {"options": None},
    "distill.tasks.options.Options": {"separator": None},
    "distill.tasks.files.FileTask": {"conflicts": None, "split_names": None, "folds": None, "fold": 0},
}

# Arguments that are now those of a part: the argument that holds it, its class, and their names.
GROUPED: Mapping[str, tuple[str, str, tuple[str, ...]]] = {
    "distill.teachers.causal_lm.CausalLMTeacher": (
        "generation",
        "distill.models.generation.Generation",
        ("sampling_temperature", "top_p"),
    ),
    "distill.tasks.files.FileTask": ("rows", "distill.tasks.files.Columns", ("question", "answer", "rationale")),
}

# Settings that a task of files, and a cache, have gained, with the present defaults, which are what it did before.
_FILE_TASK, _COLUMNS, _OPTIONS = (
    f"distill.tasks.{name}" for name in ("files.FileTask", "files.Columns", "options.Options")
)
_OPTION_SETTINGS = {"answer": "letter", "show": "\n{letter}. {text}", "gold": None, "invalid": None, "separator": None}
_TEACHER_SETTINGS = {"answers_each": 1, "batch_unit": "examples"}
_ALL_POSITIONS = {"_target_": "distill.annotation.positions.Positions", "share": 1.0, "by": "entropy"}
_STUDENT_SETTINGS = {
    "dropout": None,
    "kind": {"_target_": "distill.students.causal_lm.CausalLM", "_partial_": True, "layer_decay": 1.0},
}
_SPLIT_NAMES = {name: name for name in ("train", "validation", "test")}


def current(value: Any) -> Any:
    """A configuration, or a part of one, whose parts have their present names and all of their arguments."""
    if isinstance(value, dict):
        present = {key: _moved(item) if key == "_target_" else current(item) for key, item in value.items()}
        part = _grouped({**ADDED.get(str(present.get("_target_")), {}), **present})
        return _student(_teacher(_cache(_task(part))))
    return [current(item) for item in value] if isinstance(value, list) else value


def _grouped(part: dict[str, Any]) -> dict[str, Any]:
    """A part whose arguments stand where they belong now."""
    argument, class_name, names = GROUPED.get(str(part.get("_target_")), ("", "", ()))
    if not set(names) & set(part):
        return part
    arguments = {name: part[name] for name in names if name in part}
    group = {"_target_": class_name, **ADDED.get(class_name, {}), **arguments}
    return {argument: group, **{key: value for key, value in part.items() if key not in names}}


def _task(section: dict[str, Any]) -> dict[str, Any]:
    """The section of a task of files with all its settings; any other part as it is."""
    examples = section.get("examples")
    if not isinstance(examples, dict) or examples.get("_target_") != _FILE_TASK or "splits" in section:
        return section
    options = {"_target_": _OPTIONS, "column": section.get("choices", []), **_OPTION_SETTINGS}
    rows = examples["rows"] | ({"options": options} if examples["rows"]["_target_"] == _COLUMNS else {})
    own = {"options": _OPTION_SETTINGS, "splits": _SPLIT_NAMES}
    return {**own, **section, "examples": {**examples, "rows": rows, "split_names": _SPLIT_NAMES}}


def _teacher(section: dict[str, Any]) -> dict[str, Any]:
    """The section of a teacher with all its settings; any other part as it is."""
    return {**_TEACHER_SETTINGS, **section} if {"kind", "group_size"} <= section.keys() else section


def _student(section: dict[str, Any]) -> dict[str, Any]:
    """The section of a student with all its settings; any other part as it is."""
    return {**_STUDENT_SETTINGS, **section} if {"keep_layers", "from_scratch"} <= section.keys() else section


def _cache(section: dict[str, Any]) -> dict[str, Any]:
    """The section of a cache with all its settings; any other part as it is."""
    codec = section.get("codec")
    is_cache = isinstance(codec, dict) and str(codec.get("_target_")).startswith("distill.cache.codecs.")
    return {"positions": _ALL_POSITIONS, **section} if is_cache else section


def _moved(name: Any) -> Any:
    return MOVED.get(name, name) if isinstance(name, str) else name
