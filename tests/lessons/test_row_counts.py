"""No row vanishes: at every stage, rows read = rows left out by reason + rows kept."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from distill.annotation.requests import AnnotationRequests
from distill.annotation.row_counts import rationale_counts
from distill.lessons.curriculum import build_curriculum, prepare
from distill.records import Annotation, Example, FilteredRationale, RejectionReason, Request, RowCounts
from tests.conftest import compose, tiny_overrides

WHYS = (
    "Since it is so, it is so.",
    "",
    "The answer is 7.",
    "It is.",
    "4 + 4 = 9, so it is so.",
    "so so so so so so so so",
)
REPLIES = ("7", "7", "It is 12.", "", "   ", "no number at all", None)


def random_rows(rng: random.Random, number: int) -> list[dict[str, Any]]:
    """Rows of every kind: labelled or not, repeated, too long, explained."""
    rows = []
    for index in range(number):
        question = f"How many are {index} and {rng.randrange(99)}?" + " More, and more." * (
            40 if rng.random() < 0.1 else 0
        )
        label = str(rng.choice((7, 12))) if rng.random() < 0.4 else None
        rows.append({"question": question, "answer": label, "why": rng.choice(WHYS) if label else None})
        if rng.random() < 0.2:
            rows.append(rng.choice(rows) | {"why": None})
    return rows


def recording(rng: random.Random, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Answers of every kind to most of the questions."""
    questions = {row["question"] for row in rows if rng.random() < 0.85}
    return [
        {"question": question, "teacher_answer": rng.choice(REPLIES), "teacher_rationale": rng.choice(WHYS)}
        for question in sorted(questions)
        for _ in range(rng.choice((1, 1, 3)))
    ]


@pytest.mark.parametrize("seed", range(4))
def test_rows_read_are_rows_left_out_and_rows_kept(
    seed: int, tmp_path: Path, teacher_folder: Path, student_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(seed)
    rows = random_rows(rng, 80)
    for name, content in (("rows", rows), ("recorded", recording(rng, rows))):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    kept = [
        o for o in tiny_overrides(tmp_path, teacher_folder, student_folder) if not o.startswith(("task", "teacher"))
    ]
    own = ["task=jsonl", f"task.path={tmp_path / 'rows.jsonl'}", "task.rationale=why", "task.read.kind=number"]
    own += ["teacher=recorded", f"teacher.kind.files=[{tmp_path / 'recorded.jsonl'}]", "teacher.rationales_each=2"]
    own += ["prompt.num_shots=0", "prompt.max_length=200", "rationales=checked"]
    own += [rng.choice(("loss=[answer,teacher_answer,rationale]", "loss=[answer]", "loss=[teacher_answer]"))]
    job = prepare(compose(*kept, *own), tmp_path)
    curriculum, splits = build_curriculum(job), job.annotation_job.splits
    counts = curriculum.rows
    assert sum(counts[name].read for name in ("train", "validation", "test")) == len(rows)
    assert all(number > 0 for part in counts.values() for number in part.lost.values())
    assert counts["train"].kept == len({lesson.example_id for lesson in curriculum.train})
    assert counts["validation"].kept == len({lesson.example_id for lesson in curriculum.validation})
    assert counts["test"].kept == len(splits.test)
    reasons = Counter(rationale.reason for rationale in curriculum.rationales)
    assert counts["rationales"].kept == reasons.pop(None, 0)
    assert counts["rationales"].lost == dict(reasons)
    assert counts["rationales"].read == sum(map(len, curriculum.filled.samples.values()))
    said = capsys.readouterr().err
    for name, part in counts.items():
        assert f"{name:12} {part.read:>9,} {part.kept:>9,}" in said


def test_rationales_that_were_requested_and_not_annotated_are_counted() -> None:
    samples = [Request(key, "rationale", Example("How many?"), ()) for key in ("a", "b", "c")]
    requests = AnnotationRequests({}, {"id": samples}, {}, 0, 0, 0.0)
    reasons: tuple[RejectionReason | None, ...] = (None, "too long")
    rationales = [FilteredRationale("id", Annotation("a", {}, None), "teacher", reason) for reason in reasons]
    assert rationale_counts(requests, rationales) == RowCounts(3, {"too long": 1, "not annotated": 1}, 1)
