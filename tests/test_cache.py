"""Law 8 and half of law 12: a cache holds what was written, or says what is wrong with it."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import compose, counted, environment, grid, shards, tiny_overrides
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig
from safetensors.numpy import load_file

from distill.annotation.fill import fill, open_source
from distill.cache.claims import Claims
from distill.cache.codecs.topk import TopK
from distill.cache.index import Index
from distill.cache.store import Store, _sealed, difference, drop_shard, nearest_difference
from distill.errors import CacheError
from distill.records import Annotation, Example, Request, SoftTargets, Target

FINGERPRINT = {"teacher": {"weights": "abc", "dtype": "float32"}, "shots": ["one", "two"], "codec": {"k": 4}}
CODEC = TopK(k=4, temperature=1.0)


def key(number: int) -> str:
    return f"{number:032x}"


def annotation(number: int) -> Annotation:
    """A record that `number` alone decides; every kind of field takes every kind of value."""
    rng = np.random.default_rng(number)

    def target(length: int) -> Target:
        logits_NV = torch.from_numpy(3 * rng.normal(size=(length, 300)).astype(np.float32))
        return Target(
            tuple(rng.integers(0, 300, length).tolist()),
            CODEC.cut(logits_NV.log_softmax(-1), torch.zeros(length, dtype=torch.float64)),
        )

    spans = ("answer", "rationale")[: number % 3]
    return Annotation(
        key=key(number),
        targets={span: target(1 + number % 7) for span in spans},
        answer=None if number % 4 == 0 else f"{number} ünïcode",
        rationale="so\nso" if number % 2 else None,
        is_sampled=number % 5 == 0,
        is_truncated=number % 3 == 0,
        choice_logprobs=(-0.1, -2.5) if number % 2 else (),
    )


def stored(annotation: Annotation) -> list[Any]:
    """The record as values that can be compared, its targets as the codec keeps them."""
    targets = {
        span: (t.token_ids, t.soft and {name: a.tolist() for name, a in CODEC.pack(t.soft).items()})
        for span, t in annotation.targets.items()
    }
    return [targets, *(value for name, value in vars(annotation).items() if name != "targets")]


def opened(folder: Path, fingerprint: Any = FINGERPRINT, **settings: Any) -> Store:
    return Store(folder, fingerprint, CODEC, **settings)


def filled(folder: Path, *numbers: int, fingerprint: Any = FINGERPRINT, size: int = 4) -> Store:
    """Add records in shards of `size`."""
    store = opened(folder, fingerprint)
    with store.writing() as writer:
        for start in range(0, len(numbers), size):
            writer.add([annotation(number) for number in numbers[start : start + size]])
            writer.flush()
    return store


def request(number: int) -> Request:
    return Request(key(number), "answer", Example(str(number)), ())


def test_records_come_back_as_they_were_written_in_any_order(tmp_path: Path) -> None:
    filled(tmp_path, *range(60))
    store = opened(tmp_path)
    assert len(store) == 60
    assert len(shards(tmp_path)) == 2 * 15
    assert store.check() == []
    for number in np.random.default_rng(0).permutation(60).tolist():
        assert stored(store.read(key(number))) == stored(annotation(number))


def test_soft_targets_of_many_records_are_those_of_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.cache.store._MOST_OPEN", 3)  # of 15 shards
    store = filled(tmp_path, *range(60))
    rng = np.random.default_rng(0)
    places = [(key(n), span) for n in range(60) for span in annotation(n).targets]
    for number in (1, 7, 40):
        chosen = [places[k] for k in rng.permutation(len(places))[:number]]
        wanted = SoftTargets.join([store.read(k).targets[span].soft for k, span in chosen])
        found = store.soft_targets(chosen)
        for field in ("ids_E", "logprobs_E", "tail_N", "num_exact_N"):
            assert np.array_equal(getattr(found, field), getattr(wanted, field))
    with pytest.raises(CacheError, match="no soft targets for the rationale of record"):
        store.soft_targets([(key(1), "rationale")])
    with pytest.raises(CacheError, match="holds no record"):
        store.soft_targets([(key(60), "answer")])


def test_damage_is_found_by_whoever_reads_only_soft_targets(tmp_path: Path) -> None:
    filled(tmp_path, 1)
    (shard,) = tmp_path.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(CacheError, match=f"{shard.name} is damaged"):
        opened(tmp_path).soft_targets([(key(1), "answer")])


@settings(max_examples=50, deadline=None, database=None)
@given(
    blocks=st.lists(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=9), max_size=9),
    few=st.integers(0, 9),
)
def test_an_index_is_a_dictionary(blocks: list[list[tuple[int, int]]], few: int) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("distill.cache.index._FEW", few)
        index, added = Index(), list[bytes]()
        for block in blocks:
            keys = [first.to_bytes(8, "big") + second.to_bytes(8, "big") for first, second in block]
            index.add(b"".join(keys))
            added += keys
            wanted = {each: number for number, each in enumerate(added)}
            every = {first.to_bytes(8, "big") + second.to_bytes(8, "big") for first in range(4) for second in range(4)}
            asked = sorted(every)
            assert index.find(b"".join(asked)).tolist() == [wanted.get(each, -1) for each in asked]
            assert [int(index.find(each)[0]) for each in asked] == [wanted.get(each, -1) for each in asked]
            assert len(index) == len(wanted)


def test_a_target_without_soft_targets_stays_so(tmp_path: Path) -> None:
    bare = replace(annotation(1), targets={"rationale": Target((5, 6), None)})
    with opened(tmp_path).writing() as writer:
        writer.add([bare])
    assert opened(tmp_path).read(key(1)) == bare


def test_what_is_missing_is_asked_for_once(tmp_path: Path) -> None:
    store = filled(tmp_path, 1, 2)
    asked = [request(n) for n in (3, 1, 3, 2, 4)]
    assert [r.key for r in store.missing(asked)] == [key(3), key(4)]
    with pytest.raises(CacheError, match=f"holds no record {key(3)}; annotate first"):
        store.read(key(3))


def test_a_writer_that_fails_keeps_what_it_had(tmp_path: Path) -> None:
    def interrupted() -> None:
        with opened(tmp_path).writing() as writer:
            writer.add([annotation(number) for number in range(30)])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    filled(tmp_path, *range(30, 40))
    store = opened(tmp_path)
    assert [stored(store.read(key(n))) for n in range(40)] == [stored(annotation(n)) for n in range(40)]


def test_another_process_sees_what_was_written_meanwhile(tmp_path: Path) -> None:
    filled(tmp_path, 1)
    watching = opened(tmp_path)
    filled(tmp_path, 2)
    assert key(2) not in watching
    watching.refresh()
    assert stored(watching.read(key(2))) == stored(annotation(2))


def test_what_a_live_process_is_writing_may_vanish_while_the_folder_is_looked_through(tmp_path: Path) -> None:
    filled(tmp_path, 1)
    (tmp_path / "claims").mkdir(exist_ok=True)
    (tmp_path / "claims" / ".gone.tmp").symlink_to("nowhere")  # listed, and not there
    assert len(filled(tmp_path, 2)) == 2


# Broken off.


def fill_by_claims(folder: Path, num_groups: int, size: int = 4) -> None:
    """Make what is missing of groups 0, 1, ..., each of `size` records, as annotating does."""
    store = opened(folder)
    with store.writing() as writer:
        for group in range(num_groups):
            numbers = [n for n in range(group * size, (group + 1) * size) if key(n) not in store]
            if not numbers or not store.claims.take(str(group)):
                continue
            store.refresh()
            if key(numbers[0]) not in store:
                writer.add([annotation(n) for n in numbers])
                writer.flush()
            store.claims.release(str(group))


def die_at(boundary: int) -> None:
    """Have this process killed just before it makes something durable for the n-th time, or just after."""
    calls = itertools.count()

    def dying(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*given: Any, **others: Any) -> Any:
            number = next(calls)
            if 2 * number == boundary:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*given, **others)
            if 2 * number + 1 == boundary:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return called

    for owner, name in (
        (os, "fsync"),
        (os, "open"),
        (Path, "replace"),
        (Path, "write_bytes"),
        (Path, "unlink"),
        (os, "link"),
    ):
        setattr(owner, name, dying(getattr(owner, name)))


def in_another_process(task: Callable[[], None]) -> int:
    """Run `task` in a child; return its exit status as `subprocess` would."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            task()
            code = 0
        finally:
            if code:
                traceback.print_exc()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def kill_at_every_boundary(folder: Path, num_groups: int) -> int:
    """Fill a cache for each boundary, killed there and filled again; return how many boundaries there are.

    All work is done by children: a process that has used Arrow's threads may not fork.
    """
    broken = folder / "broken"

    def filling(where: Path, boundary: int | None = None) -> int:
        def task() -> None:
            if boundary is not None:
                die_at(boundary)
            fill_by_claims(where, num_groups)
            assert opened(where).check() == []

        return in_another_process(task)

    assert filling(folder / "unbroken") == 0
    wanted = shards(folder / "unbroken")
    for boundary in itertools.count(0, 2):  # just after one write is just before the next
        code = filling(broken, boundary)
        assert len(opened(broken)) % 4 == 0
        assert filling(broken) == 0
        assert shards(broken) == wanted, boundary
        assert not list((broken / "claims").glob("[0-9]*"))
        shutil.rmtree(broken)
        if code == 0:
            return boundary
        assert code == -signal.SIGKILL
    raise AssertionError("never reached")


