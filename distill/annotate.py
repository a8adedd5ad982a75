"""Let the teacher answer, and reason about, what the cache lacks; each question once, then never again."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig
from torch.utils.data import DataLoader

from distill import config as configuration
from distill import models
from distill.cache import Codec
from distill.cache.store import Store, Writer, fingerprint_digest
from distill.metrics import median_milliseconds
from distill.modules import TeacherModule
from distill.prompts import Prompts, load_tokenizer
from distill.records import SPANS, Annotation, CheckedRationale, Example, Reason, Request, Span, Splits
from distill.tasks import Task
from distill.teachers import Teacher
from distill.tracking import progress, say

_LATENCY_REQUESTS = 5


@dataclass(frozen=True)
class Source:
    """A task, its splits, and a teacher with its cache; nothing of the teacher is in memory yet."""

    folder: Path
    task: Task
    splits: Splits
    prompts: Prompts
    codec: Codec
    teacher: Teacher
    store: Store
    batch_size: int
    num_rationales: int


@dataclass(frozen=True)
class Filled:
    """Requests by example id and span, and how many of them the cache already held."""

    requests: Mapping[tuple[str, Span], Request]
    too_long: Mapping[str, str]
    num_reused: int
    num_annotated: int
    seconds: float


def open_source(config: DictConfig) -> Source:
    """Build what the configuration names, and open the cache; raises ConfigError or CacheError."""
    models.flush_denormals()
    root = Path(config.root).resolve()
    task: Task = configuration.build(config.task.examples)
    splits = task.splits()
    folder = models.resolve(config.teacher.model, root)
    layout = configuration.build(config.task.layout)
    shots = list(task.shots())[: config.prompt.num_shots]
    prompts = Prompts(
        load_tokenizer(folder),
        layout,
        shots,
        max_length=config.prompt.max_length,
        too_long=config.prompt.too_long,
    )
    codec: Codec = configuration.build(config.cache.codec)
    teacher: Teacher = configuration.build(config.teacher.kind)(
        folder=folder,
        prompts=prompts,
        task=task,
        codec=codec,
        calibration=[Example(example.question) for example in splits.train[: config.teacher.calibrate]],
    )
    fingerprint = {
        "task": {"name": config.task.name, "version": task.version},
        "teacher": teacher.fingerprint(),
        "codec": codec.fingerprint(),
    }
    store = Store(_cache_dir(config, root, fingerprint), fingerprint)
    return Source(
        folder, task, splits, prompts, codec, teacher, store, config.teacher.batch_size, config.teacher.num_rationales
    )


def fill(source: Source, wanted: Mapping[Span, Sequence[Example]]) -> Filled:
    """Have every wanted example annotated; the teacher is loaded only if some record is missing."""
    requests, too_long = _requests(source.prompts, wanted)
    start = time.monotonic()
    missing = source.store.missing(list(requests.values()))
    reused = len({request.key for request in requests.values()}) - len(missing)
    if not missing:
        say(f"cache {source.store.folder}: all {reused} records are there; the teacher is not loaded (0 calls)")
        return Filled(requests, too_long, reused, 0, 0.0)
    say(f"cache {source.store.folder}: {reused} records are there, {len(missing)} are to be annotated")
    with source.store.writing() as writer:
        # Another writer may have made them while this one waited.
        missing = source.store.missing(missing)
        if missing:
            _annotate(source, missing, writer)
    return Filled(requests, too_long, reused, len(missing), time.monotonic() - start)


def _annotate(source: Source, missing: Sequence[Request], writer: Writer) -> None:
    start = time.monotonic()
    module = TeacherModule(source.teacher)
    try:
        for span in SPANS:
            # Batches of like lengths have little padding.
            asked = sorted((r for r in missing if r.span == span), key=lambda r: len(r.question_ids))
            if asked:
                _predict(module, asked, source.batch_size, _Save(writer), f"{span}s")
        writer.flush()
        seconds = time.monotonic() - start
        answers = [request for request in missing if request.span == "answer"][:_LATENCY_REQUESTS]
        source.store.record_cost(
            records=len(missing),
            seconds=round(seconds, 3),
            parameters=sum(p.numel() for p in module.model.parameters()),
            ms_per_example=median_milliseconds(lambda request: source.teacher.annotate([request]), answers),
        )
    finally:
        source.teacher.close()


def check_rationales(
    examples: Sequence[Example], requests: Mapping[tuple[str, Span], Request], store: Store
) -> list[CheckedRationale]:
    """Compare the answer each rationale led to with the gold one, or else with the teacher's direct answer."""
    found = []
    for example in examples:
        if (example.id, "rationale") not in requests:
            continue
        annotation = store.read(requests[example.id, "rationale"].key)
        if example.answer is not None:
            reason = _reason(annotation, example.answer)
            found.append(CheckedRationale(example.id, annotation, "gold", reason))
        elif (example.id, "answer") in requests:
            direct = store.read(requests[example.id, "answer"].key)
            found.append(CheckedRationale(example.id, annotation, "teacher", _reason(annotation, direct.answer)))
    return found


