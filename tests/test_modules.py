"""Laws 2, 3, 5, 6: the student's loss through the real trainer, however a step is cut, padded or shared out.

Run as a script, this file is one process of a training run: `test_modules.py <folder> <overrides>`.
"""

from __future__ import annotations

import contextlib
import csv
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import (
    LAYOUT,
    WHOLE_STUDENT,
    compose,
    conf_names,
    environment,
    examples,
    keep,
    lessons,
    objectives,
    read,
    student_module,
    tiny_overrides,
)
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from distill.app import config as configuration
from distill.cache.codecs.dense import Dense
from distill.evaluation.evaluate import Evaluation
from distill.lessons import loader as data
from distill.lessons.collate import collate
from distill.lessons.curriculum import prepare, teach
from distill.lessons.join import Lesson, TrainingSequence
from distill.losses.head import head_loss, predicted_ids
from distill.prompts.cues import Prompts
from distill.records import SPANS, Annotation, Batch, Example, Splits, Target
from distill.students.causal_lm import open_student
from distill.training import module as modules
from distill.training.fit import arrange, fit
from distill.training.module import NonFiniteLossError, StudentModule

Values = dict[str, Tensor]
BATCH, STEPS, RATE = 8, 2, 0.05


def opened(folder: Path, dtype: torch.dtype = torch.float64) -> Any:
    return open_student(folder, **WHOLE_STUDENT).to(dtype)