def run_here(*arguments: str) -> str:
    """This file as a program: only a process without threads may fork."""
    line = [sys.executable, __file__, *arguments]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_killed_at_any_write_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    assert int(run_here("boundaries", str(tmp_path), "2")) > 40


def many_writers(folder: Path, num_writers: int, num_groups: int) -> None:
    """Have writers fill one cache at once; one of them is killed with a claim in its hands."""

    def killed() -> None:
        store = opened(folder)
        assert store.claims.take("7")
        os.kill(os.getpid(), signal.SIGKILL)

    (folder / "claims").mkdir(parents=True)
    assert in_another_process(killed) == -signal.SIGKILL
    children = []
    for _ in range(num_writers):
        child = os.fork()
        if child == 0:
            fill_by_claims(folder, num_groups)
            os._exit(0)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * num_writers


def test_many_writers_share_the_work_and_a_dead_one_leaves_its_own(tmp_path: Path) -> None:
    run_here("writers", str(tmp_path / "cache"), "4", "40")
    fill_by_claims(tmp_path / "alone", 40)
    assert shards(tmp_path / "cache") == shards(tmp_path / "alone")
    lines = [line for path in (tmp_path / "cache").glob("manifest-*") for line in path.read_bytes().splitlines()]
    assert len(lines) == 40  # no group was made twice
    assert len(list((tmp_path / "cache").glob("manifest-*"))) > 1


