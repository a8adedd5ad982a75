"""Recorded teachers, and a second teacher that scores their texts."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distill.annotation.annotation_job import open_annotation_job
from distill.annotation.fill import fill, loaded
from distill.errors import ConfigError
from distill.lessons.curriculum import build_curriculum, prepare
from distill.training.job import distill
from distill.training.run_facts import rationales
from tests.conftest import CountingTeacher, compose
from tests.teachers.conftest import Configured


def test_annotations_are_read_from_the_file(recorded: Configured) -> None:
    source = open_annotation_job(recorded())
    missing, *answered = source.splits.train
    filled = fill(source, {"answer": source.splits.train, "rationale": source.splits.train})
    for index, example in enumerate(answered):
        annotation = source.store.read(filled.requests[example.id, "rationale"].key)
        answer = example.answer or str(index)
        assert (annotation.answer, annotation.rationale) == (answer, f"Since it is {answer}, it is so.")
        assert source.store.read(filled.requests[example.id, "answer"].key).answer == answer
    for span in ("answer", "rationale"):
        annotation = source.store.read(filled.requests[missing.id, span].key)
        assert (annotation.answer, annotation.rationale) == (None, None)


def test_a_question_is_laid_out_alike_for_the_task_and_its_recording(tmp_path: Path, recorded: Configured) -> None:
    rows = [
        {"title": f"T{i}", "body": {"text": i / 4}, "answer": "yes", "reply": "yes", "why": ["So.", "Yes."]}
        for i in range(20)
    ]
    (tmp_path / "recorded.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = recorded()
    overrides = ["task=jsonl", f"task.path={tmp_path / 'recorded.jsonl'}", 'task.question="{title}: {body.text}"']
    config.task = compose(*overrides, f"root={tmp_path}").task
    config.prompt.num_shots = 0
    job = open_annotation_job(config)
    filled = fill(job, {"rationale": job.splits.train})
    annotations = [job.store.read(request.key) for request in filled.requests.values() if request.span == "rationale"]
    assert {(a.answer, a.rationale) for a in annotations} == {("yes", "So. Yes.")}
    assert len(annotations) == len(job.splits.train)


def test_several_rows_of_a_question_are_its_samples(recorded: Configured, tmp_path: Path) -> None:
    question = open_annotation_job(recorded()).splits.train[1].question
    with (tmp_path / "recorded.jsonl").open("a") as file:
        file.write(json.dumps({"question": f" {question}\n", "reply": "99", "why": "Another reason."}) + "\n")
    source = open_annotation_job(recorded("teacher.rationales_each=3"))
    filled = fill(source, {"rationale": source.splits.train[1:2]})
    (samples,) = filled.samples.values()
    annotations = [source.store.read(request.key) for request in samples]
    assert [annotation.answer for annotation in annotations[1:]] == ["99", None]
    assert annotations[1].rationale == "Another reason."


def test_reasoned_answers_are_validated_along_the_teachers_rationales(recorded: Configured, tmp_path: Path) -> None:
    rows = [{"question": f"Is it {i}?", "answer": "yes", "reply": "yes", "why": f"It is {i}."} for i in range(40)]
    (tmp_path / "recorded.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = recorded("loss=[answer,rationale]", "rationales=all")
    config.task = compose("task=jsonl", f"task.path={tmp_path / 'recorded.jsonl'}", "task.answer_mode=reasoned").task
    config.prompt.num_shots = 0
    job = prepare(config, tmp_path)
    curriculum = build_curriculum(job)
    spans = [{target.span for target in lesson.targets} for lesson in curriculum.validation]
    assert spans == 4 * [{"answer", "rationale"}]
    assert curriculum.rows["rationales"].kept == len(curriculum.train) + len(curriculum.validation) == 36
    assert {line["rationale"] for line in rationales(job, curriculum)} < {row["why"] for row in rows}


def test_files_are_named_by_patterns_too(recorded: Configured, tmp_path: Path) -> None:
    by_name, by_pattern = (
        open_annotation_job(recorded(f"teacher.kind.files=[{tmp_path / name}]")).store.digest
        for name in ("recorded.jsonl", "recor*.jsonl")
    )
    assert by_name == by_pattern
    with pytest.raises(ConfigError, match=r"other\*\.jsonl does not exist"):
        open_annotation_job(recorded(f"teacher.kind.files=[{tmp_path / 'other*.jsonl'}]"))


def test_a_text_in_too_many_lists_is_refused_with_its_place(recorded: Configured, tmp_path: Path) -> None:
    job = open_annotation_job(recorded())
    with (tmp_path / "recorded.jsonl").open("a") as file:
        file.write(f'{{"question": "Once more?", "reply": "1", "why": {900 * "["}{900 * "]"}}}\n')
    with pytest.raises(ConfigError, match=r"recorded\.jsonl.*line"):
        fill(job, {"rationale": job.splits.train})


def test_changed_files_change_the_cache_digest(recorded: Configured, tmp_path: Path) -> None:
    before = open_annotation_job(recorded()).store.digest
    with (tmp_path / "recorded.jsonl").open("a") as file:
        file.write(json.dumps({"question": "Once more?", "reply": "1", "why": None}) + "\n")
    assert open_annotation_job(recorded()).store.digest != before


def test_losses_on_soft_targets_are_refused_with_a_reason(recorded: Configured, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"loss\.kl needs soft targets, which this teacher does not provide.*soft_teacher"
    ):
        prepare(recorded("loss=[answer,kl]"), tmp_path)
    prepare(recorded("loss=[answer,teacher_answer,rationale]"), tmp_path)


def test_a_recorded_teacher_without_a_student_needs_a_tokenizer(recorded: Configured, tmp_path: Path) -> None:
    config = compose("teacher=recorded", f"teacher.kind.files=[{tmp_path / 'recorded.jsonl'}]", name="annotate")
    with pytest.raises(ConfigError, match=r"teacher\.model is missing"):
        open_annotation_job(config)


def test_a_missing_file_is_named(recorded: Configured) -> None:
    with pytest.raises(ConfigError, match=r"/nowhere\.jsonl does not exist"):
        open_annotation_job(recorded("teacher.kind.files=[/nowhere.jsonl]"))


LOSSES = "loss=[answer,teacher_answer,kl,rationale,rationale_kl]"


def two_teachers(teacher_folder: Path) -> list[str]:
    names = {"model": teacher_folder, "kind.dtype": "float32", "kind.max_new_tokens": 6, "batch_size": 5}
    return ["teacher@soft_teacher=causal_lm", *(f"soft_teacher.{name}={value}" for name, value in names.items())]


def test_a_second_teacher_scores_the_texts_of_the_first(
    recorded: Configured, tmp_path: Path, teacher_folder: Path
) -> None:
    job = prepare(recorded(LOSSES, *two_teachers(teacher_folder)), tmp_path)
    assert job.soft_annotation_job
    scorer = CountingTeacher(job.soft_annotation_job.teacher)
    curriculum = build_curriculum(replace(job, soft_annotation_job=replace(job.soft_annotation_job, teacher=scorer)))
    assert {request.span for request in scorer.asked} == {"answer", "rationale"}
    assert all(request.given_ids for request in scorer.asked)
    index = 7  # without a label
    example = job.annotation_job.splits.train[index + 1]
    assert example.answer is None
    (lesson,) = (lesson for lesson in curriculum.train if lesson.example_ids == (example.id,))
    prompts = job.soft_annotation_job.prompts
    for sequence, text in zip(lesson.sequences, (str(index), f"Since it is {index}, it is so."), strict=True):
        (target,) = sequence.targets
        span = target.span
        target_ids = prompts.answer_ids(text) if span == "answer" else (*prompts.rationale_ids(text), prompts.end)
        assert sequence.ids[target.start : target.stop] == target_ids
        soft = curriculum.read([target.soft.place])
        # Reference: a single pass over the whole text, without a shared prefix or a cache.
        request = prompts.request(replace(example, answer=None), span, given=text)
        with loaded(job.soft_annotation_job.teacher) as model, torch.no_grad():
            before = (*prompts.prefix(span), *request.question_ids)
            logits_TV = model(torch.tensor([(*before, *request.given_ids)])).logits[0].float()
        logprobs_NV = logits_TV[len(before) - 1 : -1, : prompts.vocabulary_size].log_softmax(-1)
        for row, (ids, logprobs) in enumerate(soft.rows()):
            gap_N = (logprobs_NV[:, ids.tolist()] - torch.from_numpy(logprobs)).abs().amax(1)
            assert gap_N[row] < 1 / 16  # the resolution of the codec
            assert int(gap_N.argmin()) == row


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Experiment logs directory")  # as in the command
def test_two_teachers_in_one_run(recorded: Configured, tmp_path: Path, teacher_folder: Path) -> None:
    config = recorded(
        LOSSES,
        *two_teachers(teacher_folder),
        "trainer.max_steps=2",
        "trainer.log_every_n_steps=1",
        "num_samples=2",
        "time_teacher=true",
    )
    run: dict[str, object] = {}
    (tmp_path / "run").mkdir()
    rows = distill(prepare(config, tmp_path / "run"), [], run)["rows"]
    assert rows["teacher"]["accuracy"] > 0  # the file has some of the test answers
    assert rows["teacher"]["size_bytes"] is rows["teacher"]["ms_per_example"] is None
    assert math.isfinite(rows["student"]["kl"])
    assert rows["student"]["peak_bytes"] > rows["student"]["parameters"]
    rationales = [json.loads(line) for line in (tmp_path / "run" / "rationales.jsonl").read_text().splitlines()]
    assert {row["reason"] for row in rationales} == {None}


def test_questions_without_a_recorded_answer_are_counted(
    recorded: Configured, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, path = recorded("loss=[answer,teacher_answer,rationale]"), tmp_path / "recorded.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:7] + lines[8:]))  # the eighth is of an example without label
    curriculum = build_curriculum(prepare(config, tmp_path))
    said = capsys.readouterr().err
    assert "9 of 10 questions have a recorded answer" in said
    assert "recorded: 18 answers to 18 questions in 1 files" in said
    assert curriculum.rows["train"].lost == {"unmatched": 1}
    assert curriculum.rows["rationales"].lost == {"unmatched": 1}
    assert (curriculum.rows["train"].read, len(curriculum.train)) == (12, 11)


def test_a_recording_of_other_questions_is_refused_now_and_when_it_is_cached(
    recorded: Configured, tmp_path: Path
) -> None:
    config = recorded("loss=[answer,teacher_answer]")
    path = tmp_path / "recorded.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text(
        "".join(json.dumps(row | {"question": f"To {i}: {row['question']}"}) + "\n" for i, row in enumerate(rows))
    )
    for _ in range(2):
        with pytest.raises(
            ConfigError, match=r"no recorded answer belongs to any of the \d+ questions.*task\.question"
        ):
            build_curriculum(prepare(config, tmp_path))
