"""The annotate command: concurrent and interrupted processes, and inspection of a cache."""

from __future__ import annotations

import itertools
import re
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from omegaconf import DictConfig

from distill.annotate import main
from distill.annotation.annotation_job import open_annotation_job
from distill.annotation.fill import Part, fill
from distill.annotation.inspection import estimate, rescore
from distill.annotation.requests import group_requests
from distill.errors import CacheError, ConfigError
from distill.models.batches import BatchLimit
from tests.annotation.conftest import annotate_options
from tests.conftest import CountingTeacher, compose, counted, grid, run, shards, start
from tests.teachers.conftest import is_close


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path) -> dict[str, bytes]:
    """The shards of a single process that runs to its end."""
    root = tmp_path_factory.mktemp("undisturbed")
    done = run(root, *annotate_options(root, teacher_folder), command="annotate")
    assert done.returncode == 0, done.stderr
    return shards(root / "cache")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["devices", "parts", "at once"])
def test_several_processes_write_the_same_shards_as_one(
    how: str, undisturbed: dict[str, bytes], tmp_path: Path, teacher_folder: Path
) -> None:
    overrides = {
        "devices": ["devices=2"],
        "parts": ["part=1/3", "part=2/3", "part=3/3"],
        "at once": ["seed=0", "seed=1"],
    }
    processes = [
        start(tmp_path, *annotate_options(tmp_path, teacher_folder, override), command="annotate")
        for override in overrides[how]
    ]
    for process in processes:
        _, errors = process.communicate(timeout=150)
        assert process.returncode == 0, errors
    assert shards(tmp_path / "cache") == undisturbed
    manifests = list((tmp_path / "cache").glob("manifests/*/*"))
    # Of two concurrent processes one may finish before the other has started.
    assert len(manifests) in {"devices": (2,), "parts": (3,), "at once": (1, 2)}[how]
    lines = [line for path in manifests for line in path.read_text().splitlines() if '"shard"' in line]
    assert 2 * len(lines) == len(undisturbed)  # no group was annotated twice


