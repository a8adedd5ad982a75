"""What software of this kind keeps getting wrong with a teacher and its cache."""

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
from distill.annotation.fill import fill, open_source, without_answers
from distill.cache.codecs.dense import Dense
from distill.cache.codecs.topk import TopK
from distill.cache.store import Store
from distill.errors import CacheError
from distill.evaluation.answers import Evaluation, speeds
from distill.models import loading
from distill.prompts.cues import Prompts
from distill.prompts.tokenizers import load_tokenizer
from distill.records import Annotation, Example, Request, Splits
from tests.annotation.conftest import annotate_options
from tests.conftest import LAYOUT, CountingTeacher, compose, counted, examples, grid, make_tokenizer
from tests.teachers.conftest import asked, opened, same

SHOWN = examples(2)


def shown(prompts: Prompts, folder: Path | None = None) -> Prompts:
    """Few-shot prompts, with the tokenizer of a folder where one is given."""
    tokenizer = load_tokenizer(folder) if folder else prompts.tokenizer
    return Prompts(tokenizer, LAYOUT, SHOWN, max_length=256, too_long="drop")


def all_asked(prompts: Prompts, number: int = 5) -> list[list[Request]]:
    """Requests for answers with and without a gold one, and for reasoning."""
    given = examples(number)
    return [asked(prompts, given), *([prompts.request(e, span) for e in given] for span in ("answer", "rationale"))]


def softs(annotations: Sequence[Annotation]) -> list[Any]:
    return [target.soft for annotation in annotations for target in annotation.targets.values()]


