"""Laws 6, 7, 9: a frozen teacher that leaves memory, its calibration, and what becomes of its reasoning."""

from __future__ import annotations

import gc
import shutil
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
from distill.annotation.teacher_module import TeacherModule
from distill.cache import uniforms
from distill.errors import ConfigError
from distill.lessons.curriculum import build_curriculum, prepare
from distill.models.reading import PrefixedReader
from distill.prompts.cues import Prompts
from distill.records import Annotation, Example, Group, Request, SoftTargets, Target
from distill.students.causal_lm import open_student
from distill.training.fit import build_training, fit
from distill.training.job import distill
from tests.conftest import (
    LAYOUT,
    WHOLE_STUDENT,
    CountingTeacher,
    compose,
    examples,
    grid,
    make_tokenizer,
    reviews,
    tiny_overrides,
)
from tests.teachers.conftest import Verbs, asked, opened, same


def test_a_teacher_is_frozen_and_stays_in_eval_mode(prompts: Prompts, teacher_folder: Path) -> None:
    teacher = opened(teacher_folder, prompts)
    module = TeacherModule(teacher, batch_size=2)
    requests = asked(prompts, examples(5))
    before = module.predict_step(Group("", tuple(requests)))
    assert not any(parameter.requires_grad for parameter in module.parameters())
    module.train()
    assert not module.model.training
    assert all(same(a, b) for a, b in zip(before, module.predict_step(Group("", tuple(requests))), strict=True))
    assert all(parameter.grad is None for parameter in module.parameters())


def test_a_fitted_checkpoint_holds_the_student_and_nothing_of_the_teacher(
    configured: Callable[..., DictConfig], tmp_path: Path
) -> None:
    job = prepare(configured("trainer.max_steps=2", "trainer.log_every_n_steps=1", "loss=[kl]"), tmp_path / "run")
    teacher = CountingTeacher(job.annotation_job.teacher)
    job = replace(job, annotation_job=replace(job.annotation_job, teacher=teacher))
    curriculum = build_curriculum(job)
    num_asked, student = len(teacher.asked), open_student(job.student_folder, **WHOLE_STUDENT)
    fit(job, build_training(job, curriculum, student, []))
    assert (teacher.num_loads, len(teacher.asked)) == (1, num_asked)
    (file,) = (tmp_path / "run" / "checkpoints").glob("*.ckpt")
    saved = torch.load(file, weights_only=True)
    assert set(saved["state_dict"]) == {f"model.{name}" for name in student.state_dict()}
    assert all(torch.equal(saved["state_dict"][f"model.{name}"], value) for name, value in student.state_dict().items())
    bytes_of_student = sum(value.nbytes for value in student.state_dict().values())
    assert file.stat().st_size < 3.3 * bytes_of_student  # weights and AdamW's two moments