def test_a_claim_of_another_machine_is_respected_until_it_was_not_touched_for_long(tmp_path: Path) -> None:
    claims = Claims(tmp_path, seconds=30.0)
    (tmp_path / "group").write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    assert not claims.take("group")
    old = time.time() - 31
    os.utime(tmp_path / "group", (old, old))
    assert claims.take("group")
    assert not Claims(tmp_path, seconds=30.0).take("group")  # this process is alive
    claims.release("group")
    assert Claims(tmp_path, seconds=30.0).take("group")


def test_claims_are_kept_alive_while_they_are_held_and_given_up_after(tmp_path: Path) -> None:
    claims = Claims(tmp_path, seconds=0.2)
    with claims.held():
        claims.take("group")
        before = (tmp_path / "group").stat().st_mtime_ns
        time.sleep(0.5)
        assert (tmp_path / "group").stat().st_mtime_ns > before
        assert not Claims(tmp_path, seconds=0.2).take("group")
    assert not (tmp_path / "group").exists()


# Damaged.


def test_a_torn_last_line_is_as_if_it_were_not_there(tmp_path: Path) -> None:
    filled(tmp_path, 1, 2, size=1)
    (manifest,) = tmp_path.glob("manifest-*")
    whole = manifest.read_bytes()
    for length in (len(whole) - 1, len(whole) - 20, whole.index(b"\n") + 2):
        manifest.write_bytes(whole[:length])
        assert key(1) in opened(tmp_path)
        assert key(2) not in opened(tmp_path)
    filled(tmp_path, 2)
    assert stored(opened(tmp_path).read(key(2))) == stored(annotation(2))


