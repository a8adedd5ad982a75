"""Size and fidelity of the cache, speed of writing and reading it: `scripts/benchmark cache`.

repetitions=5     of each variant of a timing; the longest ones are repeated half as often
data=<path>       GSM8K as JSON lines; without it the measurements on GSM8K are skipped
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
from benchmarks.fidelity import Texts, round_trips, sizes
from benchmarks.material import Workload
from benchmarks.measure import Row, medians, save
from benchmarks.pairs import optimizer_step, total_loss
from distill.annotation.annotation_job import AnnotationJob
from distill.annotation.reader import AnnotationReader
from distill.annotation.requests import group_requests
from distill.cache import Codec
from distill.cache.store import Store
from distill.lessons.collate import collate, entries
from distill.lessons.join import Join
from distill.lessons.loader import StepSampler
from distill.models.reading import PrefixedReader
from distill.prompts.vocabularies import Pairing
from distill.records import Annotation, Example, Request, SoftTargets, Target

_POSITIONS = 1000
_SOLUTIONS, _REVIEWS, _BATCH = 24, 16, 8  # annotated examples of each kind, and the batch size
_RECORDS, _PER_SHARD = 1_000_000, 64


def main(arguments: Sequence[str]) -> None:
    """Measure everything and save the figures."""
    options = dict(argument.partition("=")[::2] for argument in arguments)
    if not options.keys() <= {"repetitions", "data"}:
        sys.exit(f"{__doc__}\ngot: {' '.join(arguments)}")
    repetitions, data = int(options.get("repetitions", "5")), Path(options.get("data", "gsm8k.jsonl"))
    with tempfile.TemporaryDirectory(prefix="distill-benchmark-") as name:
        save("cache", _rows(Path(name), repetitions, data))


def _rows(folder: Path, repetitions: int, data: Path) -> Iterator[Row]:
    source = material.default_source(folder)
    examples = material.read_solutions(data) if data.is_file() else []
    if not examples:
        print(f"data={data} is not a file: rows on GSM8K are skipped", file=sys.stderr)
    reviews = material.default_workload(source, _REVIEWS, _BATCH)
    reader = PrefixedReader(reviews.model, (), source.prompts.vocabulary_size)
    prose = material.take_positions(material.prose(reader, source.prompts, source.splits.train), _POSITIONS)
    yield from sizes("reviews", prose)
    manual = material.prose(reader, source.prompts, material.manual())
    yield from sizes("manual", material.take_positions(manual, _POSITIONS))
    if examples:
        yield from sizes("chat", material.take_positions(material.chat(reader, source.prompts, examples), _POSITIONS))
    yield from reading(folder, prose, repetitions)
    yield from opening(folder / "million", repetitions)
    yield from data_wait(source, reviews.fill(folder), reviews.requests, repetitions)
    if examples:
        yield from capture(folder, source, examples[:_SOLUTIONS], repetitions)
    yield from few_shot(folder, reviews, -(-repetitions // 2))
    yield from generation(material.with_span(reviews, "rationale"), -(-repetitions // 2))


# Filling


def capture(folder: Path, source: AnnotationJob, examples: Sequence[Example], repetitions: int) -> Iterator[Row]:
    """Annotating given texts: tokens per second beside a bare forward pass and a naive loop."""
    topk = material.solutions_workload(source, examples, "topk", _BATCH)
    sampled = material.solutions_workload(source, examples, "sampled", _BATCH)
    texts = [ids for ids, _ in topk.sequences()]
    num_targets = sum(len(topk.target(request)) for request in topk.requests)
    seconds = medians(
        {
            "topk": partial(topk.fill, folder / "topk"),
            "bare": partial(peers.bare_forward, topk.model, texts, _BATCH),
            "sampled": partial(sampled.fill, folder / "sampled"),
            "naive": partial(peers.naive_capture, topk.model, topk.sequences(), _BATCH, folder / "naive.parquet"),
        },
        repetitions,
    )
    yield Row("annotate solutions: bare forward, tokens/s", sum(map(len, texts)) / seconds["bare"], None, "higher")
    for name in ("topk", "sampled"):
        yield Row(f"annotate solutions: {name} / bare forward, rate", seconds["bare"] / seconds[name], 1.0, "higher")
        yield Row(f"annotate solutions: {name} / naive loop, rate", seconds["naive"] / seconds[name], 1.2, "higher")
        store = next((folder / name).iterdir())
        yield Row(
            f"store of solutions, {name}: bytes on disk per token", _bytes_on_disk(store) / num_targets, None, "lower"
        )
    whole_texts = material.texts_workload(source, examples, "topk", _BATCH)
    texts = [ids for ids, _ in whole_texts.sequences()]
    bare_forward = partial(peers.bare_forward, whole_texts.model, texts, _BATCH)
    seconds = medians({"topk": partial(whole_texts.fill, folder), "bare": bare_forward}, -(-repetitions // 2))
    ratio = seconds["bare"] / seconds["topk"]
    yield Row("annotate, every token a target: topk / bare forward, rate", ratio, 0.95, "higher")


def _bytes_on_disk(store: Path) -> int:
    return sum(path.stat().st_size for path in store.rglob("*") if path.is_file())


def few_shot(folder: Path, workload: Workload, repetitions: int) -> Iterator[Row]:
    """Annotating the default task, whose prompts share their demonstrations."""
    texts = [ids for ids, _ in workload.sequences()]
    seconds = medians(
        {
            "ours": partial(workload.fill, folder),
            "bare": partial(peers.bare_forward, workload.model, texts, _BATCH),
            "naive": partial(
                peers.naive_capture, workload.model, workload.sequences(), _BATCH, folder / "naive.parquet"
            ),
        },
        repetitions,
    )
    yield Row("annotate reviews: requests/s", len(workload.requests) / seconds["ours"], None, "higher")
    yield Row("annotate reviews: ours / bare forward, rate", seconds["bare"] / seconds["ours"], 1.0, "higher")
    yield Row("annotate reviews: ours / naive loop, rate", seconds["naive"] / seconds["ours"], 1.2, "higher")


def generation(workload: Workload, repetitions: int) -> Iterator[Row]:
    """Greedy rationales with a shared prefix, sorted by length, beside `generate` on whole prompts."""
    limits = {"max_new_tokens": int(material.compose().teacher.kind.max_new_tokens), "stop": workload.prompts.end}
    prompts = [workload.prompt(request) for request in workload.requests]
    written: dict[str, list[list[int]]] = {}

    def ours() -> None:
        written["ours"] = _greedy(workload, **limits)

    def theirs() -> None:
        written["theirs"] = peers.generate(workload.model, prompts, _BATCH, **limits)

    seconds = medians({"ours": ours, "theirs": theirs}, repetitions)
    pairs = list(zip(prompts, written["ours"], written["theirs"], strict=True))
    num_mine, num_theirs = (sum(len(pair[side]) for pair in pairs) for side in (1, 2))
    rate = num_mine / seconds["ours"] * seconds["theirs"] / num_theirs
    yield Row("rationales: tokens/s", num_mine / seconds["ours"], None, "higher")
    yield Row("rationales: ours / generate, rate", rate, 1.5, "higher")
    # Rounding breaks ties between tokens; a small gap at the first difference shows that nothing else differs.
    differing = [pair for pair in pairs if pair[1] != pair[2]]
    gaps = [peers.gap(workload.model, *pair) for pair in differing]
    yield Row(f"rationales: equal texts, of {len(pairs)}", len(pairs) - len(differing), None, "higher")
    yield Row("rationales: largest gap at the first difference, nats", max(gaps, default=0.0), None, "lower")


def _greedy(workload: Workload, *, max_new_tokens: int, stop: int) -> list[list[int]]:
    """Text for each request, in groups of similar length as annotation makes them; the prefix is read once."""
    reader = PrefixedReader(workload.model, workload.prompts.prefix("rationale"), workload.prompts.vocabulary_size)
    written: dict[str, list[int]] = {}
    for group in group_requests(workload.requests, workload.group_size):
        for start in range(0, len(group.requests), workload.batch_size):
            batch = group.requests[start : start + workload.batch_size]
            texts = reader.read([r.question_ids for r in batch]).greedy(max_new_tokens=max_new_tokens, stops=[stop])
            written |= {request.key: ids for request, ids in zip(batch, texts, strict=True)}
    return [written[request.key] for request in workload.requests]


# Reading


def reading(folder: Path, texts: Texts, repetitions: int) -> Iterator[Row]:
    """Random access to training tensors beside `datasets`, in tokens per second of CPU time."""
    has_peer = importlib.util.find_spec("datasets") is not None
    if not has_peer:
        print("datasets is not installed: rows that compare with it are skipped", file=sys.stderr)
    for cache in ("topk", "sampled"):
        codec = material.codec(cache)
        soft = SoftTargets.join([trip.cut for trip in round_trips(codec, texts, "reading")])
        for length, number in ((100, 640), (2, 6400)):
            records = _sample_records(soft, length, number)
            store = _store_records(folder / f"{cache}-{length}", codec, records)
            readers = peers.nested_lists(folder / f"{cache}-{length}.arrow", records) if has_peer else {}
            yield from _read_rows(f"read {cache}, records of {length}", store, length, readers, repetitions)


def _read_rows(
    name: str, store: Store, length: int, readers: Mapping[str, peers.Read], repetitions: int
) -> Iterator[Row]:
    rng = random.Random(0)
    batches = [[rng.randrange(len(store)) for _ in range(rng.randint(8, 32))] for _ in range(5000 // length)]
    reads: dict[str, peers.Read] = {"ours": partial(_training_tensors, store), **readers}
    expected = _training_tensors(store, batches[0])[:2]
    for reader_name, tensors in readers.items():  # equal positions and ids: the same work was done
        if not all(map(torch.equal, expected, tensors(batches[0]))):
            raise AssertionError(f"{name}: {reader_name} reads other tensors")
    variants = {reader_name: partial(_read_all, read, batches) for reader_name, read in reads.items()}
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # like a DataLoader worker; waiting threads would count as CPU time
    seconds = medians(variants, repetitions, time.process_time)
    torch.set_num_threads(num_threads)
    num_tokens = length * sum(map(len, batches))
    yield Row(f"{name}: tokens per CPU second", num_tokens / seconds["ours"], 1e6, "higher")
    yield Row(f"{name}: fraction of 2e6 tokens per CPU second", num_tokens / seconds["ours"] / 2e6, None, "higher")
    if readers:
        best = min(seconds[reader_name] for reader_name in readers)
        yield Row(f"{name}: rate / fastest reader of datasets", best / seconds["ours"], 40, "higher")
    for reader_name in readers:
        yield Row(
            f"{name}: datasets as {reader_name}, tokens per CPU second",
            num_tokens / seconds[reader_name],
            None,
            "higher",
        )


def _read_all(read: Callable[[Sequence[int]], object], batches: Sequence[Sequence[int]]) -> None:
    for batch in batches:
        read(batch)


def _training_tensors(store: Store, indices: Sequence[int]) -> peers.Tensors:
    """Training tensors as `distill.lessons.loader` makes them from a store."""
    soft = store.soft_targets([(_record_key(index), "answer") for index in indices]).for_training()
    batch_entries = entries(np.ones(len(soft), bool), soft)
    return batch_entries.position_E, batch_entries.ids_E, batch_entries.logprobs_E


def _record_key(index: int) -> str:
    return hashlib.blake2b(str(index).encode(), digest_size=16).hexdigest()


def _sample_records(soft: SoftTargets, length: int, number: int) -> list[SoftTargets]:
    """Records of distributions drawn at random from real ones."""
    rows = np.random.default_rng(0).integers(len(soft), size=(number, length))
    return [soft[row] for row in rows]


def _store_records(folder: Path, codec: Codec, records: Sequence[SoftTargets]) -> Store:
    store = Store(folder, {"made for": "a benchmark"}, codec)
    annotations = [
        Annotation(_record_key(index), {"answer": Target((0,) * len(soft), soft)}, "")
        for index, soft in enumerate(records)
    ]
    with store.writing() as writer:
        for start in range(0, len(annotations), _PER_SHARD):
            writer.add(annotations[start : start + _PER_SHARD])
            writer.flush()
    return store


# Waiting for data


def data_wait(source: AnnotationJob, store: Store, requests: Sequence[Request], repetitions: int) -> Iterator[Row]:
    """Time to make a batch, relative to a default training step."""
    config = material.compose()
    prompts = source.prompts.zero_shot(source.prompts.tokenizer)
    by_example_and_span = {(request.example.id, request.span): request for request in requests}
    needed = frozenset({("answer", "labels"), ("answer", "soft")})
    settings: Any = {
        "soft_teacher": None,
        "rationales": {},
        "further_answers": {},
        "answer": config.task.answer_mode,
        "needed": needed,
    }
    settings |= {"pairing": Pairing(), "too_long": {}}
    join = Join(prompts=prompts, teacher=AnnotationReader(store, by_example_and_span, source.task, prompts), **settings)
    lessons = join.join([request.example for request in requests]).lessons
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
        {"batches": batches, "step": optimizer_step(module, optimizer, partial(total_loss, module, batch))}, repetitions
    )
    yield Row("training: default step, seconds", seconds["step"], None, "lower")
    yield Row("training: making a batch / step", seconds["batches"] / len(sampler) / seconds["step"], 0.01, "lower")


# Opening


def opening(folder: Path, repetitions: int) -> Iterator[Row]:
    """A store of a million records: time to open it and to look up every record."""
    codec = material.codec("topk")
    _make_million(folder, codec)
    open_store = partial(Store, folder, {"made for": "a benchmark"}, codec)
    yield Row("opening a store of 1,000,000 records, seconds", medians({"": open_store}, repetitions)[""], 1.0, "lower")
    store, example = open_store(), Example("")
    requests = [Request(_record_key(index), "answer", example, ()) for index in range(_RECORDS)]
    if len(store) != _RECORDS or store.missing(requests):
        raise AssertionError(f"the store has {len(store)} records, expected {_RECORDS}")
    missing = medians({"": partial(store.missing, requests)}, repetitions)[""]
    yield Row("missing() over 1,000,000 requests, seconds", missing, None, "lower")


def _make_million(folder: Path, codec: Codec) -> None:
    """Write a store without syncing: one real shard, and empty files of the same size."""
    shard = [Annotation(_record_key(index), {}, "positive") for index in range(_PER_SHARD)]
    store = Store(folder, {"made for": "a benchmark"}, codec)
    with store.writing() as writer:
        writer.add(shard)
    (manifest,) = folder.glob("manifests/*/*.jsonl")
    line = json.loads(manifest.read_bytes())["line"]
    with manifest.open("ab") as file:
        for number in range(1, _RECORDS // _PER_SHARD):
            line["shard"] = f"{number:016x}"
            indices = range(number * _PER_SHARD, (number + 1) * _PER_SHARD)
            line["keys"] = base64.b64encode(b"".join(bytes.fromhex(_record_key(index)) for index in indices)).decode()
            body = json.dumps(line, sort_keys=True).encode()
            file.write(b'{"crc32": %10d, "line": %s}\n' % (zlib.crc32(body), body))
            for suffix, size in line["bytes"].items():
                path = folder / f"{line['shard']}.{suffix}"
                path.touch()
                os.truncate(path, size)


if __name__ == "__main__":
    main(sys.argv[1:])
