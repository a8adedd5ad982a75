"""An exported student answers in its own folder as it did in its run, and its literal prompt has the trained ids."""

from __future__ import annotations

import functools
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig, pipeline

from distill.app import config as configuration
from distill.exports import example
from distill.exports.folder import export
from distill.prompts.rendering import build_prompts
from distill.records import Example
from distill.reports.runs import read_run
from tests.conftest import environment
from tests.exports.conftest import MakeRun, make_run_in

Exported = Callable[[str], tuple[Path, Path, str]]

MODES = {
    "choices": (),
    "reasoned choices": ("task.answer_mode=reasoned", "loss=[answer,rationale]"),
    "free text": ("task=jsonl", "task.read.kind=line"),
    "reasoned text": ("task=jsonl", "task.read.kind=line", "task.answer_mode=reasoned", "loss=[answer,rationale]"),
    "instruction": ("task.layout.instruction=Judge it.",),
    "chat": ("prompt=chat", "prompt.num_shots=0"),
    "chat with instruction": ("prompt=chat", "prompt.num_shots=0", "prompt.layout.system=Judge it."),
    "reasoned chat": ("prompt=chat", "prompt.num_shots=0", "task.answer_mode=reasoned", "loss=[answer,rationale]"),
    "reasoning between marks": (
        *("prompt=chat", "prompt.num_shots=0", "task.answer_mode=reasoned", "loss=[answer,rationale]"),
        "prompt.layout.reasoning_marks=['<think>','</think>']",
    ),
    "conversation": ("task=chat", "prompt=chat", "prompt.num_shots=0", "task.system=Judge it."),
    "own systems": ("task=chat", "prompt=chat", "prompt.num_shots=0"),
    "cut": ("prompt.max_length=36", "prompt.too_long=cut"),
}


def overrides(mode: str, folder: Path) -> list[str]:
    """The overrides of a mode, with a file of rows if its task reads one."""
    chosen = list(MODES[mode])
    if "task=chat" in chosen:
        has_systems = "task.system=Judge it." not in chosen
        rows = [{"messages": _messages(index, has_system=has_systems)} for index in range(40)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        chosen += [f"task.path={folder / 'rows.jsonl'}"]
    if "task=jsonl" in chosen:
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in map(_row, range(40))))
        chosen += [f"task.path={folder / 'rows.jsonl'}"]
    return [*chosen, "prompt.num_shots=0"] if "task=jsonl" in chosen else chosen


def _row(index: int) -> dict[str, str]:
    size, animal = ("big", "ox") if index % 2 else ("small", "ant")
    return {"question": f"Thing {index}, {size}?", "answer": f"say {animal}"}


