"""Models that end a text at any of several tokens: what they generate, what is learned, and what is saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from distill.evaluation.answers import Evaluation
from distill.models.loading import load
from distill.models.reading import PrefixedReader
from distill.prompts.rendering import Prompts, build_prompts, student_prompts
from distill.prompts.tokenizers import listed_ends
from distill.records import Example
from distill.students.saving import save_student
from tests.conftest import LAYOUT, compose, examples
from tests.prompts.templates import TEMPLATES, chat_tokenizer
from tests.teachers.conftest import FreeText, make_teacher

SIZES = {"max_length": 256, "too_long": "drop"}


def written(folder: Path, prompts: Prompts, questions: list[Example]) -> list[list[int]]:
    reader = PrefixedReader(load(folder, torch.float32), prompts.prefix("answer"), prompts.vocabulary_size)
    return reader.read([prompts.question(q, "answer") for q in questions]).greedy(max_new_tokens=6, stops=[-1])


def test_a_teacher_ends_at_any_of_its_ends_and_the_one_of_the_prompt_is_learned(
    prompts: Prompts, teacher_folder: Path
) -> None:
    questions = [Example(example.question) for example in examples(5)]
    whole = written(teacher_folder, prompts, questions)
    other = whole[0][3]
    assert other != prompts.end
    several = Prompts(prompts.tokenizer, LAYOUT, (), **SIZES, other_ends=(other,))
    teacher = make_teacher(teacher_folder, several, task=FreeText())
    teacher.load()
    annotations = teacher.annotate([several.request(question, "answer") for question in questions])
    ended = [other in ids or prompts.end in ids for ids in whole]
    assert [not annotation.is_truncated for annotation in annotations] == ended
    cut = whole[0][: whole[0].index(other)]
    assert annotations[0].text == prompts.text(cut)
    learned = annotations[0].targets["answer"]
    assert learned.token_ids == (*prompts.encode(f" {prompts.text(cut)}"), prompts.end)
    assert learned.soft is not None
    alone = make_teacher(teacher_folder, prompts, task=FreeText())
    alone.load()
    given = alone.annotate([prompts.request(questions[0], "answer", given=prompts.text(cut))])[0].targets["answer"]
    assert given.token_ids == learned.token_ids
    assert torch.allclose(*(torch.from_numpy(t.soft.logprobs_E).exp() for t in (given, learned)), atol=1e-5)
    evaluation = Evaluation(load(teacher_folder, torch.float32), several, FreeText(), "direct", 6)
    assert [p.written_answer for p in evaluation.predict(questions, {})] == [a.answer for a in annotations]


DONE, END = 318, 2  # an added token, and the tokenizer's end


@pytest.mark.parametrize(
    ("listed", "ends"),
    [([DONE, END], (END, DONE)), (DONE, (END, DONE)), ([END], (END,)), (None, (END,)), ([7, "</s>"], (END,))],
)
def test_ends_that_are_ordinary_tokens_or_none_are_ignored(listed: Any, ends: tuple[int, ...], tmp_path: Path) -> None:
    tokenizer = chat_tokenizer("", ("<|done|>",))
    assert tokenizer.convert_tokens_to_ids(["<|done|>", "</s>"]) == [DONE, END]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": listed}))
    assert Prompts(tokenizer, LAYOUT, (), **SIZES, other_ends=listed_ends(tmp_path, tokenizer)).ends == ends


@pytest.mark.parametrize("content", [None, "[", "[1]", "[" * 9999])
def test_without_readable_settings_a_text_ends_as_the_prompt_says(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "generation_config.json").write_text(content)
    assert listed_ends(tmp_path, chat_tokenizer("")) == ()


def test_several_ends_are_in_the_fingerprint_and_one_is_not(prompts: Prompts) -> None:
    one, same, two = (Prompts(prompts.tokenizer, LAYOUT, (), **SIZES, other_ends=e) for e in ((), (1,), (0,)))
    assert one.fingerprint() == same.fingerprint() == prompts.fingerprint()
    assert two.fingerprint() != one.fingerprint()


def test_the_end_is_no_part_of_a_text_even_if_it_is_no_special_token() -> None:
    tokenizer = chat_tokenizer(*TEMPLATES["ChatML"][:2])
    tokenizer.add_tokens(["<|done|>"])
    done = tokenizer.convert_tokens_to_ids("<|done|>")
    prompts = Prompts(tokenizer, LAYOUT, (), **SIZES, other_ends=(done,))
    ids = [*prompts.encode(" It is 3.\nAnswer: yes"), done]
    assert prompts.text(ids).endswith("yes")
    assert prompts.split_reply(ids).answer == "yes"
    assert (prompts.has_ended(ids), prompts.has_ended(ids[:-1]), prompts.has_ended([])) == (True, False, False)


def test_a_student_is_saved_with_all_its_ends_and_reopened_with_them(student_folder: Path, tmp_path: Path) -> None:
    GenerationConfig(eos_token_id=[0, 1, 5]).save_pretrained(tmp_path)
    for file in student_folder.iterdir():
        if file.name != "generation_config.json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    teacher = build_prompts(compose("task=arithmetic", "prompt.num_shots=2"), student_folder)
    prompts = student_prompts(teacher, tmp_path)
    assert (teacher.ends, prompts.ends) == ((1,), (1, 0))  # 5 is an ordinary token
    model = load(tmp_path, torch.float32)
    folder = tmp_path / "saved"
    save_student(model, prompts.tokenizer, folder, dtype=torch.float32, max_new_tokens=9, ends=prompts.ends)
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [1, 0]
    assert student_prompts(teacher, folder).ends == (1, 0)