def test_every_flipped_bit_is_found_and_its_file_named(tmp_path: Path) -> None:
    filled(tmp_path, *range(1, 9))
    files = sorted(path for path in tmp_path.iterdir() if path.is_file() and not path.name.startswith("."))
    rng = np.random.default_rng(0)
    for number in range(1000):
        path = files[number % len(files)]
        content = path.read_bytes()
        place, bit = int(rng.integers(len(content))), 1 << int(rng.integers(8))
        path.write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
        try:
            problems = opened(tmp_path).check()
        except CacheError as error:
            problems = [str(error)]
        assert len(problems) == 1, (path.name, place, bit)
        assert path.name in problems[0] or "another way than is asked" in problems[0]
        path.write_bytes(content)
    assert opened(tmp_path).check() == []


def test_a_damaged_shard_is_refused_when_read_and_can_be_made_anew_alone(tmp_path: Path) -> None:
    filled(tmp_path, *range(1, 9))
    wanted = shards(tmp_path)
    damaged = sorted(wanted)[-1]
    (tmp_path / damaged).write_bytes(wanted[damaged][:-1] + b"x")
    store = opened(tmp_path)
    (problem,) = store.check()
    name = damaged.partition(".")[0]
    assert f"{damaged} is damaged" in problem
    assert f"rebuild={name}" in problem
    refused = 0
    for number in range(1, 9):
        try:
            assert stored(store.read(key(number))) == stored(annotation(number))
        except CacheError:
            refused += 1
    assert refused == 4
    drop_shard(tmp_path, name)
    missing = store_missing(tmp_path, range(1, 9))
    assert len(missing) == 4
    filled(tmp_path, *missing)
    assert shards(tmp_path) == wanted
    with pytest.raises(CacheError, match=r"no manifest in .* names a shard 'abc'"):
        drop_shard(tmp_path, "abc")


def store_missing(folder: Path, numbers: Iterable[int]) -> list[int]:
    store = opened(folder)
    return [number for number in numbers if key(number) not in store]


