"""A task and a teacher with its cache: each question that the cache lacks is asked once, then never again."""

from __future__ import annotations

import hashlib
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, final

import lightning
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from distill.annotation.rationales import Checks, check
from distill.annotation.teacher_module import TeacherModule
from distill.app import config as configuration
from distill.app import preemption
from distill.app.config import Config
from distill.app.console import say
from distill.app.files import is_url
from distill.app.machine import median_milliseconds
from distill.app.progress import progress
from distill.cache import Codec
from distill.cache.store import Store, Writer, drop_shard, fingerprint_digest, nearest_difference
from distill.errors import ConfigError, PreemptedError
from distill.models import loading, naming
from distill.prompts.cues import Prompts
from distill.prompts.tokenizers import load_tokenizer
from distill.records import SPANS, CheckedRationale, Example, Group, Request, Span, Splits, distinct
from distill.tasks import Task
from distill.tasks.contamination import Overlap, screened
from distill.teachers import Teacher

_LATENCY_REQUESTS = 6
_POLL_SECONDS = 1.0
_MOST_OF_A_NAME, _MOST_OF_A_URL = 60, 200  # characters, of up to four bytes and of one; a folder's name has at most 255


@dataclass(frozen=True)
class Source:
    """A task, its splits, and a teacher with its cache; nothing of the teacher is in memory yet."""

    folder: Path
    task: Task
    splits: Splits
    overlaps: Sequence[Overlap]
    prompts: Prompts
    codec: Codec
    teacher: Teacher
    teacher_with: Callable[..., Teacher]  # the same teacher with another codec
    store: Store
    checks: Checks
    batch_size: int
    group_size: int
    num_rationales: int
    rationales_each: int


@dataclass(frozen=True)
class Share:
    """Which of the groups this process is to see to, and on how many devices."""

    part: int = 1
    num_parts: int = 1
    num_devices: int = 1


@dataclass(frozen=True)
class Filled:
    """Requests by example id and span, all samples of rationales, and how many of them the cache already held."""

    requests: Mapping[tuple[str, Span], Request]
    samples: Mapping[str, Sequence[Request]]
    too_long: Mapping[str, str]
    num_reused: int
    num_annotated: int
    seconds: float

    @property
    def every(self) -> list[Request]:
        """All requests, each key once."""
        return distinct([*self.requests.values(), *(request for each in self.samples.values() for request in each)])


def open_source(config: Config, *, name: Literal["teacher", "soft_teacher"] = "teacher") -> Source:
    """Build what the configuration names, and open the cache; raises ConfigError or CacheError."""
    loading.flush_denormals()
    settings = config[name]
    if not settings.model:
        raise ConfigError(f"{name}.model must be given where there is no student: {name}.model=<hub id or folder>")
    root = configuration.local_root(config.root)
    task: Task = configuration.build(config.task.examples)
    splits, found = screened(task.splits(), config.overlap.words, config.overlap.action)
    folder = naming.resolve(settings.model, root)
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
    teacher_with = partial(
        configuration.build(settings.kind),
        folder=folder,
        prompts=prompts,
        task=task,
        calibration=[Example(example.question) for example in splits.train[: settings.calibrate]],
    )
    teacher: Teacher = teacher_with(codec=codec)
    fingerprint = {
        "task": {"name": config.task.name, "version": task.version},
        "teacher": teacher.fingerprint(),
        "codec": codec.fingerprint(),
    }
    folder_of_cache, url = _cache_dir(config, root, fingerprint, name)
    if config.get("rebuild"):
        drop_shard(folder_of_cache, str(config.rebuild), url=url)
    store = Store(folder_of_cache, fingerprint, codec, url=url)
    checks: Checks = configuration.build(config.rationales)
    sizes = settings.batch_size, settings.group_size, settings.num_rationales, settings.rationales_each
    return Source(folder, task, splits, found, prompts, codec, teacher, teacher_with, store, checks, *sizes)