def loss_and_gradients(module: StudentModule, batch: Batch, counts: Mapping[Any, int] | None = None) -> Values:
    """The training loss of one microbatch and what it asks of each weight."""
    module.zero_grad()
    terms = module.terms(batch if counts is None else replace(batch, counts=counts))
    total, _ = head_loss(module.hidden(batch), module.head(), list(terms.values()))
    total.backward()
    return {"loss": total.detach()} | {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def assert_same(found: Values, wanted: Values, tolerance: float = 1e-10) -> None:
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        gap = (found[name] - value).abs().max()
        assert gap <= tolerance * max(1.0, value.abs().max()), f"{name} differs by {gap:.3g}"


def counts_of(given: Sequence[Lesson]) -> Counter[Any]:
    return sum((lesson.counts() for lesson in given), Counter())


def plain_divergence(name: str, log_q_B: Tensor, log_t_B: Tensor) -> Tensor:
    """By the textbook, with the settings of conf/loss/."""
    q_B, t_B = log_q_B.exp(), log_t_B.exp()

    def kl(p_B: Tensor, r_B: Tensor) -> Tensor:
        return (p_B * (p_B / r_B).log()).sum()

    half_B = (q_B + t_B) / 2
    found = {
        "kl": kl(t_B, q_B),
        "rationale_kl": kl(t_B, q_B),
        "reverse_kl": kl(q_B, t_B),
        "skew_kl": kl(t_B, 0.1 * t_B + 0.9 * q_B),
        "skew_reverse_kl": kl(q_B, 0.9 * t_B + 0.1 * q_B),
        "jensen_shannon": (kl(t_B, half_B) + kl(q_B, half_B)) / 2,
        "total_variation": (q_B - t_B).abs().sum() / 2,
    }
    return found[name]


def plain_loss(model: Any, given: Sequence[Lesson], vocabulary_size: int) -> Tensor:
    """A second, slow implementation: each sequence by itself, each position by itself, then means per loss."""
    sums: dict[str, Tensor] = {}
    numbers: Counter[str] = Counter()
    for sequence in (s for lesson in given for s in lesson.sequences):
        logits_TV = model(torch.tensor([sequence.prompt.ids])).logits[0, :, :vocabulary_size]
        for name, objective in objectives().items():
            start, stop = sequence.prompt.spans.get(objective.span, (0, 0))
            soft = read([sequence.soft[objective.span].place]) if objective.span in sequence.soft else None
            for row, place in enumerate(range(start, stop)):
                log_q_V = logits_TV[place - 1].log_softmax(-1)
                is_given = {
                    "labels": objective.span in sequence.labelled,
                    "teacher": objective.span not in sequence.labelled,
                }
                if is_given.get(objective.source, False):
                    value = cross_entropy(logits_TV[place - 1], torch.tensor(sequence.prompt.ids[place]))
                elif objective.source == "soft" and soft is not None and row < len(soft):
                    ids, logprobs = list(soft.rows())[row]
                    kept_K = log_q_V[torch.tensor(ids)]
                    log_q_B = torch.cat([kept_K, (1 - kept_K.exp().sum(0, keepdim=True)).log()])
                    tail = torch.tensor([soft.tail_N[row]]).log()
                    log_t_B = torch.cat([torch.tensor(logprobs), tail]).double()
                    value = plain_divergence(name, log_q_B, log_t_B)
                else:
                    continue
                sums[name] = sums.get(name, torch.zeros(())) + value
                numbers[name] += 1
    assert set(sums) == set(objectives())
    return torch.stack([objectives()[name].weight * total / numbers[name] for name, total in sums.items()]).sum()


def test_the_loss_is_a_weighted_sum_of_means_each_over_its_own_positions(
    prompts: Prompts, student_folder: Path
) -> None:
    model, given = opened(student_folder), lessons(prompts, BATCH)
    expected = plain_loss(model, given, prompts.vocabulary_size)
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    wanted = {f"model.{name}": g for (name, _), g in zip(model.named_parameters(), gradients, strict=True)}
    found = loss_and_gradients(student_module(model, prompts), collate(given, counts_of(given), 0, read))
    assert_same(found, {"loss": expected.detach()} | wanted, 1e-7)  # targets are stored in float32


@pytest.mark.parametrize("padding_id", [1, 319])
def test_the_padding_id_changes_nothing(padding_id: int, prompts: Prompts, student_folder: Path) -> None:
    given = lessons(prompts, BATCH)
    module = student_module(opened(student_folder), prompts)
    found = loss_and_gradients(module, collate(given, counts_of(given), padding_id, read))
    assert_same(found, loss_and_gradients(module, collate(given, counts_of(given), 0, read)))


def test_the_padding_side_changes_nothing(prompts: Prompts, student_folder: Path) -> None:
    given = lessons(prompts, BATCH)
    right = collate(given, counts_of(given), 0, read)
    shift_B = right.mask_BT.shape[1] - right.mask_BT.sum(1)
    ids_BT, mask_BT = (
        torch.stack([row.roll(int(by)) for row, by in zip(x, shift_B, strict=True)])
        for x in (right.input_ids_BT, right.mask_BT)
    )
    left = replace(right, input_ids_BT=ids_BT, mask_BT=mask_BT, before_N=right.before_N + shift_B[right.sequence_N])
    module = student_module(opened(student_folder), prompts)
    # Rotary positions are relative, but their angles are computed in float32.
    assert_same(loss_and_gradients(module, left), loss_and_gradients(module, right), 1e-5)


def test_an_example_teaches_the_same_in_whatever_company(prompts: Prompts, student_folder: Path) -> None:
    given = lessons(prompts, BATCH)
    counts, module = counts_of(given), student_module(opened(student_folder), prompts)
    whole = loss_and_gradients(module, collate(given, counts, 0, read))
    for size in (1, 3):
        summed: Values = {}
        for start in range(0, BATCH, size):
            part = loss_and_gradients(module, collate(given[start : start + size], counts, 0, read))
            summed = {name: summed.get(name, 0) + value for name, value in part.items()}
        assert_same(summed, whole)


@pytest.mark.parametrize("change", ["prompt", "unsupervised"])
def test_only_what_stands_before_a_token_is_used_to_predict_it(
    change: str, prompts: Prompts, student_folder: Path
) -> None:
    batch = collate(lessons(prompts, 3), {}, 0, read)
    module = student_module(opened(student_folder), prompts)
    row, place = int(batch.sequence_N[-1]), int(batch.before_N[-1]) - (3 if change == "prompt" else 0)
    changed_BT = batch.input_ids_BT.clone()
    changed_BT[row, place] = 300
    before_NH, after_NH = (module.hidden(b) for b in (batch, replace(batch, input_ids_BT=changed_BT)))
    has_moved_N = (before_NH - after_NH).abs().amax(1) > 1e-9
    assert torch.equal(has_moved_N, (batch.sequence_N == row) & (batch.before_N >= place))
    assert has_moved_N.any()


def test_padded_rows_of_the_students_head_do_not_matter(prompts: Prompts, student_folder: Path) -> None:
    given, model = lessons(prompts, BATCH), opened(student_folder)
    module, batch = student_module(model, prompts), collate(given, counts_of(given), 0, read)
    before = loss_and_gradients(module, batch)
    model.lm_head.weight.data[prompts.vocabulary_size :] += 50
    after = loss_and_gradients(module, batch)
    assert_same(after, before, 0.0)
    assert (after["model.lm_head.weight"][prompts.vocabulary_size :] == 0).all()


SMALL = {"vocab_size": 352, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "head_dim": 8}
PLAIN_IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
GPT2 = {"vocab_size": 352, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 160}
BLOOM = {"vocab_size": 352, "hidden_size": 32, "n_layer": 2, "n_head": 4}
FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, SMALL),
    "qwen2": (Qwen2Config, SMALL),
    "qwen3": (Qwen3Config, SMALL),
    "gemma": (GemmaConfig, SMALL),
    "gemma2": (Gemma2Config, SMALL | {"sliding_window": 128, "query_pre_attn_scalar": 8}),  # has no fused attention
    "gpt2": (GPT2Config, GPT2),
    "short window": (MistralConfig, SMALL | {"sliding_window": 16}),
    "slopes": (BloomConfig, BLOOM),
    "states": (MambaConfig, {"vocab_size": 352, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
}
TWO_SEQUENCES = {"short window", "slopes", "states"}


def of_family(name: str) -> Any:
    """A random model whose attention, and so whose mask, matters."""
    torch.manual_seed(0)
    config, settings = FAMILIES[name]
    model = AutoModelForCausalLM.from_config(config(**settings, **PLAIN_IDS, initializer_range=0.25))
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - TWO_SEQUENCES))
def test_one_sequence_for_both_tasks_teaches_what_two_do(name: str, dtype: torch.dtype, prompts: Prompts) -> None:
    given = lessons(prompts, BATCH)
    branched = [lesson.branched() for lesson in given]
    counts = counts_of(given)
    apart, one = (collate(part, counts, 1, read) for part in (given, branched))
    assert len(one.input_ids_BT) == BATCH < len(apart.input_ids_BT)
    module = student_module(of_family(name).to(dtype), prompts)
    module.model.train()  # some have dropout, under which nothing is alike
    assert module.sees_alike(apart, one)
    assert module.model.training
    module.model.eval()
    found, wanted = loss_and_gradients(module, one), loss_and_gradients(module, apart)
    assert set(found) == set(wanted)
    for key, value in wanted.items():
        # Rotary angles are computed in float32 whatever the model's type.
        assert (found[key] - value).abs().max() <= 1e-4 * value.abs().max(), key


