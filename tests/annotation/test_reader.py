"""Answers are read when they are used: a changed reader needs no new annotation, and what is cut off is not taught."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.annotation.fill import fill, filter_rationales
from distill.annotation.inspection import export_parquet
from distill.annotation.reader import count_answers
from distill.annotation.requests import collect_requests
from distill.annotation.row_counts import say_answers
from distill.lessons.curriculum import build_curriculum, examples_to_annotate, prepare
from distill.records import Annotation, Example, Request, SoftTargets, Target
from distill.tasks import with_reading
from distill.tasks.files import AnswerFormat
from tests.conftest import compose, counted, tiny_overrides
from tests.teachers.conftest import Verbs

TEXTS = {
    "Which sum?": "It is 48 for two, so 72.",
    "Which word?": "none at all",
    "What else?": "",
    "How many?": "7 of 9",
}


class Writer:
    """A teacher that writes a given text for each question, with soft targets that are certain of its answer."""

    gives_soft_targets = True

    def __init__(self, job: Any, texts: dict[str, str], *, is_truncated: bool = False) -> None:
        self._teacher, self._job, self._texts, self._is_truncated = job.teacher, job, texts, is_truncated
        self.num_asked = 0

    def fingerprint(self) -> dict[str, Any]:
        return self._teacher.fingerprint()

    def backend(self) -> dict[str, str]:
        return self._teacher.backend()

    def load(self) -> Any:
        return self._teacher.load()

    def close(self) -> None:
        self._teacher.close()

    def num_tokens(self, request: Request) -> int:
        return self._teacher.num_tokens(request)

    def annotate(self, requests: Sequence[Request]) -> list[Annotation]:
        self.num_asked += len(requests)
        return [self._annotation(request) for request in requests]

    def _annotation(self, request: Request) -> Annotation:
        text = self._texts.get(request.example.question, "1")
        rationale = None if request.span == "answer" else f"One reason for {text!r}."
        words = Annotation(request.key, {}, None, rationale, is_truncated=self._is_truncated, text=text)
        present = with_reading(words, self._job.task, request.example)
        ids = request.given_ids or (self._job.prompts.answer_ids(present.answer) if present.answer else ())
        targets = {"answer": Target(ids, certain(ids, self._job.codec))} if ids and rationale is None else {}
        return replace(words, answer=present.answer, targets=targets)


def certain(ids: Sequence[int], codec: Any) -> SoftTargets:
    logprobs_NV = torch.full((len(ids), 320), -20.0)
    logprobs_NV[range(len(ids)), list(ids)] = 0.0
    return codec.cut(logprobs_NV.log_softmax(-1), torch.zeros(len(ids), dtype=torch.float64))


@pytest.fixture
def questions(tmp_path: Path, teacher_folder: Path, student_folder: Path) -> Any:
    """Compose a run on questions whose answers are read as `kind` says; four have no label."""
    rows = [{"question": question} for question in TEXTS]
    rows += [{"question": f"How many are {i} and {i}?", "answer": str(2 * i)} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shot = "task.examples.shots=[{question:And one?,rationale:It is one.,answer:'1'}]"
    tiny = tiny_overrides(tmp_path, teacher_folder, student_folder)
    own = ["task=jsonl", f"task.path={tmp_path / 'rows.jsonl'}", shot, "prompt.num_shots=1"]

    def questions(kind: str, *more: str, teacher: Sequence[str] = ()) -> Any:
        overrides = [option for option in tiny[5:] if not (teacher and option.startswith("teacher"))]
        losses = ["loss=[answer,teacher_answer,kl]"] if not any(option.startswith("loss=") for option in more) else []
        return compose(*overrides, *own, f"task.read.kind={kind}", *losses, *more, *teacher)

    return questions


def written(config: Any, *, is_truncated: bool = False) -> tuple[Any, Writer]:
    """The job of a run whose teacher writes `TEXTS`."""
    job = prepare(config, Path("unused"))
    teacher = Writer(job.annotation_job, TEXTS, is_truncated=is_truncated)
    return replace(job, annotation_job=replace(job.annotation_job, teacher=teacher)), teacher


class Reasoner(Writer):
    """A teacher that writes another answer after its reasoning, with soft targets for it."""

    def _annotation(self, request: Request) -> Annotation:
        direct = super()._annotation(request)
        if request.span == "answer" or not direct.answer:
            return direct
        answer = f"{direct.answer}0"
        ids = self._job.prompts.answer_ids(answer)
        targets = {"answer": Target(ids, certain(ids, self._job.codec))}
        return replace(direct, answer=answer, text=answer, targets=targets)


def answers_of(curriculum: Any, job: Any) -> dict[str, str]:
    """What is taught as the answer to each of the questions without label."""
    by_id = {id_: lesson.answer for lesson in curriculum.train for id_ in lesson.example_ids}
    examples = job.annotation_job.splits.train
    return {e.question: by_id[e.id] for e in examples if e.answer is None and e.id in by_id}


def test_a_changed_reader_reads_the_stored_texts_anew(questions: Any, capsys: pytest.CaptureFixture[str]) -> None:
    job, teacher = written(questions("number"))
    assert answers_of(build_curriculum(job), job) == {"Which sum?": "48", "How many?": "7"}
    assert teacher.num_asked > 0
    assert "are read differently" not in capsys.readouterr().err
    job, teacher = written(questions("last_number"))
    curriculum = build_curriculum(job)
    assert teacher.num_asked == 0
    assert answers_of(curriculum, job) == {"Which sum?": "72", "How many?": "9"}
    message = "2 answers are read differently from when they were annotated, since task.read has changed; nothing is "
    assert message + "annotated again. 2 of them are learned without soft targets" in capsys.readouterr().err


def test_soft_targets_of_other_words_are_not_learned(questions: Any) -> None:
    def soft(kind: str) -> dict[str, bool]:
        job, _ = written(questions(kind))
        names = {e.id: e.question for e in job.annotation_job.splits.train}
        lessons = build_curriculum(job).train
        return {
            names[target.example_id]: bool(target.soft) for lesson in lessons for target in lesson.sequences[0].targets
        }

    assert soft("number") | {"How many?": True} == soft("number")
    after = soft("last_number")
    assert {question for question, has_soft in after.items() if not has_soft} == {"Which sum?", "How many?"}


def test_the_tokens_that_have_soft_targets_are_known_without_decoding_any(questions: Any) -> None:
    build_curriculum(written(questions("number"))[0])
    for kind, num_targets in (("number", 42), ("last_number", 40)):
        job, _ = written(questions(kind))
        filled = collect_requests(job.annotation_job, examples_to_annotate(job))
        reader, scored = job.annotation_job.reader(filled.requests), dict[str, Any]()
        for request in filled.all_requests:
            targets = reader.read(request).targets
            scored[request.key] = reader.scored(request.key, request.example)
            assert scored[request.key] == {span: t.scored for span, t in targets.items() if t.soft is not None}
        assert sum(map(bool, scored.values())) == num_targets
        with_soft = [request for request in filled.all_requests if scored[request.key]]
        ids = [int(reader.read(request).targets["answer"].soft.ids_E.max()) for request in with_soft]
        assert reader.largest_soft_id([(key, "answer") for key, tokens in scored.items() if tokens]) == max(ids)


def test_rationales_are_judged_by_the_present_reading(questions: Any) -> None:
    for kind, expected in (("number", "48"), ("last_number", "72")):
        job, _ = written(questions(kind))
        source = job.annotation_job
        train = [e for e in source.splits.train if e.question == "Which sum?"]
        filled = fill(source, {"answer": train, "rationale": train})
        (rationale,) = filter_rationales(source, filled)
        assert (rationale.reason, rationale.annotation.answer) == (None, expected)
        assert rationale.annotation.targets == {}  # soft targets stay in the cache


@pytest.mark.slow
def test_a_direct_student_learns_answers_that_were_exported_after_reasoning(questions: Any, tmp_path: Path) -> None:
    job, _ = written(questions("number"))
    source = replace(job.annotation_job, teacher=Reasoner(job.annotation_job, TEXTS))
    filled = fill(source, {"rationale": source.splits.train})
    export_parquet(source.reader({}), filled.all_requests, source.prompts, tmp_path / "reasoned.parquet")
    columns = ["teacher.kind.answer=answer", "teacher.kind.rationale=null"]
    recorded = ["teacher=recorded", f"teacher.kind.files=[{tmp_path / 'reasoned.parquet'}]", *columns]
    job = prepare(questions("number", "loss=[answer,teacher_answer]", teacher=recorded), tmp_path / "run")
    curriculum = build_curriculum(job)
    assert answers_of(curriculum, job) == {"Which sum?": "480", "How many?": "70"}
    assert all(s.spans == {"answer"} for lesson in curriculum.train for s in lesson.sequences)


@pytest.mark.parametrize(
    ("kind", "text", "is_whole"),
    [
        ("line", "Paris", False),
        ("line", "Paris\nQuestion: And", True),
        ("number", "72", False),
        ("number", "72 of the app", True),
        ("number", "about", False),
        ("last_number", "48 for two, so", False),
        ("expression", "(84 / 2", False),
        ("expression", "(84 / 2)", False),
        ("expression", "84 / 2\nThe", True),
    ],
)
def test_a_text_that_was_cut_off_has_an_answer_only_if_no_continuation_changes_it(
    kind: Any, text: str, is_whole: bool
) -> None:
    class Task(Verbs):
        def read_answer(self, text: str, example: Example) -> str:
            return AnswerFormat(kind=kind, pattern=None, choices=[]).read(text)

    cut, whole = (
        with_reading(Annotation("", {}, None, is_truncated=is_cut, text=text), Task(), Example("?"))
        for is_cut in (True, False)
    )
    assert (cut.whole_answer is not None) == is_whole
    assert cut.is_truncated == (not is_whole)
    assert not whole.is_truncated


def test_empty_truncated_and_unreadable_answers_are_counted_and_not_taught(
    questions: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    job, _ = written(questions("number"), is_truncated=True)
    curriculum = build_curriculum(job)
    assert answers_of(curriculum, job) == {"Which sum?": "48", "How many?": "7"}  # "7 of 9" goes on after its answer
    said = capsys.readouterr().err
    assert "answers of the teacher: 1 empty, " in said
    assert curriculum.rows["train"].lost == {"empty": 1, "truncated": 1}
    assert curriculum.rows["train"].kept == len(curriculum.train)
    job, _ = written(questions("last_number"), is_truncated=True)
    assert build_curriculum(job).rows["train"].lost == {"truncated": 3, "empty": 1}
    job, _ = written(questions("number", "root=" + str(Path(questions("number").root) / "other")))
    assert build_curriculum(job).rows["train"].lost == {"empty": 1, "unreadable": 1}


def test_scored_answers_of_the_data_are_no_answers_of_the_teacher(questions: Any) -> None:
    job, _ = counted(questions("line"))
    filled = fill(job, {"answer": job.splits.train})
    num_unlabelled = sum(example.answer is None for example in job.splits.train)
    assert 0 < num_unlabelled < len(filled.all_requests)
    assert count_answers(job.reader(filled.requests), filled.all_requests).num_answers == num_unlabelled


def test_a_model_marks_answers_that_reach_the_token_limit(questions: Any) -> None:
    job, _ = counted(questions("line", "teacher.kind.max_new_tokens=3"))
    filled = fill(job, {"answer": [e for e in job.splits.train if e.answer is None]})
    records = [job.store.read(request.key) for request in filled.all_requests]
    cut = [record for record in records if record.is_truncated]
    assert cut
    assert all(record.text is not None for record in records)
    assert all("\n" in record.text or not record.targets for record in cut)
    counts = count_answers(job.reader(filled.requests), filled.all_requests)
    assert counts.num_answers == len(records) == 4
    assert counts.defects["truncated"] + counts.defects["empty"] > 0
    say_answers(job, filled)
