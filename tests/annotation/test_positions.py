"""Laws 2, 3 and 8 where only the chosen positions of a target keep soft targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from omegaconf import DictConfig

from distill.annotation.annotation_job import AnnotationJob, open_annotation_job
from distill.annotation.codec_probe import sample_distributions
from distill.annotation.fill import fill
from distill.annotation.inspection import estimate, export_parquet, format_record, rescore
from distill.annotation.positions import ALL_POSITIONS, Positions
from distill.cache.codecs.dense import Dense
from distill.cache.codecs.topk import TopK
from distill.cache.store import Store
from distill.errors import ConfigError
from distill.lessons.collate import collate
from distill.lessons.curriculum import build_curriculum, prepare
from distill.records import Annotation, Example, Request, SoftTargets, Target
from tests.conftest import compose, shards, tiny_overrides

Configured = Callable[..., DictConfig]
SHARE = "cache.positions.share=0.3"
LONG = "teacher.kind.max_new_tokens=20"
HALF = Positions(share=0.5, by="entropy")


@dataclass(frozen=True)
class Filled:
    """A job whose cache has been filled with texts that the teacher wrote, and its requests."""

    job: AnnotationJob
    requests: dict[tuple[str, Any], Request]

    @classmethod
    def of(cls, config: DictConfig) -> Filled:
        job = open_annotation_job(config)
        train = [example.unlabelled() for example in job.splits.train]
        examples = {"answer": [*train, *job.splits.test], "rationale": [*train, *job.splits.test]}
        return cls(job, dict(fill(job, examples).requests))

    @property
    def learned(self) -> list[Request]:
        """The requests for the texts of several tokens that are learned."""
        requests = [r for r in self.requests.values() if r.span == "rationale" and not r.is_held_out]
        assert len(requests) == 12
        return requests


@pytest.fixture(scope="module")
def caches(
    teacher_folder: Path, student_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Filled, Filled]:
    """A whole cache, and one of the same teacher that keeps soft targets at a share of the positions."""
    overrides = tiny_overrides(tmp_path_factory.mktemp("positions"), teacher_folder, student_folder)
    return Filled.of(compose(*overrides, LONG)), Filled.of(compose(*overrides, LONG, SHARE))


def entropies(job: AnnotationJob, module: Any, request: Request, annotation: Annotation) -> dict[str, np.ndarray]:
    """The entropy of the model's own distribution before each token of the targets, by a plain forward pass."""
    ids, places = [*job.prompts.prefix(request.span), *request.question_ids], dict[str, range]()
    for span in (name for name in ("rationale", "answer") if name in annotation.targets):
        ids += job.prompts.separator_ids() if places else ()
        places[span] = range(len(ids) - 1, len(ids) - 1 + len(annotation.targets[span].token_ids))
        ids += annotation.targets[span].token_ids
    with torch.no_grad():
        logprobs_TV = module(torch.tensor([ids])).logits[0, :, : job.prompts.vocabulary_size].log_softmax(-1)
    entropy_T = -(logprobs_TV.exp() * logprobs_TV).sum(-1).numpy()
    return {span: entropy_T[list(where)] for span, where in places.items()}


def same(left: SoftTargets | None, right: SoftTargets | None) -> bool:
    assert left is not None
    assert right is not None
    names = ("ids_E", "logprobs_E", "tail_N", "num_exact_N")
    return all(np.array_equal(getattr(left, name), getattr(right, name)) for name in names)


def test_the_positions_of_highest_entropy_keep_what_a_whole_cache_has(caches: tuple[Filled, Filled]) -> None:
    whole, cut = caches
    module, num_longer = whole.job.teacher.load(), 0
    for name, request in whole.requests.items():
        expected, actual = whole.job.store.read(request.key), cut.job.store.read(cut.requests[name].key)
        assert replace(actual, key="", targets={}) == replace(expected, key="", targets={})
        by_span = entropies(whole.job, module, request, expected)
        for span, target in expected.targets.items():
            kept, num_tokens = actual.targets[span], len(target.token_ids)
            num_kept = min(num_tokens, 1 + max(1, round(0.3 * (num_tokens - 1))))
            assert kept.token_ids == target.token_ids
            if cut.requests[name].is_held_out:
                assert kept.chosen is None
                assert same(kept.soft, target.soft)
            elif num_tokens > 1:
                least_certain = np.argsort(-by_span[span][:-1])[: num_kept - 1].tolist()
                assert kept.chosen == (*sorted(least_certain), num_tokens - 1)  # the end is never left out
                assert same(kept.soft, target.soft[np.array(kept.chosen)])
                num_longer += num_tokens > 4
    assert num_longer > 10
    assert {r.is_held_out for r in cut.requests.values()} == {True, False}
    whole.job.teacher.close()


