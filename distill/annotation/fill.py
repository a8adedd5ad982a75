"""Filling the cache: the teacher annotates each request that the cache lacks, once."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, final

import lightning
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from distill.annotation.annotation_job import AnnotationJob
from distill.annotation.rationales import filter_samples
from distill.annotation.requests import AnnotationRequests, collect_requests, count_tokens, group_requests
from distill.annotation.teacher_module import TeacherModule
from distill.app import preemption
from distill.app.console import say
from distill.app.machine import median_milliseconds, paused_collector
from distill.app.progress import progress
from distill.cache.store import Store, Writer, nearest_difference
from distill.errors import PreemptedError
from distill.models import placement
from distill.models.body import check_length
from distill.records import SPANS, Example, FilteredRationale, Group, Request, Span
from distill.teachers import Teacher

_NUM_LATENCY_REQUESTS = 6
_POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Part:
    """The part of the groups that this process annotates, `number` of `num_parts`, and its number of devices."""

    number: int = 1
    num_parts: int = 1
    num_devices: int = 1


def fill(
    job: AnnotationJob,
    examples: Mapping[Span, Sequence[Example]],
    *,
    part: Part = Part(),
    use_given_rationales: bool = False,
) -> AnnotationRequests:
    """Annotate the examples of each span; the teacher is loaded only if a record is missing.

    Several processes may fill one cache: each annotates groups that no other has claimed, then waits until the
    groups claimed by others are complete. Only this process annotates the groups of its `part`. With
    `use_given_rationales` the teacher scores the examples' own rationales and generates none.
    """
    filled, start = collect_requests(job, examples, use_given_rationales=use_given_rationales), time.monotonic()
    groups = group_requests(filled.all_requests, job.group_size)[part.number - 1 :: part.num_parts]
    missing = job.store.missing(_requests_of(groups))
    num_reused = len(_requests_of(groups)) - len(missing)
    if not missing:
        say(f"cache {job.store.location}: all {num_reused} records exist; the teacher is not loaded (0 calls)")
        return replace(filled, num_reused=num_reused)
    say(f"cache {job.store.location}: {num_reused} records exist, annotating {len(missing)} more")
    if not len(job.store):
        _say_nearest_cache(job.store)
    with job.store.writing() as writer:
        _annotate(job, groups, writer, part.num_devices)
    seconds = time.monotonic() - start
    return replace(filled, num_reused=num_reused, num_annotated=len(missing), seconds=seconds)


@paused_collector()
def filter_rationales(job: AnnotationJob, filled: AnnotationRequests) -> list[FilteredRationale]:
    """Filter the teacher's rationales of train and validation examples; a rejected rationale has the reason.

    The annotations of the result have no targets: soft targets stay in the cache.
    """
    assert job.rationale_filter
    store, reader = job.store, job.reader(filled.requests)
    examples = [e for e in (*job.splits.train, *job.splits.validation) if e.id in filled.samples]
    samples = {e.id: [reader.words(r) for r in filled.samples[e.id] if r.key in store] for e in examples}
    answer_requests = {e.id: filled.requests.get((e.id, "answer")) for e in examples}
    direct = {id_: reader.words(r).whole_answer for id_, r in answer_requests.items() if r and r.key in store}
    direct_answers = {id_: answer for id_, answer in direct.items() if answer is not None}
    return filter_samples(examples, samples, direct_answers, job.task.value, job.rationale_filter, job.task.is_same)


@contextmanager
def loaded(teacher: Teacher) -> Iterator[nn.Module]:
    """Keep the teacher's model in memory, on its device, inside the block."""
    model = teacher.load()
    try:
        yield placement.place(model)
    finally:
        del model
        teacher.close()
        placement.release()


def _annotate(job: AnnotationJob, groups: Sequence[Group], writer: Writer, num_devices: int) -> None:
    start = time.monotonic()
    with loaded(job.teacher) as model:
        check_length(model, _longest(job, _requests_of(groups)))
        record_cost = partial(_record_cost, writer, sum(p.numel() for p in model.parameters()), start)
        del model  # the teacher alone keeps it
        module = TeacherModule(job.teacher, job.positions, job.batch_limit)
        try:
            _annotate_spans(job, groups, module, writer, num_devices)
            _complete_claimed(job.store, groups, module, writer)
            answers = [request for request in _requests_of(groups) if request.span == "answer"][:_NUM_LATENCY_REQUESTS]
            annotate_one = {"teacher": lambda request: job.teacher.annotate([request])}
            record_cost(median_milliseconds(annotate_one, answers if writer.num_written else [])["teacher"])
        except (KeyboardInterrupt, PreemptedError):  # record the cost so far
            record_cost(None)
            raise


