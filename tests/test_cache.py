"""Law 8 and half of law 12: a cache holds what was written, or says what is wrong with it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import compose, counted, tiny_overrides
from omegaconf import DictConfig

from distill.annotate import fill, open_source
from distill.cache.store import Store, difference
from distill.records import Annotation, CacheError, Example, Request, SoftTargets, Target

FINGERPRINT = {"teacher": {"weights": "abc", "dtype": "float32"}, "shots": ["one", "two"], "codec": {"k": 4}}


def annotation(number: int) -> Annotation:
    """A record that `number` alone decides; every kind of field takes every kind of value."""
    rng = np.random.default_rng(number)

    def target(length: int) -> Target:
        ids_NK = rng.integers(0, 300, (length, 4), dtype=np.int32)
        soft = SoftTargets(
            ids_NK, rng.normal(size=(length, 4)).astype(np.float32), rng.random(length).astype(np.float32)
        )
        return Target(tuple(rng.integers(0, 300, length).tolist()), soft)

    spans = ("answer", "rationale")[: number % 3]
    return Annotation(
        key=f"key-{number}",
        targets={span: target(1 + number % 7) for span in spans},
        answer=None if number % 4 == 0 else f"{number} ünïcode",
        rationale="so\nso" if number % 2 else None,
        is_sampled=number % 5 == 0,
        is_truncated=number % 3 == 0,
        choice_logprobs=(-0.1, -2.5) if number % 2 else (),
    )


def plain(annotation: Annotation) -> list[Any]:
    """The record as values that can be compared."""
    targets = {
        span: (t.token_ids, t.soft and (t.soft.ids_NK.tolist(), t.soft.logprobs_NK.tolist(), t.soft.tail_N.tolist()))
        for span, t in annotation.targets.items()
    }
    return [targets, *(value for name, value in vars(annotation).items() if name != "targets")]


def filled(folder: Path, *numbers: int, fingerprint: Any = FINGERPRINT) -> Store:
    store = Store(folder, fingerprint)
    with store.writing() as writer:
        writer.add([annotation(number) for number in numbers])
    return store


def request(number: int) -> Request:
    return Request(f"key-{number}", "answer", Example(str(number)), ())


def test_records_come_back_as_they_were_written_in_any_order(tmp_path: Path) -> None:
    filled(tmp_path, *range(600))
    store = Store(tmp_path, FINGERPRINT)
    assert len(store) == 600
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    for number in np.random.default_rng(0).permutation(600).tolist():
        assert plain(store.read(f"key-{number}")) == plain(annotation(number))


def test_a_target_without_soft_targets_stays_so(tmp_path: Path) -> None:
    bare = replace(annotation(1), targets={"rationale": Target((5, 6), None)})
    with Store(tmp_path, FINGERPRINT).writing() as writer:
        writer.add([bare])
    assert Store(tmp_path, FINGERPRINT).read("key-1") == bare


def test_what_is_missing_is_asked_for_once(tmp_path: Path) -> None:
    store = filled(tmp_path, 1, 2)
    asked = [request(n) for n in (3, 1, 3, 2, 4)]
    assert [r.key for r in store.missing(asked)] == ["key-3", "key-4"]
    with pytest.raises(CacheError, match="holds no record key-3; annotate first"):
        store.read("key-3")


def test_a_writer_that_fails_keeps_what_it_had(tmp_path: Path) -> None:
    def interrupted() -> None:
        with Store(tmp_path, FINGERPRINT).writing() as writer:
            writer.add([annotation(number) for number in range(300)])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    filled(tmp_path, *range(300, 310))
    store = Store(tmp_path, FINGERPRINT)
    assert [plain(store.read(f"key-{n}")) for n in range(310)] == [plain(annotation(n)) for n in range(310)]


def write_all(folder: Path, number: int, say: int) -> None:
    """Print how many records there are; add what is missing, 64 at a time; write a byte to `say` before each."""
    store = Store(folder, FINGERPRINT)
    print(len(store), flush=True)
    with store.writing() as writer:
        missing = [n for n in range(number) if f"key-{n}" not in store]
        for start in range(0, len(missing), 64):
            os.write(say, b".")
            writer.add([annotation(n) for n in missing[start : start + 64]])


def write_and_be_killed(folder: Path, number: int, num_kills: int) -> None:
    """Start writers one after the other; all but the last are killed amid their work."""
    for attempt in range(num_kills + 1):
        hear, say = os.pipe()
        writer = os.fork()
        if writer == 0:
            write_all(folder, number, say)
            os._exit(0)
        os.close(say)
        if attempt < num_kills:
            for _ in range(2 + 2 * attempt):
                os.read(hear, 1)
            time.sleep(0.002 * attempt)
            os.kill(writer, signal.SIGKILL)
        os.close(hear)
        _, status = os.waitpid(writer, 0)
        assert os.waitstatus_to_exitcode(status) == (-signal.SIGKILL if attempt < num_kills else 0)


@pytest.mark.slow
def test_a_writer_killed_again_and_again_ends_with_the_same_records(tmp_path: Path) -> None:
    number, folder = 6000, tmp_path / "cache"
    command = [sys.executable, __file__, str(folder), str(number), "6"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    seen = [int(line) for line in done.stdout.split()]
    assert seen == sorted(seen)
    assert 0 < seen[-1] < number
    store = Store(folder, FINGERPRINT)
    assert len(store) == number
    for n in range(number):
        assert plain(store.read(f"key-{n}")) == plain(annotation(n))


def test_a_torn_last_line_is_as_if_it_were_not_there(tmp_path: Path) -> None:
    filled(tmp_path, 1)
    filled(tmp_path, 2)
    manifest = tmp_path / "manifest.jsonl"
    whole = manifest.read_bytes()
    manifest.write_bytes(whole[:-20])
    assert "key-1" in Store(tmp_path, FINGERPRINT)
    assert "key-2" not in Store(tmp_path, FINGERPRINT)
    filled(tmp_path, 2)
    assert manifest.read_bytes() == whole
    assert plain(Store(tmp_path, FINGERPRINT).read("key-2")) == plain(annotation(2))


@pytest.mark.parametrize("file", ["00000.safetensors", "00000.parquet", "00001.safetensors", "00001.parquet"])
@pytest.mark.parametrize("where", [0.0, 0.5, 0.999])
def test_a_flipped_bit_is_refused_by_the_name_of_its_file(file: str, where: float, tmp_path: Path) -> None:
    filled(tmp_path, 1, 2, 3)
    filled(tmp_path, 4, 5)
    content = bytearray((tmp_path / file).read_bytes())
    content[int(where * len(content))] ^= 4
    (tmp_path / file).write_bytes(content)
    with pytest.raises(CacheError, match=rf"{file} is damaged: its SHA-256 is not the manifest's"):
        Store(tmp_path, FINGERPRINT)


@pytest.mark.parametrize("how", ["symlink", "missing", "directory", "elsewhere"])
def test_a_shard_that_is_no_plain_file_of_the_folder_is_refused(how: str, tmp_path: Path) -> None:
    filled(tmp_path / "cache", 1, 2, 3)
    shard, other = tmp_path / "cache" / "00000.parquet", tmp_path / "other.parquet"
    shutil.copy(shard, other)
    shard.unlink()
    if how == "symlink":
        shard.symlink_to(other)
    elif how == "directory":
        shard.mkdir()
    elif how == "elsewhere":
        manifest = tmp_path / "cache" / "manifest.jsonl"
        manifest.write_text(manifest.read_text().replace("00000.parquet", "../other.parquet"))
    with pytest.raises(CacheError, match=r"parquet is named in the manifest but is no plain file there"):
        Store(tmp_path / "cache", FINGERPRINT)


@pytest.mark.parametrize(
    ("theirs", "names"),
    [
        ({"teacher": {"weights": "xyz", "dtype": "float32"}}, ['teacher.weights: cache has "xyz", asked for is "abc"']),
        ({"shots": ["one", "2"]}, ['shots[1]: cache has "2", asked for is "two"']),
        ({"shots": ["one"]}, ['shots: cache has ["one"], asked for is ["one", "two"]']),
        ({"codec": {}}, ["codec.k: cache has null, asked for is 4"]),
        (
            {"codec": {"k": 5}, "more": 1},
            ["codec.k: cache has 5, asked for is 4", "more: cache has 1, asked for is null"],
        ),
    ],
)
def test_another_fingerprint_is_refused_key_by_key(theirs: dict[str, Any], names: list[str], tmp_path: Path) -> None:
    filled(tmp_path, 1, fingerprint=FINGERPRINT | theirs)
    with pytest.raises(CacheError) as raised:
        Store(tmp_path, FINGERPRINT)
    assert all(name in str(raised.value) for name in names)
    assert len(difference(FINGERPRINT | theirs, FINGERPRINT)) == len(names)


def test_another_format_is_refused(tmp_path: Path) -> None:
    filled(tmp_path, 1)
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(CacheError, match="has format 2, this version reads 1"):
        Store(tmp_path, FINGERPRINT)


def test_no_file_of_a_cache_is_a_pickle(tmp_path: Path) -> None:
    filled(tmp_path, 1, 2)
    kinds = {path.suffix for path in tmp_path.iterdir() if path.name != ".lock"}
    assert kinds == {".jsonl", ".safetensors", ".parquet"}
    assert json.loads((tmp_path / "manifest.jsonl").read_text().splitlines()[0])["fingerprint"] == FINGERPRINT


# What changes a cache, and what does not, through the configuration.


def wanted(source: Any) -> dict[Any, Any]:
    return {"answer": [*source.splits.train, *source.splits.validation]}


def test_each_question_is_annotated_once_in_whatever_order(configured: Callable[..., DictConfig]) -> None:
    source, teacher = counted(configured())
    few = [e for e in source.splits.train if e.answer is None][:4]
    fill(source, {"answer": few[:2]})
    assert {r.example.id for r in teacher.asked} == {e.id for e in few[:2]}
    teacher.asked.clear()
    report = fill(source, {"answer": [few[3], *few[:2], few[2]]})
    assert {r.example.id for r in teacher.asked if r.example in few[2:]} == {e.id for e in few[2:]}
    assert (report.num_reused, report.num_annotated) == (2, 2)
    assert teacher.num_loads == 2
    teacher.asked.clear()
    again, untouched = counted(configured())
    report = fill(again, {"answer": few[::-1]})
    assert (report.num_reused, report.num_annotated, untouched.num_loads, untouched.asked) == (4, 0, 0, [])


def test_more_unlabelled_examples_leave_the_cache_as_it_is(configured: Callable[..., DictConfig]) -> None:
    source, _ = counted(configured())
    first = fill(source, wanted(source))
    more, _ = counted(configured("task.examples.num_unlabelled=9"))
    assert more.store.fingerprint == source.store.fingerprint
    report = fill(more, wanted(more))
    assert (report.num_reused, report.num_annotated) == (first.num_annotated, 3)


@pytest.mark.parametrize(
    "change",
    [
        "task.layout.answer_cue='So:'",
        "task.layout.instruction='Count.'",
        "prompt.num_shots=1",
        "prompt.max_length=99",
        "teacher.kind.max_new_tokens=7",
        "teacher.kind.dtype=bfloat16",
        "cache.codec.k=7",
        "cache.codec.temperature=2.0",
        "cache=dense",
        "weights",
    ],
)
def test_whatever_changes_a_target_changes_the_fingerprint(
    change: str, configured: Callable[..., DictConfig], teacher_folder: Path, tmp_path: Path
) -> None:
    if change == "weights":
        copied = shutil.copytree(teacher_folder, tmp_path / "model")
        with (copied / "model.safetensors").open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\x00")
        change = f"teacher.model={copied}"
    ours = configured()
    if change == "cache=dense":
        theirs = compose(
            *(o for o in tiny_overrides(tmp_path, teacher_folder, teacher_folder) if "codec" not in o), change
        )
    else:
        theirs = configured(change)
    stores = [open_source(config).store for config in (ours, theirs)]
    assert stores[0].fingerprint != stores[1].fingerprint
    assert stores[0].folder != stores[1].folder


@pytest.mark.parametrize(
    "change", ["seed=1", "batch_size=4", "loss=[kl]", "teacher.batch_size=3", "optim.optimizer.lr=0.1"]
)
def test_what_does_not_change_a_target_does_not_change_the_fingerprint(
    change: str, configured: Callable[..., DictConfig]
) -> None:
    assert open_source(configured()).store.fingerprint == open_source(configured(change)).store.fingerprint


def test_a_prompt_template_changes_every_key(configured: Callable[..., DictConfig]) -> None:
    ours, theirs = (open_source(configured(*o)) for o in ((), ("task.layout.question_cue='?'",)))
    keys = [{s.prompts.request(e, "answer").key for e in s.splits.train} for s in (ours, theirs)]
    assert len(keys[0]) == len(keys[1]) == len(ours.splits.train)
    assert not keys[0] & keys[1]


def test_a_folder_that_something_else_made_is_refused(configured: Callable[..., DictConfig], tmp_path: Path) -> None:
    here = f"cache.dir={tmp_path / 'mine'}"
    source, _ = counted(configured(here))
    fill(source, {"answer": source.splits.validation})
    with pytest.raises(CacheError, match=r"codec\.k: cache has 8, asked for is 7"):
        open_source(configured(here, "cache.codec.k=7"))


def test_stored_targets_are_the_teachers_own(configured: Callable[..., DictConfig]) -> None:
    source, _ = counted(configured())
    fill(source, {"answer": source.splits.validation})
    module = source.teacher.load()
    for example in source.splits.validation:
        stored = source.store.read(source.prompts.request(example, "answer").key).targets["answer"]
        before = source.prompts.prefix("answer") + source.prompts.question(example, "answer")
        ids = torch.tensor([[*before, *stored.token_ids]])
        with torch.no_grad():
            logits_TV = module(ids).logits[0, len(before) - 1 : -1, : source.prompts.vocabulary_size]
        top_NK, ids_NK = logits_TV.log_softmax(-1).topk(8, -1)
        assert stored.soft is not None
        assert np.allclose(stored.soft.logprobs_NK, top_NK, atol=1e-4)
        assert np.array_equal(stored.soft.ids_NK[:, 0], ids_NK[:, 0])


if __name__ == "__main__":
    write_and_be_killed(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