@pytest.mark.parametrize("name", sorted(TWO_SEQUENCES))
def test_a_model_that_cannot_share_a_prompt_is_found_out(name: str, prompts: Prompts) -> None:
    given = lessons(prompts, 15)
    apart, one = (collate(part, {}, 1, read) for part in (given, [lesson.branched() for lesson in given]))
    module = student_module(of_family(name), prompts)
    assert not module.sees_alike(apart, one)
    assert module.sees_alike(apart, apart)


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - TWO_SEQUENCES))
def test_no_branch_sees_another(name: str, prompts: Prompts) -> None:
    (given,) = [lesson.branched() for lesson in lessons(prompts, 3) if len(lesson.sequences) > 1]
    batch, module = collate([given], {}, 1, read), student_module(of_family(name), prompts)
    prompt = given.sequences[0].prompt
    assert batch.branch_BT is not None
    branch_N = batch.branch_BT[0, batch.before_N]
    before_NH = module.hidden(batch)
    for branch, place in enumerate((prompt.branches[0] - 1, *prompt.branches)):
        changed_BT = batch.input_ids_BT.clone()
        changed_BT[0, place] = 300
        after_NH = module.hidden(replace(batch, input_ids_BT=changed_BT))
        has_moved_N = (before_NH != after_NH).any(1)
        assert torch.equal(has_moved_N, torch.ones_like(has_moved_N) if branch == 0 else branch_N == branch)


def divergence_by_position(module: StudentModule, batch: Batch) -> dict[str, list[float]]:
    """Each loss's value at each position that it applies to."""
    with torch.no_grad():
        hidden_NH, head = module.hidden(batch), module.head()
        found = {}
        for name, term in module.terms(replace(batch, counts={})).items():
            used_N, places = torch.arange(len(term.is_used_N)), term.is_used_N.nonzero().ravel().tolist()
            single = [replace(term, is_used_N=used_N == place) for place in places]
            found[name] = [float(head_loss(hidden_NH, head, [t])[1]) for t in single]
    return found