def test_the_optimizer_holds_the_students_trained_parameters_and_no_others(
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


def test_a_filled_cache_makes_no_call_and_a_teacher_leaves_memory(configured: Callable[..., DictConfig]) -> None:
    source = open_annotation_job(configured())
    kept: list[weakref.ref[Any]] = []

    class Watched(CountingTeacher):
        def load(self) -> Any:
            model = super().load()
            kept.append(weakref.ref(model))
            return model

    watched = Watched(source.teacher)
    wanted: Any = {"answer": source.splits.train, "rationale": source.splits.train[:3]}
    first = fill(replace(source, teacher=watched), wanted)
    gc.collect()
    assert len(kept) == watched.num_loads == 1
    assert kept[0]() is None
    again = open_annotation_job(configured())
    unused = CountingTeacher(again.teacher)
    second = fill(replace(again, teacher=unused), wanted)
    assert (unused.num_loads, unused.asked) == (0, [])
    assert (second.num_reused, second.num_annotated) == (first.num_annotated, 0)


@pytest.mark.filterwarnings("ignore:Experiment logs directory")  # the command has written there before
def test_training_and_evaluation_ask_the_teacher_nothing(configured: Callable[..., DictConfig], tmp_path: Path) -> None:
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


@pytest.mark.parametrize("shots", [0, 2])
def test_answers_do_not_depend_on_company(shots: int, prompts: Prompts, teacher_folder: Path) -> None:
    shown = Prompts(prompts.tokenizer, LAYOUT, examples(shots), max_length=256, too_long="drop")
    teacher = opened(teacher_folder, shown)
    teacher.load()
    for span in ("answer", "rationale"):
        requests = [shown.request(example, span) for example in examples(7)]
        together = teacher.annotate(requests)
        alone = [teacher.annotate([request])[0] for request in requests]
        assert all(same(a, b, 1e-4) for a, b in zip(together, alone, strict=True))


class Echo:
    """A codec that keeps nothing but the number it was given for each position."""

    seed = 11

    def cut(self, logprobs_NV: torch.Tensor, uniform_N: torch.Tensor) -> SoftTargets:
        assert len(logprobs_NV) == len(uniform_N)
        nothing_E, no_N = np.zeros(0), np.zeros(len(uniform_N), np.int32)
        return SoftTargets(nothing_E.astype(np.int32), nothing_E, uniform_N.numpy(), no_N)

    def unused(self) -> None:
        raise NotImplementedError

    pack = unpack = check_temperature = at_temperature = fingerprint = unused


@pytest.mark.parametrize("together", [1, 7])
def test_every_position_of_a_record_has_a_number_of_its_own_in_any_batch(
    together: int, prompts: Prompts, teacher_folder: Path
) -> None:
    teacher = opened(teacher_folder, prompts, codec=Echo())
    teacher.load()
    for span in ("answer", "rationale"):
        requests = [prompts.request(example, span) for example in examples(7)]
        parts = [requests[start : start + together] for start in range(0, 7, together)]
        for annotation in (annotation for part in parts for annotation in teacher.annotate(part)):
            found = {name: target.soft.tail_N.tolist() for name, target in annotation.targets.items()}
            numbers = [number for span_numbers in found.values() for number in span_numbers]
            assert len(set(numbers)) == len(numbers)
            # A rationale's target goes on, over the words between, to the answer.
            length = len(numbers) + len(prompts.separator_ids()) * (len(found) == 2)
            every = uniforms(annotation.key, length, 11).tolist()
            assert found.get("rationale", []) == every[: len(found.get("rationale", []))]
            assert found.get("answer", []) == every[length - len(found.get("answer", [])) :]


def test_padded_rows_of_the_teachers_head_do_not_matter(prompts: Prompts, teacher_folder: Path) -> None:
    teacher = opened(teacher_folder, prompts)
    model = teacher.load()
    requests = asked(prompts, examples(5))
    before = teacher.annotate(requests)
    model.lm_head.weight.data[prompts.vocabulary_size :] += 50
    assert all(same(a, b, 0) for a, b in zip(before, teacher.annotate(requests), strict=True))
    for annotation in before:
        soft = annotation.targets["answer"].soft
        assert soft is not None
        assert (soft.num_exact_N == prompts.vocabulary_size).all()
        assert np.allclose(np.exp(grid(soft)[1]).sum(-1), 1, atol=1e-5)


def test_another_token_in_a_target_moves_only_the_distributions_after_it(
    prompts: Prompts, teacher_folder: Path
) -> None:
    teacher = opened(teacher_folder, prompts)
    teacher.load()
    question = examples(1)[0]
    pair = [prompts.request(replace(question, answer=answer), "answer") for answer in ("x y z", "x q z")]
    one, other = (annotation.targets["answer"] for annotation in teacher.annotate(pair))
    (place,) = np.flatnonzero(np.array(one.token_ids) != np.array(other.token_ids))
    assert one.soft is not None
    assert other.soft is not None
    gaps = np.abs(np.exp(grid(one.soft)[1]) - np.exp(grid(other.soft)[1])).max(-1)
    assert (gaps[: place + 1] < 1e-5).all()
    assert (gaps[place + 1 :] > 1e-3).all()
    assert 0 < place < len(gaps) - 1


def test_choices_are_scored_by_all_their_tokens(prompts: Prompts, teacher_folder: Path) -> None:
    teacher = opened(teacher_folder, prompts, constrain=False)
    model = teacher.load()
    for request, annotation in zip(
        asked(prompts, examples(4)), teacher.annotate(asked(prompts, examples(4))), strict=True
    ):
        scores = []
        for choice in Verbs.choices:
            ids = prompts.encode(f" {choice}")
            before = [*prompts.prefix("answer"), *prompts.question(request.example, "answer")]
            with torch.no_grad():
                logits_TV = model(torch.tensor([[*before, *ids]])).logits[0, len(before) - 1 : -1, :320]
            scores.append(logits_TV.log_softmax(-1).gather(-1, torch.tensor(ids).unsqueeze(-1)).sum())
        assert np.allclose(annotation.choice_logprobs, torch.stack(scores).log_softmax(0), atol=1e-4)
        assert annotation.answer == Verbs.choices[int(torch.stack(scores).argmax())]


def test_calibration_leaves_the_median_question_undecided(prompts: Prompts, teacher_folder: Path) -> None:
    given = [Example(example.question) for example in examples(9)]
    firsts = [prompts.encode(f" {choice}")[0] for choice in Verbs.choices]
    assert len(set(firsts)) == 2
    teacher = opened(teacher_folder, prompts, *given)
    teacher.load()
    softs = [a.targets["answer"].soft for a in teacher.annotate(asked(prompts, given))]
    gold_NC = np.array([grid(soft)[1][0, firsts] for soft in softs])
    plain = opened(teacher_folder, prompts)
    plain.load()
    raw_NC = np.array([grid(a.targets["answer"].soft)[1][0, firsts] for a in plain.annotate(asked(prompts, given))])
    moved = (gold_NC - raw_NC) @ [1, -1]
    assert np.allclose(moved, moved[0], atol=1e-4)
    assert abs(moved[0]) > 1e-3
    with pytest.raises(ConfigError, match="begin with the same token"):
        opened(teacher_folder, prompts, *given, task=type("Alike", (Verbs,), {"choices": ("gets", "gets back")})())


def test_choices_are_calibrated_on_train_questions_alone(
    tmp_path: Path, teacher_folder: Path, student_folder: Path
) -> None:
    teacher, options = shutil.copytree(teacher_folder, tmp_path / "teacher"), reviews(tmp_path)
    make_tokenizer(teacher, texts=["Sentiment: negative", "Sentiment: positive"] * 500)  # two tokens to begin with
    tiny = tiny_overrides(tmp_path, teacher, student_folder)
    source = open_annotation_job(compose(*tiny[1:], *options, "teacher.calibrate=5"))
    assert source.teacher.fingerprint()["calibration"] == [example.id for example in source.splits.train[:5]]


def test_a_teacher_that_loads_nothing_has_a_fingerprint(prompts: Prompts, teacher_folder: Path) -> None:
    teacher = opened(teacher_folder, prompts, examples(1)[0])
    assert teacher.fingerprint() == opened(teacher_folder, prompts, examples(1)[0]).fingerprint()
    assert teacher.fingerprint() != opened(teacher_folder, prompts).fingerprint()
    assert not hasattr(teacher, "_model")


def test_reasoning_counts_as_cut_off_only_where_it_did_not_come_to_its_end(
    prompts: Prompts, teacher_folder: Path
) -> None:
    requests = [prompts.request(example, "rationale") for example in examples(5)]
    model = opened(teacher_folder, prompts).load()
    reader = PrefixedReader(model, prompts.prefix("rationale"), prompts.vocabulary_size)
    written = reader.read([request.question_ids for request in requests]).greedy(max_new_tokens=6, stop=-1)
    for end in (written[0][-1], written[1][2]):
        ending = Prompts(prompts.tokenizer, LAYOUT, (), max_length=256, too_long="drop")
        ending.end = end
        teacher = opened(teacher_folder, ending, max_new_tokens=6)
        teacher.load()
        found = [annotation.is_truncated for annotation in teacher.annotate(requests)]
        assert found == [end not in ids for ids in written]
        assert set(found) == {True, False}


def samples(prompts: Prompts, number: int) -> list[Request]:
    """Requests of several rationales for each of some examples."""
    return [prompts.request(example, "rationale", sample=k) for example in examples(5) for k in range(number)]


def test_a_sample_depends_on_its_key_and_not_on_its_company(prompts: Prompts, teacher_folder: Path) -> None:
    teacher = opened(teacher_folder, prompts, sampling_temperature=1.0)
    teacher.load()
    requests = samples(prompts, 4)
    together = teacher.annotate(requests)
    backwards = teacher.annotate(requests[::-1])[::-1]
    alone = [teacher.annotate([request])[0] for request in requests]
    for others in (backwards, alone):
        assert all(same(a, b, 1e-4) for a, b in zip(together, others, strict=True))
    assert [a.is_sampled for a in together] == [request.sample > 0 for request in requests]
    texts = [[a.rationale for a in together[start : start + 4]] for start in range(0, len(together), 4)]
    assert all(len(set(few)) > 1 for few in texts)
    assert max(len(set(few)) for few in texts) == 4


def test_sample_zero_is_greedy_whatever_stands_beside_it(prompts: Prompts, teacher_folder: Path) -> None:
    teacher = opened(teacher_folder, prompts, sampling_temperature=1.0)
    teacher.load()
    requests = samples(prompts, 2)
    greedy = teacher.annotate(requests[::2])
    assert all(same(a, b, 1e-4) for a, b in zip(greedy, teacher.annotate(requests)[::2], strict=True))
    reader = PrefixedReader(teacher._model, prompts.prefix("rationale"), prompts.vocabulary_size)
    read = reader.read([request.question_ids for request in requests[::2]])
    written = read.greedy(max_new_tokens=6, stop=prompts.end)
    assert [a.rationale for a in greedy] == [prompts.split_reply(ids).rationale for ids in written]


def test_samples_become_greedy_as_the_sampling_temperature_vanishes(prompts: Prompts, teacher_folder: Path) -> None:
    teacher = opened(teacher_folder, prompts, sampling_temperature=1e-5)
    teacher.load()
    greedy, drawn = (teacher.annotate(samples(prompts, 2)[start::2]) for start in (0, 1))
    assert all(same(a, replace(b, key=a.key, is_sampled=False), 1e-4) for a, b in zip(greedy, drawn, strict=True))


def test_words_are_drawn_by_other_numbers_than_targets_are_cut_by(prompts: Prompts, teacher_folder: Path) -> None:
    """Else, given the words, what the codec draws in their places would not be fair."""
    teacher = opened(teacher_folder, prompts, sampling_temperature=1.0, top_p=1.0)
    teacher.load()
    requests = [request for request in samples(prompts, 2) if request.sample]
    reader = PrefixedReader(teacher._model, prompts.prefix("rationale"), prompts.vocabulary_size)
    texts = [annotation.rationale for annotation in teacher.annotate(requests)]
    for ending, is_theirs in (("/words", True), ("", False)):
        numbers_BN = torch.from_numpy(np.stack([uniforms(request.key + ending, 6, 0) for request in requests]))
        reading = reader.read([request.question_ids for request in requests])
        written = reading.sampled(uniforms_BN=numbers_BN, stop=prompts.end, temperature=1.0, top_p=1.0)
        same = [prompts.split_reply(ids).rationale == text for ids, text in zip(written, texts, strict=True)]
        assert same == [is_theirs] * len(requests)


@pytest.mark.parametrize("setting", [{"sampling_temperature": 0.5}, {"top_p": 0.5}, {"max_new_tokens": 5}])
def test_how_samples_are_drawn_is_in_the_fingerprint(
    setting: dict[str, float], prompts: Prompts, teacher_folder: Path
) -> None:
    plain, other = (opened(teacher_folder, prompts, **given).fingerprint() for given in ({}, setting))
    assert other == plain | {"generation": plain["generation"] | setting}
    assert other != plain


@pytest.mark.parametrize(
    "setting", [{"sampling_temperature": 0.0}, {"sampling_temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.1}]
)
def test_a_teacher_that_could_not_draw_is_refused(
    setting: dict[str, float], prompts: Prompts, teacher_folder: Path
) -> None:
    with pytest.raises(ConfigError, match="sampling_temperature"):
        opened(teacher_folder, prompts, **setting)


REASONED = {  # what the teacher left: rationale, answer after it, cut off at the limit
    "good": ("Since it is so.", "7", False),
    "disagrees": ("Since it is so.", "8", False),
    "unreadable": ("Since it is so.", None, False),
    "truncated": ("Since it is so and", "7", True),
    "empty": ("", "7", False),
}


def test_only_rationales_without_a_reason_against_them_reach_the_student(
    configured: Callable[..., DictConfig], tmp_path: Path
) -> None:
    job = prepare(configured("loss=[answer,kl,rationale]", "num_samples=0"), tmp_path)
    unlabelled = [e for e in job.annotation_job.splits.train if e.answer is None]
    prompts, cases = job.annotation_job.prompts, dict(zip((e.id for e in unlabelled), REASONED, strict=False))
    with job.annotation_job.store.writing() as writer:
        for example in unlabelled:
            rationale, answer, is_truncated = REASONED[cases.get(example.id, "empty")]
            ids = prompts.answer_ids("7")
            keys = [prompts.request(example, span).key for span in ("answer", "rationale")]
            writer.add([Annotation(keys[0], {"answer": Target(ids, None)}, "7")])
            target = {"rationale": Target(prompts.rationale_ids(rationale), None)} if rationale else {}
            writer.add([Annotation(keys[1], target, answer, rationale, is_truncated=is_truncated)])
    curriculum = build_curriculum(job)
    assert {c.reason for c in curriculum.rationales} == {None, "disagrees", "unreadable", "truncated", "empty"}
    taught = {
        lesson.example_id for lesson in curriculum.train for s in lesson.sequences if "rationale" in s.prompt.spans
    }
    by_teacher = taught & {e.id for e in unlabelled}
    assert by_teacher == {i for i, case in cases.items() if case == "good"}
    assert taught - by_teacher == {e.id for e in job.annotation_job.splits.train if e.rationale is not None}
