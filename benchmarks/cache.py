"""Sizes, fidelity and speed of the cache, of filling it and of reading it: `scripts/benchmark cache`.

repetitions=5     of each variant of a timing; the longest are repeated half as often
data=<path>       GSM8K as JSON lines; without it what is measured on it is left out
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from benchmarks import material, peers
from benchmarks.material import Asked
from benchmarks.measure import Row, keep, medians
from distill import config as configuration
from distill.annotate import Source, plan
from distill.cache import Codec, uniforms
from distill.cache.rs_kd import RandomSampling
from distill.cache.store import Store
from distill.data import Join, StepSampler, collate
from distill.head import head_loss
from distill.models import native_dtype
from distill.modules import StudentModule
from distill.reading import PrefixedReader
from distill.records import Annotation, Example, Request, SoftTargets, Span, Target
from distill.student import open_student

Texts = Sequence[Float[Tensor, "N V"]]
Rows = list[Row]
_POSITIONS = 1000
_LARGE_VOCABULARY = 151_936
_SAMPLED_BARS = {"chat": 30, "manual": 60, "reviews": 60}  # bytes per token
_SOLUTIONS, _REVIEWS, _BATCH = 24, 16, 8  # examples that are annotated, and how many at a time
_RECORDS, _PER_SHARD = 1_000_000, 64


def main(arguments: Sequence[str]) -> None:
    """Measure everything, and keep it."""
    given = dict(argument.partition("=")[::2] for argument in arguments)
    if not given.keys() <= {"repetitions", "data"}:
        sys.exit(f"{__doc__}\nfound: {' '.join(arguments)}")
    repetitions, data = int(given.get("repetitions", "5")), Path(given.get("data", "gsm8k.jsonl"))
    with tempfile.TemporaryDirectory(prefix="distill-benchmark-") as name:
        keep("cache", list(_measured(Path(name), repetitions, data)))


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


# Sizes and fidelity


@dataclass(frozen=True)
class Kept:
    """What a codec cuts from the distributions of a text, what is read back of it, and the bytes between."""

    cut: SoftTargets
    back: SoftTargets
    num_bytes: int


def kept(codec: Codec, texts: Texts, name: str) -> Iterator[Kept]:
    """Pass each text through the codec, as a record of its own."""
    for place, logprobs_NV in enumerate(texts):
        uniform_N = torch.from_numpy(uniforms(f"{name}/{place}", len(logprobs_NV), codec.seed or 0))
        cut = codec.cut(logprobs_NV, uniform_N)
        arrays = codec.pack(cut)
        yield Kept(cut, codec.unpack(arrays), sum(array.nbytes for array in arrays.values()))


def sizes(kind: str, texts: Texts) -> Iterator[Row]:
    """Bytes, rounding, captured mass and noise, on real distributions.

    Bytes go with entropy: the manual's is what their bar for prose is of, reviews torn out of context have a nat more.
    """
    codecs = {"sampled": material.codec("sampled"), "topk k=32": material.codec("topk")}
    codecs |= {f"topk k={k}": material.codec("topk", k=k) for k in (16, 64)}
    codecs |= {"rs_kd n=64": material.codec("rs_kd"), "dense": material.codec("dense")}
    byte_bars = {"sampled": _SAMPLED_BARS[kind], "topk k=16": 48, "topk k=64": 200}
    yield Row(f"{kind}: mean entropy, nats", _mean_entropy(texts), None, "lower")
    for name, codec in codecs.items():
        found = list(kept(codec, texts, kind))
        yield Row(f"{kind}: {name}, bytes per token", _bytes_per_token(found), byte_bars.get(name), "lower")
        if name != "dense" and not name.startswith("rs_kd"):  # neither rounds
            rounding = sum(_rounding(one) for one in found) / _num_positions(found)
            bar = {"topk k=16": 1.5e-4, "topk k=64": 1e-4}.get(name)
            yield Row(f"{kind}: {name}, KL by rounding, nats", rounding, bar, "lower")
            mass = 1 - sum(float(one.cut.tail_N.sum()) for one in found) / _num_positions(found)
            yield Row(f"{kind}: {name}, mass of exact entries", mass, None, "higher")
    yield from _noise(kind, texts, codecs["sampled"])
    wide = [material.widened(logprobs_NV, _LARGE_VOCABULARY) for logprobs_NV in texts]
    for name in ("sampled", "topk k=16", "topk k=32", "topk k=64", "rs_kd n=64"):
        bar = byte_bars["sampled"] if name == "sampled" else None  # the others' are for ids of 16 bits
        found = list(kept(codecs[name], wide, kind))
        yield Row(f"{kind}: {name}, bytes per token at V={_LARGE_VOCABULARY}", _bytes_per_token(found), bar, "lower")


def _noise(kind: str, texts: Texts, sampled: Codec) -> Iterator[Row]:
    """The noise of `sampled`, and its bytes beside those of independent draws that are as noisy."""
    found = list(kept(sampled, texts, kind))
    noise = sum(map(_squared_error, found, texts)) / _num_positions(found)
    alone = float(torch.cat([1 - logprobs_NV.double().exp().square().sum(-1) for logprobs_NV in texts]).mean())
    n = round(alone / noise)  # of n independent draws the noise is alone / n
    as_noisy = RandomSampling(n=n, seed=0, temperature=1.0)
    ratio = _bytes_per_token(found) / _bytes_per_token(list(kept(as_noisy, texts, kind)))
    yield Row(f"{kind}: sampled, E|t-p|^2", noise, None, "lower")
    yield Row(f"{kind}: n at which rs_kd is as noisy", n, None, "higher")
    yield Row(f"{kind}: bytes of sampled / rs_kd at equal noise", ratio, 0.45, "lower")


def _mean_entropy(texts: Texts) -> float:
    return float(torch.cat([-(logprobs_NV.exp() * logprobs_NV).sum(-1) for logprobs_NV in texts]).mean())


def _num_positions(found: Sequence[Kept]) -> int:
    return sum(len(one.cut) for one in found)


def _bytes_per_token(found: Sequence[Kept]) -> float:
    return sum(one.num_bytes for one in found) / _num_positions(found)


def _rounding(one: Kept) -> float:
    """Sum over positions of the KL from what was cut to what is read back, the rest being one outcome."""
    before_NB, after_NB = _buckets(one.cut), _buckets(one.back)
    is_there_NB = before_NB > 0
    return float((before_NB[is_there_NB] * np.log(before_NB[is_there_NB] / after_NB[is_there_NB])).sum())


def _buckets(soft: SoftTargets) -> np.ndarray:
    head = soft.buckets()
    return np.concatenate([np.exp(head.logprobs_NK.astype(np.float64)), head.tail_N[:, None]], 1)


def _squared_error(one: Kept, logprobs_NV: Float[Tensor, "N V"]) -> float:
    """Sum over positions of |t - p|^2, t being what a student is taught."""
    p_NV = logprobs_NV.double().exp()
    t_NK = torch.from_numpy(one.back.logprobs_NK).double().exp()
    p_NK = p_NV.gather(-1, torch.from_numpy(one.back.ids_NK).long().clamp(min=0))
    return float(p_NV.square().sum() + (t_NK * (t_NK - 2 * p_NK)).sum())


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
    for cache in ("topk", "sampled"):
        codec = material.codec(cache)
        real = SoftTargets.join([one.cut for one in kept(codec, texts, "reading")])
        for length, number in ((100, 640), (2, 6400)):
            records = _dealt(real, length, number)
            store = _stored(folder / f"{cache}-{length}", codec, records)
            ways = peers.nested_lists(folder / f"{cache}-{length}.arrow", records)
            yield from _read_rows(f"read {cache}, records of {length}", store, length, ways, repetitions)


def _read_rows(name: str, store: Store, length: int, ways: Mapping[str, peers.Read], repetitions: int) -> Iterator[Row]:
    rng = random.Random(0)
    batches = [[rng.randrange(len(store)) for _ in range(rng.randint(8, 32))] for _ in range(1000 // length)]
    read = {"ours": partial(_training_tensors, store), **ways}
    expected = _training_tensors(store, batches[0])[0]
    for way, tensors in ways.items():  # the same ids come out, so the same work was done
        if not torch.equal(expected, tensors(batches[0])[0]):
            raise AssertionError(f"{name}: {way} reads something else")
    variants = {way: partial(_every, one, batches) for way, one in read.items()}
    seconds = medians(variants, repetitions, time.process_time)
    num_tokens = length * sum(map(len, batches))
    best = min(seconds[way] for way in ways)
    yield Row(f"{name}: tokens per CPU second", num_tokens / seconds["ours"], 1e6, "higher")
    yield Row(f"{name}: share of 2e6 tokens per CPU second", num_tokens / seconds["ours"] / 2e6, None, "higher")
    yield Row(f"{name}: rate / faster way of datasets", best / seconds["ours"], 40, "higher")
    for way in ways:
        yield Row(f"{name}: datasets as {way}, tokens per CPU second", num_tokens / seconds[way], None, "higher")


def _every(read: Callable[[Sequence[int]], object], batches: Sequence[Sequence[int]]) -> None:
    for batch in batches:
        read(batch)


def _training_tensors(store: Store, places: Sequence[int]) -> peers.Tensors:
    """As `distill.data` makes them of what a store gives."""
    soft = _soft_targets(store, [(_key(place), "answer") for place in places]).for_training()
    return torch.from_numpy(soft.ids_NK).to(torch.int64), torch.from_numpy(soft.logprobs_NK).to(torch.float32)


def _soft_targets(store: Any, places: Sequence[tuple[str, Span]]) -> SoftTargets:
    if hasattr(store, "soft_targets"):
        found: SoftTargets = store.soft_targets(places)
        return found
    return SoftTargets.join([store.read(key).targets[span].soft for key, span in places])


def _key(place: int) -> str:
    return hashlib.blake2b(str(place).encode(), digest_size=16).hexdigest()


def _dealt(real: SoftTargets, length: int, number: int) -> list[SoftTargets]:
    """Records of real distributions, dealt out at random."""
    rows = np.random.default_rng(0).integers(len(real), size=(number, length))
    arrays = (real.ids_NK, real.logprobs_NK, real.tail_N, real.num_exact_N)
    return [SoftTargets(*(array[some] for array in arrays), real.is_tail_drawn) for some in rows]


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
    join = Join(
        prompts=prompts, store=store, requests=by_place, rationales={}, answer=config.task.answer, needed=needed
    )
    lessons = join.lessons([request.example for request in requests])
    sampler = StepSampler(lessons, batch_size=config.batch_size, num_microbatches=1, num_steps=20, seed=0)

    def batches() -> list[Any]:
        return [collate([lessons[i] for i in part.indices], part.counts, prompts.end) for part in sampler]

    module, optimizer = _student(source, config)
    batch = batches()[0]
    seconds = medians({"batches": batches, "step": partial(_step, module, optimizer, batch)}, repetitions)
    yield Row("training: default step, seconds", seconds["step"], None, "lower")
    yield Row("training: making a batch / step", seconds["batches"] / len(sampler) / seconds["step"], 0.01, "lower")


def _student(source: Source, config: Any) -> tuple[StudentModule, torch.optim.Optimizer]:
    settings = config.student
    student = open_student(
        source.folder, keep_layers=settings.keep_layers, freeze=list(settings.freeze), from_scratch=False
    )
    module = StudentModule(
        student,
        objectives={name: configuration.build(node) for name, node in config.loss.items()},
        vocabulary_size=source.prompts.vocabulary_size,
        retemper=source.codec.at_temperature,
        make_optimizer=configuration.build(config.optim.optimizer),
        make_schedule=configuration.build(config.optim.schedule),
    )
    return module, module.configure_optimizers()["optimizer"]


def _step(module: StudentModule, optimizer: torch.optim.Optimizer, batch: Any) -> None:
    """What Lightning does of a step, without Lightning."""
    with torch.autocast("cpu", torch.bfloat16, enabled=native_dtype() == torch.bfloat16):
        loss, _ = head_loss(module.hidden(batch), *module.head(), list(module.terms(batch).values()))
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(module.model.parameters(), 1.0)
    optimizer.step()


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
