"""Runs on conversations, from annotation to the student on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig
from transformers import AutoTokenizer

from distill.errors import ConfigError
from distill.lessons.curriculum import build_curriculum, prepare
from distill.records import Example
from distill.training import checkpoints
from distill.training.fit import build_training, fit, open_job_student
from tests.cases import with_template
from tests.training.test_resume import copy_checkpoints, weights_equal
from tests.training.test_saved import SHORT, distilled

Configured = Callable[..., DictConfig]
EVERY_STEP = ("checkpoint_every=1", "batch_size=3")


def messages(number: int) -> list[dict[str, str]]:
    """A conversation of up to three questions, every second with a turn of the system."""
    turns = [("system", f"Be {number}.")] if number % 2 else []
    for turn in range(1 + number % 3):
        turns += [("user", f"What is {number} + {turn}?"), ("assistant", f"It is\n{number + turn}.")]
    return [{"role": role, "content": content} for role, content in turns]


@pytest.fixture
def conversations(configured: Configured, teacher_folder: Path, student_folder: Path, tmp_path: Path) -> Configured:
    """Compose the train command for models with templates on 24 conversations."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"messages": messages(number)}) for number in range(24)))
    teacher = with_template(teacher_folder, tmp_path / "teacher", "Zephyr")
    student = with_template(student_folder, tmp_path / "student", "Zephyr, start token")
    sizes = [f"task.examples.num_{name}=null" for name in ("labelled", "unlabelled")]
    own = ["task=chat", f"task.path={rows}", f"teacher.model={teacher}", f"student.model={student}", *sizes]
    return lambda *overrides: configured(*SHORT, *own, "prompt.num_shots=0", *overrides)


@pytest.mark.slow
@pytest.mark.parametrize("learn", ["all", "last"])
def test_every_learned_turn_of_a_conversation_is_a_lesson_after_its_whole_rendering(
    learn: str, conversations: Configured, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = prepare(conversations("prompt=chat", f"task.learn={learn}", "loss=[answer,kl]"), tmp_path / "run")
    splits = job.annotation_job.splits
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "student")
    learned = {prompt.ids: prompt.spans["answer"] for prompt in map(_answer_prompt(job.prompts), splits.train)}
    num_turns = sum(1 + number % 3 for number in range(24)) if learn == "all" else 24
    assert sum(len(part) for part in (splits.train, splits.validation, splits.test)) == num_turns
    for example in splits.train:
        turns = [{"role": m.role, "content": m.content} for m in example.history]
        turns += [{"role": "user", "content": example.question}, {"role": "assistant", "content": str(example.answer)}]
        ids = tuple(tokenizer.encode(tokenizer.apply_chat_template(turns, tokenize=False), add_special_tokens=False))
        match = max((prompt for prompt in learned if ids[: len(prompt)] == prompt), key=len)
        start, stop = learned[match]
        assert tokenizer.decode(match[start:stop]).removesuffix("</s>").strip() == example.answer
    facts, results = distilled(job)
    assert not [check for check in facts["preflight"] if check["passed"] is False and check["is_fatal"]]
    assert {"template", "text", "end"} <= {check["check"] for check in facts["preflight"] if check["passed"]}
    num_conversations = len({example.opening for example in splits.train})
    assert facts["counts"]["lessons"] == num_conversations
    assert (num_conversations < len(splits.train)) == (learn == "all")
    unit = f"in {num_conversations} lessons: 2 steps of 4 lessons" if learn == "all" else ": 2 steps of 4 examples"
    assert f"training on {len(splits.train)} examples{' ' * (learn == 'all')}{unit}" in capsys.readouterr().err
    assert results["rows"]["student"]
    rows = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    assert {row["id"] for row in rows} == {example.id for example in splits.test}
    assert any("history" in row for row in rows)


def _answer_prompt(prompts: Any) -> Callable[[Example], Any]:
    return lambda example: prompts.answer_prompt(example, str(example.answer))


def test_conversations_are_refused_by_cues_before_anything_is_annotated(
    conversations: Configured, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="conversations of several messages need a chat template"):
        distilled(prepare(conversations("prompt=cues", "loss=[answer,kl]"), tmp_path / "run"))
    assert not list(tmp_path.rglob("manifests"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint")
def test_a_run_on_conversations_that_is_resumed_ends_with_the_uninterrupted_weights(
    conversations: Configured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "NUM_KEPT", 5)
    config = conversations("prompt=chat", "task.learn=all", "loss=[answer,kl]", "trainer.max_steps=4", *EVERY_STEP)
    runs = []
    for name in ("whole", "resumed"):
        if name == "resumed":
            copy_checkpoints(tmp_path / "whole", tmp_path / name, [2])
        job = prepare(config, tmp_path / name)
        student = open_job_student(job)
        training = build_training(job, build_curriculum(job), student, [])
        assert any(len(lesson.example_ids) > 1 for lesson in training.curriculum.train)
        fit(job, training)
        runs.append({key: value.clone() for key, value in student.state_dict().items()})
    assert weights_equal(*runs)
