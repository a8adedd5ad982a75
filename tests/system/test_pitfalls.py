"""Common mistakes of distillation software with teachers and caches, and tests against them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig

from distill.annotate import main
from distill.annotation.annotation_job import open_annotation_job
from distill.annotation.fill import fill
from distill.annotation.requests import without_labels
from distill.cache.codecs.dense import Dense
from distill.cache.codecs.topk import TopK
from distill.cache.store import Store
from distill.errors import CacheError
from distill.evaluation.answers import Evaluation, speeds
from distill.models import loading
from distill.prompts.rendering import Prompts
from distill.prompts.tokenizers import load_tokenizer
from distill.records import Annotation, Example, Request, Splits
from tests.annotation.conftest import annotate_options
from tests.conftest import LAYOUT, CountingTeacher, compose, counted, examples, grid, make_tokenizer
from tests.teachers.conftest import answer_requests, is_close, make_teacher

SHOTS = examples(2)


def few_shot_prompts(prompts: Prompts, folder: Path | None = None) -> Prompts:
    """Few-shot prompts; with `folder`, its tokenizer."""
    tokenizer = load_tokenizer(folder) if folder else prompts.tokenizer
    return Prompts(tokenizer, LAYOUT, SHOTS, max_length=256, too_long="drop")


def requests_by_kind(prompts: Prompts, number: int = 5) -> list[list[Request]]:
    """Requests for answers with and without gold answers, and for rationales."""
    questions = examples(number)
    return [
        answer_requests(prompts, questions),
        *([prompts.request(e, span) for e in questions] for span in ("answer", "rationale")),
    ]


def soft_targets_of(annotations: Sequence[Annotation]) -> list[Any]:
    return [target.soft for annotation in annotations for target in annotation.targets.values()]


def test_sampling_settings_of_a_model_folder_reach_neither_text_nor_distributions(
    prompts: Prompts, teacher_folder: Path, tmp_path: Path
) -> None:
    sampling = {"do_sample": True, "temperature": 0.3, "top_p": 0.5, "top_k": 3, "repetition_penalty": 2.0}
    with_sampling = shutil.copytree(teacher_folder, tmp_path / "tempted")
    (with_sampling / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 1} | sampling))
    teachers = [make_teacher(folder, prompts, max_new_tokens=24) for folder in (teacher_folder, with_sampling)]
    models = [teacher.load() for teacher in teachers]
    assert models[1].generation_config.temperature == 0.3
    for requests in requests_by_kind(prompts):
        left, right = (teacher.annotate(requests) for teacher in teachers)
        assert all(is_close(a, b, 0) for a, b in zip(left, right, strict=True))
        token_ids = [target.token_ids for annotation in left for target in annotation.targets.values()]
        assert any(len(set(ids)) < len(ids) - 2 for ids in token_ids) or requests[0].span == "answer"
        for soft in soft_targets_of(right):
            mass_N = np.exp(grid(soft)[1].astype(np.float64)).sum(1)
            assert np.allclose(mass_N, 1, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_teacher_computes_in_the_dtype_of_its_fingerprint(dtype: str, prompts: Prompts, teacher_folder: Path) -> None:
    teacher = make_teacher(teacher_folder, prompts, dtype=dtype)
    assert teacher.fingerprint()["dtype"] == dtype
    assert {parameter.dtype for parameter in teacher.load().parameters()} == {getattr(torch, dtype)}


def test_a_teacher_in_bfloat16_has_its_softmax_in_float32(
    prompts: Prompts, teacher_folder: Path, tmp_path: Path
) -> None:
    for codec, atol in ((Dense(), 0), (TopK(k=320, temperature=1.0), 0.01)):
        teacher = make_teacher(teacher_folder, prompts, codec=codec, dtype="bfloat16", constrain=False)
        model = teacher.load()
        requests = requests_by_kind(prompts)[1]
        annotations = teacher.annotate(requests)
        store = Store(tmp_path / type(codec).__name__, {}, codec)
        with store.writing() as writer:
            writer.add(annotations)
        for request, annotation in zip(requests, annotations, strict=True):
            soft = annotation.targets["answer"].soft
            stored = store.read(annotation.key).targets["answer"].soft
            assert soft.logprobs_E.dtype == stored.logprobs_E.dtype == np.float32
            ids_NK, logprobs_NK = grid(soft)
            p_NK = np.exp(logprobs_NK.astype(np.float64))
            assert np.allclose(p_NK.sum(1), 1, atol=1e-5)
            assert np.array_equal(soft.ids_E, stored.ids_E)
            assert np.abs(np.exp(grid(stored)[1]) - p_NK).max() <= atol + 1e-7
            ids = annotation.targets["answer"].token_ids
            prefix_ids = [*prompts.prefix("answer"), *prompts.question(request.example, "answer")]
            with torch.inference_mode():
                logits_TV = model(torch.tensor([[*prefix_ids, *ids]])).logits[0, len(prefix_ids) - 1 : -1, :320]
            expected_NV = logits_TV.float().softmax(-1).numpy()
            # The model rounds to 8 bits, depending on shapes; everything computed from its logits does not.
            assert np.abs(np.take_along_axis(expected_NV, ids_NK.astype(np.int64), 1) - p_NK).max() < 0.05


@pytest.mark.parametrize("span", ["answer", "rationale"])
def test_a_start_token_appears_once_in_every_teacher_input(span: str, prompts: Prompts, tmp_path: Path) -> None:
    make_tokenizer(tmp_path, has_start=True)
    with_start, without_start = few_shot_prompts(prompts, tmp_path), few_shot_prompts(prompts)
    question = with_start.request(examples(3)[2], span)
    assert (*with_start.prefix(span), *question.question_ids).count(0) == 1
    assert with_start.prefix(span)[0] == 0
    assert with_start.prefix(span)[1:] == without_start.prefix(span)
    assert question.key != without_start.request(examples(3)[2], span).key


def test_the_layout_decides_the_prompt_and_a_chat_template_does_not(
    prompts: Prompts, student_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(student_folder, tmp_path / "chat")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}")
    with_template = few_shot_prompts(prompts, folder)
    assert with_template.tokenizer.chat_template
    for span in ("answer", "rationale"):
        keys = [p.request(examples(1)[0], span).key for p in (few_shot_prompts(prompts), with_template)]
        assert keys[0] == keys[1]
    assert with_template.fingerprint() == few_shot_prompts(prompts).fingerprint()


def test_no_evaluation_question_is_in_train(configured: Callable[..., DictConfig]) -> None:
    source = open_annotation_job(configured())
    splits = source.splits

    def keys(some_examples: Sequence[Example]) -> set[str]:
        return {source.prompts.request(e, span).key for e in some_examples for span in ("answer", "rationale")}

    held_out = [*splits.validation, *splits.test]
    assert not keys([*splits.train, *without_labels(splits.train)]) & keys([*held_out, *without_labels(held_out)])
    planted = Example(f"  {splits.test[0].question} ", splits.test[0].answer)
    splits_again = Splits.disjoint([*splits.train, planted], [*splits.validation, splits.test[1]], splits.test)
    assert (splits_again.train, splits_again.validation) == (splits.train, splits.validation)
    assert [splits_again.counts[name].lost for name in ("train", "validation")] == [{"in another split": 1}] * 2


def test_annotate_never_uses_test_labels(tmp_path: Path, teacher_folder: Path) -> None:
    config = compose(*annotate_options(tmp_path, teacher_folder), f"root={tmp_path}", name="annotate")
    main(config)
    source = open_annotation_job(config)
    for example in source.splits.test:
        assert example.answer is not None
        without_label = source.prompts.request(Example(example.question), "answer")
        assert without_label.key in source.store
        assert without_label.key != source.prompts.request(example, "answer").key
        assert source.prompts.request(example, "answer").key not in source.store
        assert source.prompts.request(example, "rationale").key not in source.store


def test_the_head_is_applied_to_a_bounded_number_of_positions(prompts: Prompts, teacher_folder: Path) -> None:
    teacher = make_teacher(teacher_folder, prompts, codec=TopK(k=4, temperature=1.0))
    positions_per_call: list[int] = []
    head = teacher.load().get_output_embeddings()
    head.register_forward_hook(
        lambda module, inputs, output: positions_per_call.append(inputs[0].numel() // inputs[0].shape[-1])
    )
    long_examples = [replace(example, answer="so many words " * 40) for example in examples(8)]
    annotations = teacher.annotate([prompts.request(example, "answer") for example in long_examples])
    num_positions = sum(len(soft) for soft in soft_targets_of(annotations))
    assert num_positions > 1024
    assert sum(positions_per_call) >= num_positions
    assert max(positions_per_call) <= 256


class MisbehavingTeacher(CountingTeacher):
    """A teacher whose annotations do not match its requests."""

    def __init__(self, teacher: Any, kind: str) -> None:
        super().__init__(teacher)
        self._kind = kind

    def annotate(self, requests: Sequence[Request]) -> list[Annotation]:
        annotations = super().annotate(requests)
        foreign = replace(annotations[-1], key="0" * 32)
        return {
            "one missing": annotations[:-1],
            "none": [],
            "one extra": [*annotations, foreign],
            "one repeated": [*annotations, annotations[0]],
            "reordered": annotations[::-1],
            "of another request": [*annotations[:-1], foreign],
        }[self._kind]


@pytest.mark.parametrize(
    "kind", ["one missing", "none", "one extra", "one repeated", "reordered", "of another request"]
)
def test_annotations_must_match_requests_one_to_one(kind: str, configured: Callable[..., DictConfig]) -> None:
    source, _ = counted(configured())
    source = replace(source, teacher=MisbehavingTeacher(source.teacher, kind))
    with pytest.raises(CacheError, match="one per request in order"):
        fill(source, {"answer": source.splits.train})
    assert len(open_annotation_job(configured()).store) == 0


@pytest.mark.parametrize("span", ["answer", "rationale"])
@pytest.mark.parametrize("shots", [0, 2])
def test_sequences_of_a_batch_do_not_attend_to_each_other(
    shots: int, span: str, prompts: Prompts, teacher_folder: Path
) -> None:
    prompts_with_shots = Prompts(prompts.tokenizer, LAYOUT, SHOTS[:shots], max_length=256, too_long="drop")
    teacher = make_teacher(teacher_folder, prompts_with_shots)
    teacher.load()
    first, short, long = (
        prompts_with_shots.request(Example(q), span) for q in ("Why is it so?", "Who?", "And who knows? " * 9)
    )
    alone = teacher.annotate([first])[0]
    for others in ([short], [long], [long, short, long]):
        for position in range(len(others) + 1):
            batch = [*others[:position], first, *others[position:]]
            annotation = teacher.annotate(batch)[position]
            assert annotation.key == first.key
            assert is_close(annotation, alone, 1e-4)


def test_a_too_long_test_question_counts_as_wrong(
    student_folder: Path, prompts: Prompts, configured: Callable[..., DictConfig]
) -> None:
    source = open_annotation_job(configured())
    questions = [source.splits.test[0], Example("how " * 400 + "many?", "7"), *source.splits.test[1:]]
    model = loading.load(student_folder, torch.float32)
    evaluation = Evaluation(model, prompts, source.task, "direct", 6)
    predictions = evaluation.predict(questions, {})
    assert [p.example_id for p in predictions] == [example.id for example in questions]
    assert (predictions[1].answer, predictions[1].is_correct, predictions[1].is_written_correct) == (None, False, False)
    without_long = evaluation.predict(source.splits.test, {})
    assert [p.written_answer for p in (predictions[0], *predictions[2:])] == [p.written_answer for p in without_long]
    assert evaluation.rationales(questions)[1] == ""
    assert speeds({"it": evaluation}, [questions[1]])["it"]["ms_per_example"] is None
    assert speeds({"it": evaluation}, questions)["it"]["ms_per_example"] > 0
