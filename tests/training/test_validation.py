"""Laws 2 and 6: soft targets at their positions, and what validation and evaluation measure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distill.app import config as configuration
from distill.cache.codecs.dense import Dense
from distill.evaluation.answers import Evaluation
from distill.lessons.collate import collate
from distill.lessons.curriculum import build_curriculum, prepare
from distill.lessons.join import Lesson, TrainingSequence
from distill.losses.head import head_loss, predicted_ids
from distill.models.batches import BatchLimit
from distill.models.reading import PrefixedReader
from distill.prompts.rendering import Prompts
from distill.records import SPANS, Annotation, Batch, Example, Splits, Target
from distill.teachers import Calibration
from distill.training.module import StudentModule
from tests.cases import KINDS, Case, case_overrides
from tests.conftest import LAYOUT, compose, examples, keep, lessons, objectives, read, student_module, tiny_overrides
from tests.training.conftest import open_whole_student, plain_loss


def losses_by_position(module: StudentModule, batch: Batch) -> dict[str, list[float]]:
    """The value of each loss at each of its positions."""
    with torch.no_grad():
        hidden_NH, head = module.hidden(batch), module.head()
        losses = {}
        for name, term in module.terms(replace(batch, counts={})).items():
            used_N, positions = torch.arange(len(term.is_used_N)), term.is_used_N.nonzero().ravel().tolist()
            single_terms = [replace(term, is_used_N=used_N == position) for position in positions]
            losses[name] = head_loss(hidden_NH, head, single_terms)[1].tolist()
    return losses


# Without the sampling codecs: their targets equal the teacher's only on average, and they refuse reverse KL.
@pytest.mark.parametrize(
    ("cache", "rounding", "kind"),
    [
        ("dense", 1e-5, None),
        ("topk", 3e-4, None),
        *(pytest.param("dense", 1e-5, kind, marks=pytest.mark.slow) for kind in list(KINDS)[1:]),
    ],
)
def test_a_student_equal_to_the_teacher_has_zero_kl_at_every_position(
    cache: str, rounding: float, kind: str | None, teacher_folder: Path, tmp_path: Path
) -> None:
    overrides = tiny_overrides(tmp_path, teacher_folder, teacher_folder)
    overrides = [o for o in overrides if "cache" not in o and "num_shots" not in o]
    overrides += case_overrides(kind, tmp_path, teacher_folder, teacher_folder) if kind else ["prompt.num_shots=0"]
    config = compose(*overrides, f"cache={cache}", "teacher.calibrate=0", "loss=[kl,reverse_kl]")
    job = prepare(config, tmp_path / "run")
    curriculum = build_curriculum(job)
    all_lessons = [*curriculum.train, *curriculum.validation]
    batch = collate(all_lessons, {}, 0, curriculum.read)
    module = student_module(open_whole_student(teacher_folder, torch.float32).eval(), job.prompts, "kl", "reverse_kl")
    losses = losses_by_position(module, batch)
    assert batch.soft is not None
    is_end_N = batch.label_N == job.prompts.end
    assert (is_end_N & batch.is_soft_N).sum() == len(all_lessons)
    for name in ("kl", "reverse_kl"):
        assert (
            len(losses[name])
            == batch.is_soft_N.sum()
            == sum(c for lesson in all_lessons for (_, s), c in lesson.counts().items() if s == "soft")
        )
        assert max(map(abs, losses[name])) < rounding


class SevensTask:
    """A task that reads the answer 7 from every text."""

    version = "1"
    is_free_text = False
    choices: tuple[str, ...] = ()

    def splits(self) -> Splits:
        return Splits.disjoint((), (), ())

    def shots(self) -> Sequence[Example]:
        return ()

    def read_answer(self, text: str, example: Example) -> str:
        return "7"

    def value(self, answer: str) -> str:
        return answer

    def is_same(self, answer: str, reference: str) -> bool:
        return answer == reference


@pytest.mark.parametrize(
    ("case", "shots"),
    [
        ("cues", 0),
        ("conversations", 0),
        *((kind, 2) for kind in ("cues", "reasoning", "named template", "several ends")),
    ],
    indirect=["case"],
)
def test_rationale_and_following_answer_have_targets_at_their_positions(
    shots: int, case: Case, teacher_folder: Path, tmp_path: Path
) -> None:
    prompts, few_shot_prompts = case.prompts, case.with_shots(shots)
    kind = configuration.build(compose("teacher=causal_lm", "teacher.kind.dtype=float32").teacher.kind)
    teacher = kind(
        folder=teacher_folder,
        hashes=tmp_path,
        prompts=few_shot_prompts,
        codec=Dense(),
        task=SevensTask(),
        calibration=Calibration(0, ()),
        max_new_tokens=9,
    )
    teacher.load()
    questions = case.examples(7)
    annotations = teacher.annotate([few_shot_prompts.request(example, "rationale") for example in questions])
    made_lessons = []
    for example, annotation in zip(questions, annotations, strict=True):
        if not annotation.rationale:
            continue
        prompt = few_shot_prompts.rationale_prompt(example, annotation.rationale, "7")
        soft = {span: keep(target.soft) for span, target in annotation.targets.items() if target.soft is not None}
        made_lessons.append(Lesson((TrainingSequence.of(prompt, example.id, (), soft),)))
        assert set(soft) == {"answer", "rationale"}
    assert len(made_lessons) >= 4
    module = student_module(open_whole_student(teacher_folder, torch.float32).eval(), prompts, "kl", "rationale_kl")
    losses = losses_by_position(module, collate(made_lessons, {}, 0, read))
    assert len(losses["kl"]) == sum(len(prompts.answer_ids("7")) for _ in made_lessons)
    assert max(map(abs, losses["kl"] + losses["rationale_kl"])) < 1e-5


def test_evaluation_measures_zero_kl_for_the_teacher_itself(
    prompts: Prompts, teacher_folder: Path, tmp_path: Path
) -> None:
    kind = configuration.build(compose("teacher=causal_lm", "teacher.kind.dtype=float32").teacher.kind)
    settings = {"codec": Dense(), "task": SevensTask(), "calibration": Calibration(0, ()), "max_new_tokens": 6}
    teacher, questions = kind(folder=teacher_folder, hashes=tmp_path, prompts=prompts, **settings), examples(18)
    teacher.load()
    annotations = teacher.annotate([prompts.request(example, "answer") for example in questions])
    annotation_by_id = {example.id: annotation for example, annotation in zip(questions, annotations, strict=True)}
    assert len({len(annotation.targets["answer"].token_ids) for annotation in annotations}) > 1
    evaluation = Evaluation(
        open_whole_student(teacher_folder, torch.float32).eval(), prompts, SevensTask(), "direct", 6
    )
    predictions = evaluation.predict(questions, annotation_by_id)
    assert max(abs(prediction.kl) for prediction in predictions) < 1e-5
    assert [*zip(*(prediction.acceptance for prediction in predictions), strict=True)] == [pytest.approx([1] * 18)] * 2


def test_an_unreadable_teacher_answer_is_wrong_and_agrees_with_nothing(prompts: Prompts, student_folder: Path) -> None:
    questions = [Example("One?", "7"), Example("Two?", "7"), Example("Three?", "7"), Example("Four?", "7")]
    teacher_answers = {questions[0].id: "7", questions[1].id: "8", questions[2].id: None}
    teacher = {id_: Annotation("", {}, answer) for id_, answer in teacher_answers.items()}
    evaluation = Evaluation(
        open_whole_student(student_folder, torch.float32).eval(), prompts, SevensTask(), "direct", 6
    )
    predictions = evaluation.predict(questions, teacher)
    assert [prediction.is_teacher_correct for prediction in predictions] == [True, False, False, None]
    assert [prediction.agrees is None for prediction in predictions] == [False, False, True, True]


def test_an_answer_is_correct_only_if_all_its_tokens_are(prompts: Prompts, student_folder: Path) -> None:
    model = open_whole_student(student_folder, torch.float32).eval()
    module = student_module(model, prompts, "answer")
    batch = collate(lessons(prompts, 12), {}, 0, read)
    is_answer_N = (batch.span_N == SPANS.index("answer")) & batch.is_labelled_N
    with torch.no_grad():
        predicted_N = predicted_ids(module.hidden(batch), module.head())
    answered_rows = batch.sequence_N[is_answer_N].unique().tolist()
    # Labels match all tokens of the first answer, all but the last of the second, none of the others.
    label_N = torch.where(batch.sequence_N == answered_rows[0], predicted_N, predicted_N + 1)
    second = ((batch.sequence_N == answered_rows[1]) & is_answer_N).nonzero().squeeze(-1)
    label_N[second[:-1]] = predicted_N[second[:-1]]
    with torch.no_grad():
        module.validation_step(replace(batch, label_N=label_N.clamp(max=prompts.vocabulary_size - 1)))
    right, number = module._tallies["val/accuracy"]
    assert (float(right), float(number)) == (1, len(answered_rows))
    assert len(second) > 1


def test_validation_means_do_not_depend_on_the_batches(prompts: Prompts, student_folder: Path) -> None:
    module, all_lessons = student_module(open_whole_student(student_folder).eval(), prompts), lessons(prompts, 12)
    means_by_size = []
    for size in (12, 5, 1):
        with torch.no_grad():
            for start in range(0, len(all_lessons), size):
                module.validation_step(collate(all_lessons[start : start + size], {}, 0, read))
        means_by_size.append({name: float(total / number) for name, (total, number) in module._tallies.items()})
        module._tallies = {}
    assert set(means_by_size[0]) == {"val/accuracy", "val/cross_entropy", *(f"val/{name}" for name in objectives())}
    assert all(means == pytest.approx(means_by_size[0], rel=1e-6) for means in means_by_size[1:])
    weighted = sum(objective.weight * means_by_size[0][f"val/{name}"] for name, objective in objectives().items())
    assert weighted == pytest.approx(plain_loss(module.model, all_lessons, prompts.vocabulary_size).item(), rel=1e-5)


def test_students_with_any_losses_have_the_cross_entropy_of_gold_answers(
    prompts: Prompts, student_folder: Path
) -> None:
    batch, tallied = collate(lessons(prompts, 12), {}, 0, read), {}
    for names in (("answer",), ("kl",)):
        module = student_module(open_whole_student(student_folder).eval(), prompts, *names)
        with torch.no_grad():
            module.validation_step(batch)
        tallied[names] = module.validation_means()
    assert tallied["kl",]["val/cross_entropy"] == tallied["answer",]["val/answer"]
    assert "val/answer" not in tallied["kl",]


def test_no_validation_accuracy_of_free_texts(prompts: Prompts, student_folder: Path) -> None:
    module = student_module(open_whole_student(student_folder).eval(), prompts, "answer")
    module._measures_accuracy = False
    with torch.no_grad():
        module.validation_step(collate(lessons(prompts, 12), {}, 0, read))
    assert set(module.validation_means()) == {"val/answer", "val/cross_entropy", "val/loss"}


def test_a_loss_without_validation_positions_is_not_logged(
    prompts: Prompts, student_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = student_module(
        open_whole_student(student_folder, torch.float32).eval(), prompts, "answer", "kl", "rationale"
    )
    logged_values: dict[str, Any] = {}
    monkeypatch.setattr(module, "log_dict", lambda values, **_: logged_values.update(values))
    monkeypatch.setattr(type(module), "trainer", SimpleNamespace(world_size=1))
    plain_answers = [lesson for lesson in lessons(prompts, 12) if lesson.counts()["rationale", "labels"] == 0]
    with torch.no_grad():
        module.validation_step(collate(plain_answers, {}, 0, read))
    module.on_validation_epoch_end()
    assert set(logged_values) == {"val/answer", "val/kl", "val/loss", "val/accuracy", "val/cross_entropy", "step"}
    weighted = {name: objectives()[name].weight * float(logged_values[f"val/{name}"]) for name in ("answer", "kl")}
    assert float(logged_values["val/loss"]) == pytest.approx(sum(weighted.values()))
    assert all(math.isfinite(value) for value in logged_values.values())


@pytest.mark.parametrize("limit", [BatchLimit(1), BatchLimit(3), BatchLimit(60, "tokens")])
def test_evaluation_reads_no_more_at_once_than_allowed(
    limit: BatchLimit, prompts: Prompts, student_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, questions = open_whole_student(student_folder, torch.float32).eval(), examples(11)
    expected = Evaluation(model, prompts, SevensTask(), "direct", 6)
    limited = Evaluation(model, prompts, SevensTask(), "direct", 6, limit)
    sizes: list[int] = []
    original_read = PrefixedReader.read

    def recording_read(reader: PrefixedReader, texts: Sequence[Sequence[int]]) -> Any:
        longest = max(map(len, texts)) + 6
        sizes.append(len(texts) if limit.unit == "examples" or len(texts) == 1 else len(texts) * longest)
        return original_read(reader, texts)

    before = [p.written_answer for p in expected.predict(questions, {})], expected.rationales(questions)
    monkeypatch.setattr(PrefixedReader, "read", recording_read)
    assert ([p.written_answer for p in limited.predict(questions, {})], limited.rationales(questions)) == before
    assert max(sizes) <= limit.size


def test_evaluation_uses_the_current_weights(prompts: Prompts, student_folder: Path) -> None:
    few_shot_prompts = Prompts(prompts.tokenizer, LAYOUT, examples(2), max_length=256, too_long="drop")
    model, questions, task = open_whole_student(student_folder, torch.float32), examples(5), SevensTask()
    task.choices = ("7", "2")
    evaluation = Evaluation(model, few_shot_prompts, task, "direct", 6)
    before = evaluation.predict(questions, {})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.flip(0))
    after = evaluation.predict(questions, {})
    assert after == Evaluation(model, few_shot_prompts, task, "direct", 6).predict(questions, {})
    assert [p.confidence for p in after] != [p.confidence for p in before]


def test_padding_rows_of_the_head_do_not_change_validation_or_evaluation(
    prompts: Prompts, student_folder: Path
) -> None:
    model, questions, ids = (
        open_whole_student(student_folder, torch.float32).eval(),
        examples(5),
        prompts.answer_ids("7"),
    )
    batch, module = collate(lessons(prompts, 12), {}, 0, read), student_module(model, prompts)
    with torch.no_grad():
        batch = replace(batch, label_N=predicted_ids(module.hidden(batch), module.head()))
    log_t_NV = torch.randn(len(ids), prompts.vocabulary_size).log_softmax(-1)
    target = Target(ids, Dense().cut(log_t_NV, torch.zeros(len(ids), dtype=torch.float64)))
    teacher = {example.id: Annotation("", {"answer": target}, "7") for example in questions}

    def measure() -> list[Any]:
        with torch.no_grad():
            module.validation_step(batch)
        tallies = {name: [float(number) for number in tally] for name, tally in module._tallies.items()}
        module._tallies = {}
        evaluation = Evaluation(model, prompts, SevensTask(), "direct", 6)
        return [tallies, evaluation.predict(questions, teacher), evaluation.rationales(questions)]

    before = measure()
    model.lm_head.weight.data[prompts.vocabulary_size :] += 50
    assert measure() == before
    assert before[0]["val/accuracy"] == [8, 8]
    assert all(prediction.kl for prediction in before[1])
