"""Soft targets of a rationale and of the answer after it are those of a single pass over the whole text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from distill.models.reading import Reading
from distill.prompts.rendering import Prompts
from tests.conftest import examples, grid
from tests.teachers.conftest import make_teacher

TEXTS = [("Since so.", "has"), ("Ann has it, then she gets it back.", "gets back"), ("It is not said.", None)]


@pytest.mark.parametrize("rows", [(0,), (2,), (0, 1, 2), (2, 1)])
def test_a_rationale_and_its_answer_have_the_distributions_of_the_whole_text(
    rows: tuple[int, ...], prompts: Prompts, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    for rationale, answer in (TEXTS[row] for row in rows):
        ending = (*prompts.separator_ids(), *prompts.answer_ids(answer)) if answer else (prompts.end,)
        written.append([*prompts.rationale_ids(rationale), *ending])
    monkeypatch.setattr(Reading, "greedy", lambda self, **settings: written)
    teacher = make_teacher(teacher_folder, prompts)
    model: Any = teacher.load()
    requests = [prompts.request(examples(5)[row], "rationale") for row in rows]
    for row, request, annotation in zip(rows, requests, teacher.annotate(requests), strict=True):
        rationale, answer = TEXTS[row]
        assert (annotation.rationale, annotation.answer, annotation.is_truncated) == (rationale, answer, False)
        assert annotation.targets.keys() == ({"rationale", "answer"} if answer else {"rationale"})
        first = [*prompts.prefix("rationale"), *request.question_ids]
        ids = [*first, *prompts.rationale_ids(rationale)]
        spans = {"rationale": (len(first), len(ids))}
        if answer:
            ids += prompts.separator_ids()
            spans["answer"] = (len(ids), len(ids) + len(prompts.answer_ids(answer)))
            ids += prompts.answer_ids(answer)
        with torch.no_grad():
            logprobs_TV = model(torch.tensor([ids])).logits[0, :, : prompts.vocabulary_size].log_softmax(-1)
        for span, (start, stop) in spans.items():
            target = annotation.targets[span]
            assert target.token_ids == tuple(ids[start:stop])
            found = torch.from_numpy(grid(target.soft)[1]).float()
            assert torch.allclose(found, logprobs_TV[start - 1 : stop - 1], atol=1e-4)