# Not the codecs that draw: their targets are the teacher's on average only, and they refuse reverse KL.
@pytest.mark.parametrize(("cache", "rounding"), [("dense", 1e-5), ("topk", 3e-4)])
def test_a_student_that_is_the_teacher_has_nothing_to_learn_at_any_position(
    cache: str, rounding: float, teacher_folder: Path, tmp_path: Path
) -> None:
    same = tiny_overrides(tmp_path, teacher_folder, teacher_folder)
    same = [o for o in same if "cache" not in o and "num_shots" not in o]
    config = compose(*same, f"cache={cache}", "prompt.num_shots=0", "teacher.calibrate=0", "loss=[kl,reverse_kl]")
    job = prepare(config, tmp_path / "run")
    curriculum = teach(job)
    given = [*curriculum.train, *curriculum.validation]
    batch = collate(given, {}, 0, curriculum.read)
    module = student_module(opened(teacher_folder, torch.float32).eval(), job.prompts, "kl", "reverse_kl")
    found = divergence_by_position(module, batch)
    assert batch.soft is not None
    is_end_N = batch.label_N == job.prompts.end
    assert (is_end_N & batch.is_soft_N).sum() == len(given)
    for name in ("kl", "reverse_kl"):
        assert (
            len(found[name])
            == batch.is_soft_N.sum()
            == sum(c for lesson in given for (_, s), c in lesson.counts().items() if s == "soft")
        )
        assert max(map(abs, found[name])) < rounding


class Sevens:
    """A task in which every text holds the answer 7."""

    version = "1"
    choices: tuple[str, ...] = ()

    def splits(self) -> Splits:
        return Splits.disjoint((), (), ())

    def shots(self) -> Sequence[Example]:
        return ()

    def read_answer(self, text: str) -> str:
        return "7"

    def value(self, answer: str) -> str:
        return answer


@pytest.mark.parametrize("shots", [0, 2])
def test_reasoning_and_the_answer_after_it_have_targets_at_their_own_positions(
    shots: int, prompts: Prompts, teacher_folder: Path
) -> None:
    shown = Prompts(prompts.tokenizer, LAYOUT, examples(shots), max_length=256, too_long="drop")
    kind = configuration.build(compose("teacher=causal_lm", "teacher.kind.dtype=float32").teacher.kind)
    teacher = kind(folder=teacher_folder, prompts=shown, codec=Dense(), task=Sevens(), calibration=(), max_new_tokens=9)
    teacher.load()
    asked = examples(7)
    made = teacher.annotate([shown.request(example, "rationale") for example in asked])
    given = []
    for example, annotation in zip(asked, made, strict=True):
        if not annotation.rationale:
            continue
        prompt = shown.rationale_prompt(example, annotation.rationale, "7")
        soft = {span: keep(target.soft) for span, target in annotation.targets.items() if target.soft is not None}
        given.append(Lesson(example.id, (TrainingSequence(prompt, frozenset(), soft),)))
        assert set(soft) == {"answer", "rationale"}
    assert len(given) >= 4
    module = student_module(opened(teacher_folder, torch.float32).eval(), prompts, "kl", "rationale_kl")
    found = divergence_by_position(module, collate(given, {}, 0, read))
    assert len(found["kl"]) == sum(len(prompts.answer_ids("7")) for _ in given)
    assert max(map(abs, found["kl"] + found["rationale_kl"])) < 1e-5


def test_a_model_that_is_the_teacher_is_measured_to_be_no_distance_from_it(
    prompts: Prompts, teacher_folder: Path
) -> None:
    kind = configuration.build(compose("teacher=causal_lm", "teacher.kind.dtype=float32").teacher.kind)
    settings = {"codec": Dense(), "task": Sevens(), "calibration": (), "max_new_tokens": 6}
    teacher, given = kind(folder=teacher_folder, prompts=prompts, **settings), examples(18)
    teacher.load()
    made = teacher.annotate([prompts.request(example, "answer") for example in given])
    left = {example.id: annotation for example, annotation in zip(given, made, strict=True)}
    assert len({len(annotation.targets["answer"].token_ids) for annotation in made}) > 1
    evaluation = Evaluation(opened(teacher_folder, torch.float32).eval(), prompts, Sevens(), "direct", 6)
    assert max(abs(prediction.kl) for prediction in evaluation.predict(given, left)) < 1e-5