def test_a_whole_cache_is_as_it_was_before_there_was_a_choice(caches: tuple[Filled, Filled]) -> None:
    whole, cut = caches
    for filled, has_choice in ((whole, False), (cut, True)):
        assert set(filled.job.store.fingerprint) == {"task", "teacher", "codec", *["positions"] * has_choice}
        assert any(request.is_held_out for request in filled.requests.values()) == has_choice
        assert any(b'"mask"' in content for content in shards(filled.job.store.folder).values()) == has_choice


def test_what_decides_the_positions_is_in_the_fingerprint(configured: Configured) -> None:
    changes = [(), (SHARE,), ("cache.positions.share=0.5",), (SHARE, "cache.positions.by=random")]
    jobs = [open_annotation_job(configured(*change)) for change in changes]
    assert len({job.store.digest for job in jobs}) == len(jobs)
    ways = [open_annotation_job(configured(f"cache.positions.by={by}")).store.digest for by in ("entropy", "random")]
    assert ways == [jobs[0].store.digest] * 2
    with pytest.raises(ConfigError, match=r"cache\.positions\.share=0\.0: expected a share above 0"):
        open_annotation_job(configured("cache.positions.share=0.0"))


@pytest.mark.slow
@pytest.mark.parametrize("second", [False, True])
def test_losses_on_words_see_all_tokens_and_those_on_soft_targets_the_chosen_ones(
    second: bool, configured: Configured, teacher_folder: Path, student_folder: Path, tmp_path: Path
) -> None:
    scorer = {"model": student_folder, "kind.dtype": "float32"}
    more = ["teacher@soft_teacher=causal_lm", *(f"soft_teacher.{k}={v}" for k, v in scorer.items())] if second else []
    job = prepare(configured(LONG, SHARE, "loss=[answer,teacher_answer,kl,rationale_kl]", *more), tmp_path)
    curriculum, num_chosen = build_curriculum(job), 0
    for lesson in curriculum.train:
        batch, counts = collate([lesson], {}, 0, curriculum.read), lesson.counts()
        tokens = [n for s in lesson.sequences for t in s.targets for n in s.ids[t.start : t.stop]]
        assert batch.label_N.tolist() == tokens
        assert counts["answer", "soft"] + counts["rationale", "soft"] == batch.is_soft_N.sum()
        for soft in (t.soft for s in lesson.sequences for t in s.targets if t.soft):
            assert soft.num_positions == len(curriculum.read([soft.place]))
            num_chosen += soft.chosen is not None
    assert num_chosen >= 5
    soft = [t.soft for lesson in curriculum.validation for s in lesson.sequences for t in s.targets if t.soft]
    assert soft
    assert all(place.chosen is None for place in soft)


def cut_of(logits: Any) -> SoftTargets:
    logprobs_NV = torch.tensor(logits).log_softmax(-1)
    return HALF.cut(TopK(k=1, temperature=1.0)).cut(logprobs_NV, torch.zeros(len(logprobs_NV), dtype=torch.float64))


def chosen(positions: Positions, soft: SoftTargets, key: str = "") -> tuple[int, ...] | None:
    target = Target((5,) * len(soft), soft)
    (kept,) = positions.reduced([Request(key, "answer", Example("?"), ())], [Annotation(key, {"answer": target}, None)])
    return kept.targets["answer"].chosen


