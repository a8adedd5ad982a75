"""Renamed classes: the `_target_` names in configurations of earlier versions, and their present names."""

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


def current(value: Any) -> Any:
    """A configuration, or a part of one, in which every renamed `_target_` has its present name."""
    if isinstance(value, dict):
        return {key: _moved(item) if key == "_target_" else current(item) for key, item in value.items()}
    return [current(item) for item in value] if isinstance(value, list) else value


def _moved(name: Any) -> Any:
    return MOVED.get(name, name) if isinstance(name, str) else name
