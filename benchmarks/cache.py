"""Sizes, fidelity and speed of the cache, of filling it and of reading it: `scripts/benchmark cache`.

repetitions=5     of each variant of a timing; the longest are repeated half as often
data=<path>       GSM8K as JSON lines; without it what is measured on it is left out
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import os
import random
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import material, peers
from benchmarks.fidelity import Texts, kept, sizes
from benchmarks.material import Asked
from benchmarks.measure import Row, keep, medians
from benchmarks.pairs import loss_of, stepped
from distill.annotation.fill import Source, plan
from distill.cache import Codec
from distill.cache.store import Store
from distill.lessons.collate import collate, entries
from distill.lessons.join import Join, Records
from distill.lessons.loader import StepSampler
from distill.models.reading import PrefixedReader
from distill.records import Annotation, Example, Request, SoftTargets, Target

_POSITIONS = 1000
_SOLUTIONS, _REVIEWS, _BATCH = 24, 16, 8  # examples that are annotated, and how many at a time
_RECORDS, _PER_SHARD = 1_000_000, 64


def main(arguments: Sequence[str]) -> None:
    """Measure everything, and keep it."""
    given = dict(argument.partition("=")[::2] for argument in arguments)
    if not given.keys() <= {"repetitions", "data"}:
        sys.exit(f"{__doc__}\nfound: {' '.join(arguments)}")
    repetitions, data = int(given.get("repetitions", "5")), Path(given.get("data", "gsm8k.jsonl"))
    with tempfile.TemporaryDirectory(prefix="distill-benchmark-") as name:
        keep("cache", _measured(Path(name), repetitions, data))


def _measured(folder: Path, repetitions: int, data: Path) -> Iterator[Row]:
    source = material.default_source(folder)
    examples = material.solutions(data) if data.is_file() else []
    if not examples:
        print(f"data={data} is no file: rows on GSM8K are left out", file=sys.stderr)
    reviews = material.default_asked(source, _REVIEWS, _BATCH)
    reader = PrefixedReader(reviews.model, (), source.prompts.vocabulary_size)
    prose = material.positions(material.prose(reader, source.prompts, source.splits.train), _POSITIONS)
    yield from sizes("reviews", prose)
    manual = material.prose(reader, source.prompts, material.manual())
    yield from sizes("manual", material.positions(manual, _POSITIONS))
    if examples:
        yield from sizes("chat", material.positions(material.chat(reader, source.prompts, examples), _POSITIONS))
    yield from reading(folder, prose, repetitions)
    yield from opening(folder / "million", repetitions)
    yield from data_wait(source, reviews.fill(folder), reviews.requests, repetitions)
    if examples:
        yield from capture(folder, source, examples[:_SOLUTIONS], repetitions)
    yield from few_shot(folder, reviews, -(-repetitions // 2))
    yield from generation(material.asked_again(reviews, "rationale"), -(-repetitions // 2))


# Filling


def capture(folder: Path, source: Source, examples: Sequence[Example], repetitions: int) -> Iterator[Row]:
    """Soft targets of given texts, stored: tokens per second beside a bare forward pass and a naive loop."""
    topk = material.solutions_asked(source, examples, "topk", _BATCH)
    sampled = material.solutions_asked(source, examples, "sampled", _BATCH)
    texts = [ids for ids, _ in topk.whole()]
    num_targets = sum(len(topk.target(request)) for request in topk.requests)
    seconds = medians(
        {
            "topk": partial(topk.fill, folder / "topk"),
            "bare": partial(peers.bare_forward, topk.model, texts, _BATCH),
            "sampled": partial(sampled.fill, folder / "sampled"),
            "naive": partial(peers.naive_capture, topk.model, topk.whole(), _BATCH, folder / "naive.parquet"),
        },
        repetitions,
    )
    yield Row("annotate solutions: bare forward, tokens/s", sum(map(len, texts)) / seconds["bare"], None, "higher")
    for name in ("topk", "sampled"):
        yield Row(f"annotate solutions: {name} / bare forward, rate", seconds["bare"] / seconds[name], 1.0, "higher")
        yield Row(f"annotate solutions: {name} / naive loop, rate", seconds["naive"] / seconds[name], 1.2, "higher")
        store = next((folder / name).iterdir())
        yield Row(f"store of solutions, {name}: bytes on disk per token", _on_disk(store) / num_targets, None, "lower")
    every = material.texts_asked(source, examples, "topk", _BATCH)
    texts = [ids for ids, _ in every.whole()]
    bare = partial(peers.bare_forward, every.model, texts, _BATCH)
    seconds = medians({"topk": partial(every.fill, folder), "bare": bare}, -(-repetitions // 2))
    ratio = seconds["bare"] / seconds["topk"]
    yield Row("annotate, every token a target: topk / bare forward, rate", ratio, 0.95, "higher")


def _on_disk(store: Path) -> int:
    return sum(path.stat().st_size for path in store.rglob("*") if path.is_file())


def few_shot(folder: Path, asked: Asked, repetitions: int) -> Iterator[Row]:
    """The default task, whose prompts share their demonstrations."""
    texts = [ids for ids, _ in asked.whole()]
    seconds = medians(
        {
            "ours": partial(asked.fill, folder),
            "bare": partial(peers.bare_forward, asked.model, texts, _BATCH),
            "naive": partial(peers.naive_capture, asked.model, asked.whole(), _BATCH, folder / "naive.parquet"),
        },
        repetitions,
    )
    yield Row("annotate reviews: requests/s", len(asked.requests) / seconds["ours"], None, "higher")
    yield Row("annotate reviews: ours / bare forward, rate", seconds["bare"] / seconds["ours"], 1.0, "higher")
    yield Row("annotate reviews: ours / naive loop, rate", seconds["naive"] / seconds["ours"], 1.2, "higher")


def generation(asked: Asked, repetitions: int) -> Iterator[Row]:
    """Greedy rationales, shared prefix and sorted by length, beside `generate` on whole prompts."""
    limits = {"max_new_tokens": int(material.compose().teacher.kind.max_new_tokens), "stop": asked.prompts.end}
    prompts = [asked.prompt(request) for request in asked.requests]
    written: dict[str, list[list[int]]] = {}

    def ours() -> None:
        written["ours"] = _greedy(asked, **limits)

    def theirs() -> None:
        written["theirs"] = peers.generate(asked.model, prompts, _BATCH, **limits)

    seconds = medians({"ours": ours, "theirs": theirs}, repetitions)
    pairs = list(zip(prompts, written["ours"], written["theirs"], strict=True))
    num_mine, num_theirs = (sum(len(pair[side]) for pair in pairs) for side in (1, 2))
    rate = num_mine / seconds["ours"] * seconds["theirs"] / num_theirs
    yield Row("rationales: tokens/s", num_mine / seconds["ours"], None, "higher")
    yield Row("rationales: ours / generate, rate", rate, 1.5, "higher")
    # Rounding decides where two tokens are as likely; the gap where texts part shows that nothing else did.
    parted = [pair for pair in pairs if pair[1] != pair[2]]
    gaps = [peers.gap(asked.model, *pair) for pair in parted]
    yield Row(f"rationales: equal texts, of {len(pairs)}", len(pairs) - len(parted), None, "higher")
    yield Row("rationales: largest gap where texts part, nats", max(gaps, default=0.0), None, "lower")


def _greedy(asked: Asked, *, max_new_tokens: int, stop: int) -> list[list[int]]:
    """Text for each request, computed in groups of like length as annotation does, the prefix read anew."""
    reader = PrefixedReader(asked.model, asked.prompts.prefix("rationale"), asked.prompts.vocabulary_size)
    written: dict[str, list[int]] = {}
    for group in plan(asked.requests, asked.group_size):
        for start in range(0, len(group.requests), asked.batch_size):
            batch = group.requests[start : start + asked.batch_size]
            found = reader.read([r.question_ids for r in batch]).greedy(max_new_tokens=max_new_tokens, stop=stop)
            written |= {request.key: ids for request, ids in zip(batch, found, strict=True)}
    return [written[request.key] for request in asked.requests]


# Reading


def reading(folder: Path, texts: Texts, repetitions: int) -> Iterator[Row]:
    """Random access to training tensors beside `datasets`, in tokens per second of CPU time."""
    has_peer = importlib.util.find_spec("datasets") is not None
    if not has_peer:
        print("datasets is not installed: rows beside it are left out", file=sys.stderr)
    for cache in ("topk", "sampled"):
        codec = material.codec(cache)
        real = SoftTargets.join([one.cut for one in kept(codec, texts, "reading")])
        for length, number in ((100, 640), (2, 6400)):
            records = _dealt(real, length, number)
            store = _stored(folder / f"{cache}-{length}", codec, records)
            ways = peers.nested_lists(folder / f"{cache}-{length}.arrow", records) if has_peer else {}
            yield from _read_rows(f"read {cache}, records of {length}", store, length, ways, repetitions)


def _read_rows(name: str, store: Store, length: int, ways: Mapping[str, peers.Read], repetitions: int) -> Iterator[Row]:
    rng = random.Random(0)
    batches = [[rng.randrange(len(store)) for _ in range(rng.randint(8, 32))] for _ in range(5000 // length)]
    read = {"ours": partial(_training_tensors, store), **ways}
    expected = _training_tensors(store, batches[0])[:2]
    for way, tensors in ways.items():  # the same positions and ids come out, so the same work was done
        if not all(map(torch.equal, expected, tensors(batches[0]))):
            raise AssertionError(f"{name}: {way} reads something else")
    variants = {way: partial(_every, one, batches) for way, one in read.items()}
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as a worker of a DataLoader has; others would count as CPU seconds while they wait
    seconds = medians(variants, repetitions, time.process_time)
    torch.set_num_threads(num_threads)
    num_tokens = length * sum(map(len, batches))
    yield Row(f"{name}: tokens per CPU second", num_tokens / seconds["ours"], 1e6, "higher")
    yield Row(f"{name}: share of 2e6 tokens per CPU second", num_tokens / seconds["ours"] / 2e6, None, "higher")
    if ways:
        best = min(seconds[way] for way in ways)
        yield Row(f"{name}: rate / faster way of datasets", best / seconds["ours"], 40, "higher")
    for way in ways:
        yield Row(f"{name}: datasets as {way}, tokens per CPU second", num_tokens / seconds[way], None, "higher")


def _every(read: Callable[[Sequence[int]], object], batches: Sequence[Sequence[int]]) -> None:
    for batch in batches:
        read(batch)


def _training_tensors(store: Store, places: Sequence[int]) -> peers.Tensors:
    """As `distill.lessons.loader` makes them of what a store gives."""
    soft = store.soft_targets([(_key(place), "answer") for place in places]).for_training()
    found = entries(np.ones(len(soft), bool), soft)
    return found.position_E, found.ids_E, found.logprobs_E


def _key(place: int) -> str:
    return hashlib.blake2b(str(place).encode(), digest_size=16).hexdigest()


def _dealt(real: SoftTargets, length: int, number: int) -> list[SoftTargets]:
    """Records of real distributions, dealt out at random."""
    rows = np.random.default_rng(0).integers(len(real), size=(number, length))
    return [real[some] for some in rows]


def _stored(folder: Path, codec: Codec, records: Sequence[SoftTargets]) -> Store:
    store = Store(folder, {"made": "for a measurement"}, codec)
    annotations = [
        Annotation(_key(place), {"answer": Target((0,) * len(soft), soft)}, "") for place, soft in enumerate(records)
    ]
    with store.writing() as writer:
        for start in range(0, len(annotations), _PER_SHARD):
            writer.add(annotations[start : start + _PER_SHARD])
            writer.flush()
    return store


# Waiting for data


def data_wait(source: Source, store: Store, requests: Sequence[Request], repetitions: int) -> Iterator[Row]:
    """What making a batch takes of a default training step."""
    config = material.compose()
    prompts = source.prompts.zero_shot(source.prompts.tokenizer)
    by_place = {(request.example.id, request.span): request for request in requests}
    needed = frozenset({("answer", "labels"), ("answer", "soft")})
    settings: Any = {"soft_teacher": None, "rationales": {}, "answer": config.task.answer_mode, "needed": needed}
    join = Join(prompts=prompts, teacher=Records(store, by_place), **settings)
    lessons = join.lessons([request.example for request in requests])
    sampler = StepSampler(
        lessons, batch_size=config.batch_size, batch_unit="examples", num_microbatches=1, num_steps=20, seed=0
    )

    def batches() -> list[Any]:
        return [
            collate([lessons[i] for i in part.indices], part.counts, prompts.end, store.soft_targets)
            for part in sampler
        ]

    module, optimizer = material.student(source.folder, config, source.prompts.vocabulary_size, source.codec)
    batch = batches()[0]
    seconds = medians(
        {"batches": batches, "step": stepped(module, optimizer, partial(loss_of, module, batch))}, repetitions
    )
    yield Row("training: default step, seconds", seconds["step"], None, "lower")
    yield Row("training: making a batch / step", seconds["batches"] / len(sampler) / seconds["step"], 0.01, "lower")


# Opening


def opening(folder: Path, repetitions: int) -> Iterator[Row]:
    """A million records: opening their store, and asking it for all of them."""
    codec = material.codec("topk")
    _make_million(folder, codec)
    opened = partial(Store, folder, {"made": "for a measurement"}, codec)
    yield Row("opening a store of 1,000,000 records, seconds", medians({"": opened}, repetitions)[""], 1.0, "lower")
    store, example = opened(), Example("")
    requests = [Request(_key(place), "answer", example, ()) for place in range(_RECORDS)]
    if len(store) != _RECORDS or store.missing(requests):
        raise AssertionError(f"{len(store)} of {_RECORDS} records are found")
    missing = medians({"": partial(store.missing, requests)}, repetitions)[""]
    yield Row("missing() over 1,000,000 requests, seconds", missing, None, "lower")


def _make_million(folder: Path, codec: Codec) -> None:
    """Write a store without syncing: one real shard, and others that are only as large as it."""
    one = [Annotation(_key(place), {}, "positive") for place in range(_PER_SHARD)]
    store = Store(folder, {"made": "for a measurement"}, codec)
    with store.writing() as writer:
        writer.add(one)
    (manifest,) = folder.glob("manifest-*.jsonl")
    line = json.loads(manifest.read_bytes())["line"]
    with manifest.open("ab") as file:
        for number in range(1, _RECORDS // _PER_SHARD):
            line["shard"] = f"{number:016x}"
            places = range(number * _PER_SHARD, (number + 1) * _PER_SHARD)
            line["keys"] = base64.b64encode(b"".join(bytes.fromhex(_key(place)) for place in places)).decode()
            body = json.dumps(line, sort_keys=True).encode()
            file.write(b'{"crc32": %10d, "line": %s}\n' % (zlib.crc32(body), body))
            for suffix, size in line["bytes"].items():
                path = folder / f"{line['shard']}.{suffix}"
                path.touch()
                os.truncate(path, size)


if __name__ == "__main__":
    main(sys.argv[1:])