def fill(
    source: Source, wanted: Mapping[Span, Sequence[Example]], *, share: Share = Share(), are_given: bool = False
) -> Filled:
    """Have every wanted example annotated; the teacher is loaded only if some record is missing.

    Other processes may fill the same cache at once: each takes groups that no other has taken, and waits at the end
    for what the others are still making. A `share` of the groups is nobody's business but its own.
    Where words `are_given`, the teacher reads the examples' own rationales and does not write any.
    """
    asked, start = to_ask(source, wanted, are_given=are_given), time.monotonic()
    groups = plan(asked.every, source.group_size)[share.part - 1 :: share.num_parts]
    missing = source.store.missing(_asked(groups))
    reused = len(_asked(groups)) - len(missing)
    if not missing:
        say(f"cache {source.store.place}: all {reused} records exist; the teacher is not loaded (0 calls)")
        return replace(asked, num_reused=reused)
    say(f"cache {source.store.place}: {reused} records exist, annotating {len(missing)} more")
    if not len(source.store):
        _say_why(source.store)
    with source.store.writing() as writer:
        _annotate(source, groups, writer, share.num_devices)
    return replace(asked, num_reused=reused, num_annotated=len(missing), seconds=time.monotonic() - start)


def to_ask(source: Source, wanted: Mapping[Span, Sequence[Example]], *, are_given: bool = False) -> Filled:
    """What `fill` would have annotated, and nothing of it done."""
    requests, too_long = _requests(source.prompts, wanted, are_given)
    return Filled(requests, _samples(source, requests), too_long, 0, 0, 0.0)


def plan(requests: Sequence[Request], size: int) -> list[Group]:
    """Cut requests into groups: like lengths together, so that batches have little padding."""
    groups = []
    for span in SPANS:
        of_span = distinct(request for request in requests if request.span == span)
        ordered = sorted(of_span, key=lambda request: (_length(request), request.key))
        for start in range(0, len(ordered), size):
            part = tuple(ordered[start : start + size])
            keys = "".join(request.key for request in part)
            groups.append(Group(hashlib.blake2b(keys.encode(), digest_size=8).hexdigest(), part))
    return groups


def _length(request: Request) -> int:
    """How many tokens will be read for it behind the shared prefix."""
    return len(request.question_ids) + len(request.given_ids)


def _annotate(source: Source, groups: Sequence[Group], writer: Writer, num_devices: int) -> None:
    start = time.monotonic()
    module = TeacherModule(source.teacher, source.batch_size)
    try:
        for span in SPANS:
            of_span = [group for group in groups if group.requests[0].span == span]
            num_missing = len(source.store.missing(_asked(of_span)))
            if num_missing:
                bar = progress(f"{span}s", num_missing)
                _predict(module, _Open(source.store, of_span), [_Save(writer), bar], num_devices)
        _wait(source.store, groups, module, writer)
        asked = [request for request in _asked(groups) if request.span == "answer"][:_LATENCY_REQUESTS]
        answering = {"teacher": lambda request: source.teacher.annotate([request])}
        milliseconds = median_milliseconds(answering, asked if writer.num_written else [])["teacher"]
        _record_cost(writer, module, start, milliseconds)
    except (KeyboardInterrupt, PreemptedError):  # what it took until now was paid all the same
        _record_cost(writer, module, start, None)
        raise
    finally:
        source.teacher.close()


def _record_cost(writer: Writer, module: TeacherModule, start: float, milliseconds: float | None) -> None:
    if writer.num_written:
        writer.record_cost(
            records=writer.num_written,
            seconds=round(time.monotonic() - start, 3),
            parameters=sum(p.numel() for p in module.model.parameters()),
            ms_per_example=milliseconds,
        )


def _wait(store: Store, groups: Sequence[Group], module: TeacherModule, writer: Writer) -> None:
    """Wait for what other processes have taken; make what dead ones have left."""
    is_told = False
    while store.missing(_asked(groups)):
        for group in _Open(store, groups):
            writer.write(group, module.predict_step(group))
            _stop_if_asked()
        store.refresh()
        if store.missing(_asked(groups)):
            if not is_told:
                say("waiting for what other processes are annotating ...")
            is_told = True
            _stop_if_asked()
            time.sleep(_POLL_SECONDS)


def _asked(groups: Sequence[Group]) -> list[Request]:
    return [request for group in groups for request in group.requests]


def check_rationales(source: Source, filled: Filled) -> list[CheckedRationale]:
    """The teacher's rationales of train examples, each with the reason against it where there is one."""
    store = source.store
    examples = [example for example in source.splits.train if example.id in filled.samples]
    samples = {e.id: [store.read(r.key) for r in filled.samples[e.id] if r.key in store] for e in examples}
    asked = {e.id: filled.requests.get((e.id, "answer")) for e in examples}
    direct = {id_: store.read(r.key).answer for id_, r in asked.items() if r and r.key in store}
    known = {id_: answer for id_, answer in direct.items() if answer is not None}
    found = check(examples, samples, known, source.task.value, source.checks)
    # Where the teacher's direct answer cannot be read, no reasoning of its leads to it.
    judged = {checked.example_id for checked in found}
    left = [id_ for id_ in samples if id_ not in judged and id_ in direct]
    return [*found, *(CheckedRationale(id_, a, "teacher", "disagrees") for id_ in left for a in samples[id_])]