def _longest(job: AnnotationJob, requests: Sequence[Request]) -> int:
    """Number of tokens of the longest text that the teacher will be given, with its demonstrations."""
    return max(len(job.prompts.prefix(r.span)) + len(r.question_ids) + len(r.given_ids) for r in requests)


def _annotate_spans(
    job: AnnotationJob, groups: Sequence[Group], module: TeacherModule, writer: Writer, num_devices: int
) -> None:
    for span in SPANS:
        of_span = [group for group in groups if group.requests[0].span == span]
        num_missing = len(job.store.missing(_requests_of(of_span)))
        if num_missing:
            bar = progress(f"{span}s", num_missing, partial(count_tokens, job.prompts))
            _predict(module, _UnclaimedGroups(job.store, of_span), [_WriteGroups(writer), bar], num_devices)


def _record_cost(writer: Writer, num_parameters: int, start: float, milliseconds: float | None) -> None:
    if writer.num_written:
        writer.record_cost(
            records=writer.num_written,
            seconds=round(time.monotonic() - start, 3),
            parameters=num_parameters,
            ms_per_example=milliseconds,
        )


def _complete_claimed(store: Store, groups: Sequence[Group], module: TeacherModule, writer: Writer) -> None:
    """Wait for groups claimed by other processes, and annotate those whose process has died."""
    has_said = False
    while store.missing(_requests_of(groups)):
        for group in _UnclaimedGroups(store, groups):
            writer.write(group, module.predict_step(group))
            _raise_if_stop_requested()
        store.refresh()
        if store.missing(_requests_of(groups)):
            if not has_said:
                say("waiting for groups that other processes are annotating ...")
            has_said = True
            _raise_if_stop_requested()
            time.sleep(_POLL_SECONDS)


def _requests_of(groups: Sequence[Group]) -> list[Request]:
    return [request for group in groups for request in group.requests]


def _predict(module: TeacherModule, groups: _UnclaimedGroups, callbacks: list[Callback], num_devices: int) -> None:
    trainer = lightning.Trainer(
        accelerator="auto",
        devices=num_devices,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=sys.stderr.isatty(),
        callbacks=callbacks,
    )
    try:
        trainer.predict(module, DataLoader(groups, batch_size=None), return_predictions=False)
    except SystemExit:  # Lightning raises it on Ctrl-C, and on signals that arrive before `watch_again`
        _raise_if_stop_requested()
        raise KeyboardInterrupt from None


@final
class _UnclaimedGroups(IterableDataset[Group]):
    """Iterates over groups that are neither annotated nor claimed by another process, claiming each."""

    def __init__(self, store: Store, groups: Sequence[Group]) -> None:
        self._store, self._groups = store, groups

    def __iter__(self) -> Iterator[Group]:
        for group in self._groups:
            if not self._store.missing(group.requests) or not self._store.claims.take(group.name):
                continue
            self._store.refresh()  # another process may have annotated it just before the claim
            missing = self._store.missing(group.requests)
            if missing:
                yield replace(group, requests=tuple(missing))
            else:
                self._store.claims.release(group.name)


class _WriteGroups(Callback):
    """Writes each group as soon as it is annotated."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        preemption.watch_again()

    def on_predict_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._writer.write(batch, outputs)
        _raise_if_stop_requested()


def _raise_if_stop_requested() -> None:
    if preemption.is_stop_requested():
        raise PreemptedError("stopped on request; annotated records are kept, run the same command to resume")


def _say_nearest_cache(store: Store) -> None:
    """Say in which settings the nearest other cache differs, so that the user sees why it is not reused."""
    nearest = nearest_difference(store.folder, store.fingerprint)
    if nearest and nearest[1]:
        say(f"no existing cache has these settings; the nearest, {nearest[0].name}, differs in:")
        say("\n".join(nearest[1]))
