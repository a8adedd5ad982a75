"""Lines of progress for a log: records, a teacher's tokens, speed."""

from __future__ import annotations

import lightning
import pytest

from distill.annotation.requests import count_tokens
from distill.app import progress as progress_of
from distill.app.progress import ProgressLines, token_speed
from distill.prompts.rendering import Prompts
from distill.records import Annotation, Example, Group


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ((12_000, 3_000, 60.0), "12,000 tokens read, 3,000 written (50/s)"),
        ((12_000, 0, 60.0), "12,000 tokens read (200/s)"),
    ],
)
def test_a_speed_is_that_of_writing_and_without_texts_that_of_reading(
    numbers: tuple[int, int, float], expected: str
) -> None:
    assert token_speed(*numbers) == expected


def test_lines_of_annotation_count_records_and_tokens(
    prompts: Prompts, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 10.0, 20.0])
    monkeypatch.setattr(progress_of.time, "monotonic", lambda: next(clock))
    of_lightning = lightning.Trainer(logger=False, enable_checkpointing=False), lightning.LightningModule()
    lines = ProgressLines("answers", 4, lambda *both: count_tokens(prompts, *both), every_seconds=5.0)
    lines.on_predict_start(*of_lightning)
    for number in (1, 2):
        requests = tuple(prompts.request(Example(f"{number} and {k}?"), "answer") for k in (1, 2))
        written = [Annotation(request.key, {}, "x", text="four five six") for request in requests]
        lines.on_predict_batch_end(*of_lightning, written, Group("", requests), number)
    num_read = len(requests[0].question_ids)
    num_written = len(prompts.encode("four five six"))
    assert capsys.readouterr().err.splitlines() == [
        f"  2 of 4 answers, 0.2/s, 10 s left, {2 * num_read} tokens read, {2 * num_written} written "
        f"({2 * num_written / 10:,.0f}/s)",
        f"  4 of 4 answers, 0.2/s, 0 s left, {4 * num_read} tokens read, {4 * num_written} written "
        f"({4 * num_written / 20:,.0f}/s)",
    ]


def test_a_rationale_and_its_answer_are_written_and_a_choice_is_not(prompts: Prompts) -> None:
    reply = Annotation("a", {}, "7", "It is so.", text="7")
    assert count_tokens(prompts, [], [reply])[1] == len(prompts.encode("It is so.")) + len(prompts.encode("7"))
    assert count_tokens(prompts, [], [Annotation("b", {}, "has", choice_logprobs=(0.0, -1.0))]) == (0, 0)