def test_a_teachers_answer_that_cannot_be_read_is_wrong_and_agrees_with_nothing(
    prompts: Prompts, student_folder: Path
) -> None:
    given = [Example("One?", "7"), Example("Two?", "7"), Example("Three?", "7"), Example("Four?", "7")]
    said = {given[0].id: "7", given[1].id: "8", given[2].id: None}
    teacher = {id_: Annotation("", {}, answer) for id_, answer in said.items()}
    evaluation = Evaluation(opened(student_folder, torch.float32).eval(), prompts, Sevens(), "direct", 6)
    found = evaluation.predict(given, teacher)
    assert [prediction.is_teacher_correct for prediction in found] == [True, False, False, None]
    assert [prediction.agrees is None for prediction in found] == [False, False, True, True]


def test_an_answer_counts_as_right_only_where_all_its_tokens_are(prompts: Prompts, student_folder: Path) -> None:
    model = opened(student_folder, torch.float32).eval()
    module = student_module(model, prompts, "answer")
    batch = collate(lessons(prompts, 12), {}, 0, read)
    is_answer_N = (batch.span_N == SPANS.index("answer")) & batch.is_labelled_N
    with torch.no_grad():
        likeliest_N = predicted_ids(module.hidden(batch), module.head())
    answered = batch.sequence_N[is_answer_N].unique().tolist()
    # All tokens of the first answer are made right, of the second but the last, of the others none.
    label_N = torch.where(batch.sequence_N == answered[0], likeliest_N, likeliest_N + 1)
    second = ((batch.sequence_N == answered[1]) & is_answer_N).nonzero().squeeze(-1)
    label_N[second[:-1]] = likeliest_N[second[:-1]]
    with torch.no_grad():
        module.validation_step(replace(batch, label_N=label_N.clamp(max=prompts.vocabulary_size - 1)))
    right, number = module._tallies["val/accuracy"]
    assert (float(right), float(number)) == (1, len(answered))
    assert len(second) > 1


def test_validation_has_the_same_means_however_it_is_cut(prompts: Prompts, student_folder: Path) -> None:
    module, given = student_module(opened(student_folder).eval(), prompts), lessons(prompts, 12)
    found = []
    for size in (12, 5, 1):
        with torch.no_grad():
            for start in range(0, len(given), size):
                module.validation_step(collate(given[start : start + size], {}, 0, read))
        found.append({name: float(total / number) for name, (total, number) in module._tallies.items()})
        module._tallies = {}
    assert set(found[0]) == {"val/accuracy", *(f"val/{name}" for name in objectives())}
    assert all(means == pytest.approx(found[0], rel=1e-6) for means in found[1:])
    weighted = sum(objective.weight * found[0][f"val/{name}"] for name, objective in objectives().items())
    assert weighted == pytest.approx(plain_loss(module.model, given, prompts.vocabulary_size).item(), rel=1e-5)


def test_a_loss_that_no_validation_example_has_is_not_logged(
    prompts: Prompts, student_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = student_module(opened(student_folder, torch.float32).eval(), prompts, "answer", "kl", "rationale")
    logged_: dict[str, Any] = {}
    monkeypatch.setattr(module, "log_dict", lambda values, **_: logged_.update(values))
    monkeypatch.setattr(type(module), "trainer", SimpleNamespace(world_size=1))
    plain_answers = [lesson for lesson in lessons(prompts, 12) if lesson.counts()["rationale", "labels"] == 0]
    with torch.no_grad():
        module.validation_step(collate(plain_answers, {}, 0, read))
    module.on_validation_epoch_end()
    assert set(logged_) == {"val/answer", "val/kl", "val/accuracy", "step"}
    assert all(math.isfinite(value) for value in logged_.values())


def test_evaluation_sees_what_a_model_has_learned_meanwhile(prompts: Prompts, student_folder: Path) -> None:
    shown = Prompts(prompts.tokenizer, LAYOUT, examples(2), max_length=256, too_long="drop")
    model, asked, task = opened(student_folder, torch.float32), examples(5), Sevens()
    task.choices = ("7", "2")
    evaluation = Evaluation(model, shown, task, "direct", 6)
    before = evaluation.predict(asked, {})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.flip(0))
    after = evaluation.predict(asked, {})
    assert after == Evaluation(model, shown, task, "direct", 6).predict(asked, {})
    assert [p.choice_probabilities for p in after] != [p.choice_probabilities for p in before]


