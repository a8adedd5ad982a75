"""A teacher's texts by its settings: where they end, how short they may be, and which are sampled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distill.prompts.rendering import Prompts
from distill.records import Annotation, Example, Request
from tests.conftest import LAYOUT, examples
from tests.teachers.conftest import Verbs, answer_requests, is_close, make_teacher

LIMIT = 12


class Lines(Verbs):
    """A task whose answers are free text."""

    choices = ()

    def read_answer(self, text: str, example: Example) -> str:
        return text


def opened(folder: Path, prompts: Prompts, **settings: Any) -> Any:
    teacher = make_teacher(folder, prompts, task=Lines(), max_new_tokens=LIMIT, **settings)
    teacher.load()
    return teacher


@pytest.fixture
def requests(prompts: Prompts) -> list[Request]:
    return answer_requests(prompts, examples(6))


def written_ids(teacher: Any, requests: list[Request]) -> list[list[int]]:
    reader = teacher._reader(requests[0].span)
    return reader.read([r.question_ids for r in requests]).greedy(max_new_tokens=LIMIT, stops=[-1])


def test_a_text_ends_at_a_text_that_spans_tokens_and_is_as_if_it_had_ended_there(
    prompts: Prompts, teacher_folder: Path, requests: list[Request]
) -> None:
    ids = written_ids(opened(teacher_folder, prompts), requests)[0]
    whole = prompts.generated_text(ids)
    parts = [prompts.decode(ids[:n]) for n in range(LIMIT + 1)]
    border = next(
        len(part) for part in parts[4:] if part and whole.startswith(part) and "\N{REPLACEMENT CHARACTER}" not in part
    )
    stop = whole[border - 1 : border + 1]
    teacher = opened(teacher_folder, prompts, stops=[stop])
    annotation = teacher.annotate(requests)[0]
    assert annotation.text == whole[: whole.index(stop)].strip()
    assert (annotation.is_truncated, annotation.is_sampled, annotation.answer) == (False, False, annotation.text)
    target = annotation.targets["answer"]
    assert target.token_ids == prompts.answer_ids(annotation.text)  # it learns to end there
    sizes: list[int] = []
    teacher._model.base_model.register_forward_pre_hook(lambda _, arguments: sizes.append(1))
    generated = teacher._generate(requests[:1], teacher._read(requests[:1]))[0]
    assert len(sizes) == len(generated) < LIMIT  # and nothing is written after it
    assert stop in prompts.decode(generated)
    assert stop not in prompts.decode(generated[:-1])


def test_a_text_that_begins_with_what_stops_it_is_empty_and_not_learned(
    prompts: Prompts, teacher_folder: Path, requests: list[Request]
) -> None:
    whole = opened(teacher_folder, prompts).annotate(requests)[0].text
    annotation = opened(teacher_folder, prompts, stops=["xyz", whole[0]]).annotate(requests)[0]
    assert (annotation.text, annotation.defect, annotation.targets) == ("", "empty", {})


def test_a_rationale_ends_at_a_text_that_stops_it(prompts: Prompts, teacher_folder: Path) -> None:
    requests = [prompts.request(example, "rationale") for example in examples(4)]
    plain = opened(teacher_folder, prompts).annotate(requests)
    stop = plain[0].rationale[3:5]
    stopped = opened(teacher_folder, prompts, stops=[stop]).annotate(requests)
    assert stopped[0].rationale == plain[0].rationale.partition(stop)[0].strip()
    assert (plain[0].is_truncated, stopped[0].is_truncated) == (True, False)


def test_a_text_of_at_least_so_many_tokens_is_not_ended_by_any_of_the_ends(
    prompts: Prompts, teacher_folder: Path, requests: list[Request]
) -> None:
    first = [ids[0] for ids in written_ids(opened(teacher_folder, prompts), requests)]
    ending = Prompts(prompts.tokenizer, LAYOUT, (), max_length=256, too_long="drop", other_ends=(*first, 0))
    assert [a.text for a in opened(teacher_folder, ending).annotate(requests)] == [""] * len(requests)
    teacher = opened(teacher_folder, ending, min_new_tokens=5)
    generated = teacher._generate(requests, teacher._read(requests))
    assert not any({*ids[:5]} & {*ending.ends} for ids in generated)
    annotations = teacher.annotate(requests)
    assert [a.is_truncated for a in annotations] == [ids[-1] not in ending.ends for ids in generated]
    at_limit = opened(teacher_folder, ending, min_new_tokens=LIMIT).annotate(requests)
    assert {annotation.defect for annotation in at_limit} == {"truncated"}


def texts(annotations: list[Annotation]) -> list[str | None]:
    return [annotation.text for annotation in annotations]


def test_a_sampled_answer_says_so_and_depends_on_its_key_alone(
    prompts: Prompts, teacher_folder: Path, requests: list[Request]
) -> None:
    greedy = opened(teacher_folder, prompts).annotate(requests)
    teacher = opened(teacher_folder, prompts, temperature=1.5)
    sampled = teacher.annotate(requests)
    assert [{a.is_sampled for a in part} for part in (greedy, sampled)] == [{False}, {True}]
    assert all(a != b for a, b in zip(texts(greedy), texts(sampled), strict=True))
    alone = [teacher.annotate([request])[0] for request in requests]
    for others in (alone, teacher.annotate(requests[::-1])[::-1]):
        assert all(is_close(a, b, 1e-4) for a, b in zip(sampled, others, strict=True))
    assert texts(opened(teacher_folder, prompts, temperature=1.5, top_k=1).annotate(requests)) == texts(greedy)


def test_each_text_of_an_example_has_its_temperature(prompts: Prompts, teacher_folder: Path) -> None:
    both = [prompts.request(Example(e.question), "answer", sample=k) for e in examples(4) for k in (0, 1)]
    cold = opened(teacher_folder, prompts, sampling_temperature=1e-5)
    greedy, further = (cold.annotate(both)[start::2] for start in (0, 1))
    assert texts(greedy) == texts(further)
    assert [a.is_sampled for a in (*greedy, *further)] == [False] * 4 + [True] * 4
    hot = opened(teacher_folder, prompts, sampling_temperature=1.5).annotate(both)
    assert texts(hot[::2]) == texts(greedy)
    assert all(a != b for a, b in zip(texts(hot[1::2]), texts(greedy), strict=True))
    mixed = opened(teacher_folder, prompts, temperature=1.5, sampling_temperature=1e-5).annotate(both)
    assert texts(mixed[1::2]) == texts(greedy)
    assert all(a != b for a, b in zip(texts(mixed[::2]), texts(greedy), strict=True))


def test_soft_targets_are_those_of_the_model_however_its_text_was_made(
    prompts: Prompts, teacher_folder: Path, requests: list[Request]
) -> None:
    teacher = opened(teacher_folder, prompts, temperature=1.5, top_k=3, min_new_tokens=4)
    for request, annotation in zip(requests, teacher.annotate(requests), strict=True):
        if target := annotation.targets.get("answer"):
            given = prompts.request(request.example, "answer", given=annotation.answer)
            scored = opened(teacher_folder, prompts).annotate([given])[0].targets["answer"]
            assert is_close(*(Annotation("", {"answer": t}, None) for t in (target, scored)), 1e-4)