def test_the_entropy_is_that_of_the_whole_distribution_and_equal_ones_are_taken_in_order() -> None:
    peaked, split, long_tail = [9.0, 0.0, 0.0, 0.0], [9.0, 9.0, -99.0, -99.0], [2.0, 0.0, 0.0, 0.0]
    # After truncation, `split` would be the less certain one of the last two.
    assert chosen(HALF, cut_of([peaked, split, long_tail, peaked])) == (1, 2, 3)
    assert chosen(Positions(share=0.25, by="entropy"), cut_of([peaked, split, long_tail, peaked])) == (2, 3)
    assert chosen(HALF, cut_of([split] * 5)) == (0, 1, 4)
    assert chosen(Positions(share=0.01, by="entropy"), cut_of([peaked, peaked, split])) == (0, 2)
    assert chosen(HALF, cut_of([peaked])) is chosen(ALL_POSITIONS, cut_of([peaked] * 3)) is None
    constrained = torch.tensor([[0.0, -torch.inf], [0.0, 0.0], [0.0, 0.0]])
    assert chosen(HALF, cut_of(constrained.tolist())) == (1, 2)


def test_random_positions_depend_on_the_key_alone() -> None:
    soft, by_chance = cut_of([[0.0, 1.0]] * 40), Positions(share=0.25, by="random")
    draws = {key: chosen(by_chance, soft, key) for key in ("a", "b")}
    assert draws["a"] == chosen(by_chance, soft, "a") != draws["b"]
    assert [len(draw) for draw in draws.values()] == [11, 11]


@pytest.mark.slow
def test_stored_positions_are_compared_with_the_live_teacher(caches: tuple[Filled, Filled]) -> None:
    job, learned = caches[1].job, caches[1].learned
    moved = [replace(a, targets=later(a.targets)) for a in (job.store.read(request.key) for request in learned)]
    other = Store(job.store.folder.parent / "moved", job.store.fingerprint, job.codec)
    with other.writing() as writer:
        writer.add(moved)
    job.teacher.load()
    assert rescore(job.store, job.teacher, learned, 8, seed=0).is_close
    assert not rescore(other, job.teacher, learned, 8, seed=0).is_close
    num_bytes = [estimate(replace(job, positions=p), learned).num_bytes for p in (job.positions, ALL_POSITIONS)]
    assert num_bytes[0] < 0.6 * num_bytes[1]
    job.teacher.close()


def test_codecs_are_compared_on_the_positions_that_are_kept(caches: tuple[Filled, Filled]) -> None:
    job, learned = caches[1].job, caches[1].learned
    teacher = job.build_teacher(codec=job.positions.cut(Dense()))
    teacher.load()
    numbers = [sum(map(len, sample_distributions(teacher, p, learned, 0))) for p in (job.positions, ALL_POSITIONS)]
    teacher.close()
    assert numbers[0] < 0.5 * numbers[1]


def later(targets: Mapping[Any, Target]) -> dict[Any, Target]:
    """The targets with each distribution at the place of the next one that is kept."""
    return {
        span: replace(target, soft=target.soft[np.roll(np.arange(len(target.soft)), 1)])
        for span, target in targets.items()
        if target.soft
    }


def test_inspection_names_the_tokens_that_have_soft_targets(caches: tuple[Filled, Filled], tmp_path: Path) -> None:
    job, requests = caches[1].job, list(caches[1].requests.values())
    reader = job.reader({})
    export_parquet(reader, requests, job.prompts, tmp_path / "all.parquet")
    targets = {request.key: reader.read(request).targets for request in requests}
    for row in pq.read_table(tmp_path / "all.parquet").to_pylist():
        target = targets[row["key"]][row["span"]]
        assert row["positions"] == [*(target.chosen or range(len(target.token_ids)))]
        assert len(row["tokens"]) >= len(row["positions"]) == len(row["ids"]) == len(row["tail"])
    request = caches[1].learned[0]
    target = targets[request.key]["rationale"]
    text = format_record(request, reader.read(request), job.prompts)
    lines = text.partition("rationale: each token")[2].splitlines()[1 : 1 + len(target.token_ids)]
    assert tuple(n for n, line in enumerate(lines) if "rest" in line) == target.chosen


def test_soft_targets_are_read_together_whatever_their_records_keep(caches: tuple[Filled, Filled]) -> None:
    store = caches[1].job.store
    records = [store.read(request.key) for request in caches[1].requests.values()]
    places = [(annotation.key, span) for annotation in reversed(records) for span in annotation.targets]
    parts = [store.read(key).targets[span].soft for key, span in places]
    assert {target.chosen is None for record in records for target in record.targets.values()} == {True, False}
    assert same(store.soft_targets(places), SoftTargets.join([part for part in parts if part is not None]))