def _reason(annotation: Annotation, known: str | None) -> Reason | None:
    if not annotation.rationale:
        return "empty"
    if annotation.is_truncated:
        return "truncated"
    if annotation.answer is None:
        return "unreadable"
    return None if annotation.answer == known else "disagrees"


def _requests(
    prompts: Prompts, wanted: Mapping[Span, Sequence[Example]]
) -> tuple[dict[tuple[str, Span], Request], dict[str, str]]:
    requests: dict[tuple[str, Span], Request] = {}
    too_long: dict[str, str] = {}
    for span, examples in wanted.items():
        for example in examples:
            try:
                requests[example.id, span] = prompts.request(example, span)
            except ValueError as error:
                too_long[example.id] = str(error)
    return requests, too_long


def _predict(module: TeacherModule, requests: Sequence[Request], batch_size: int, save: Callback, unit: str) -> None:
    batches = [requests[start : start + batch_size] for start in range(0, len(requests), batch_size)]
    trainer = lightning.Trainer(
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=sys.stderr.isatty(),
        callbacks=[save, progress(unit, len(requests))],
    )
    loader: DataLoader[Sequence[Request]] = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    try:
        trainer.predict(module, loader, return_predictions=False)
    except SystemExit:  # what Lightning makes of Ctrl-C
        raise KeyboardInterrupt from None


class _Save(Callback):
    """Hands each batch of annotations on as soon as it is there."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer

    def on_predict_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._writer.add(outputs)


def _cache_dir(config: DictConfig, root: Path, fingerprint: Mapping[str, Any]) -> Path:
    if config.cache.dir:
        return Path(config.cache.dir).resolve()
    return root / "cache" / f"{config.task.name}-{fingerprint_digest(fingerprint)}"


def main(config: DictConfig) -> float:
    """Fill the cache for all splits and say what it holds."""
    configuration.check(config)
    source = open_source(config)
    splits = source.splits
    wanted: dict[Span, Sequence[Example]] = {}
    if "answer" in config.spans:
        wanted["answer"] = [*splits.train, *splits.validation, *without_answers(splits.test)]
    if "rationale" in config.spans:
        wanted["rationale"] = splits.train[: source.num_rationales]
    filled = fill(source, wanted)
    checked = check_rationales(splits.train, filled.requests, source.store)
    kept = sum(rationale.reason is None for rationale in checked)
    print(
        f"{source.store.folder}\n{len(source.store)} records, {filled.num_annotated} of them new in "
        f"{filled.seconds:.0f} s; {kept} of {len(checked)} rationales agree with the answer; "
        f"{len(filled.too_long)} examples too long"
    )
    return float(filled.num_annotated)


def without_answers(examples: Sequence[Example]) -> list[Example]:
    """The same questions as the teacher sees them where no label may be known."""
    return [Example(example.question) for example in examples]


if __name__ == "__main__":
    configuration.command("annotate", main)
