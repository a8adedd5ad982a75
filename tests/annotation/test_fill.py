"""The annotate command: shared work, broken-off work, and looking into a cache."""

from __future__ import annotations

import itertools
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
from distill.annotation.fill import Share, fill, open_source, plan
from distill.annotation.inspection import estimate, rescore
from distill.errors import CacheError, ConfigError
from tests.annotation.conftest import tiny
from tests.conftest import CountingTeacher, compose, counted, grid, run, shards, start


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path) -> dict[str, bytes]:
    """The shards of one process that nobody disturbs."""
    root = tmp_path_factory.mktemp("whole")
    done = run(root, *tiny(root, teacher_folder), command="annotate")
    assert done.returncode == 0, done.stderr
    return shards(root / "cache")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["devices", "parts", "at once"])
def test_work_that_is_shared_ends_in_the_same_shards(
    how: str, whole: dict[str, bytes], tmp_path: Path, teacher_folder: Path
) -> None:
    jobs = {"devices": ["devices=2"], "parts": ["part=1/3", "part=2/3", "part=3/3"], "at once": ["seed=0", "seed=1"]}
    started = [start(tmp_path, *tiny(tmp_path, teacher_folder, job), command="annotate") for job in jobs[how]]
    for process in started:
        _, errors = process.communicate(timeout=150)
        assert process.returncode == 0, errors
    assert shards(tmp_path / "cache") == whole
    manifests = list((tmp_path / "cache").glob("manifest-*"))
    # Of two that start at once one may have done everything before the other has started.
    assert len(manifests) in {"devices": (2,), "parts": (3,), "at once": (1, 2)}[how]
    named = [line for path in manifests for line in path.read_text().splitlines() if '"shard"' in line]
    assert 2 * len(named) == len(whole)  # no group was made twice


