"""A run with prompts in the chat templates of teacher and student, from annotation to the student on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig
from transformers import AutoTokenizer, pipeline

from distill.app import config as configuration
from distill.errors import ConfigError
from distill.exports.folder import export
from distill.lessons.curriculum import prepare
from distill.prompts.templates import named_template
from distill.records import Example
from tests.cases import with_template
from tests.training.test_saved import SHORT, distilled

Configured = Callable[..., DictConfig]
CHAT = (*SHORT, "prompt=chat", "prompt.num_shots=2", "loss=[answer,kl,rationale]", "teacher.num_rationales=2")


@pytest.mark.parametrize("mode", ["direct", "reasoned"])
def test_teacher_and_student_meet_in_their_own_templates(
    mode: str, configured: Configured, teacher_folder: Path, student_folder: Path, tmp_path: Path
) -> None:
    teacher = with_template(teacher_folder, tmp_path / "teacher", "Zephyr")
    student = with_template(student_folder, tmp_path / "student", "Zephyr, start token")
    models = (f"teacher.model={teacher}", f"student.model={student}", f"task.answer_mode={mode}")
    job = prepare(configured(*CHAT, *models), tmp_path / "run")
    facts, results = distilled(job)
    assert {"template", "text", "end"} <= {check["check"] for check in facts["preflight"] if check["passed"]}
    assert results["rows"]["student"]
    saved = AutoTokenizer.from_pretrained(tmp_path / "run" / "student")
    message = {"role": "user", "content": "1 + 1?"}
    text = saved.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    span = "answer" if mode == "direct" else "rationale"
    learned = job.prompts.prefix(span) + job.prompts.question(Example("1 + 1?"), span)
    assert tuple(saved.encode(text, add_special_tokens=False)) == learned
    assert learned[0] == saved.bos_token_id
    assert job.annotation_job.prompts.prefix(span)[0] != saved.bos_token_id


def test_templates_with_other_spaces_before_an_answer_share_no_soft_targets(
    configured: Configured, teacher_folder: Path, student_folder: Path, tmp_path: Path
) -> None:
    teacher = with_template(teacher_folder, tmp_path / "teacher", "Zephyr")
    student = with_template(student_folder, tmp_path / "student", "Mistral")
    models = (f"teacher.model={teacher}", f"student.model={student}")
    with pytest.raises(ConfigError, match=r"kl: an answer begins with '' in .* the teacher and with ' ' in"):
        prepare(configured(*CHAT, *models), tmp_path / "run")
    assert prepare(configured(*CHAT, *models, "loss=[answer,rationale]"), tmp_path / "run")


def test_a_model_without_a_template_is_refused_before_anything_is_annotated(
    configured: Configured, teacher_folder: Path, tmp_path: Path
) -> None:
    teacher = with_template(teacher_folder, tmp_path / "teacher", "Zephyr")
    with pytest.raises(ConfigError, match=r"no chat template; .*\.without_template=plain\|zephyr, or set"):
        prepare(configured(*CHAT, f"teacher.model={teacher}"), tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["direct", "reasoned"])
def test_a_student_learns_to_reason_between_marks(
    mode: str, configured: Configured, teacher_folder: Path, student_folder: Path, tmp_path: Path
) -> None:
    marks = "prompt.layout.reasoning_marks=['<think>','</think>']"
    teacher, student = (
        with_template(source, tmp_path / name, "Zephyr")
        for source, name in ((teacher_folder, "teacher"), (student_folder, "student"))
    )
    models = (f"teacher.model={teacher}", f"student.model={student}", f"task.answer_mode={mode}", marks)
    job = prepare(configured(*CHAT, *models), tmp_path / "run")
    facts, results = distilled(job)
    assert {"template", "text", "end"} <= {check["check"] for check in facts["preflight"] if check["passed"]}
    assert results["rows"]["student"]
    saved = AutoTokenizer.from_pretrained(tmp_path / "run" / "student")
    text = saved.apply_chat_template(
        [{"role": "user", "content": "1 + 1?"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|assistant|>\n<think>\n" + ("\n</think>\n\n" if mode == "direct" else ""))


@pytest.mark.slow
def test_an_instructed_teacher_teaches_a_base_student_that_leaves_with_a_template(
    configured: Configured,
    teacher_folder: Path,
    student_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    teacher = with_template(teacher_folder, tmp_path / "teacher", "Zephyr, start token")
    named = (*CHAT, f"teacher.model={teacher}", "prompt.without_template=zephyr")
    config = configured(*named)
    job = prepare(config, tmp_path / "run")
    assert f"{student_folder} has no chat template and gets the template zephyr" in capsys.readouterr().err
    facts, results = distilled(job)
    assert {"template", "text", "end"} <= {check["check"] for check in facts["preflight"] if check["passed"]}
    assert results["rows"]["student"]
    configuration.save(config, tmp_path / "run" / "config.yaml")
    for name, content in (("run", facts | {"losses": list(job.objectives), "seed": 0}), ("results", results)):
        (tmp_path / "run" / f"{name}.json").write_text(json.dumps(content))
    export(tmp_path / "run", tmp_path / "out")
    answer = pipeline("text-generation", model=str(tmp_path / "out"))
    messages = [{"role": "user", "content": "1 + 1?"}]
    assert answer(messages)[0]["generated_text"][-1]["role"] == "assistant"
    assert answer.tokenizer.chat_template == named_template("zephyr", job.prompts.tokenizer)
    text = answer.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    learned = job.prompts.prefix("answer") + job.prompts.question(Example("1 + 1?"), "answer")
    assert tuple(answer.tokenizer.encode(text, add_special_tokens=False)) == learned