def test_sampling_settings_of_a_model_folder_reach_neither_text_nor_distributions(
    prompts: Prompts, teacher_folder: Path, tmp_path: Path
) -> None:
    sampling = {"do_sample": True, "temperature": 0.3, "top_p": 0.5, "top_k": 3, "repetition_penalty": 2.0}
    tempted = shutil.copytree(teacher_folder, tmp_path / "tempted")
    (tempted / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 1} | sampling))
    teachers = [opened(folder, prompts, max_new_tokens=24) for folder in (teacher_folder, tempted)]
    models = [teacher.load() for teacher in teachers]
    assert models[1].generation_config.temperature == 0.3
    for requests in all_asked(prompts):
        left, right = (teacher.annotate(requests) for teacher in teachers)
        assert all(same(a, b, 0) for a, b in zip(left, right, strict=True))
        written = [target.token_ids for annotation in left for target in annotation.targets.values()]
        assert any(len(set(ids)) < len(ids) - 2 for ids in written) or requests[0].span == "answer"
        for soft in softs(right):
            mass_N = np.exp(grid(soft)[1].astype(np.float64)).sum(1)
            assert np.allclose(mass_N, 1, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_teacher_computes_in_the_dtype_of_its_fingerprint(dtype: str, prompts: Prompts, teacher_folder: Path) -> None:
    teacher = opened(teacher_folder, prompts, dtype=dtype)
    assert teacher.fingerprint()["dtype"] == dtype
    assert {parameter.dtype for parameter in teacher.load().parameters()} == {getattr(torch, dtype)}


def test_a_teacher_in_bfloat16_has_its_softmax_in_float32(
    prompts: Prompts, teacher_folder: Path, tmp_path: Path
) -> None:
    for codec, atol in ((Dense(), 0), (TopK(k=320, temperature=1.0), 0.01)):
        teacher = opened(teacher_folder, prompts, codec=codec, dtype="bfloat16", constrain=False)
        model = teacher.load()
        requests = all_asked(prompts)[1]
        made = teacher.annotate(requests)
        store = Store(tmp_path / type(codec).__name__, {}, codec)
        with store.writing() as writer:
            writer.add(made)
        for request, annotation in zip(requests, made, strict=True):
            soft = annotation.targets["answer"].soft
            kept = store.read(annotation.key).targets["answer"].soft
            assert soft.logprobs_E.dtype == kept.logprobs_E.dtype == np.float32
            ids_NK, logprobs_NK = grid(soft)
            p_NK = np.exp(logprobs_NK.astype(np.float64))
            assert np.allclose(p_NK.sum(1), 1, atol=1e-5)
            assert np.array_equal(soft.ids_E, kept.ids_E)
            assert np.abs(np.exp(grid(kept)[1]) - p_NK).max() <= atol + 1e-7
            ids = annotation.targets["answer"].token_ids
            before = [*prompts.prefix("answer"), *prompts.question(request.example, "answer")]
            with torch.inference_mode():
                logits_TV = model(torch.tensor([[*before, *ids]])).logits[0, len(before) - 1 : -1, :320]
            wanted_NV = logits_TV.float().softmax(-1).numpy()
            # The model itself rounds to 8 bits, another way with other shapes; not so what is made of its logits.
            assert np.abs(np.take_along_axis(wanted_NV, ids_NK.astype(np.int64), 1) - p_NK).max() < 0.05


@pytest.mark.parametrize("span", ["answer", "rationale"])
def test_a_start_token_appears_once_in_every_teacher_input(span: str, prompts: Prompts, tmp_path: Path) -> None:
    make_tokenizer(tmp_path, has_start=True)
    started, plain = shown(prompts, tmp_path), shown(prompts)
    question = started.request(examples(3)[2], span)
    assert (*started.prefix(span), *question.question_ids).count(0) == 1
    assert started.prefix(span)[0] == 0
    assert started.prefix(span)[1:] == plain.prefix(span)
    assert question.key != plain.request(examples(3)[2], span).key


def test_the_layout_decides_the_prompt_and_a_chat_template_does_not(
    prompts: Prompts, student_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(student_folder, tmp_path / "chat")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}")
    chatting = shown(prompts, folder)
    assert chatting.tokenizer.chat_template
    for span in ("answer", "rationale"):
        keys = [p.request(examples(1)[0], span).key for p in (shown(prompts), chatting)]
        assert keys[0] == keys[1]
    assert chatting.fingerprint() == shown(prompts).fingerprint()


def test_no_evaluation_question_is_in_train(configured: Callable[..., DictConfig]) -> None:
    source = open_source(configured())
    splits = source.splits

    def keys(given: Sequence[Example]) -> set[str]:
        return {source.prompts.request(e, span).key for e in given for span in ("answer", "rationale")}

    held_out = [*splits.validation, *splits.test]
    assert not keys([*splits.train, *without_answers(splits.train)]) & keys([*held_out, *without_answers(held_out)])
    planted = Example(f"  {splits.test[0].question.upper()} ", splits.test[0].answer)
    again = Splits.disjoint([*splits.train, planted], [*splits.validation, splits.test[1]], splits.test)
    assert (again.train, again.validation) == (splits.train, splits.validation)
    assert again.dropped == {"train": 1, "validation": 1}


def test_annotate_never_uses_test_labels(tmp_path: Path, teacher_folder: Path) -> None:
    config = compose(*annotate_options(tmp_path, teacher_folder), f"root={tmp_path}", name="annotate")
    main(config)
    source = open_source(config)
    for example in source.splits.test:
        assert example.answer is not None
        hidden = source.prompts.request(Example(example.question), "answer")
        assert hidden.key in source.store
        assert hidden.key != source.prompts.request(example, "answer").key
        assert source.prompts.request(example, "answer").key not in source.store
        assert source.prompts.request(example, "rationale").key not in source.store


def test_the_head_is_applied_to_a_bounded_number_of_positions(prompts: Prompts, teacher_folder: Path) -> None:
    teacher = opened(teacher_folder, prompts, codec=TopK(k=4, temperature=1.0))
    seen: list[int] = []
    head = teacher.load().get_output_embeddings()
    head.register_forward_hook(lambda module, given, out: seen.append(given[0].numel() // given[0].shape[-1]))
    long = [replace(example, answer="so many words " * 40) for example in examples(8)]
    made = teacher.annotate([prompts.request(example, "answer") for example in long])
    num_positions = sum(len(soft) for soft in softs(made))
    assert num_positions > 1024
    assert sum(seen) >= num_positions
    assert max(seen) <= 256


class Ragged(CountingTeacher):
    """A teacher whose replies are not one for each request."""

    def __init__(self, teacher: Any, how: str) -> None:
        super().__init__(teacher)
        self._how = how

    def annotate(self, requests: Sequence[Request]) -> list[Annotation]:
        made = super().annotate(requests)
        other = replace(made[-1], key="0" * 32)
        return {
            "one less": made[:-1],
            "none": [],
            "one more": [*made, other],
            "one twice": [*made, made[0]],
            "in another order": made[::-1],
            "of something else": [*made[:-1], other],
        }[self._how]


@pytest.mark.parametrize("how", ["one less", "none", "one more", "one twice", "in another order", "of something else"])
def test_annotations_must_match_requests_one_to_one(how: str, configured: Callable[..., DictConfig]) -> None:
    source, _ = counted(configured())
    source = replace(source, teacher=Ragged(source.teacher, how))
    with pytest.raises(CacheError, match="one for each"):
        fill(source, {"answer": source.splits.train})
    assert len(open_source(configured()).store) == 0


@pytest.mark.parametrize("span", ["answer", "rationale"])
@pytest.mark.parametrize("shots", [0, 2])
def test_sequences_of_a_batch_do_not_attend_to_each_other(
    shots: int, span: str, prompts: Prompts, teacher_folder: Path
) -> None:
    given = Prompts(prompts.tokenizer, LAYOUT, SHOWN[:shots], max_length=256, too_long="drop")
    teacher = opened(teacher_folder, given, calibration=())
    teacher.load()
    first, short, long = (given.request(Example(q), span) for q in ("Why is it so?", "Who?", "And who knows? " * 9))
    alone = teacher.annotate([first])[0]
    for others in ([short], [long], [long, short, long]):
        for place in range(len(others) + 1):
            batch = [*others[:place], first, *others[place:]]
            made = teacher.annotate(batch)[place]
            assert made.key == first.key
            assert same(made, alone, 1e-4)


def test_a_too_long_test_question_counts_as_wrong(
    student_folder: Path, prompts: Prompts, configured: Callable[..., DictConfig]
) -> None:
    source = open_source(configured())
    given = [source.splits.test[0], Example("how " * 400 + "many?", "7"), *source.splits.test[1:]]
    model = loading.load(student_folder, torch.float32)
    evaluation = Evaluation(model, prompts, source.task, "direct", 6)
    found = evaluation.predict(given, {})
    assert [p.example_id for p in found] == [example.id for example in given]
    assert (found[1].answer, found[1].is_correct, found[1].is_written_correct) == (None, False, False)
    alone = evaluation.predict(source.splits.test, {})
    assert [p.written_answer for p in (found[0], *found[2:])] == [p.written_answer for p in alone]
    assert evaluation.rationales(given)[1] == ""
    assert speeds({"it": evaluation}, [given[1]])["it"]["ms_per_example"] is None
    assert speeds({"it": evaluation}, given)["it"]["ms_per_example"] > 0