@pytest.mark.slow
def test_killed_at_random_times_annotation_ends_in_the_same_shards(
    undisturbed: dict[str, bytes], tmp_path: Path, teacher_folder: Path
) -> None:
    rng, cache, num_seen = np.random.default_rng(0), tmp_path / "cache", [0]
    for _ in range(2):
        process = start(tmp_path, *annotate_options(tmp_path, teacher_folder), command="annotate")
        num_groups = num_seen[-1] + int(rng.integers(1, 4))
        while process.poll() is None and len(shards(cache)) < 2 * num_groups:
            time.sleep(0.002)
        time.sleep(float(rng.random()) * 0.05)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        num_seen.append(len(shards(cache)) // 2)
    assert num_seen == sorted(num_seen)
    assert 0 < num_seen[-1] < len(undisturbed) // 2
    done = run(tmp_path, *annotate_options(tmp_path, teacher_folder), command="annotate")
    assert done.returncode == 0, done.stderr
    assert shards(cache) == undisturbed
    assert not list((cache / "claims").glob("[0-9a-f]*"))


def test_groups_depend_on_the_examples_alone(configured: Callable[..., DictConfig]) -> None:
    job = open_annotation_job(configured())
    requests = [job.prompts.request(example, "answer") for example in job.splits.train]
    groups = group_requests(requests, 4)
    assert [len(group.requests) for group in groups] == [4, 4, 4]
    assert group_requests([*requests[::-1], requests[0]], 4) == groups
    lengths = [len(r.question_ids) + len(r.given_ids) for group in groups for r in group.requests]
    assert lengths == sorted(lengths)


def test_parts_are_disjoint_and_cover_all_examples(configured: Callable[..., DictConfig]) -> None:
    examples, annotated = {"answer": open_annotation_job(configured()).splits.train}, []
    for part in (1, 2, 3):
        job, teacher = counted(configured("teacher.group_size=2", f"cache.dir={configured().root}/{part}"))
        fill(job, examples, part=Part(part, 3))
        annotated.append({request.key for request in teacher.asked})
    assert not any(left & right for left, right in itertools.combinations(annotated, 2))
    assert len(set().union(*annotated)) == len(examples["answer"])


def test_an_estimate_writes_nothing_and_is_accurate(configured: Callable[..., DictConfig]) -> None:
    job = open_annotation_job(configured("task.examples.num_unlabelled=60"))
    requests = [job.prompts.request(example, "answer") for example in job.splits.train]
    job.teacher.load()
    result = estimate(replace(job, batch_limit=BatchLimit(8)), requests)
    job.teacher.close()
    assert result.num_sampled == 8
    assert result.seconds > 0
    assert not job.store.folder.exists()
    fill(job, {"answer": job.splits.train})
    num_bytes = sum(path.stat().st_size for path in job.store.folder.glob("*.safetensors"))
    assert 0.3 < result.num_bytes / num_bytes < 1.2


class Sizes(CountingTeacher):
    """A teacher that keeps the lengths of the requests of each batch, with what it may write."""

    batches: list[list[int]]

    def annotate(self, requests: Any) -> Any:
        self.batches.append([self.num_tokens(request) for request in requests])
        return super().annotate(requests)


def test_batches_of_tokens_stay_within_their_budget_and_change_no_record(
    configured: Callable[..., DictConfig], tmp_path: Path
) -> None:
    budget = 150
    expected, limited = (
        open_annotation_job(configured(f"cache.dir={tmp_path / name}", "teacher.group_size=7", *options))
        for name, options in {
            "examples": ["teacher.batch_size=7"],
            "tokens": ["teacher.batch_unit=tokens", f"teacher.batch_size={budget}"],
        }.items()
    )
    teacher = Sizes(limited.teacher)
    teacher.batches = []
    unlabelled = [example.unlabelled() for example in expected.splits.train]
    to_annotate: Any = {"answer": unlabelled, "rationale": unlabelled[:3]}
    fill(expected, to_annotate)
    filled = fill(replace(limited, teacher=teacher), to_annotate)
    sizes = [len(batch) * max(batch) for batch in teacher.batches]
    assert all(size <= budget or len(batch) == 1 for size, batch in zip(sizes, teacher.batches, strict=True))
    assert len({*map(len, teacher.batches)}) > 1
    written = [len(request.question_ids) + 6 for request in filled.all_requests if not request.given_ids]
    assert {*written} <= {length for batch in teacher.batches for length in batch}
    assert limited.store.fingerprint == expected.store.fingerprint
    for request in filled.all_requests:
        assert is_close(*(job.store.read(request.key) for job in (expected, limited)), 0.01)


def test_records_of_another_teacher_are_detected_despite_correct_checksums(
    configured: Callable[..., DictConfig],
) -> None:
    job = open_annotation_job(configured())
    fill(job, {"answer": job.splits.train})
    requests = [job.prompts.request(example, "answer") for example in job.splits.train]
    job.teacher.load()
    result = rescore(job.store, job.teacher, requests, 8, seed=0)
    assert result.is_close
    assert result.num_records == 8
    assert result.distance < 0.01
    assert result.noise_floor < 1e-4
    other = open_annotation_job(configured(f"cache.dir={configured().root}/other"))
    with other.store.writing() as writer:
        for request in requests:
            annotation = job.store.read(request.key)
            target = annotation.targets.get("answer")
            if target is None or target.soft is None:
                continue
            rolled_NK = np.roll(grid(target.soft)[0], 1, axis=1)
            wrong = replace(target, soft=replace(target.soft, ids_E=rolled_NK.ravel()))
            writer.add([replace(annotation, targets={"answer": wrong})])
    assert other.store.check() == []
    assert not rescore(other.store, job.teacher, requests, 8, seed=0).is_close
    job.teacher.close()


@pytest.mark.slow
def test_a_cache_can_be_inspected_verified_and_repaired(
    tmp_path: Path, teacher_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def annotate(*more: str) -> str:
        overrides = [
            *annotate_options(tmp_path, teacher_folder, *more),
            f"root={tmp_path}",
            "teacher.num_rationales=4",
        ]
        main(compose(*overrides, name="annotate"))
        return capsys.readouterr().out

    forecast = annotate("dry_run=true")
    assert "0 records exist, 58 are missing; they will take about" in forecast
    assert re.search(r"\([\d,]+ tokens read, [\d,]+ written \([\d,]+/s\); measured on \d+ of them", forecast)
    assert "0 records exist, 66 are missing" in annotate("dry_run=true", "teacher.rationales_each=3")
    assert not (tmp_path / "cache").exists()
    annotate()
    assert "58 records exist, 0 are missing" in annotate("dry_run=true")
    verified = annotate("verify=true")
    assert "58 records: all checksums are correct" in verified
    assert "32 answers annotated again" in verified
    before = shards(tmp_path / "cache")
    exported = annotate(f"export={tmp_path / 'all.parquet'}")
    rows = pq.read_table(tmp_path / "all.parquet").to_pylist()
    assert f"{len(rows)} targets" in exported
    assert all(len(r["token_ids"]) == len(r["ids"]) == len(r["logprobs"]) == len(r["tail"]) for r in rows)
    shown = annotate(f"show={rows[0]['example']}")
    assert f"record     {rows[0]['key']}" in shown
    assert "the teacher's most probable tokens at its position" in shown
    with pytest.raises(ConfigError, match="matches 0 requests"):
        annotate("show=a question of no example")
    with pytest.raises(ConfigError, match=r"part=4/3: expected number/parts"):
        annotate("part=4/3")
    name = min(before)
    (tmp_path / "cache" / name).write_bytes(before[name][:-1] + b"x")
    with pytest.raises(CacheError, match=f"{name} is damaged"):
        annotate("verify=true")
    annotate(f"rebuild={name.partition('.')[0]}")
    assert shards(tmp_path / "cache") == before


def test_an_interrupted_annotation_records_its_cost(configured: Callable[..., DictConfig]) -> None:
    job, teacher = counted(configured("teacher.group_size=4", "teacher.batch_size=4"))

    class Interrupted(CountingTeacher):
        def annotate(self, requests: Any) -> Any:
            if self.asked:
                raise KeyboardInterrupt
            return super().annotate(requests)

    with pytest.raises(KeyboardInterrupt):
        fill(replace(job, teacher=Interrupted(teacher)), {"answer": job.splits.train})
    (cost,) = open_annotation_job(configured()).store.costs
    assert cost["records"] == 4
    assert cost["seconds"] > 0
    assert cost["parameters"] > 0
    assert cost["ms_per_example"] is None