@pytest.mark.parametrize("how", ["symlink", "missing", "directory", "elsewhere", "absolute", "no keys", "no number"])
def test_a_shard_that_is_no_plain_file_of_the_folder_is_refused(how: str, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    filled(folder, 1, 2, 3)
    (shard,), (manifest,) = folder.glob("*.parquet"), folder.glob("manifest-*")
    other = shutil.copy(shard, tmp_path / "other.parquet")
    (line,) = lines_of(manifest)
    if how in {"symlink", "missing", "directory"}:
        shard.unlink()
        if how != "missing":
            shard.symlink_to(other) if how == "symlink" else shard.mkdir()
    line |= {
        "elsewhere": {"shard": "../other"},
        "absolute": {"shard": str(tmp_path / "other")},
        "no keys": {"keys": ""},
        "no number": {"records": 1e300},
    }.get(how, {})
    manifest.write_bytes(_sealed(line))
    with pytest.raises(CacheError, match=r"no plain file there|in a way that this program does not"):
        opened(folder)


def lines_of(manifest: Path) -> list[dict[str, Any]]:
    return [json.loads(line)["line"] for line in manifest.read_text().splitlines()]


HEADERS = {
    "huge header": (2**63, b"{}"),
    "header over the end": (10**6, b"{}"),
    "no object": (None, b"[1]"),
    "no JSON": (None, b"\xff{"),
    "nested": (None, b"[" * 100_000),
    "huge shape": (None, b'{"token": {"dtype": "I32", "shape": [1000000000000], "data_offsets": [0, 4]}}'),
    "two huge extents": (
        None,
        b'{"token": {"dtype": "I32", "shape": [4294967296, 4294967296], "data_offsets": [0, 0]}}',
    ),
    "negative": (None, b'{"token": {"dtype": "I32", "shape": [-1], "data_offsets": [8, 4]}}'),
    "over the end": (None, b'{"token": {"dtype": "I32", "shape": [999], "data_offsets": [0, 3996]}}'),
    "other type": (None, b'{"token": {"dtype": "PICKLE", "shape": [1], "data_offsets": [0, 4]}}'),
    "infinite": (None, b'{"token": {"dtype": "I32", "shape": [Infinity], "data_offsets": [0, 4]}}'),
    "lacks arrays": (None, b'{"token": {"dtype": "I32", "shape": [1], "data_offsets": [0, 4]}}'),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_hostile_file_is_refused_though_its_checksums_are_right(name: str, tmp_path: Path) -> None:
    filled(tmp_path, 1)
    (shard,), (manifest,) = tmp_path.glob("*.safetensors"), tmp_path.glob("manifest-*")
    length, header = HEADERS[name]
    content = (length or len(header)).to_bytes(8, "little") + header + bytes(16)
    shard.write_bytes(content)
    (line,) = lines_of(manifest)
    crcs = {"header": zlib.crc32(content[: 8 + len(header)]), "token": zlib.crc32(bytes(4))}
    line["crc32"] = crcs | {"parquet": line["crc32"]["parquet"]}
    line["bytes"]["safetensors"] = len(content)
    manifest.write_bytes(_sealed(line))
    with pytest.raises(CacheError, match=rf"{shard.name} is damaged"):
        opened(tmp_path).read(key(1))


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
    filled(tmp_path / "theirs", 1, fingerprint=FINGERPRINT | theirs)
    with pytest.raises(CacheError) as raised:
        opened(tmp_path / "theirs")
    assert all(name in str(raised.value) for name in names)
    assert len(difference(FINGERPRINT | theirs, FINGERPRINT)) == len(names)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "manifest.jsonl").write_text('{"format": 1, "fingerprint": {}}\n')
    nearest = nearest_difference(tmp_path / "ours", FINGERPRINT)
    assert nearest is not None
    assert nearest[0].name == "theirs"
    assert [line.strip() for line in nearest[1]] == names


@pytest.mark.parametrize("line", [b'{"format": 1, "fingerprint": {}}\n', _sealed({"format": 3, "fingerprint": {}})])
def test_another_format_is_refused_by_name(line: bytes, tmp_path: Path) -> None:
    (tmp_path / "manifest.jsonl").write_bytes(line)
    with pytest.raises(CacheError, match=r"has format (1|3), this version reads 2"):
        opened(tmp_path)


def test_no_file_of_a_cache_is_a_pickle_and_others_can_read_them(tmp_path: Path) -> None:
    filled(tmp_path, 1, 2)
    kinds = {path.suffix for path in tmp_path.iterdir() if path.is_file()}
    assert kinds == {".jsonl", ".safetensors", ".parquet"}
    assert json.loads((tmp_path / "manifest.jsonl").read_text())["line"]["fingerprint"] == FINGERPRINT
    (arrays,), (text,) = tmp_path.glob("*.safetensors"), tmp_path.glob("*.parquet")
    assert load_file(arrays)["token"].tolist() == [
        i for n in (1, 2) for t in annotation(n).targets.values() for i in t.token_ids
    ]
    assert pq.read_table(text)["key"].to_pylist() == [key(1), key(2)]


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
        # What is stored is rounded: probabilities to 1/255 on the scale of their fourth roots.
        stored_ids_NK, stored_logprobs_NK = grid(stored.soft)
        assert np.allclose(np.exp(stored_logprobs_NK), top_NK.exp(), atol=0.01)
        assert np.array_equal(stored_ids_NK[:, 0], ids_NK[:, 0])


if __name__ == "__main__":
    if sys.argv[1] == "boundaries":
        print(kill_at_every_boundary(Path(sys.argv[2]), int(sys.argv[3])))
    else:
        many_writers(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
