"""No row and no rationale vanishes: on random data with every kind of them, all are counted under the right reason."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import pytest

from distill.annotation.requests import AnnotationRequests
from distill.annotation.row_counts import rationale_counts
from distill.errors import ConfigError
from distill.lessons.curriculum import build_curriculum, prepare
from distill.records import Annotation, Example, FilteredRationale, RejectionReason, Request, RowCounts
from distill.training.forecast import forecast_run
from tests.conftest import CountingTeacher, compose, tiny_overrides

# What a teacher writes, by the reason to reject it if the label is 7; {n} makes each text unlike the others.
GOOD = "Since box{n} holds seven, crate{n} is so."
WRITTEN = {
    "right": ("7", GOOD),
    "disagrees": ("8", GOOD),
    "unreadable": ("no number", GOOD),
    "truncated": ("7", "Since box{n} holds seven and"),
    "empty": ("7", " "),
    "wrong arithmetic": ("7", "4 + 4 = 9, so box{n} is full."),
    "too short": ("7", "Box{n} holds."),
    "too long": ("7", " ".join(f"word{k}of{{n}}" for k in range(15))),
    "repetitive": ("7", "so so so so so so so so"),
    "foreign": ("7", "Потому что ящик{n} полон вещей"),
    "leaks the answer": ("7", "The answer is 7."),
    "long for the student": ("7", " ".join(f"{'q' * 30}{k}of{{n}}" for k in range(11))),
}
FILTER = ["max_words=12", "script=LATIN", "near_duplicates=0.8", "per_example=1"]


class Cutting(CountingTeacher):
    """A teacher some of whose texts reach the token limit."""

    def annotate(self, requests: Sequence[Request]) -> list[Annotation]:
        annotations = super().annotate(requests)
        return [replace(a, is_truncated=_is_cut(r, a)) for r, a in zip(requests, annotations, strict=True)]


def _is_cut(request: Request, annotation: Annotation) -> bool:
    if request.span == "answer":
        return "cut short" in request.example.question
    return (annotation.rationale or "").endswith(" and")


@dataclass
class Data:
    """Rows of files, what a teacher recorded, and what has to be counted for these losses."""

    rng: random.Random
    losses: tuple[str, ...]
    num_samples: int
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {"train": [], "validation": [], "test": []})
    recorded: list[dict[str, Any]] = field(default_factory=list)
    lost: dict[str, Counter[str]] = field(default_factory=lambda: {"train": Counter(), "validation": Counter()})
    kept: Counter[str] = field(default_factory=Counter)
    rationales: Counter[str] = field(default_factory=Counter)  # by reason; "" for those that are learned
    number: int = 0

    def question(self, more: str = "") -> str:
        self.number += 1
        return f"How many are {self.number} and {self.rng.randrange(99)}{more}?"

    def add(self, split: str, question: str, answer: str | None, reason: str | None = None) -> None:
        """Add a row; `reason` is why it is lost."""
        self.rows[split].append({"question": question, "answer": answer})
        if reason:
            self.lost[split][reason] += 1
        else:
            self.kept[split] += 1

    def record(self, question: str, answer: str, text: str) -> None:
        self.number += 1
        row = {"question": question, "teacher_answer": answer, "teacher_rationale": text.format(n=self.number)}
        self.recorded.append(row)

    def labelled(self, *written: str) -> None:
        """Add a labelled question with these samples; a sample that the recording lacks is unmatched."""
        question, is_learned, reasons = self.question(), False, list[str]()
        for name in written:
            self.record(question, *WRITTEN[name])
        for name in (*written, *["unmatched"] * self.num_samples)[: self.num_samples]:
            is_right = name in ("right", "long for the student")
            reasons.append(("surplus" if is_learned else "") if is_right else name)
            is_learned |= is_right
        is_long = written[0] == "long for the student" and "rationale" in self.losses
        self.expect(["too long" if is_long and not reason else reason for reason in reasons])
        self.add("train", question, "7", "too long" if is_long else None)

    def unlabelled(self, more: str, samples: Sequence[tuple[str, str]], reasons: Sequence[str], defect: str) -> None:
        """Add a question without label; `defect` is why the teacher's direct answer cannot be learned."""
        question = self.question(more)
        for answer, text in samples:
            self.record(question, answer, text)
        self.expect(list(reasons[: self.num_samples]))
        is_learned = ("teacher_answer" in self.losses and not defect) or (
            "rationale" in self.losses and "" in reasons[: self.num_samples]
        )
        reason = defect if "teacher_answer" in self.losses else "no label"
        self.add("train", question, None, None if is_learned else reason)

    def expect(self, reasons: Sequence[str]) -> None:
        self.rationales.update(reasons if "rationale" in self.losses else [])


def random_data(rng: random.Random, losses: tuple[str, ...], num_samples: int) -> Data:
    data, few = Data(rng, losses, num_samples), range(1, 4)
    others = [name for name in WRITTEN if name != "long for the student"]
    for name in [*WRITTEN, *rng.choices(others, k=12)]:
        data.labelled(name, *rng.choices(others, k=rng.choice((1, 2))))
    cut = ["no reference"] if num_samples == 1 else ["", "surplus", "outvoted"]
    voted = [("7", GOOD), ("7", GOOD), ("8", GOOD)]
    for _ in range(rng.choice(few)):
        data.unlabelled("", voted, ["", "surplus", "outvoted"], "")
        data.unlabelled(", cut short", voted, cut, "truncated")
        data.unlabelled("", [(" ", GOOD)] * 3, ["unreadable"] * 3, "empty")
        data.unlabelled("", [("no number", GOOD)] * 3, ["unreadable"] * 3, "unreadable")
        data.unlabelled("", [], ["unmatched"] * 3, "unmatched")
    for _ in range(rng.choice(few)):  # two questions with one text: which of them keeps it is the order's matter
        text = f"Twice {data.number} is the same here."
        for reason in ("", "near duplicate"):
            question = data.question()
            data.record(question, "7", text)
            data.add("train", question, "7")
            data.expect([reason, *["unmatched"] * (num_samples - 1)])
    for split in ("train", "validation"):
        for _ in range(rng.choice(few)):
            data.add(split, data.question(" More, and more." * 40), "7", "too long")
            question = data.question()
            data.add(split, question, "7", "contradicting")
            data.add(split, question, "8", "contradicting")
            question = data.question()
            data.record(question, "7", GOOD)
            data.add("test", question, "7")
            data.add(split, question, "7", "in another split")
    for _ in range(4):
        question = data.question()
        data.add("validation", question, "7")
        data.add("validation", question, "7", "repeated")
    data.add("train", *next((row["question"], None) for row in data.rows["train"] if row["answer"]), "repeated")
    for rows in data.rows.values():
        rng.shuffle(rows)
    return data


