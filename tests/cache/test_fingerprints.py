"""Law 8, fingerprints and keys: a cache is reused exactly if the teacher's targets are the same."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import DictConfig

from distill.annotation.annotation_job import open_annotation_job
from distill.annotation.fill import fill
from distill.cache.codecs.topk import TopK
from distill.cache.store import Store
from distill.errors import CacheError
from tests.cache.conftest import train_and_validation
from tests.cases import TWO_FAST, Case
from tests.conftest import compose, counted, grid, tiny_overrides
from tests.teachers.conftest import FreeText, make_teacher


def test_each_question_is_annotated_once_in_any_order(configured: Callable[..., DictConfig]) -> None:
    job, teacher = counted(configured())
    examples = [e for e in job.splits.train if e.answer is None][:4]
    fill(job, {"answer": examples[:2]})
    assert {r.example.id for r in teacher.asked} == {e.id for e in examples[:2]}
    teacher.asked.clear()
    filled = fill(job, {"answer": [examples[3], *examples[:2], examples[2]]})
    assert {r.example.id for r in teacher.asked if r.example in examples[2:]} == {e.id for e in examples[2:]}
    assert (filled.num_reused, filled.num_annotated) == (2, 2)
    assert teacher.num_loads == 2
    teacher.asked.clear()
    same_job, unused = counted(configured())
    filled = fill(same_job, {"answer": examples[::-1]})
    assert (filled.num_reused, filled.num_annotated, unused.num_loads, unused.asked) == (4, 0, 0, [])


def test_more_unlabelled_examples_reuse_the_cache(configured: Callable[..., DictConfig]) -> None:
    job, _ = counted(configured())
    first = fill(job, train_and_validation(job))
    larger, _ = counted(configured("task.examples.num_unlabelled=9"))
    assert larger.store.fingerprint == job.store.fingerprint
    filled = fill(larger, train_and_validation(larger))
    assert (filled.num_reused, filled.num_annotated) == (first.num_annotated, 3)


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
def test_settings_that_change_targets_change_the_fingerprint(
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
    stores = [open_annotation_job(config).store for config in (ours, theirs)]
    assert stores[0].fingerprint != stores[1].fingerprint
    assert stores[0].folder != stores[1].folder


@pytest.mark.parametrize(
    "change", ["seed=1", "batch_size=4", "loss=[kl]", "teacher.batch_size=3", "optim.optimizer.lr=0.1"]
)
def test_other_settings_keep_the_fingerprint(change: str, configured: Callable[..., DictConfig]) -> None:
    assert (
        open_annotation_job(configured()).store.fingerprint == open_annotation_job(configured(change)).store.fingerprint
    )


def test_a_prompt_template_changes_every_key(configured: Callable[..., DictConfig]) -> None:
    ours, theirs = (open_annotation_job(configured(*o)) for o in ((), ("task.layout.question_cue='?'",)))
    keys = [{s.prompts.request(e, "answer").key for e in s.splits.train} for s in (ours, theirs)]
    assert len(keys[0]) == len(keys[1]) == len(ours.splits.train)
    assert not keys[0] & keys[1]


def test_whatever_the_teacher_reads_of_an_example_is_in_the_key(case: Case) -> None:
    for example in case.examples(6):
        others = [replace(example, question=f"{example.question} So?"), replace(example, answer=f"{example.answer}0")]
        if example.choices:
            others += [replace(example, choices=example.choices[::-1]), replace(example, choices=example.choices[1:])]
        for place, message in enumerate(example.history):
            changed = replace(message, content=f"{message.content} So.")
            history = (*example.history[:place], changed, *example.history[place + 1 :])
            others.append(replace(example, history=history))
        others += [example, example.unlabelled()]
        keys = [case.prompts.request(other, span).key for other in others for span in ("answer", "rationale")]
        assert len(set(keys)) == len(keys) - 2  # a rationale is requested alike whatever the answer


def test_a_cache_with_another_fingerprint_is_refused(configured: Callable[..., DictConfig], tmp_path: Path) -> None:
    cache_dir = f"cache.dir={tmp_path / 'mine'}"
    job, _ = counted(configured(cache_dir))
    fill(job, {"answer": job.splits.validation})
    with pytest.raises(CacheError, match=r"codec\.k: cache has 8, this run has 7"):
        open_annotation_job(configured(cache_dir, "cache.codec.k=7"))


@pytest.mark.parametrize("case", TWO_FAST, indirect=True)
def test_stored_targets_equal_the_models_own(case: Case, teacher_folder: Path, tmp_path: Path) -> None:
    prompts, codec, questions = case.prompts, TopK(k=8, temperature=1.0), case.examples(4)
    teacher = make_teacher(teacher_folder, prompts, task=FreeText(), codec=codec, constrain=False)
    module = teacher.load()
    with Store(tmp_path, {"for": "test"}, codec).writing() as writer:
        writer.add(teacher.annotate([prompts.request(example.unlabelled(), "answer") for example in questions]))
        writer.add(teacher.annotate([prompts.request(example, "answer") for example in questions]))
    store = Store(tmp_path, {"for": "test"}, codec)
    for example in (*questions, *(example.unlabelled() for example in questions)):
        target = store.read(prompts.request(example, "answer").key).targets.get("answer")
        if target is None:  # the teacher's own answer was cut off
            assert example.answer is None
            continue
        before = prompts.prefix("answer") + prompts.question(example, "answer")
        assert example.answer is None or target.token_ids == prompts.answer_ids(example.answer)
        with torch.no_grad():
            logits_TV = module(torch.tensor([[*before, *target.token_ids]])).logits[0, len(before) - 1 : -1]
        logits_TV = logits_TV[:, : prompts.vocabulary_size]
        top_NK, ids_NK = logits_TV.log_softmax(-1).topk(8, -1)
        assert target.soft is not None
        # Stored probabilities are rounded to 1/255 on the scale of their fourth roots.
        stored_ids_NK, stored_logprobs_NK = grid(target.soft)
        assert np.allclose(np.exp(stored_logprobs_NK), top_NK.exp(), atol=0.01)
        assert np.array_equal(stored_ids_NK[:, 0], ids_NK[:, 0])
