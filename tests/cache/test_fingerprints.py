"""Law 8 and half of law 12: a cache holds what was written, or says what is wrong with it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import DictConfig

from distill.annotation.fill import fill, open_source
from distill.errors import CacheError
from tests.cache.conftest import wanted
from tests.conftest import compose, counted, grid, tiny_overrides


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
    with pytest.raises(CacheError, match=r"codec\.k: cache has 8, this run has 7"):
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