def overrides(data: Data, root: Path, *models: Path) -> list[str]:
    """A run on this data, whose files are written below `root`."""
    for name, rows in {**data.rows, "recorded": data.recorded}.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny = [o for o in tiny_overrides(root, *models) if not o.startswith(("task", "teacher"))]
    paths = [f"task.{split}_path={root / split}.jsonl" for split in ("validation", "test")]
    own = ["task=jsonl", f"task.path={root / 'train.jsonl'}", *paths, "task.read.kind=number", "task.conflicts=drop"]
    own += ["teacher=recorded", f"teacher.kind.files=[{root / 'recorded.jsonl'}]"]
    own += [f"teacher.rationales_each={data.num_samples}", "prompt.num_shots=0", "prompt.max_length=200"]
    own += [f"rationales.{setting}" for setting in FILTER]
    return [*tiny, *own, f"loss=[{','.join(data.losses)}]"]


@pytest.mark.parametrize(
    ("losses", "num_samples"),
    [
        (("answer", "teacher_answer", "rationale"), 1),
        (("answer", "teacher_answer", "rationale"), 3),
        pytest.param(("answer", "rationale"), 3, marks=pytest.mark.slow),
        pytest.param(("answer",), 1, marks=pytest.mark.slow),
    ],
)
def test_every_row_and_every_rationale_is_counted_under_its_reason(
    losses: tuple[str, ...],
    num_samples: int,
    tmp_path: Path,
    teacher_folder: Path,
    student_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = random_data(random.Random(len(losses) + num_samples), losses, num_samples)
    job = prepare(compose(*overrides(data, tmp_path, teacher_folder, student_folder)), tmp_path)
    teacher = Cutting(job.annotation_job.teacher)
    curriculum = build_curriculum(replace(job, annotation_job=replace(job.annotation_job, teacher=teacher)))
    rows = curriculum.rows
    for split in ("train", "validation"):
        assert rows[split] == RowCounts(len(data.rows[split]), dict(data.lost[split]), data.kept[split]), split
    assert rows["test"] == RowCounts(data.kept["test"], {}, data.kept["test"])
    num_learned, number = data.rationales.pop("", 0), data.rationales.total()
    assert rows["rationales"] == RowCounts(num_learned + number, dict(data.rationales), num_learned)
    for split, lessons in (("train", curriculum.train), ("validation", curriculum.validation)):
        assert rows[split].kept == len({id_ for lesson in lessons for id_ in lesson.example_ids})
    spans = [span for lesson in curriculum.train for sequence in lesson.sequences for span in sequence.spans]
    assert spans.count("rationale") == num_learned
    if "rationale" in losses:
        impossible = {"outvoted", "surplus"} if num_samples == 1 else {"no reference"}
        assert set(data.rationales) == set(get_args(RejectionReason)) - impossible
    said = capsys.readouterr().err
    for name, part in rows.items():
        assert f"{name:12} {part.read:>9,} {part.kept:>9,}" in said


def test_rationales_that_were_requested_and_not_annotated_are_counted() -> None:
    samples = [Request(key, "rationale", Example("How many?"), ()) for key in ("a", "b", "c")]
    requests = AnnotationRequests({}, {"id": samples}, {}, {}, 0, 0, 0.0)
    reasons: tuple[RejectionReason | None, ...] = (None, "too long")
    rationales = [FilteredRationale("id", Annotation("a", {}, None), "teacher", reason) for reason in reasons]
    assert rationale_counts(requests, rationales) == RowCounts(3, {"too long": 1, "not annotated": 1}, 1)


@pytest.mark.parametrize(
    ("changes", "problems"),
    [
        (["loss=[teacher_answer]"], ["validation example has targets .* rows left out: 4 no loss on its label"]),
        (["loss=[kl]", "prompt.max_length=5"], ["train example .*: 12 too long", "validation example .*: 4 too long"]),
        (["loss=[answer]", "prompt.max_length=5"], ["train example .*too long", "validation example .*: 4 too long"]),
    ],
)
def test_data_that_cannot_make_a_lesson_is_refused_before_annotation(
    changes: list[str], problems: list[str], tmp_path: Path, teacher_folder: Path, student_folder: Path
) -> None:
    job = prepare(compose(*tiny_overrides(tmp_path, teacher_folder, student_folder), *changes), tmp_path)
    teacher = CountingTeacher(job.annotation_job.teacher)
    job = replace(job, annotation_job=replace(job.annotation_job, teacher=teacher))
    for start in (build_curriculum, forecast_run):
        with pytest.raises(ConfigError) as refusal:
            start(job)
        for problem, pattern in zip(refusal.value.problems, problems, strict=True):
            assert re.search(f"no {pattern}", problem)
    assert teacher.num_loads == 0