def test_padded_rows_do_not_matter_in_validation_and_evaluation(prompts: Prompts, student_folder: Path) -> None:
    model, asked, ids = opened(student_folder, torch.float32).eval(), examples(5), prompts.answer_ids("7")
    batch, module = collate(lessons(prompts, 12), {}, 0, read), student_module(model, prompts)
    with torch.no_grad():
        batch = replace(batch, label_N=predicted_ids(module.hidden(batch), module.head()))
    log_t_NV = torch.randn(len(ids), prompts.vocabulary_size).log_softmax(-1)
    target = Target(ids, Dense().cut(log_t_NV, torch.zeros(len(ids), dtype=torch.float64)))
    teacher = {example.id: Annotation("", {"answer": target}, "7") for example in asked}

    def measured() -> list[Any]:
        with torch.no_grad():
            module.validation_step(batch)
        tallies = {name: [float(number) for number in tally] for name, tally in module._tallies.items()}
        module._tallies = {}
        evaluation = Evaluation(model, prompts, Sevens(), "direct", 6)
        return [tallies, evaluation.predict(asked, teacher), evaluation.rationales(asked)]

    before = measured()
    model.lm_head.weight.data[prompts.vocabulary_size :] += 50
    assert measured() == before
    assert before[0]["val/accuracy"] == [8, 8]
    assert all(prediction.kl for prediction in before[1])


def trained(config: DictConfig, folder: Path, *, codec: Any = None) -> Values:
    """Fit the student that `config` names on uneven lessons, in float64; return its weights."""
    OmegaConf.update(
        config, "optim.optimizer", {"_target_": "torch.optim.SGD", "_partial_": True, "lr": RATE}, merge=False
    )
    job = prepare(config, folder)
    train, validation = (lessons(job.prompts, number, codec=codec) for number in (11, 4))
    curriculum = replace(teach(job), train=train, validation=validation, read=read)
    student = opened(job.student_folder)
    fit(job, arrange(job, curriculum, student, []))
    return {name: value.detach().clone() for name, value in student.state_dict().items()}


def logged(folder: Path) -> list[dict[str, float]]:
    """What was logged in each step, in order."""
    rows = csv.DictReader((folder / "metrics.csv").read_text().splitlines())
    return [{k: float(v) for k, v in row.items() if v and k.startswith(("train/", "val/"))} for row in rows]


ALL_LOSSES = f"loss=[{','.join(conf_names('loss'))}]"
CUT = [ALL_LOSSES, f"batch_size={BATCH}", f"trainer.max_steps={STEPS}", "trainer.gradient_clip_val=null"]
CUT += [
    "trainer.log_every_n_steps=1",
    f"validate_every={STEPS}",
    "teacher.num_rationales=0",
    "num_samples=0",
    "optim.schedule.num_warmup_steps=0",
]


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, student_folder: Path) -> tuple[Path, Values]:
    """A folder with a filled cache, and the weights after training with one microbatch per step."""
    root = tmp_path_factory.mktemp("root")
    config = compose(*tiny_overrides(root, teacher_folder, student_folder), *CUT, f"microbatch_size={BATCH}")
    return root, trained(config, root / "uncut")


@pytest.mark.parametrize("microbatch_size", [4, 3, 1])
def test_microbatches_make_the_same_student(
    microbatch_size: int, uncut: tuple[Path, Values], teacher_folder: Path, student_folder: Path
) -> None:
    root, weights = uncut
    config = compose(*tiny_overrides(root, teacher_folder, student_folder), *CUT, f"microbatch_size={microbatch_size}")
    folder = root / f"cut-{microbatch_size}"
    assert_same(trained(config, folder), weights)
    assert any((weights[n] - v).abs().max() > 1e-3 for n, v in opened(student_folder).state_dict().items())
    for found, wanted in zip(logged(folder), logged(root / "uncut"), strict=True):
        assert found == pytest.approx(wanted, rel=1e-5)


