"""A student with a class head: what it learns from the cache, what is saved, and what it refuses."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from distill.errors import CacheError, ConfigError
from distill.evaluation.calibration import Calibration, best_temperature
from distill.evaluation.classes import ClassEvaluation
from distill.lessons.choices import choice_targets
from distill.lessons.collate import collate
from distill.lessons.curriculum import Job, build_curriculum, prepare
from distill.lessons.join import Lesson, PlacedTarget, TrainingSequence
from distill.losses.head import head_loss
from distill.models.batches import BatchLimit
from distill.models.classifiers import class_logits
from distill.prompts.classes import ClassPrompts
from distill.records import Annotation, Example
from distill.students import Changes, classifier
from distill.students.causal_lm import merge_adapters
from distill.students.classifier import divide_logits
from distill.training import temperature
from distill.training.fit import build_training, open_job_student, preflight_input
from distill.training.job import train
from distill.training.preflight import preflight
from tests.conftest import compose, reviews, tiny_overrides
from tests.students.encoders import LABELS, class_prompts, make_body, make_encoder

STEPS = ["trainer.max_steps=4", "batch_size=4", "validate_every=2", "trainer.log_every_n_steps=1"]


@pytest.fixture(scope="module")
def body(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_body(tmp_path_factory.mktemp("body"))


def overrides(root: Path, teacher: Path, student: Path, *more: str) -> list[str]:
    replaced = ("task", "student=causal_lm", "cache")
    tiny = [o for o in tiny_overrides(root, teacher, student) if not o.startswith(replaced)]
    sizes = {"num_labelled": 6, "num_unlabelled": 12, "num_validation": 4, "num_test": 6}
    small = [f"task.examples.{name}={size}" for name, size in sizes.items()]
    return [*reviews(root), *tiny, *small, "student=classifier", "teacher.calibrate=5", *STEPS, *more]


@pytest.fixture
def prepared(tmp_path: Path, teacher_folder: Path, body: Path) -> Callable[..., Job]:
    """Prepare a run of a tiny encoder on a tiny teacher."""
    (tmp_path / "run").mkdir()
    return lambda *more: prepare(compose(*overrides(tmp_path, teacher_folder, body, *more)), tmp_path / "run")


def test_the_soft_target_of_a_class_is_the_choice_distribution_of_the_teacher(prepared: Callable[..., Job]) -> None:
    job = prepared("cache=sampled")
    curriculum = build_curriculum(job)
    examples = {example.id: example for example in job.annotation_job.splits.train}
    store, num_labelled, differing = job.annotation_job.store, 0, 0
    for lesson in curriculum.train:
        (sequence,) = lesson.sequences
        (target,) = sequence.targets
        example = examples[target.example_id]
        record = store.words(target.soft.place[0])
        soft = curriculum.read([target.soft.place])
        assert np.allclose(soft.logprobs_E, record.choice_logprobs, atol=1e-6)
        assert soft.ids_E.tolist() == [0, 1]
        assert float(soft.tail_N[0]) == 0
        learned = job.prompts.label(sequence.ids[target.start : target.stop])
        assert learned == (example.answer or record.answer)
        assert target.is_labelled == (example.answer is not None)
        num_labelled, differing = num_labelled + target.is_labelled, differing + (learned != record.answer)
    assert num_labelled == 6
    assert differing > 0  # gold answers that the teacher did not choose


@pytest.mark.slow
def test_a_run_of_an_encoder_saves_what_transformers_opens_and_answers_alike(
    tmp_path: Path, teacher_folder: Path, body: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = compose(*overrides(tmp_path, teacher_folder, body))
    monkeypatch.setattr("distill.app.config.run_dir", lambda: tmp_path / "run")
    monkeypatch.setattr("distill.app.config.sweep_name", lambda: None)
    train(config)
    folder = tmp_path / "run" / "student"
    rows = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    classify = pipeline("text-classification", model=str(folder), tokenizer=str(folder), device="cpu")
    for row in rows:
        (answer,) = classify([row["question"]])
        assert answer["label"] == row["student_answer"]
        assert answer["score"] == pytest.approx(row["student_confidence"], abs=1e-4)
    result = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]["student"]
    assert result["accuracy"] == np.mean([row["is_correct"] for row in rows])
    assert result["generated_accuracy"] is None
    assert result["kl"] >= 0
    assert AutoTokenizer.from_pretrained(folder).model_max_length == 256


def test_preflight_passes_on_a_classifier_and_fails_on_one_that_reads_its_class(
    prepared: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = prepared()
    training = build_training(job, build_curriculum(job), open_job_student(job), [])
    findings = {finding.check: finding for finding in preflight(preflight_input(job, training))}
    assert [name for name, finding in findings.items() if finding.stops] == []
    assert {"self-KL", "mask", "classes", "unknown tokens", "labels", "gradients"} <= set(findings)

    def seeing(self: Any, model: Any, batch: Any) -> Any:
        last_B = batch.mask_BT.sum(1) - 1
        return classifier.features(model, batch.input_ids_BT, batch.mask_BT, last_B)[batch.sequence_N]

    monkeypatch.setattr(classifier.ClassSeam, "hidden", seeing)
    findings = {finding.check: finding for finding in preflight(preflight_input(job, training))}
    assert findings["self-KL"].stops


def test_new_weights_learn_at_a_higher_rate(prepared: Callable[..., Job]) -> None:
    job = prepared("optim.optimizer.lr=1e-3", "student.kind.head_rate=7.0", "optim.schedule.num_warmup_steps=0")
    training = build_training(job, build_curriculum(job), student := open_job_student(job), [])
    optimizer = training.module.configure_optimizers()["optimizer"]
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    by_name = {name: rates[id(parameter)] for name, parameter in student.named_parameters()}
    new = {name for name in by_name if name.startswith(("classifier", "bert.pooler"))}
    assert [by_name[name] for name in new] == pytest.approx([7e-3] * len(new))
    assert {by_name[name] for name in by_name.keys() - new} == {1e-3}


def test_the_order_of_labels_changes_no_answer(tmp_path: Path, prepared: Callable[..., Job]) -> None:
    folder = make_encoder(tmp_path / "one")
    prompts = class_prompts(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    turned = ClassPrompts(prompts.tokenizer, LABELS[::-1], max_length=128, too_long="drop")
    permuted = AutoModelForSequenceClassification.from_pretrained(folder)
    examples = [Example(f"Sentence {i} of some length.", LABELS[i % 2]) for i in range(20)]
    with torch.no_grad():  # half of the texts are in either class
        logits_BC = class_logits(model.eval(), [prompts.question(e, "answer") for e in examples], prompts.end)
        model.classifier.bias.sub_(logits_BC.median(0).values)
        permuted.classifier.weight.copy_(model.classifier.weight.flip(0))
        permuted.classifier.bias.copy_(model.classifier.bias.flip(0))
    task, pairs = prepared().annotation_job.task, ((model, prompts), (permuted, turned))
    left, right = (ClassEvaluation(m, p, task, BatchLimit(3)).predict(examples, {}) for m, p in pairs)
    assert [p.answer for p in left] == [p.answer for p in right]
    assert len({p.answer for p in left}) == 2
    assert [p.is_correct for p in left] == [p.answer == p.gold for p in left]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (["loss=[answer,rationale]"], r"loss\.rationale is computed on rationales"),
        (["loss=[answer,kl,rationale_kl]"], r"loss\.rationale_kl is computed on rationales"),
        (["task.answer_mode=reasoned", "loss=[answer]"], "a class head writes no reasoning"),
        (["task=arithmetic"], "needs a task whose questions all have the same choices"),
    ],
)
def test_what_a_classifier_cannot_learn_is_refused_in_a_sentence(
    changes: list[str], problem: str, tmp_path: Path, teacher_folder: Path, body: Path
) -> None:
    given = [
        o for o in overrides(tmp_path, teacher_folder, body) if "task" not in o or "task=arithmetic" not in changes
    ]
    with pytest.raises(ConfigError, match=problem):
        prepare(compose(*given, *changes), tmp_path / "run")


def test_losses_of_every_temperature_and_form_accept_class_distributions(prepared: Callable[..., Job]) -> None:
    losses = "loss=[answer,teacher_answer,kl,reverse_kl,jensen_shannon,skew_kl,skew_reverse_kl,total_variation]"
    job = prepared(losses, "loss.kl.temperature=3.0", "cache=sampled")
    curriculum = build_curriculum(job)
    training = build_training(job, curriculum, open_job_student(job), [])
    batch = collate(curriculum.train, Counter({("answer", "soft"): 1}), job.prompts.end, curriculum.read)
    terms = training.module.terms(batch)
    assert set(terms) == set(job.objectives)
    hot = terms["kl"].targets.logprobs_E.reshape(-1, 2)
    cold = terms["reverse_kl"].targets.logprobs_E.reshape(-1, 2)
    assert torch.allclose(hot, (cold / 3).log_softmax(-1), atol=1e-6)


@pytest.mark.parametrize("too_long", ["drop", "cut", "refuse"])
def test_texts_that_are_too_long_are_dropped_cut_or_refused(too_long: Any, body: Path) -> None:
    prompts = class_prompts(body, max_length=6, too_long=too_long)
    long, short = Example("A sentence of many words that goes on and on.", "positive"), Example("No.", "negative")
    assert len(prompts.question(short, "answer")) <= 6
    if too_long == "cut":
        assert prompts.question(long, "answer") == tuple(prompts.tokenizer(long.text).input_ids[:6])
    else:
        with pytest.raises(ConfigError if too_long == "refuse" else ValueError, match="over"):
            prompts.question(long, "answer")


def test_a_text_that_is_dropped_counts_as_wrong(body: Path, prepared: Callable[..., Job]) -> None:
    prompts = class_prompts(body, max_length=6)
    model = AutoModelForSequenceClassification.from_pretrained(body)
    examples = [Example("A sentence of many words that goes on and on.", "positive"), Example("No.", "negative")]
    task = prepared().annotation_job.task
    long, short = ClassEvaluation(model, prompts, task, BatchLimit(3)).predict(examples, {})
    assert (long.answer, long.is_correct) == (None, False)
    assert short.answer in LABELS


def test_adapters_and_the_new_head_are_trained_and_merged_into_a_plain_model(
    prepared: Callable[..., Job], tmp_path: Path
) -> None:
    job = prepared()
    model = job.kind.open(Changes(lora=peft.LoraConfig(r=4, target_modules=["query", "value"])))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or name.startswith(("classifier", "bert.pooler")) for name in trained)
    assert {"classifier.weight", "bert.pooler.dense.weight"} <= trained
    assert any("lora_" in name for name in trained)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    ids = torch.tensor([[5, 6, 7]])
    before = model.eval()(ids).logits
    merge_adapters(model)
    saved = job.kind.save(model, tmp_path / "student", torch.float32)
    assert torch.allclose(saved.model.eval()(ids).logits, before, atol=1e-5)


def test_dropout_acts_in_training_and_the_saved_student_has_that_of_its_source(
    prepared: Callable[..., Job], body: Path, tmp_path: Path
) -> None:
    job, ids = prepared("student.dropout=0.25"), torch.tensor([[5, 6, 7]])
    model = open_job_student(job)
    assert model.config.hidden_dropout_prob == 0.25
    assert not torch.equal(model.train()(ids).logits, model(ids).logits)
    saved = job.kind.save(model.eval(), tmp_path / "student", torch.float32)
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    source = json.loads((body / "config.json").read_text())
    for key in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
        assert config[key] == source[key] == getattr(saved.model.config, key)
    assert not any(module.p == 0.25 for module in saved.model.modules() if isinstance(module, torch.nn.Dropout))


def test_a_teacher_without_scores_of_the_choices_is_refused_for_soft_targets() -> None:
    with pytest.raises(CacheError, match="no scores of the task's choices"):
        choice_targets([Annotation("", {}, "positive")])


def test_a_step_has_the_same_gradient_however_it_is_cut_into_microbatches(prepared: Callable[..., Job]) -> None:
    job = prepared()
    curriculum, model = build_curriculum(job), open_job_student(job).eval()
    module = build_training(job, curriculum, model, []).module
    counts = sum((lesson.counts() for lesson in curriculum.train), Counter[Any]())

    def gradient(size: int) -> torch.Tensor:
        model.zero_grad()
        for start in range(0, len(curriculum.train), size):
            part = curriculum.train[start : start + size]
            batch = collate(part, counts, job.prompts.end, curriculum.read)
            head_loss(module.hidden(batch), module.head(), [*module.terms(batch).values()])[0].backward()
        return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])

    whole = gradient(len(curriculum.train))
    assert whole.norm() > 0
    for size in (1, 5):
        assert (gradient(size) - whole).norm() < 1e-5 * whole.norm()


def test_a_calibrated_classifier_needs_no_further_temperature_and_gives_the_same_answers(
    prepared: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(temperature, "_MIN_LABELS", 4)
    job = prepared()
    model, splits = open_job_student(job), job.annotation_job.splits
    divide_logits(model, 0.02)  # overconfident
    evaluation = ClassEvaluation(model, job.prompts, job.annotation_job.task, BatchLimit(3))
    before = [prediction.answer for prediction in evaluation.predict(splits.train, {})]
    factor = temperature.calibrated(job, evaluation)
    assert factor is not None
    assert factor > 1
    logprobs_NC, label_N = evaluation.labelled(splits.validation)
    assert best_temperature(logprobs_NC, label_N) == pytest.approx(1.0, abs=1e-3) or factor == pytest.approx(
        20, rel=1e-3
    )
    assert [prediction.answer for prediction in evaluation.predict(splits.train, {})] == before
    facts = temperature.calibration_facts(job, evaluation, factor)
    undone = evaluation.labelled(splits.test)[0] * factor
    undone -= np.logaddexp.reduce(undone, axis=1, keepdims=True)
    assert facts["ece_before"] == Calibration.of(undone, evaluation.labelled(splits.test)[1]).ece
    assert facts["temperature"] == factor


def test_too_few_labels_leave_the_probabilities_as_they_are(prepared: Callable[..., Job], capsys: Any) -> None:
    job = prepared()
    model = open_job_student(job)
    weights = model.classifier.weight.clone()
    evaluation = ClassEvaluation(model, job.prompts, job.annotation_job.task, BatchLimit(3))
    assert temperature.calibrated(job, evaluation) is None
    assert torch.equal(model.classifier.weight, weights)
    assert "not calibrated: validation has 4 labels, at least 30 are needed" in capsys.readouterr().err


def test_adapters_of_the_head_are_refused(prepared: Callable[..., Job]) -> None:
    with pytest.raises(ConfigError, match="adapts the head of the classes"):
        prepared().kind.open(Changes(lora=peft.LoraConfig(r=4, target_modules=["query", "classifier"])))


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path, teacher_folder: Path) -> None:
    folder = make_encoder(tmp_path / "small", vocab_size=300)
    (tmp_path / "run").mkdir()
    job = prepare(compose(*overrides(tmp_path, teacher_folder, folder)), tmp_path / "run")
    with pytest.raises(ConfigError, match="has 320 tokens, and the model embeds 300"):
        open_job_student(job)


def test_positions_are_counted_by_the_padding_id_of_the_model(tmp_path: Path, teacher_folder: Path) -> None:
    folder = make_encoder(tmp_path / "roberta", "RoBERTa", pad_token_id=5)  # its tokenizer has no padding token
    (tmp_path / "run").mkdir()
    job = prepare(compose(*overrides(tmp_path, teacher_folder, folder)), tmp_path / "run")
    ids = torch.tensor([[9, 8, 7]])
    own = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert torch.equal(open_job_student(job).eval()(ids).logits, own(ids).logits)


def test_an_end_token_that_is_the_padding_token_is_read_as_the_model_reads_it(tmp_path: Path) -> None:
    folder = make_encoder(tmp_path, "Qwen3")
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    prompts, seam = class_prompts(folder), classifier.ClassSeam(1)
    sequences = [
        TrainingSequence((9, 8, *end, 0), (PlacedTarget("answer", 2 + len(end), 3 + len(end), "a", True),))
        for end in ((1,), (7, 6, 1))
    ]
    batch = collate([Lesson((sequence,)) for sequence in sequences], Counter(), prompts.end, lambda _: None)
    alone = torch.cat([model(torch.tensor([sequence.ids[:-1]])).logits for sequence in sequences])
    with torch.no_grad():
        assert torch.allclose(seam.hidden(model, batch) @ model.score.weight.T, alone, atol=1e-5)
