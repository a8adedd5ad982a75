"""Several answers of a teacher to an example: all texts are taught, or the most frequent answer; each is counted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from distill.annotation.inspection import rescore
from distill.lessons.curriculum import Curriculum, Job, build_curriculum, prepare
from distill.records import RowCounts
from distill.training.forecast import forecast_run
from tests.conftest import CountingTeacher, compose, tiny_overrides

Folders = tuple[Path, Path]
ANSWERS = {  # recorded answers to unlabelled questions, and those that are taught as texts and as numbers
    "How many are two?": (["2 it is", "So 3", "3", "3"], ["2 it is", "So 3", "3"], ["3"]),
    "How many are three?": (["3", "", "It is 4.", "3!"], ["3", "It is 4.", "3!"], ["3"]),
    "How many are four?": (["5", "4", "4", "5"], ["5", "4"], ["5"]),
    "How many are none?": (["", "none"], ["none"], []),
    "How many is it?": (["it " * 80, "is 7"], ["it " * 79 + "it", "is 7"], ["7"]),
}


@pytest.fixture
def folders(teacher_folder: Path, student_folder: Path) -> Folders:
    return teacher_folder, student_folder


def overrides(root: Path, folders: Folders, kind: str, *more: str) -> list[str]:
    rows = [{"question": question} for question in ANSWERS]
    rows += [{"question": f"How many are {i} and {i}?", "answer": str(2 * i)} for i in range(20)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny = [o for o in tiny_overrides(root, *folders) if not o.startswith(("task", "teacher"))]
    own = ["task=jsonl", f"task.path={root / 'rows.jsonl'}", f"task.read.kind={kind}", "prompt.num_shots=0"]
    sizes = [f"task.examples.num_{split}={n}" for split, n in {"labelled": 12, "validation": 4, "test": 4}.items()]
    return [*tiny, *own, *sizes, "teacher.answers_each=4", *more]


def recorded(root: Path, *, backwards: bool = False) -> list[str]:
    pairs = [(question, text) for question, (texts, *_) in ANSWERS.items() for text in texts]
    words = [{"question": q, "teacher_answer": text} for q, text in (reversed(pairs) if backwards else pairs)]
    (root / "recorded.jsonl").write_text("".join(json.dumps(row) + "\n" for row in words))
    return [
        "teacher=recorded",
        f"teacher.kind.files=[{root / 'recorded.jsonl'}]",
        "teacher.kind.rationale=null",
        "loss=[answer,teacher_answer]",
    ]


def taught(job: Job, curriculum: Curriculum) -> dict[str, list[str]]:
    """The answers in the lessons of the unlabelled examples, by question."""
    questions = {example.id: example.question for example in job.annotation_job.splits.train if example.answer is None}
    texts: dict[str, list[str]] = {question: [] for question in questions.values()}
    for sequence in (sequence for lesson in curriculum.train for sequence in lesson.sequences):
        for target in sequence.targets:
            if target.example_id in questions:
                learned = job.prompts.text(sequence.ids[target.start : target.stop])
                texts[questions[target.example_id]].append(learned)
    return texts


def split_of(job: Job, column: int) -> dict[str, Sequence[str]]:
    return {e.question: ANSWERS[e.question][column] for e in job.annotation_job.splits.train if e.answer is None}


@pytest.mark.parametrize(
    ("kind", "column", "lost"),
    [
        ("text", 1, {"unmatched": 4, "empty": 2, "repeated": 3}),
        ("number", 2, {"unmatched": 4, "outvoted": 4, "repeated": 4, "empty": 2, "unreadable": 2}),
    ],
)
def test_texts_are_all_taught_and_numbers_are_votes(
    kind: str, column: int, lost: dict[str, int], tmp_path: Path, folders: Folders
) -> None:
    teacher = recorded(tmp_path)
    job = prepare(compose(*overrides(tmp_path, folders, kind, *teacher, "prompt.max_length=600")), tmp_path)
    curriculum = build_curriculum(job)
    answers = taught(job, curriculum)
    assert len(answers) == len(ANSWERS)
    assert answers == split_of(job, column)
    num_taught = sum(map(len, answers.values()))
    assert curriculum.rows["answers"] == RowCounts(20, lost, num_taught)
    assert curriculum.rows["train"].kept == len({id_ for lesson in curriculum.train for id_ in lesson.example_ids})


def test_a_further_answer_that_is_too_long_is_counted_and_costs_no_other(tmp_path: Path, folders: Folders) -> None:
    teacher = recorded(tmp_path, backwards=True)
    job = prepare(compose(*overrides(tmp_path, folders, "text", *teacher, "prompt.max_length=90")), tmp_path)
    curriculum = build_curriculum(job)
    assert taught(job, curriculum)["How many is it?"] == ["is 7"]
    answers = curriculum.rows["answers"]
    assert answers.lost["too long"] == 1
    assert answers.kept == sum(map(len, taught(job, curriculum).values()))


@pytest.mark.slow
def test_each_sampled_text_is_learned_with_the_soft_targets_along_its_own_words(
    tmp_path: Path, folders: Folders
) -> None:
    settings = ["teacher=causal_lm", f"teacher.model={folders[0]}", "teacher.kind.dtype=float32", "loss=[kl]"]
    settings += ["teacher.kind.max_new_tokens=8", "teacher.kind.generation.stops=[e,o,a]"]
    settings += ["teacher.kind.generation.sampling_temperature=1.5", "teacher.rationales_each=1"]
    job = prepare(compose(*overrides(tmp_path, folders, "text", *settings)), tmp_path)
    forecast = forecast_run(job)
    curriculum = build_curriculum(job)
    texts = taught(job, curriculum)
    assert max(map(len, texts.values())) > 1
    assert all(len({*answers}) == len(answers) for answers in texts.values())
    rows = curriculum.rows["answers"]
    assert rows.kept == sum(map(len, texts.values()))
    assert {*rows.lost} <= {"empty", "truncated", "repeated"}
    num_lessons = {name: len(part.train) for name, part in (("at most", forecast.curriculum), ("now", curriculum))}
    assert num_lessons["at most"] >= num_lessons["now"]
    requests = {r.key: r for samples in curriculum.filled.answers.values() for r in samples}
    stored = {key: job.annotation_job.store.read(key) for key in requests}
    assert all(annotation.is_sampled == (requests[key].sample > 0) for key, annotation in stored.items())
    sequences = [s for lesson in curriculum.train for s in lesson.sequences if lesson.answer]
    keys = set()
    for sequence, target in ((s, target) for s in sequences for target in s.targets):
        keys.add(key := target.soft.place[0])
        if key in stored:
            assert stored[key].targets["answer"].token_ids == sequence.ids[target.start : target.stop]
    assert keys & {key for key, request in requests.items() if request.sample}
    teacher = CountingTeacher(job.annotation_job.teacher)
    teacher.load()
    compared = rescore(job.annotation_job.store, teacher, [r for r in requests.values() if r.sample], 99, seed=0)
    # Sampled again they could be others by rounding: they are compared along their own words.
    assert (compared.num_records, compared.is_close) == (
        sum(r.sample > 0 for r in requests.values() if stored[r.key].targets),
        True,
    )
    assert all(request.given_ids for request in teacher.asked)