def test_one_step_is_plain_gradient_descent_on_the_plain_loss(
    uncut: tuple[Path, Values], teacher_folder: Path, student_folder: Path, prompts: Prompts
) -> None:
    root, _ = uncut
    overrides = [
        *tiny_overrides(root, teacher_folder, student_folder),
        *CUT,
        "trainer.max_steps=1",
        "batch_size=11",
        "microbatch_size=2",
    ]
    after = trained(compose(*overrides), root / "one-step")
    given = lessons(prepare(compose(*overrides), root).prompts, 11)
    model = opened(student_folder)
    loss = plain_loss(model, given, prompts.vocabulary_size)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    wanted = {n: (p - RATE * g).detach() for (n, p), g in zip(model.named_parameters(), gradients, strict=True)}
    assert_same(after, wanted, 1e-7)


def test_a_shared_prompt_makes_the_same_student(
    uncut: tuple[Path, Values],
    teacher_folder: Path,
    student_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root, weights = uncut
    rows: list[int] = []
    collated = data.collate
    monkeypatch.setattr(data, "collate", lambda *a: rows.append(len((b := collated(*a)).input_ids_BT)) or b)
    overrides = [*tiny_overrides(root, teacher_folder, student_folder), *CUT, f"microbatch_size={BATCH}"]
    assert_same(trained(compose(*overrides), root / "shared"), weights)
    assert max(rows) == BATCH
    # A Llama's norms and angles are in float32 also where its weights are in float64.
    assert_same(trained(compose(*overrides, "share_prompt=false"), root / "apart"), weights, 1e-7)
    assert max(rows) > BATCH
    monkeypatch.setattr(modules, "branch_mask", lambda *_: None)  # as a model that looks at no mask
    rows.clear()
    assert_same(trained(compose(*overrides), root / "refused"), weights, 1e-7)
    assert max(rows) > BATCH
    assert "a sequence of its own" in capsys.readouterr().err


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_a_temperature_divides_both_sides_and_its_square_is_in_the_step_but_not_in_the_log(
    temperature: float, tmp_path: Path, teacher_folder: Path, student_folder: Path
) -> None:
    tiny = [o for o in (*tiny_overrides(tmp_path, teacher_folder, student_folder), *CUT) if "cache" not in o]
    tiny = [o for o in tiny if not o.startswith("loss")] + [
        "cache=dense",
        "trainer.max_steps=1",
        "batch_size=11",
        "microbatch_size=3",
    ]
    config = compose(*tiny, "loss=[kl]", f"loss.kl.temperature={temperature}")
    after = trained(config, tmp_path / "run", codec=Dense())
    prompts = prepare(config, tmp_path).prompts
    given = lessons(prompts, 11, codec=Dense())
    batch, model = collate(given, {}, 0, read), opened(student_folder)
    is_used_N = batch.is_soft_N & (batch.span_N == SPANS.index("answer"))
    logits_BTV = model(batch.input_ids_BT, attention_mask=batch.mask_BT).logits[..., : prompts.vocabulary_size]
    logits_NV = logits_BTV[batch.sequence_N, batch.before_N][is_used_N]
    assert batch.soft is not None
    log_t_NV = batch.soft.logprobs_E.double().view(-1, prompts.vocabulary_size)[is_used_N[batch.is_soft_N]]
    both_NV = ((x_NV / temperature).log_softmax(-1) for x_NV in (logits_NV, log_t_NV))
    mean = kl_div(*both_NV, log_target=True, reduction="sum") / is_used_N.sum()
    gradients = torch.autograd.grad(temperature**2 * mean, list(model.parameters()))
    wanted = {n: (p - RATE * g).detach() for (n, p), g in zip(model.named_parameters(), gradients, strict=True)}
    assert_same(after, wanted, 1e-7)
    assert logged(tmp_path / "run")[0]["train/kl"] == pytest.approx(mean.item(), rel=1e-5)


def run_together(command: list[str], seconds: float) -> None:
    """Run a command that starts processes of its own; none of them outlives the time limit."""
    with tempfile.TemporaryFile("w+") as told:
        started = subprocess.Popen(command, env=environment(), stdout=told, stderr=told, start_new_session=True)
        try:
            code: int | str = started.wait(seconds)
        except subprocess.TimeoutExpired:
            code = f"none after {seconds} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)
            started.wait()
        told.seek(0)
        assert code == 0, f"exit code {code}\n{told.read()[-3000:]}"


@pytest.mark.slow
def test_two_processes_make_the_same_student_as_one(
    uncut: tuple[Path, Values], teacher_folder: Path, student_folder: Path
) -> None:
    root, weights = uncut
    folder = root / "processes"
    overrides = [*tiny_overrides(root, teacher_folder, student_folder), *CUT, "microbatch_size=2"]
    overrides += ["trainer.devices=2", "trainer.strategy=ddp"]
    run_together([sys.executable, __file__, str(folder), *overrides], seconds=60)
    assert_same(load_file(folder / "weights.safetensors"), weights)
    for found, wanted in zip(logged(folder), logged(root / "uncut"), strict=True):
        assert found == pytest.approx(wanted, rel=1e-5)


def test_a_loss_that_is_not_finite_stops_before_the_optimizer_moves(
    uncut: tuple[Path, Values], teacher_folder: Path, student_folder: Path
) -> None:
    root, _ = uncut
    config = compose(*tiny_overrides(root, teacher_folder, student_folder), *CUT)
    job = prepare(config, root / "broken")
    student = opened(student_folder)
    student.lm_head.weight.data[5, 0] = torch.nan
    before = {name: value.clone() for name, value in student.state_dict().items()}
    curriculum = replace(teach(job), train=lessons(job.prompts, BATCH), validation=[], read=read)
    with pytest.raises(NonFiniteLossError) as raised:
        fit(job, arrange(job, curriculum, student, []))
    assert all(lesson.example_id in str(raised.value) for lesson in curriculum.train)
    assert all(torch.equal(value, before[name]) or "lm_head" in name for name, value in student.state_dict().items())


def test_the_averaged_student_is_the_average_of_its_steps(
    uncut: tuple[Path, Values], teacher_folder: Path, student_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, _ = uncut
    passed: list[Values] = []
    finish = StudentModule.on_train_batch_end

    def noted(module: StudentModule, *arguments: Any) -> None:
        passed.append({name: value.clone() for name, value in module.model.state_dict().items()})
        finish(module, *arguments)

    monkeypatch.setattr(StudentModule, "on_train_batch_end", noted)
    steps = ["trainer.max_steps=4", "validate_every=2", "callback=[ema]", "callback.ema.decay=0.75"]
    overrides = [*tiny_overrides(root, teacher_folder, student_folder), *CUT, *steps]
    found = trained(compose(*overrides, "callback.ema.update_starting_at_step=1"), root / "averaged")
    assert len(passed) == 4
    for name, value in found.items():
        first, second, third = (weights[name] for weights in passed[1:])
        assert torch.allclose(value, 0.75 * (0.75 * first + 0.25 * second) + 0.25 * third, rtol=0, atol=1e-12)
    assert any((found[name] - value).abs().max() > 1e-4 for name, value in passed[-1].items())


def test_training_stops_where_validation_no_longer_gains(
    uncut: tuple[Path, Values], teacher_folder: Path, student_folder: Path
) -> None:
    root, _ = uncut
    still = [
        "trainer.max_steps=9",
        "validate_every=1",
        "callback=[early_stopping]",
        "callback.early_stopping.patience=2",
    ]
    for delta, steps in ((100.0, 3), (0.0, 9)):
        more = [*still, f"callback.early_stopping.min_delta={delta}", "loss=[answer]"]
        folder = root / f"stopped-{delta}"
        trained(compose(*tiny_overrides(root, teacher_folder, student_folder), *CUT[1:], *more), folder)
        assert sum("val/answer" in row for row in logged(folder)) == steps


@pytest.mark.parametrize("every", [1, 3])
def test_losses_are_logged_every_so_many_steps(
    every: int, uncut: tuple[Path, Values], teacher_folder: Path, student_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, _ = uncut
    calls: list[Any] = []
    log = StudentModule.log_dict
    monkeypatch.setattr(StudentModule, "log_dict", lambda *a, **k: calls.append(a[1]) or log(*a, **k))
    overrides = [*tiny_overrides(root, teacher_folder, student_folder), *CUT, "trainer.max_steps=6", "validate_every=6"]
    trained(compose(*overrides, f"trainer.log_every_n_steps={every}"), root / f"logged-{every}")
    assert sum("train/answer" in values for values in calls) == 6 // every
    assert sum("train/answer" in row for row in logged(root / f"logged-{every}")) == 6 // every


if __name__ == "__main__":
    weights = trained(compose(*sys.argv[2:]), Path(sys.argv[1]))
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        save_file(weights, Path(sys.argv[1]) / "weights.safetensors")