def _samples(source: Source, requests: Mapping[tuple[str, Span], Request]) -> dict[str, list[Request]]:
    """All requests for a rationale of each train example; only these are asked for several times."""
    found = {}
    for example in source.splits.train:
        first = requests.get((example.id, "rationale"))
        if first and not first.given_ids:
            again = range(1, source.rationales_each)
            found[example.id] = [first, *(source.prompts.request(example, "rationale", sample=k) for k in again)]
    return found


def _requests(
    prompts: Prompts, wanted: Mapping[Span, Sequence[Example]], are_given: bool = False
) -> tuple[dict[tuple[str, Span], Request], dict[str, str]]:
    requests: dict[tuple[str, Span], Request] = {}
    too_long: dict[str, str] = {}
    for span, examples in wanted.items():
        for example in examples:
            try:
                given = example.rationale if are_given and span == "rationale" else None
                requests[example.id, span] = prompts.request(example, span, given=given)
            except ValueError as error:
                too_long[example.id] = str(error)
    return requests, too_long


def _predict(module: TeacherModule, groups: _Open, callbacks: list[Callback], num_devices: int) -> None:
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
    except SystemExit:  # what Lightning makes of Ctrl-C, and of a signal before it was told to leave these alone
        _stop_if_asked()
        raise KeyboardInterrupt from None


@final
class _Open(IterableDataset[Group]):
    """The groups, one after the other, that no other process has taken or made; each is claimed as it is given."""

    def __init__(self, store: Store, groups: Sequence[Group]) -> None:
        self._store, self._groups = store, groups

    def __iter__(self) -> Iterator[Group]:
        for group in self._groups:
            if not self._store.missing(group.requests) or not self._store.claims.take(group.name):
                continue
            self._store.refresh()  # another process may have made it just before
            missing = self._store.missing(group.requests)
            if missing:
                yield replace(group, requests=tuple(missing))
            else:
                self._store.claims.release(group.name)


class _Save(Callback):
    """Puts each group on disk as soon as it is annotated."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        preemption.watch_on()

    def on_predict_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._writer.write(batch, outputs)
        _stop_if_asked()


def _stop_if_asked() -> None:
    if preemption.is_asked():
        raise PreemptedError("stopped on request; annotated records are kept, run the same command to resume")


def _say_why(store: Store) -> None:
    """Why nothing can be reused, where there are caches beside this one."""
    found = nearest_difference(store.folder, store.fingerprint)
    if found and found[1]:
        say(f"no cache beside it fits; the nearest, {found[0].name}, was made in another way:")
        say("\n".join(found[1]))


def _cache_dir(config: Config, root: Path, fingerprint: Mapping[str, Any], teacher: str) -> tuple[Path, str | None]:
    """The folder of the cache, and where it is a copy, of what."""
    task = re.sub(r"[/\0]", "-", config.task.name)[:_MOST_OF_A_NAME]  # the fingerprint has it whole
    name = f"{config.root.rstrip('/')}/cache/{task}-{fingerprint_digest(fingerprint)}"
    named = config.cache.dir and str(config.cache.dir) + ("" if teacher == "teacher" else f"-{teacher}")
    place = named or name
    if is_url(place):
        plain = re.sub(r"[^A-Za-z0-9._-]+", "-", place)
        unique = "" if len(plain) <= _MOST_OF_A_URL else f"-{hashlib.sha256(place.encode()).hexdigest()[:12]}"
        return root / "copies" / f"{plain[:_MOST_OF_A_URL]}{unique}", place
    return Path(place).resolve(), None


@contextmanager
def loaded(teacher: Teacher) -> Iterator[nn.Module]:
    """The teacher's model, in memory for as long as the block runs."""
    try:
        yield teacher.load()
    finally:
        teacher.close()


def without_answers(examples: Sequence[Example]) -> list[Example]:
    """The same questions as the teacher sees them where no label may be known."""
    return [Example(example.question) for example in examples]
