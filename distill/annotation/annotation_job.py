"""Opening an annotation job: a task, and a teacher with the cache of its annotations."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from distill.annotation.positions import Positions
from distill.annotation.rationales import RationaleFilter
from distill.annotation.reader import AnnotationReader
from distill.app import config as configuration
from distill.app.config import Config
from distill.app.files import is_url
from distill.cache import Codec
from distill.cache.store import Store, drop_shard, fingerprint_digest
from distill.errors import ConfigError
from distill.models import loading, naming
from distill.models.batches import BatchLimit, BatchUnit
from distill.prompts.rendering import Prompts, build_prompts
from distill.records import Request, Span, Splits
from distill.tasks import Task
from distill.tasks.contamination import Overlap, screen_splits
from distill.teachers import Calibration, Teacher

Role = Literal["teacher", "soft_teacher", "judge"]  # the section of the configuration that names the model
# In characters. A folder name has at most 255 bytes; a task's name takes up to four bytes per character, a URL one.
_MAX_TASK_NAME, _MAX_URL = 60, 200


@dataclass(frozen=True)
class AnnotationJob:
    """A task with its splits, and a teacher with its cache; the teacher is not in memory yet."""

    folder: Path
    task: Task
    splits: Splits
    overlaps: Sequence[Overlap]
    prompts: Prompts
    codec: Codec
    positions: Positions
    teacher: Teacher
    build_teacher: Callable[..., Teacher]  # builds the same teacher for another `codec`
    store: Store
    rationale_filter: RationaleFilter | None  # None: no rationales are requested
    batch_limit: BatchLimit
    group_size: int
    num_rationales: int
    rationales_each: int
    answers_each: int

    def reader(self, requests: Mapping[tuple[str, Span], Request]) -> AnnotationReader:
        """Return a reader of these requests' records."""
        return AnnotationReader(self.store, requests, self.task, self.prompts)


def open_annotation_job(config: Config, *, name: Role = "teacher") -> AnnotationJob:
    """Build the parts that the configuration names, and open the cache; raises ConfigError or CacheError."""
    loading.flush_denormals()
    settings = config[name]
    if not settings.model:
        raise ConfigError(
            f"{name}.model is missing, without a student it has no default: {name}.model=<hub id or folder>"
        )
    root = configuration.local_root(config.root)
    task: Task = configuration.build(config.task.examples)
    splits, overlaps = task.splits(), list[Overlap]()
    if "overlap" in config:  # a judge has no train split that could overlap
        splits, overlaps = screen_splits(splits, config.overlap.words, config.overlap.action)
    folder = naming.resolve(settings.model, root, with_weights=False)
    prompts = build_prompts(config, folder, task.shots())
    codec: Codec = configuration.build(config.cache.codec)
    positions: Positions = configuration.build(config.cache.positions)
    questions = [example.unlabelled() for example in splits.train[: settings.calibrate]]
    # The teacher calibrates after the store is open, which needs the teacher's fingerprint.
    calibration = Calibration(settings.calibrate, questions, lambda name, make: store.recall(name, make))
    build_teacher = partial(
        configuration.build(settings.kind),
        folder=folder,
        hashes=root / "hashes",
        prompts=prompts,
        task=task,
        calibration=calibration,
    )
    teacher: Teacher = build_teacher(codec=positions.cut(codec))
    fingerprint = {
        "task": config.task.name,
        "teacher": teacher.fingerprint(),
        "codec": codec.fingerprint(),
        **positions.fingerprint(),
    }
    cache_dir, url = cache_location(config, root, fingerprint, name)
    if config.get("rebuild"):
        drop_shard(cache_dir, str(config.rebuild), url=url)
    accepted = _accepted(config.cache.accept)
    store = Store(cache_dir, fingerprint, codec, backend=teacher.backend(), accepts_backend=accepted, url=url)
    rationale_filter: RationaleFilter | None = configuration.build(config.get("rationales"))
    numbers = settings.group_size, settings.num_rationales, settings.rationales_each, settings.answers_each
    parts = folder, task, splits, overlaps, prompts, codec, positions, teacher, build_teacher, store, rationale_filter
    return AnnotationJob(*parts, _batch_limit(settings, name), *numbers)


def _batch_limit(settings: Config, name: str) -> BatchLimit:
    units = get_args(BatchUnit)
    if settings.batch_unit not in units or settings.batch_size < 1:
        raise ConfigError(
            f"{name}.batch_unit={settings.batch_unit}, {name}.batch_size={settings.batch_size}: expected "
            f"{' or '.join(units)}, and a size of at least 1"
        )
    return BatchLimit(settings.batch_size, settings.batch_unit)


def _accepted(setting: str | None) -> bool:
    if setting not in (None, "backend"):
        raise ConfigError(f"cache.accept={setting}: expected null or backend")
    return setting == "backend"


def cache_location(config: Config, root: Path, fingerprint: Mapping[str, Any], teacher: str) -> tuple[Path, str | None]:
    """Return the cache's local folder, and its URL if it is remote."""
    task = re.sub(r"[/\0]", "-", config.task.name)[:_MAX_TASK_NAME]  # the fingerprint has the full name
    default = f"{config.root.rstrip('/')}/cache/{task}-{fingerprint_digest(fingerprint)}"
    configured = config.cache.dir and str(config.cache.dir) + ("" if teacher == "teacher" else f"-{teacher}")
    location = configured or default
    if is_url(location):
        plain = re.sub(r"[^A-Za-z0-9._-]+", "-", location)
        suffix = "" if len(plain) <= _MAX_URL else f"-{hashlib.sha256(location.encode()).hexdigest()[:12]}"
        return root / "copies" / f"{plain[:_MAX_URL]}{suffix}", location
    return Path(location).resolve(), None