def _messages(index: int, *, has_system: bool) -> list[dict[str, str]]:
    """A conversation of two questions, or of one; every second one may have a turn of the system."""
    first, second = _row(index), _row(index + 1)
    pairs = (first, second) if index % 3 else (first,)
    turns = [("system", f"Be {index}.")] if has_system and index % 2 else []
    turns += [turn for row in pairs for turn in (("user", row["question"]), ("assistant", row["answer"]))]
    return [{"role": role, "content": content} for role, content in turns]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The run of a mode, the folder that it was exported to, and what the export said."""

    @functools.cache
    def exported(mode: str) -> tuple[Path, Path, str]:
        root = tmp_path_factory.mktemp("exported")
        run_dir = make_run_in(root, *overrides(mode, root))
        message = export(run_dir, root / "out")
        return run_dir, root / "out", message

    return exported


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def example_of(folder: Path) -> Any:
    spec = importlib.util.spec_from_file_location("exported_example", folder / "example.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_same_answers(replies: list[Any], run_dir: Path, *, num_answers: int = 2) -> None:
    task = configuration.build(configuration.of(read_run(run_dir).config).task.examples)
    rows = lines(run_dir / "predictions.jsonl")
    assert len({row["student_answer"] for row in rows}) >= num_answers
    for reply, row in zip(replies, rows, strict=True):
        assert (reply["answer"] if task.choices else task.read_answer(reply["answer"], Example("?"))) == row[
            "student_answer"
        ]
        assert reply.get("rationale") == row["student_rationale"]
        if row["student_written_answer"] is not None:
            assert task.read_answer(reply["written"], Example("?")) == row["student_written_answer"]


ANSWERING = [mode for mode in MODES if mode not in ("conversation", "own systems")]
# Every setting, but not each alone.
FAST = ("choices", "reasoned choices", "free text", "chat with instruction", "conversation", "cut")


@pytest.mark.parametrize(
    "mode", [mode if mode in FAST else pytest.param(mode, marks=pytest.mark.slow) for mode in ANSWERING]
)
def test_the_example_gives_the_answers_of_the_run(mode: str, exported: Exported) -> None:
    run_dir, folder, message = exported(mode)
    assert "no example" not in message
    student = example_of(folder).Student(folder)
    replies = [student.reply(row["question"]) for row in lines(run_dir / "predictions.jsonl")]
    assert_same_answers(replies, run_dir, num_answers=1 if mode == "cut" else 2)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["choices", "reasoned text"])
def test_the_example_needs_no_more_than_torch_and_transformers(mode: str, exported: Exported, tmp_path: Path) -> None:
    run_dir, folder, _ = exported(mode)
    (tmp_path / "blocked").mkdir()
    for name in ("distill", "lightning", "hydra", "omegaconf", "peft", "datasets"):
        (tmp_path / "blocked" / f"{name}.py").write_text(f"raise ImportError('{name} is not installed here')")
    questions = [row["question"] for row in lines(run_dir / "predictions.jsonl")]
    done = subprocess.run(
        [sys.executable, str(folder / "example.py"), *questions],
        cwd=tmp_path,
        env=environment() | {"PYTHONPATH": str(tmp_path / "blocked")},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    replies = [json.loads(line) for line in done.stdout.splitlines()]
    assert [reply.pop("question") for reply in replies] == questions
    assert_same_answers(replies, run_dir)


@pytest.mark.parametrize(
    "mode",
    [
        mode if mode in FAST else pytest.param(mode, marks=pytest.mark.slow)
        for mode in MODES
        if mode not in ("cut", "free text", "reasoned choices", "reasoned chat", "reasoning between marks")
    ],
)
def test_a_pipeline_answers_plain_messages_as_the_student_did_in_its_run(mode: str, exported: Exported) -> None:
    run_dir, folder, _ = exported(mode)
    student = pipeline("text-generation", model=str(folder))
    task = configuration.build(configuration.of(read_run(run_dir).config).task.examples)
    for row in lines(run_dir / "predictions.jsonl"):
        messages = [*row.get("history", ()), {"role": "user", "content": row["question"]}]
        reply = student(messages)[0]["generated_text"][-1]["content"]
        if row["student_rationale"] is not None:
            rationale, _, reply = reply.partition("\nAnswer:")
            assert rationale.strip() == row["student_rationale"]
        assert task.read_answer(reply, Example("?")) == row["student_written_answer"]


@pytest.mark.parametrize("mode", ["choices", "reasoned choices", "instruction", "chat with instruction"])
def test_the_literal_prompt_has_the_trained_ids(mode: str, exported: Exported) -> None:
    run_dir, folder, _ = exported(mode)
    card = (folder / "README.md").read_text()
    literal = card.partition("```text\n")[2].partition("\n```")[0]
    prompts = build_prompts(configuration.of(read_run(run_dir).config), run_dir / "student")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for row in lines(run_dir / "predictions.jsonl"):
        learned = (
            prompts.rationale_prompt(Example(row["question"], None), "so", "yes")
            if "reasoned" in mode
            else prompts.answer_prompt(Example(row["question"], None), "yes")
        )
        start = min(start for start, _ in learned.spans.values())
        text = literal.replace("{question}", row["question"])
        assert tuple(tokenizer(text, add_special_tokens=False).input_ids) == learned.ids[:start]
        messages = [{"role": "user", "content": row["question"]}]
        assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == text
    assert "are exactly those of training" in card


def with_a_template_and_sampling(folder: Path) -> None:
    """Make the start of a student look like a chat model."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(folder)
    GenerationConfig(do_sample=True, temperature=0.5, eos_token_id=[5, 6]).save_pretrained(folder)


def test_template_and_sampling_of_the_source_are_not_exported(make_run: MakeRun, tmp_path: Path) -> None:
    run_dir = make_run(prepare_model=with_a_template_and_sampling)
    with_a_template_and_sampling(run_dir / "student")  # as an earlier version left it
    export(run_dir, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    message = {"role": "user", "content": "Hello"}
    text = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    assert text == "Review: Hello\nSentiment:"
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    assert generation.do_sample is False
    assert generation.eos_token_id == tokenizer.eos_token_id
    assert generation.max_new_tokens == 40
    assert generation.temperature in (None, 1.0)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == 1


def test_an_answer_is_the_most_likely_continuation_each_time(exported: Exported) -> None:
    _, folder, _ = exported("choices")
    student = example_of(folder).Student(folder)
    for weight in student.model.parameters():
        torch.nn.init.normal_(weight, std=0.02)  # an untaught student is sure of nothing, so that draws would differ
    assert len({student.write([5, 6, 7], 8) for _ in range(5)}) == 1


@pytest.mark.parametrize(("second", "expected"), [((0.2, 0.2, 0.6, 0.0), "short"), ((0.1, 0.1, 0.8, 1.0), "long")])
def test_a_choice_is_scored_as_a_whole_and_without_padding_rows(second: tuple[float, ...], expected: str) -> None:
    """One token of probability 0.4 against two: 0.6 times 0.6 or 0.8. The last row of the head is padding."""
    rows = torch.tensor([(0.4, 0.6, 0.0, 0.0), second]).log()
    student = object.__new__(example.Student)
    student.prompt = {"vocabulary_size": 3}
    student.model = lambda ids_BT: SimpleNamespace(logits=rows[: ids_BT.shape[1]].unsqueeze(0))
    assert student.choose([9], {"short": [0], "long": [1, 2]}) == expected


def test_a_question_that_is_too_long_is_refused_by_the_example(make_run: MakeRun, tmp_path: Path) -> None:
    export(make_run("prompt.max_length=60", "prompt.too_long=drop"), tmp_path / "out")
    student = example_of(tmp_path / "out").Student(tmp_path / "out")
    with pytest.raises(ValueError, match=r"the question has \d+ tokens; at most \d+ are allowed"):
        student.reply("word " * 100)
