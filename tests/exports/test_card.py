"""The card of an exported student: valid front matter, and who and what it is made from."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCardData

from distill.exports import example
from distill.exports.card import card, is_taught
from distill.exports.folder import export
from distill.exports.recipe import make_recipe, num_literal
from distill.models.naming import license_of
from distill.prompts.cues import Layout
from distill.prompts.rendering import Prompts
from distill.records import Example
from distill.reports.runs import Run, read_run
from tests.conftest import compose
from tests.exports.conftest import MakeRun
from tests.exports.test_export import QUESTIONS, joining_full_stop_and_newline, with_a_leading_space, with_start

FACTS = {
    "name": "answer-seed0",
    "losses": ["answer"],
    "task": "reviews",
    "teacher": "some/teacher",
    "student": "some/base",
    "licenses": {"student": "apache-2.0", "teacher": "Llama 3 Community License"},
    "counts": {"train": 30, "labelled": 20, "lessons": 25, "rationales_kept": 0},
    "labels": {"good": 12, "bad": 8},
    "saved": {"dtype": "bfloat16"},
}
LOSSES = {
    "answer": {"source": "labels", "span": "answer", "label": "labels"},
    "rationale": {"source": "labels", "span": "rationale", "label": "rationales"},
    "teacher_answer": {"source": "teacher", "span": "answer", "label": "teacher's answers"},
    "kl": {"source": "soft", "span": "answer", "label": "teacher's distributions"},
}


def run_with(**changes: Any) -> Run:
    config = {"loss": LOSSES, "task": {"license": "mit", "language": "de"}}
    predictions = tuple({"question": f"q{i}", "gold": "good" if i else "bad"} for i in range(4))
    return Run(Path("run"), (), FACTS | changes, config, {}, (), predictions, (), (), (), ())


def front_matter(text: str) -> Any:
    start, settings, _ = text.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(settings)


def test_the_card_says_what_the_student_is_made_from() -> None:
    text = card(run_with(), None, 0, "")
    for line in (
        "- Base model: some/base (license: apache-2.0)",
        "- Data: reviews: 30 training examples, 20 of them labelled (license: mit)",
        "- Trained on: labels; 25 lessons",
        "- Language: de",
        "- Labels in train: bad 8, good 12",
        "- Labels in test: bad 1, good 3",
        "- Weights: bfloat16",
    ):
        assert line in text.splitlines(), line


def test_the_front_matter_is_valid() -> None:
    settings = front_matter(card(run_with(), None, 0, ""))
    assert settings == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["distillation"],
        "base_model": "some/base",
        "license": "apache-2.0",
        "language": "de",
    }
    assert ModelCardData(**settings).to_dict() == settings


@pytest.mark.parametrize("name", ["/home/someone/models/mine", "./mine", "pypi://package==1/mine.gguf"])
def test_a_base_that_is_not_on_the_hub_is_named_in_the_text_alone(name: str) -> None:
    text = card(run_with(student=name, licenses={"student": "My: own 'license'\n---"}), None, 0, "")
    settings = front_matter(text)
    assert "base_model" not in settings
    assert settings["license"] == "other"
    assert "someone" not in text
    assert "mine" in text


@pytest.mark.parametrize(
    ("losses", "num_kept", "is_named"),
    [
        (["answer"], 9, False),
        (["answer", "kl"], 0, True),
        (["teacher_answer"], 0, True),
        (["rationale"], 9, True),
        (["rationale"], 0, False),
    ],
)
def test_the_teacher_is_named_where_something_of_it_was_learned(
    losses: list[str], num_kept: int, is_named: bool
) -> None:
    run = run_with(losses=losses, counts=FACTS["counts"] | {"rationales_kept": num_kept})
    assert is_taught(run) == is_named
    assert ("some/teacher" in card(run, None, 0, "").partition("\n\n|")[0].partition("## ")[0]) == is_named


def test_student_and_teacher_have_the_licenses_of_their_own_weights() -> None:
    lines = card(run_with(losses=["answer", "kl"]), None, 0, "").splitlines()
    assert "- Base model: some/base (license: apache-2.0)" in lines
    assert "- Teacher: some/teacher (license: Llama 3 Community License)" in lines


def test_a_prompt_that_must_be_tokenized_in_pieces_is_said_to_be() -> None:
    layout = Layout(instruction="", question_cue="Q:", rationale_cue="Reason:", answer_cue="Answer:")
    prompts = Prompts(joining_full_stop_and_newline(), layout, (), max_length=256, too_long="drop")
    config = compose("task=jsonl", "task.path=none.jsonl", "student=causal_lm", "student.model=none")
    questions = [Example("It is dull.", "no"), Example("A fine film", "yes")]
    recipe = make_recipe(prompts, config, questions)
    assert num_literal(recipe, prompts, questions) == 1
    text = card(run_with(), recipe, 3, "")
    assert "```text\nQ: {question}\nAnswer:\n```" in text
    assert "tokenized one by one, as `example.py` does" in text
    assert "other tokens for 1 of 4 test questions" in text


@pytest.mark.parametrize("make", [with_start, with_a_leading_space])
def test_the_example_reads_the_tokens_of_training(make: Callable[[Path], Any], tmp_path: Path) -> None:
    layout = Layout(instruction="Judge.", question_cue="Q:", rationale_cue="Reason:", answer_cue="Answer:")
    prompts = Prompts(make(tmp_path), layout, (), max_length=256, too_long="drop")
    config = compose("task=jsonl", "task.path=none.jsonl", "student=causal_lm", "student.model=none")
    recipe = asdict(make_recipe(prompts, config, QUESTIONS))
    for question in (*QUESTIONS, Example("It ends with </s> here", "negative")):
        learned = prompts.answer_prompt(question, "negative")
        start, _ = learned.spans["answer"]
        assert tuple(example.prompt_ids(prompts.tokenizer, recipe, question.question)) == learned.ids[:start]


@pytest.mark.parametrize(("mode", "expected"), [("direct", "its answer"), ("reasoned", "its reasoning")])
def test_the_card_says_what_follows_the_prompt(mode: str, expected: str) -> None:
    layout = Layout(instruction="", question_cue="Q:", rationale_cue="Reason:", answer_cue="Answer:")
    prompts = Prompts(joining_full_stop_and_newline(), layout, (), max_length=256, too_long="drop")
    config = compose("task=jsonl", "task.path=none.jsonl", "student.model=none", f"task.answer_mode={mode}")
    text = card(run_with(), make_recipe(prompts, config, []), 4, "")
    assert f"The student goes on with {expected}, and ends it with `</s>`." in text


def test_fences_in_the_layout_do_not_end_the_prompt() -> None:
    layout = Layout(instruction="```\n# Not a heading", question_cue="Q:", rationale_cue="R:", answer_cue="A:")
    prompts = Prompts(joining_full_stop_and_newline(), layout, (), max_length=256, too_long="drop")
    config = compose("task=jsonl", "task.path=none.jsonl", "student=causal_lm", "student.model=none")
    text = card(run_with(), make_recipe(prompts, config, []), 4, "")
    assert "````text\n```\n# Not a heading\n\nQ: {question}\nA:\n````" in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("---\nlicense: mit\n---\n# Model", "mit"),
        ("---\nlicense: other\nlicense_name: own\n---\n", "own"),
        ("# Model\nno front matter", None),
        ("---\n[broken\n---\n", None),
        ("---\nlicense: [a, b]\n---\n", None),
    ],
)
def test_the_license_is_read_from_the_card_of_a_model(text: str, expected: str | None, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(text)
    assert license_of(tmp_path) == expected
    assert license_of(tmp_path / "none") is None


def test_an_exported_folder_has_all_that_it_names(make_run: MakeRun, tmp_path: Path) -> None:
    run_dir = make_run()
    export(run_dir, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    kept = {path.name for path in (run_dir / "student").iterdir()}
    assert names == kept | {"README.md", "example.py", "prompt.json", "lm_eval"}
    assert {"generation_config.json", "config.json", "model.safetensors", "tokenizer.json"} <= names
    text = (tmp_path / "out" / "README.md").read_text()
    assert front_matter(text)["pipeline_tag"] == "text-generation"
    assert "- Choices: negative, positive" in text
    assert "- Teacher:" not in text  # learned from labels alone
    assert str(tmp_path) not in text
    assert json.loads((tmp_path / "out" / "prompt.json").read_text())["choices"].keys() == {"negative", "positive"}
    assert read_run(run_dir).facts["labels"] == {"negative": 3, "positive": 3}
