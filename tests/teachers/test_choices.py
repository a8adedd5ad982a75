"""Choices are whole answers: their probabilities exclude each other, calibrated or not, and soft targets agree."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill.annotation.annotation_job import AnnotationJob, open_annotation_job
from distill.annotation.fill import fill
from distill.errors import CacheError, ConfigError
from distill.prompts.rendering import Prompts
from distill.records import Example
from distill.teachers.causal_lm import CausalLMTeacher
from distill.teachers.choices import Adjustment, calibrated_offsets
from tests.conftest import compose, examples, grid, reviews, shards, tiny_overrides
from tests.teachers.conftest import Verbs, answer_requests, make_teacher

CHOICE_SETS = [
    ("has", "gets back"),
    ("good", "good but slow"),
    ("1", "10", "100"),
    ("no", "no, thanks"),
    ("gets", "gets back", "get"),
]
END, VOCABULARY, LONGEST = 0, 4, 3


def task_of(choices: tuple[str, ...]) -> Any:
    return type("Choosing", (Verbs,), {"choices": choices})()


@pytest.mark.parametrize("choices", CHOICE_SETS)
@pytest.mark.parametrize("constrain", [False, True])
def test_soft_targets_along_each_choice_give_its_calibrated_probability(
    constrain: bool, choices: tuple[str, ...], prompts: Prompts, teacher_folder: Path
) -> None:
    questions = [Example(example.question) for example in examples(5)]
    teacher = make_teacher(teacher_folder, prompts, *questions, task=task_of(choices), constrain=constrain)
    teacher.load()
    along = []
    for choice in choices:
        given = teacher.annotate([prompts.request(replace(q, answer=choice), "answer") for q in questions])
        softs = [annotation.targets["answer"] for annotation in given]
        along.append([grid(t.soft)[1][range(len(t.token_ids)), t.token_ids].sum() for t in softs])
    expected_NC = np.array([annotation.choice_logprobs for annotation in given])
    along_NC = np.array(along).T
    assert (np.exp(along_NC).sum(1) <= 1 + 1e-5).all()
    if not constrain:  # the rest is the probability of other texts
        assert (np.exp(along_NC).sum(1) < 1).all()
        along_NC = along_NC - np.log(np.exp(along_NC).sum(1, keepdims=True))
    assert np.allclose(along_NC, expected_NC, atol=1e-4)


@pytest.mark.parametrize("choices", CHOICE_SETS)
def test_calibration_leaves_the_median_question_undecided(
    choices: tuple[str, ...], prompts: Prompts, teacher_folder: Path
) -> None:
    questions = [Example(example.question) for example in examples(9)]
    centred = []
    for sample in ((), questions):
        teacher = make_teacher(teacher_folder, prompts, *sample, task=task_of(choices))
        teacher.load()
        score_NC = np.array([a.choice_logprobs for a in teacher.annotate(answer_requests(prompts, questions))])
        centred.append(np.median(score_NC - score_NC.mean(1, keepdims=True), 0))
    biased_C, calibrated_C = centred
    assert np.ptp(biased_C) > 0.1
    assert np.ptp(calibrated_C) < 1e-4
    assert len(choices) > 2 or np.allclose(calibrated_C, 0, atol=1e-4)


def test_offsets_favour_what_the_model_rates_low() -> None:
    score_NC = torch.tensor([[0.0, -2.0], [-1.0, -2.0], [-3.0, -9.0]])  # log-odds 2, 1, 6
    assert calibrated_offsets(score_NC).tolist() == pytest.approx([-1.0, 1.0])


def language(seed: int) -> dict[tuple[int, ...], torch.Tensor]:
    """A random language model on texts of at most three tokens and an end token: log-probabilities by beginning."""
    generator, model = torch.Generator().manual_seed(seed), {}
    for length in range(LONGEST + 1):
        for beginning in itertools.product(range(1, VOCABULARY), repeat=length):
            logits_V = 2 * torch.randn(VOCABULARY, generator=generator, dtype=torch.float64)
            logits_V[1:] -= torch.inf if length == LONGEST else 0
            model[beginning] = logits_V.log_softmax(0)
    return model


@pytest.mark.parametrize("is_constrained", [False, True])
@pytest.mark.parametrize(
    "choices", [((1, END), (2, END)), ((1, END), (1, 2, END), (1, 2, 3, END)), ((3, 1, END), (2, END))]
)
def test_soft_targets_are_those_of_the_tilted_distribution_of_whole_texts(
    choices: tuple[tuple[int, ...], ...], is_constrained: bool
) -> None:
    """Reference: the probability of every text, tilted, and summed by beginning."""
    model = language(len(choices))
    offset_C = torch.linspace(-1.5, 2.0, len(choices), dtype=torch.float64)
    texts = [(*beginning, END) for beginning in model]
    by_token = {text: [model[text[:n]][text[n]] for n in range(len(text))] for text in texts}
    weights = {text: torch.stack(logprobs).sum().exp().item() for text, logprobs in by_token.items()}
    for text in weights:
        tilt = offset_C[choices.index(text)].exp().item() if text in choices else float(not is_constrained)
        weights[text] *= tilt
    token_logprobs = [torch.stack(by_token[choice]).unsqueeze(0) for choice in choices]
    adjustment = Adjustment.of(choices, offset_C, is_constrained, token_logprobs)
    for beginning in {choice[:n] for choice in choices for n in range(len(choice))}:
        mass_V = torch.tensor(
            [
                sum(w for t, w in weights.items() if t[: len(beginning) + 1] == (*beginning, v))
                for v in range(VOCABULARY)
            ]
        )
        adjusted_V = adjustment.adjust(model[beginning].unsqueeze(0), [(0, beginning)])[0]
        assert torch.allclose(adjusted_V.exp(), (mass_V / mass_V.sum()).to(adjusted_V), atol=1e-12)
    whole = torch.tensor([weights[choice] for choice in choices])
    assert torch.allclose(adjustment.score_BC[0].exp(), (whole / whole.sum()).double(), atol=1e-7)


@pytest.mark.parametrize("is_constrained", [False, True])
def test_prompts_of_a_batch_are_adjusted_by_their_own_row(is_constrained: bool) -> None:
    """Three prompts and two choices that begin alike: no axis can be taken for another."""
    models, choices = [language(seed) for seed in (1, 2, 3)], ((1, END), (1, 2, END))
    offset_C = torch.tensor([0.7, -1.1], dtype=torch.float64)
    logprobs = [torch.stack([torch.stack([m[c[:n]][c[n]] for n in range(len(c))]) for m in models]) for c in choices]
    whole = Adjustment.of(choices, offset_C, is_constrained, logprobs)
    alone = [Adjustment.of(choices, offset_C, is_constrained, [x[row : row + 1] for x in logprobs]) for row in range(3)]
    places = [(row, beginning) for beginning in ((), (1,), (2,), (1, 2)) for row in (2, 0, 1)]
    together_NV = whole.adjust(torch.stack([models[row][beginning] for row, beginning in places]), places)
    for (row, beginning), found_V in zip(places, together_NV, strict=True):
        expected_NV = alone[row].adjust(models[row][beginning].unsqueeze(0), [(0, beginning)])
        assert torch.allclose(found_V, expected_NV[0])
    assert whole.score_BC.shape == (3, 2)
    assert torch.allclose(whole.score_BC, torch.cat([adjustment.score_BC for adjustment in alone]))
    assert torch.allclose(whole.score_BC.exp().sum(1), torch.ones(3).double())


def test_a_text_that_no_choice_begins_with_keeps_its_distributions() -> None:
    model = language(9)
    choices = ((1, END), (2, END))
    token_logprobs = [torch.stack([model[()][a], model[a,][END]]).unsqueeze(0) for a in (1, 2)]
    adjustment = Adjustment.of(choices, torch.tensor([1.0, -1.0]).double(), True, token_logprobs)
    assert torch.equal(adjustment.adjust(model[3,].unsqueeze(0), [(0, (3,))])[0], model[3,])


def test_choices_with_the_same_tokens_are_refused(prompts: Prompts, teacher_folder: Path) -> None:
    with pytest.raises(ConfigError, match="'has' and 'has' have the same tokens in the tokenizer"):
        make_teacher(teacher_folder, prompts, task=task_of(("has", "has")))


def test_too_long_questions_are_left_out_of_the_calibration(prompts: Prompts, teacher_folder: Path) -> None:
    questions = [Example(example.question) for example in examples(5)]
    long = Example("very " * 300 + "long?")
    offsets = []
    for sample in (questions, [long, *questions]):
        teacher = make_teacher(teacher_folder, prompts, *sample)
        teacher.load()
        offsets.append(teacher._offsets)
    assert offsets[0] == offsets[1]
    teacher = make_teacher(teacher_folder, prompts, long)
    teacher.load()
    with pytest.raises(ConfigError, match="too long"):
        teacher.annotate(answer_requests(prompts, questions))


@pytest.fixture
def calibrated(tmp_path: Path, teacher_folder: Path, student_folder: Path) -> Any:
    """Overrides for a task of two choices, calibrated on 20 questions, with a variable number of train examples."""
    tiny = tiny_overrides(tmp_path, teacher_folder, student_folder)[6:]
    options = [*reviews(tmp_path), "task.examples.num_validation=4", "task.examples.num_test=4", *tiny]
    sizes = "task.examples.num_labelled={} task.examples.num_unlabelled=2 teacher.calibrate=20"
    return lambda number: compose(*options, *sizes.format(number).split())


def annotate(job: AnnotationJob) -> int:
    return fill(job, {"answer": [Example(example.question) for example in job.splits.train]}).num_annotated


def test_opening_a_job_builds_its_teacher_once(calibrated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    build, teachers = CausalLMTeacher.__init__, list[CausalLMTeacher]()

    def counted_build(self: CausalLMTeacher, **arguments: Any) -> None:
        teachers.append(self)
        build(self, **arguments)

    monkeypatch.setattr(CausalLMTeacher, "__init__", counted_build)
    job = open_annotation_job(calibrated(8))
    assert teachers == [job.teacher]


def test_a_calibration_is_made_once_and_survives_a_grown_train_set(calibrated: Any) -> None:
    few = open_annotation_job(calibrated(8))
    assert annotate(few) == len(few.splits.train) == 10
    record = (few.store.folder / "manifest.calibration.json").read_bytes()
    before = shards(few.store.folder)
    many = open_annotation_job(calibrated(16))
    new = {example.id for example in many.splits.train} - {example.id for example in few.splits.train}
    assert many.store.folder == few.store.folder
    assert 0 < annotate(many) == len(new) < len(many.splits.train)
    assert (few.store.folder / "manifest.calibration.json").read_bytes() == record
    assert before.items() <= shards(few.store.folder).items()
    assert json.loads(record)["line"]["questions"] == [example.id for example in few.splits.train]


def test_two_processes_share_the_first_calibration(calibrated: Any) -> None:
    first, second = open_annotation_job(calibrated(8)), open_annotation_job(calibrated(16))
    with second.store.writing(), first.store.writing():
        choices = ["negative", "positive"]
        record = {"choices": choices, "offsets": [0.5, -0.5]}
        kept = first.store.recall("calibration", lambda: record)
        assert second.store.recall("calibration", lambda: {**record, "offsets": [9.0, -9.0]}) == kept == record
    second.teacher.load()
    assert second.teacher._offsets == {"negative": 0.5, "positive": -0.5}


def test_a_calibration_is_only_kept_where_records_are_written(calibrated: Any) -> None:
    job = open_annotation_job(calibrated(8))
    job.teacher.load()
    assert any(job.teacher._offsets.values())
    assert not job.store.folder.exists()


@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_a_damaged_calibration_is_refused(damage: str, calibrated: Any) -> None:
    job = open_annotation_job(calibrated(8))
    annotate(job)
    path = job.store.folder / "manifest.calibration.json"
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes().replace(b'"offsets": [', b'"offsets": [1'))
    with pytest.raises(CacheError, match=r"manifest\.calibration\.json is (missing|damaged)"):
        annotate(open_annotation_job(calibrated(16)))


def test_the_fingerprint_has_the_number_of_calibration_questions_and_not_which(calibrated: Any) -> None:
    few, many = (open_annotation_job(calibrated(number)).teacher for number in (8, 16))
    assert few.fingerprint() == many.fingerprint()
    assert few.fingerprint()["calibration"] == 20
    assert [e.answer for e in few._calibration.questions] == [None] * 10