@pytest.mark.slow
def test_killed_at_random_times_it_ends_in_the_same_shards(
    whole: dict[str, bytes], tmp_path: Path, teacher_folder: Path
) -> None:
    rng, cache, num_seen = np.random.default_rng(0), tmp_path / "cache", [0]
    for _ in range(2):
        process = start(tmp_path, *tiny(tmp_path, teacher_folder), command="annotate")
        wanted = num_seen[-1] + int(rng.integers(1, 4))
        while process.poll() is None and len(shards(cache)) < 2 * wanted:
            time.sleep(0.002)
        time.sleep(float(rng.random()) * 0.05)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        num_seen.append(len(shards(cache)) // 2)
    assert num_seen == sorted(num_seen)
    assert 0 < num_seen[-1] < len(whole) // 2
    done = run(tmp_path, *tiny(tmp_path, teacher_folder), command="annotate")
    assert done.returncode == 0, done.stderr
    assert shards(cache) == whole
    assert not list((cache / "claims").glob("[0-9a-f]*"))


def test_groups_are_a_function_of_the_examples(configured: Callable[..., DictConfig]) -> None:
    source = open_source(configured())
    requests = [source.prompts.request(example, "answer") for example in source.splits.train]
    groups = plan(requests, 4)
    assert [len(group.requests) for group in groups] == [4, 4, 4]
    assert plan([*requests[::-1], requests[0]], 4) == groups
    lengths = [len(r.question_ids) + len(r.given_ids) for group in groups for r in group.requests]
    assert lengths == sorted(lengths)


def test_parts_are_disjoint_and_together_everything(configured: Callable[..., DictConfig]) -> None:
    wanted, seen = {"answer": open_source(configured()).splits.train}, []
    for part in (1, 2, 3):
        source, teacher = counted(configured("teacher.group_size=2", f"cache.dir={configured().root}/{part}"))
        fill(source, wanted, part=Share(part, 3))
        seen.append({request.key for request in teacher.asked})
    assert not any(left & right for left, right in itertools.combinations(seen, 2))
    assert len(set().union(*seen)) == len(wanted["answer"])


def test_an_estimate_stores_nothing_and_is_near(configured: Callable[..., DictConfig]) -> None:
    source = open_source(configured("task.examples.num_unlabelled=60"))
    requests = [source.prompts.request(example, "answer") for example in source.splits.train]
    source.teacher.load()
    found = estimate(source.teacher, source.codec, requests, 8)
    source.teacher.close()
    assert found.num_sampled == 8
    assert found.seconds > 0
    assert not source.store.folder.exists()
    fill(source, {"answer": source.splits.train})
    stored = sum(path.stat().st_size for path in source.store.folder.glob("*.safetensors"))
    assert 0.3 < found.num_bytes / stored < 1.2


def test_a_record_that_is_not_the_teachers_own_is_found_though_its_checksums_are_right(
    configured: Callable[..., DictConfig],
) -> None:
    source = open_source(configured())
    fill(source, {"answer": source.splits.train})
    requests = [source.prompts.request(example, "answer") for example in source.splits.train]
    source.teacher.load()
    right = rescore(source.store, source.teacher, requests, 8, seed=0)
    assert right.is_close
    assert right.num_records == 8
    assert right.distance < 0.01
    assert right.noise_floor < 1e-4
    other = open_source(configured(f"cache.dir={configured().root}/other"))
    with other.store.writing() as writer:
        for request in requests:
            annotation = source.store.read(request.key)
            target = annotation.targets.get("answer")
            if target is None or target.soft is None:
                continue
            rolled_NK = np.roll(grid(target.soft)[0], 1, axis=1)
            wrong = replace(target, soft=replace(target.soft, ids_E=rolled_NK.ravel()))
            writer.add([replace(annotation, targets={"answer": wrong})])
    assert other.store.check() == []
    assert not rescore(other.store, source.teacher, requests, 8, seed=0).is_close
    source.teacher.close()


def test_a_cache_can_be_looked_into_verified_and_mended(
    tmp_path: Path, teacher_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def annotate(*more: str) -> str:
        given = [*tiny(tmp_path, teacher_folder, *more), f"root={tmp_path}", "teacher.num_rationales=4"]
        main(compose(*given, name="annotate"))
        return capsys.readouterr().out

    assert "0 records are there, 58 are missing; they will take about" in annotate("dry_run=true")
    assert "0 records are there, 66 are missing" in annotate("dry_run=true", "teacher.rationales_each=3")
    assert not (tmp_path / "cache").exists()
    annotate()
    assert "58 records are there, 0 are missing" in annotate("dry_run=true")
    verified = annotate("verify=true")
    assert "58 records: all checksums are right" in verified
    assert "32 answers asked again" in verified
    before = shards(tmp_path / "cache")
    exported = annotate(f"export={tmp_path / 'all.parquet'}")
    rows = pq.read_table(tmp_path / "all.parquet").to_pylist()
    assert f"{len(rows)} targets" in exported
    assert all(len(r["token_ids"]) == len(r["ids"]) == len(r["logprobs"]) == len(r["tail"]) for r in rows)
    shown = annotate(f"show={rows[0]['example']}")
    assert f"record     {rows[0]['key']}" in shown
    assert "what the teacher expected in the place of each" in shown
    with pytest.raises(ConfigError, match="0 examples begin so"):
        annotate("show=nobody asks this")
    with pytest.raises(ConfigError, match=r"part=4/3: wanted part/parts"):
        annotate("part=4/3")
    name = min(before)
    (tmp_path / "cache" / name).write_bytes(before[name][:-1] + b"x")
    with pytest.raises(CacheError, match=f"{name} is damaged"):
        annotate("verify=true")
    annotate(f"rebuild={name.partition('.')[0]}")
    assert shards(tmp_path / "cache") == before


def test_what_an_interrupted_annotation_cost_is_known(configured: Callable[..., DictConfig]) -> None:
    source, teacher = counted(configured("teacher.group_size=4", "teacher.batch_size=4"))

    class Interrupted(CountingTeacher):
        def annotate(self, requests: Any) -> Any:
            if self.asked:
                raise KeyboardInterrupt
            return super().annotate(requests)

    with pytest.raises(KeyboardInterrupt):
        fill(replace(source, teacher=Interrupted(teacher)), {"answer": source.splits.train})
    (cost,) = open_source(configured()).store.costs
    assert cost["records"] == 4
    assert cost["seconds"] > 0
    assert cost["parameters"] > 0
    assert cost["ms_per_example"] is None
