"""Laws 6, 7, 9: teachers are frozen and released, calibrated, and sampled; which rationales reach the student."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig

from distill.annotation.annotation_job import open_annotation_job
from distill.annotation.fill import fill
from distill.annotation.positions import ALL_POSITIONS
from distill.annotation.teacher_module import TeacherModule
from distill.cache import uniforms
from distill.errors import ConfigError
from distill.lessons.curriculum import build_curriculum, prepare
from distill.models.batches import BatchLimit
from distill.models.reading import PrefixedReader
from distill.prompts.rendering import Prompts
from distill.records import Annotation, Example, Group, Request, SoftTargets, Target
from distill.students.causal_lm import open_student
from distill.training.fit import build_training, fit
from distill.training.job import distill
from tests.cases import LAYOUT, TWO_FAST, Case
from tests.conftest import (
    WHOLE_STUDENT,
    CountingTeacher,
    counted,
    examples,
    grid,
    make_model,
)
from tests.teachers.conftest import FreeText, Verbs, answer_requests, is_close, make_teacher


def test_a_teacher_is_frozen_and_stays_in_eval_mode(prompts: Prompts, teacher_folder: Path) -> None:
    teacher = make_teacher(teacher_folder, prompts)
    model = teacher.load()
    module = TeacherModule(teacher, ALL_POSITIONS, BatchLimit(2))
    requests = answer_requests(prompts, examples(5))
    before = module.predict_step(Group("", tuple(requests)))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    module.train()
    assert not model.training
    assert all(is_close(a, b) for a, b in zip(before, module.predict_step(Group("", tuple(requests))), strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_request_counts_the_tokens_that_are_read_and_the_most_that_are_written(
    prompts: Prompts, teacher_folder: Path
) -> None:
    question = Example("Who has it?")
    answer, reasoned = (prompts.request(question, span) for span in ("answer", "rationale"))
    scored = prompts.request(question, "rationale", given="It is so.")
    choosing, writing = (make_teacher(teacher_folder, prompts, task=task) for task in (Verbs(), FreeText()))
    longest = max(map(len, prompts.choice_ids(Verbs.choices)))
    assert choosing.num_tokens(answer) == len(answer.question_ids) + longest
    assert writing.num_tokens(answer) == len(answer.question_ids) + 6
    assert choosing.num_tokens(reasoned) == len(reasoned.question_ids) + 6
    assert choosing.num_tokens(scored) == len(scored.question_ids) + len(scored.given_ids)


def test_a_checkpoint_contains_only_the_student(configured: Callable[..., DictConfig], tmp_path: Path) -> None:
    job = prepare(configured("trainer.max_steps=2", "trainer.log_every_n_steps=1", "loss=[kl]"), tmp_path / "run")
    teacher = CountingTeacher(job.annotation_job.teacher)
    job = replace(job, annotation_job=replace(job.annotation_job, teacher=teacher))
    curriculum = build_curriculum(job)
    num_requests, student = len(teacher.asked), open_student(job.student_folder, **WHOLE_STUDENT)
    fit(job, build_training(job, curriculum, student, []))
    assert (teacher.num_loads, len(teacher.asked)) == (1, num_requests)
    (file,) = (tmp_path / "run" / "checkpoints").glob("*.ckpt")
    saved = torch.load(file, weights_only=True)
    assert set(saved["state_dict"]) == {f"model.{name}" for name in student.state_dict()}
    assert all(torch.equal(saved["state_dict"][f"model.{name}"], value) for name, value in student.state_dict().items())
    bytes_of_student = sum(value.nbytes for value in student.state_dict().values())
    assert file.stat().st_size < 3.3 * bytes_of_student  # weights and AdamW's two moments


def test_the_optimizer_has_only_the_trained_parameters_of_the_student(
    configured: Callable[..., DictConfig], tmp_path: Path
) -> None:
    few = ["trainer.max_steps=1", "trainer.log_every_n_steps=1", "optim.schedule.num_warmup_steps=0"]
    job = prepare(configured(*few, "loss=[answer]"), tmp_path / "run")
    student = open_student(job.student_folder, **WHOLE_STUDENT | {"freeze": ["embed_tokens"]})
    before = {name: value.clone() for name, value in student.state_dict().items()}
    fit(job, build_training(job, build_curriculum(job), student, []))
    (state,) = torch.load(tmp_path / "run" / "checkpoints" / "step-00000001.ckpt", weights_only=True)[
        "optimizer_states"
    ]
    trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    assert sum(len(group["params"]) for group in state["param_groups"]) == len(state["state"]) == len(trained)
    assert {n for n, value in student.state_dict().items() if not torch.equal(value, before[n])} == trained


def test_a_filled_cache_needs_no_teacher_and_a_used_teacher_is_released(configured: Callable[..., DictConfig]) -> None:
    source = open_annotation_job(configured())
    models: list[weakref.ref[Any]] = []

    class Watched(CountingTeacher):
        def load(self) -> Any:
            model = super().load()
            models.append(weakref.ref(model))
            return model

    watched = Watched(source.teacher)
    to_annotate: Any = {"answer": source.splits.train, "rationale": source.splits.train[:3]}
    first = fill(replace(source, teacher=watched), to_annotate)
    gc.collect()
    assert len(models) == watched.num_loads == 1
    assert models[0]() is None
    again = open_annotation_job(configured())
    unused = CountingTeacher(again.teacher)
    second = fill(replace(again, teacher=unused), to_annotate)
    assert (unused.num_loads, unused.asked) == (0, [])
    assert (second.num_reused, second.num_annotated) == (first.num_annotated, 0)


@pytest.mark.filterwarnings("ignore:Experiment logs directory")  # the folder exists already
def test_training_and_evaluation_never_call_the_teacher(configured: Callable[..., DictConfig], tmp_path: Path) -> None:
    short = [
        "trainer.max_steps=1",
        "trainer.log_every_n_steps=1",
        "max_new_tokens=4",
        "num_samples=2",
        "loss=[answer,kl,rationale]",
    ]
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    job = prepare(configured(*short), run_dir)
    build_curriculum(job)
    unused = CountingTeacher(job.annotation_job.teacher)
    distill(replace(job, annotation_job=replace(job.annotation_job, teacher=unused)), [], {})
    assert (unused.num_loads, unused.asked) == (0, [])


@pytest.mark.parametrize("case", TWO_FAST, indirect=True)
@pytest.mark.parametrize("shots", [0, 2])
def test_annotations_do_not_depend_on_the_batch(shots: int, case: Case, teacher_folder: Path) -> None:
    prompts = case.with_shots(shots)
    teacher = make_teacher(teacher_folder, prompts, task=FreeText())
    teacher.load()
    for span in ("answer", "rationale"):
        requests = [prompts.request(example.unlabelled(), span) for example in case.examples(7)]
        batched = teacher.annotate(requests)
        alone = [teacher.annotate([request])[0] for request in requests]
        assert all(is_close(a, b, 1e-4) for a, b in zip(batched, alone, strict=True))


class Echo:
    """A codec that keeps only the random number of every position."""

    seed = 11

    def cut(self, logprobs_NV: torch.Tensor, uniform_N: torch.Tensor) -> SoftTargets:
        assert len(logprobs_NV) == len(uniform_N)
        nothing_E, no_N = np.zeros(0), np.zeros(len(uniform_N), np.int32)
        return SoftTargets(nothing_E.astype(np.int32), nothing_E, uniform_N.numpy(), no_N)

    def unused(self) -> None:
        raise NotImplementedError

    pack = unpack = check_temperature = at_temperature = fingerprint = unused


@pytest.mark.parametrize("batch_size", [1, 7])
def test_random_numbers_are_distinct_by_position_and_independent_of_the_batch(
    batch_size: int, prompts: Prompts, teacher_folder: Path
) -> None:
    teacher = make_teacher(teacher_folder, prompts, codec=Echo())
    teacher.load()
    for span in ("answer", "rationale"):
        requests = [prompts.request(example, span) for example in examples(7)]
        parts = [requests[start : start + batch_size] for start in range(0, 7, batch_size)]
        for annotation in (annotation for part in parts for annotation in teacher.annotate(part)):
            by_span = {name: target.soft.tail_N.tolist() for name, target in annotation.targets.items()}
            numbers = [number for span_numbers in by_span.values() for number in span_numbers]
            assert len(set(numbers)) == len(numbers)
            # The sequence of a rationale continues, after the separator, with the answer.
            length = len(numbers) + len(prompts.separator_ids()) * (len(by_span) == 2)
            expected = uniforms(annotation.key, length, 11).tolist()
            assert by_span.get("rationale", []) == expected[: len(by_span.get("rationale", []))]
            assert by_span.get("answer", []) == expected[length - len(by_span.get("answer", [])) :]


def test_padding_rows_of_the_teachers_head_have_no_effect(prompts: Prompts, teacher_folder: Path) -> None:
    teacher = make_teacher(teacher_folder, prompts)
    model = teacher.load()
    requests = answer_requests(prompts, examples(5))
    before = teacher.annotate(requests)
    model.lm_head.weight.data[prompts.vocabulary_size :] += 50
    assert all(is_close(a, b, 0) for a, b in zip(before, teacher.annotate(requests), strict=True))
    for annotation in before:
        soft = annotation.targets["answer"].soft
        assert soft is not None
        assert (soft.num_exact_N == prompts.vocabulary_size).all()
        assert np.allclose(np.exp(grid(soft)[1]).sum(-1), 1, atol=1e-5)


def test_a_changed_target_token_changes_only_later_distributions(prompts: Prompts, teacher_folder: Path) -> None:
    teacher = make_teacher(teacher_folder, prompts)
    teacher.load()
    question = examples(1)[0]
    pair = [prompts.request(replace(question, answer=answer), "answer") for answer in ("x y z", "x q z")]
    first, second = (annotation.targets["answer"] for annotation in teacher.annotate(pair))
    (position,) = np.flatnonzero(np.array(first.token_ids) != np.array(second.token_ids))
    assert first.soft is not None
    assert second.soft is not None
    gaps = np.abs(np.exp(grid(first.soft)[1]) - np.exp(grid(second.soft)[1])).max(-1)
    assert (gaps[: position + 1] < 1e-5).all()
    assert (gaps[position + 1 :] > 1e-3).all()
    assert 0 < position < len(gaps) - 1


def test_choices_are_scored_by_all_their_tokens_and_the_end_token(prompts: Prompts, teacher_folder: Path) -> None:
    teacher = make_teacher(teacher_folder, prompts, constrain=False)
    model = teacher.load()
    for request, annotation in zip(
        answer_requests(prompts, examples(4)), teacher.annotate(answer_requests(prompts, examples(4))), strict=True
    ):
        scores = []
        for choice in Verbs.choices:
            ids = prompts.answer_ids(choice)
            before = [*prompts.prefix("answer"), *prompts.question(request.example, "answer")]
            with torch.no_grad():
                logits_TV = model(torch.tensor([[*before, *ids]])).logits[0, len(before) - 1 : -1, :320]
            scores.append(logits_TV.log_softmax(-1).gather(-1, torch.tensor(ids).unsqueeze(-1)).sum())
        assert np.allclose(annotation.choice_logprobs, torch.stack(scores).log_softmax(0), atol=1e-4)
        assert annotation.answer == Verbs.choices[int(torch.stack(scores).argmax())]


def test_a_fingerprint_needs_no_loaded_weights(prompts: Prompts, teacher_folder: Path) -> None:
    teacher = make_teacher(teacher_folder, prompts, examples(1)[0])
    assert teacher.fingerprint() == make_teacher(teacher_folder, prompts, examples(1)[0]).fingerprint()
    assert teacher.fingerprint() != make_teacher(teacher_folder, prompts).fingerprint()
    assert not hasattr(teacher, "_model")


def test_a_rationale_is_truncated_only_without_an_end_token(prompts: Prompts, teacher_folder: Path) -> None:
    requests = [prompts.request(example, "rationale") for example in examples(5)]
    model = make_teacher(teacher_folder, prompts).load()
    reader = PrefixedReader(model, prompts.prefix("rationale"), prompts.vocabulary_size)
    written = reader.read([request.question_ids for request in requests]).greedy(max_new_tokens=6, stops=[-1])
    for end in (written[0][-1], written[1][2]):
        ending = Prompts(prompts.tokenizer, LAYOUT, (), max_length=256, too_long="drop")
        ending.end = end
        teacher = make_teacher(teacher_folder, ending, max_new_tokens=6)
        teacher.load()
        are_truncated = [annotation.is_truncated for annotation in teacher.annotate(requests)]
        assert are_truncated == [end not in ids for ids in written]
        assert set(are_truncated) == {True, False}


def samples(prompts: Prompts, number: int) -> list[Request]:
    """Requests of several rationales for each of some examples."""
    return [prompts.request(example, "rationale", sample=k) for example in examples(5) for k in range(number)]


def test_a_sample_depends_on_its_key_and_not_on_the_batch(prompts: Prompts, teacher_folder: Path) -> None:
    teacher = make_teacher(teacher_folder, prompts, sampling_temperature=1.0)
    teacher.load()
    requests = samples(prompts, 4)
    batched = teacher.annotate(requests)
    backwards = teacher.annotate(requests[::-1])[::-1]
    alone = [teacher.annotate([request])[0] for request in requests]
    for others in (backwards, alone):
        assert all(is_close(a, b, 1e-4) for a, b in zip(batched, others, strict=True))
    assert [a.is_sampled for a in batched] == [request.sample > 0 for request in requests]
    texts = [[a.rationale for a in batched[start : start + 4]] for start in range(0, len(batched), 4)]
    assert all(len(set(few)) > 1 for few in texts)
    assert max(len(set(few)) for few in texts) == 4


def test_sample_zero_is_greedy_in_any_batch(prompts: Prompts, teacher_folder: Path) -> None:
    teacher = make_teacher(teacher_folder, prompts, sampling_temperature=1.0)
    teacher.load()
    requests = samples(prompts, 2)
    greedy = teacher.annotate(requests[::2])
    assert all(is_close(a, b, 1e-4) for a, b in zip(greedy, teacher.annotate(requests)[::2], strict=True))
    reader = PrefixedReader(teacher._model, prompts.prefix("rationale"), prompts.vocabulary_size)
    reading = reader.read([request.question_ids for request in requests[::2]])
    written = reading.greedy(max_new_tokens=6, stops=[prompts.end])
    assert [a.rationale for a in greedy] == [prompts.split_reply(ids).rationale for ids in written]


def test_samples_approach_greedy_as_the_temperature_vanishes(prompts: Prompts, teacher_folder: Path) -> None:
    teacher = make_teacher(teacher_folder, prompts, sampling_temperature=1e-5)
    teacher.load()
    greedy, drawn = (teacher.annotate(samples(prompts, 2)[start::2]) for start in (0, 1))
    assert all(is_close(a, replace(b, key=a.key, is_sampled=False), 1e-4) for a, b in zip(greedy, drawn, strict=True))


def test_sampling_and_codec_use_different_random_numbers(prompts: Prompts, teacher_folder: Path) -> None:
    """Otherwise the draws of the codec would depend on the sampled tokens."""
    teacher = make_teacher(teacher_folder, prompts, sampling_temperature=1.0, top_p=1.0)
    teacher.load()
    requests = [request for request in samples(prompts, 2) if request.sample]
    reader = PrefixedReader(teacher._model, prompts.prefix("rationale"), prompts.vocabulary_size)
    texts = [annotation.rationale for annotation in teacher.annotate(requests)]
    for suffix, is_equal in (("/words", True), ("", False)):
        numbers_BN = torch.from_numpy(np.stack([uniforms(request.key + suffix, 6, 0) for request in requests]))
        reading = reader.read([request.question_ids for request in requests])
        written = reading.sampled(uniforms_BN=numbers_BN, stops=[prompts.end], temperature=1.0, top_p=1.0)
        matches = [prompts.split_reply(ids).rationale == text for ids, text in zip(written, texts, strict=True)]
        assert matches == [is_equal] * len(requests)


@pytest.mark.parametrize("setting", [{"sampling_temperature": 0.5}, {"top_p": 0.5}, {"max_new_tokens": 5}])
def test_sampling_settings_are_in_the_fingerprint(
    setting: dict[str, float], prompts: Prompts, teacher_folder: Path
) -> None:
    plain, other = (make_teacher(teacher_folder, prompts, **settings).fingerprint() for settings in ({}, setting))
    assert other == plain | setting
    assert other != plain


@pytest.mark.parametrize(
    "setting",
    [
        {"sampling_temperature": 0.0},
        {"sampling_temperature": float("nan")},
        {"temperature": -0.1},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": 0},
        {"min_new_tokens": -1},
        {"min_new_tokens": 7},
        {"stops": ["x", ""]},
        {"stops": ["x\\n"]},
    ],
    ids=str,
)
def test_impossible_sampling_settings_are_refused(
    setting: dict[str, float], prompts: Prompts, teacher_folder: Path
) -> None:
    with pytest.raises(ConfigError, match=f"generation.{next(iter(setting))}="):
        make_teacher(teacher_folder, prompts, **setting)


CASES = {  # rationale, answer after it, is truncated
    "good": ("Since it is so.", "7", False),
    "disagrees": ("Since it is so.", "8", False),
    "unreadable": ("Since it is so.", None, False),
    "truncated": ("Since it is so and", "7", True),
    "empty": ("", "7", False),
}


def test_only_kept_rationales_reach_the_student(configured: Callable[..., DictConfig], tmp_path: Path) -> None:
    job = prepare(configured("loss=[answer,kl,rationale]", "num_samples=0"), tmp_path)
    unlabelled = [e for e in job.annotation_job.splits.train if e.answer is None]
    prompts, cases = job.annotation_job.prompts, dict(zip((e.id for e in unlabelled), CASES, strict=False))
    with job.annotation_job.store.writing() as writer:
        for example in unlabelled:
            rationale, answer, is_truncated = CASES[cases.get(example.id, "empty")]
            ids = prompts.answer_ids("7")
            keys = [prompts.request(example, span).key for span in ("answer", "rationale")]
            writer.add([Annotation(keys[0], {"answer": Target(ids, None)}, "7")])
            target = {"rationale": Target(prompts.rationale_ids(rationale), None)} if rationale else {}
            writer.add([Annotation(keys[1], target, answer, rationale, is_truncated=is_truncated)])
    curriculum = build_curriculum(job)
    assert {c.reason for c in curriculum.rationales} == {None, "disagrees", "unreadable", "truncated", "empty"}
    taught = {
        target.example_id
        for lesson in curriculum.train
        for sequence in lesson.sequences
        for target in sequence.targets
        if target.span == "rationale"
    }
    taught_by_teacher = taught & {e.id for e in unlabelled}
    assert taught_by_teacher == {i for i, case in cases.items() if case == "good"}
    assert taught - taught_by_teacher == {e.id for e in job.annotation_job.splits.train if e.rationale is not None}


def test_a_request_longer_than_the_positions_of_the_teacher_stops_before_the_first_annotation(
    configured: Callable[..., DictConfig], tmp_path: Path
) -> None:
    config = configured(f"teacher.model={make_model(tmp_path / 'short', seed=1, max_position_embeddings=60)}")
    source, teacher = counted(config)
    with pytest.raises(ConfigError, match=r"a text of \d+ tokens, .* exceeds the 60 positions of LlamaForCausalLM"):
        fill(source, {"answer": source.splits.train})
    assert not teacher.asked
