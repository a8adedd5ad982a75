"""Forked DataLoader workers read from a cache the same batches as a single process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from distill.annotation.reader import AnnotationReader
from distill.cache.codecs.topk import TopK
from distill.cache.store import Store
from distill.lessons.collate import collate
from distill.lessons.join import Join
from distill.prompts.rendering import Prompts
from distill.prompts.tokenizers import load_tokenizer
from distill.prompts.vocabularies import Pairing
from distill.records import Annotation, Batch, Example, Request, Span, Target
from tests.cache.conftest import FINGERPRINT
from tests.conftest import LAYOUT, arithmetic, environment, examples


@final
class StepBatches(Dataset[Batch]):
    """Batches whose soft targets are read from a cache on access."""

    def __init__(self, join: Join, store: Store, examples: Sequence[Example]) -> None:
        self._join, self._store, self._examples = join, store, examples

    def __len__(self) -> int:
        return len(self._examples) // 4

    def __getitem__(self, number: int) -> Batch:
        batch_examples = self._examples[4 * number : 4 * number + 4]
        return collate(
            self._join.join(batch_examples).lessons, {("answer", "soft"): number}, 0, self._store.soft_targets
        )


def lesson_prompts(folder: Path) -> Prompts:
    return Prompts(load_tokenizer(folder), LAYOUT, (), max_length=256, too_long="drop")


def read_by_workers(folder: Path, tokenizer: Path) -> None:
    """Read a cache in forked workers and in this process, and compare the batches."""
    prompts, all_examples = lesson_prompts(tokenizer), examples(24)
    requests: dict[tuple[str, Span], Request] = {(e.id, "answer"): prompts.request(e, "answer") for e in all_examples}
    needed: Any = frozenset({("answer", "labels"), ("answer", "soft")})
    store = Store(folder, FINGERPRINT, TopK(k=4, temperature=1.0))
    settings: Any = {
        "soft_teacher": None,
        "rationales": {},
        "further_answers": {},
        "answer": "direct",
        "needed": needed,
    }
    settings |= {"pairing": Pairing(), "too_long": {}}
    join = Join(prompts=prompts, teacher=AnnotationReader(store, requests, arithmetic(), prompts), **settings)
    loaders = [
        DataLoader(StepBatches(join, store, all_examples), batch_size=None, num_workers=number) for number in (2, 0)
    ]
    of_workers, of_process = (list(loader) for loader in loaders)
    assert len(of_workers) == len(of_process) == 6
    for left, right in zip(of_workers, of_process, strict=True):
        assert left.counts == right.counts
        assert left.example_ids == right.example_ids
        for name in (
            "input_ids_BT",
            "mask_BT",
            "sequence_N",
            "before_N",
            "label_N",
            "is_labelled_N",
            "is_soft_N",
            "target_N",
        ):
            assert torch.equal(getattr(left, name), getattr(right, name))
        assert left.soft.ends_N.tolist() == right.soft.ends_N.tolist()
        for name in ("position_E", "ids_E", "logprobs_E", "tail_N"):
            assert torch.equal(getattr(left.soft, name), getattr(right.soft, name))


@pytest.mark.slow
def test_forked_workers_read_the_same_batches(tmp_path: Path, student_folder: Path) -> None:
    codec, prompts = TopK(k=4, temperature=1.0), lesson_prompts(student_folder)
    with Store(tmp_path, FINGERPRINT, codec).writing() as writer:
        for number, example in enumerate(examples(24)):
            ids = prompts.answer_ids(example.answer or "")
            soft = codec.cut((3 * torch.randn(len(ids), 300)).log_softmax(-1), torch.zeros(len(ids)).double())
            request = prompts.request(example, "answer")
            writer.add([Annotation(request.key, {"answer": Target(ids, soft)}, example.answer)])
            if number % 5 == 4:
                writer.flush()
    # Forking is safe only without threads, so in a new process.
    line = [sys.executable, __file__, str(tmp_path), str(student_folder)]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


if __name__ == "__main__":
    read_by_workers(Path(sys.argv[1]), Path(sys.argv[2]))
