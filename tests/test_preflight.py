"""Preflight: it passes what is sound, finds each bug that is planted here, and leaves no trace."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from conftest import WHOLE_STUDENT, compose, make_model, objectives, student_module, tiny_overrides

from distill.app.machine import free_memory
from distill.lessons.collate import collate
from distill.lessons.curriculum import prepare, teach
from distill.lessons.join import Lesson
from distill.lessons.loader import Arrangement, DistillData
from distill.losses import Objective
from distill.records import Annotation, Batch, Place, SoftTargets
from distill.students.causal_lm import open_student
from distill.training import module as modules
from distill.training.module import StudentModule
from distill.training.preflight import Finding, Plan, _without_trace, preflight, table
from distill.training.preflight.needs import _measured_step, _states_per_weight
from distill.training.preflight.plan import collated

LOSSES = ("answer", "kl", "rationale")


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, student_folder: Path) -> Plan:
    """What the train command would train: the tiny student on what the tiny teacher really left in a cache."""
    root = tmp_path_factory.mktemp("preflight")
    job = prepare(compose(*tiny_overrides(root, teacher_folder, student_folder)), root)
    curriculum = teach(job)
    return Plan(
        module=student_module(open_student(student_folder, **WHOLE_STUDENT), job.prompts, *LOSSES),
        objectives=objectives(*LOSSES),
        lessons=curriculum.train,
        read=curriculum.read,
        annotation=job.source.store.read,
        prompts=job.prompts,
        is_vocabulary_shared=job.is_vocabulary_shared,
        is_from_scratch=False,
        make_optimizer=torch.optim.AdamW,
        batch_size=8,
        microbatch_size=4,
        batch_unit="examples",
        num_steps=100,
        num_devices=1,
        run_dir=root,
        device=torch.device("cpu"),
        precision=nullcontext,
    )


@pytest.fixture
def sound(planned: Plan, student_folder: Path) -> Plan:
    """The plan with a student of the test's own."""
    model = open_student(student_folder, **WHOLE_STUDENT)
    return replace(planned, module=student_module(model, planned.prompts, *LOSSES))


def checked(plan: Plan) -> dict[str, Finding]:
    return {finding.check: finding for finding in preflight(plan)}


def failed(plan: Plan) -> set[str]:
    return {finding.check for finding in preflight(plan) if finding.passed is False}


def taught(plan: Plan, losses: dict[str, Objective]) -> Plan:
    """The plan with other losses."""
    module = StudentModule(
        plan.module.model,
        objectives=losses,
        vocabulary_size=plan.prompts.vocabulary_size,
        retemper=lambda entries, temperature: entries,
        make_optimizer=torch.optim.AdamW,
        make_schedule=lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer),
        seed=0,
    )
    return replace(plan, module=module, objectives=losses)


def test_a_sound_plan_passes_every_check(sound: Plan) -> None:
    findings = preflight(sound)
    assert [finding.check for finding in findings if finding.passed is not True] == []
    assert len(findings) == 17


def test_a_sound_plan_with_shared_prompts_passes_every_check(sound: Plan) -> None:
    lessons = [lesson.branched() for lesson in sound.lessons]
    assert any(lesson.sequences[0].prompt.branches for lesson in lessons)
    assert failed(replace(sound, lessons=lessons)) == set()


def test_a_hidden_state_one_place_too_early_is_found_by_self_kl(sound: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    right = StudentModule.hidden

    def early(self: StudentModule, batch: Batch) -> Any:
        return right(self, replace(batch, before_N=batch.before_N - 1))

    monkeypatch.setattr(StudentModule, "hidden", early)
    found = checked(sound)
    assert found["self-KL"].stops
    assert found["labels"].passed


def test_padded_rows_that_are_not_cut_off_are_found_by_self_kl(sound: Plan) -> None:
    model = sound.module.model
    rows = len(model.get_output_embeddings().weight)
    assert rows > sound.prompts.vocabulary_size
    module = StudentModule(
        model,
        objectives=sound.objectives,
        vocabulary_size=rows,
        retemper=lambda entries, temperature: entries,
        make_optimizer=torch.optim.AdamW,
        make_schedule=lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer),
        seed=0,
    )
    assert checked(replace(sound, module=module))["self-KL"].stops


def test_labels_off_by_one_are_found(sound: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(lessons: Sequence[Lesson], *rest: Any) -> Batch:
        batch = collate(lessons, *rest)
        return replace(batch, before_N=batch.before_N - 1)

    monkeypatch.setattr("distill.training.preflight.plan.collate", late)
    found = checked(sound)
    assert found["labels"].stops
    assert "self-KL" not in found  # nothing is run that cannot work


def sure(plan: Plan, by: int) -> Callable[[Sequence[Place]], SoftTargets]:
    """Soft targets that give nine tenths to a token of the text, `by` places from their own."""

    def read(places: Sequence[Place]) -> SoftTargets:
        targets = [np.roll(plan.annotation(key).targets[span].token_ids, -by) for key, span in places]
        ids_E = np.concatenate(targets).astype(np.int32)
        number = len(ids_E)
        each_N = np.ones(number, np.int32)
        return SoftTargets(ids_E, np.full(number, np.log(0.9), np.float32), np.full(number, 0.1, np.float32), each_N)

    return read


def test_soft_targets_off_by_one_are_found(sound: Plan) -> None:
    assert checked(replace(sound, read=sure(sound, 0)))["shift"].passed
    assert checked(replace(sound, read=sure(sound, 1)))["shift"].stops
    assert checked(replace(sound, read=sure(sound, -1)))["shift"].stops


def test_padding_that_is_seen_is_found(sound: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def on_the_left(lessons: Sequence[Lesson], *rest: Any) -> Batch:
        batch = collate(lessons, *rest)
        pad_B = (1 - batch.mask_BT).sum(1)
        rows = [row.roll(int(pad)) for row, pad in zip(batch.input_ids_BT, pad_B, strict=True)]
        before_N = batch.before_N + pad_B[batch.sequence_N]
        return replace(batch, input_ids_BT=torch.stack(rows), mask_BT=torch.ones_like(batch.mask_BT), before_N=before_N)

    monkeypatch.setattr("distill.training.preflight.plan.collate", on_the_left)
    found = checked(sound)
    assert found["labels"].passed
    assert found["mask"].stops


def test_neighbours_that_are_seen_are_found(sound: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    right = StudentModule.hidden

    def mixed(self: StudentModule, batch: Batch) -> Any:
        hidden_NH = right(self, batch)
        return hidden_NH + hidden_NH.mean(0) / 2

    monkeypatch.setattr(StudentModule, "hidden", mixed)
    found = checked(sound)["mask"]
    assert found.stops
    assert "change 0e+00 by padding" in found.found


def test_branches_that_see_padding_are_found(sound: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_mask(branch_BT: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(len(branch_BT), 1, branch_BT.shape[1], branch_BT.shape[1], dtype=dtype)

    monkeypatch.setattr(modules, "branch_mask", open_mask)
    found = checked(replace(sound, lessons=[lesson.branched() for lesson in sound.lessons]))
    assert found["mask"].stops
    assert found["self-KL"].stops


def test_ids_beyond_the_vocabulary_are_found_before_anything_runs(sound: Plan) -> None:
    def foreign(places: Sequence[Place]) -> SoftTargets:
        soft = sound.read(places)
        return replace(soft, ids_E=soft.ids_E + sound.prompts.vocabulary_size)

    found = checked(replace(sound, read=foreign))
    assert found["vocabulary"].stops
    assert "self-KL" not in found


def test_a_vocabulary_that_is_not_shared_fails_where_soft_targets_are_read(sound: Plan) -> None:
    apart = replace(sound, is_vocabulary_shared=False)
    assert checked(apart)["vocabulary"].stops
    assert checked(taught(apart, objectives("answer", "rationale")))["vocabulary"].passed


def test_a_target_that_is_not_what_the_teacher_read_is_found(sound: Plan) -> None:
    def other(key: str) -> Annotation:
        annotation = sound.annotation(key)
        turned = {
            span: replace(target, token_ids=tuple(reversed(target.token_ids)))
            for span, target in annotation.targets.items()
        }
        return replace(annotation, targets=turned)

    assert checked(replace(sound, annotation=other))["template"].stops


def test_tokens_that_do_not_read_as_the_teachers_text_are_found(sound: Plan) -> None:
    unlabelled = [
        Lesson(lesson.example_id, tuple(replace(s, labelled=frozenset[Any]()) for s in lesson.sequences))
        for lesson in sound.lessons
    ]
    told = {
        key: lesson for lesson in unlabelled for s in lesson.sequences for key, _ in [p.place for p in s.soft.values()]
    }
    texts = {key: sound.prompts.text(sound.annotation(key).targets["answer"].token_ids) for key in told}
    kl = taught(replace(sound, lessons=unlabelled), objectives("kl"))
    same = replace(kl, annotation=lambda key: replace(sound.annotation(key), answer=texts[key]))
    assert checked(same)["template"].passed
    other = replace(kl, annotation=lambda key: replace(sound.annotation(key), answer=texts[key] + "0"))
    assert checked(other)["template"].stops


def test_a_target_behind_another_cue_is_found(sound: Plan) -> None:
    layout = replace(sound.prompts.layout, answer_cue="Result:")
    other = type(sound.prompts)(sound.prompts.tokenizer, layout, (), max_length=256, too_long="drop")
    assert checked(replace(sound, prompts=other))["template"].stops


def test_an_answer_without_its_end_is_found(sound: Plan) -> None:
    def endless(lesson: Lesson) -> Lesson:
        sequences = []
        for sequence in lesson.sequences:
            spans = {name: (start, stop - 1) for name, (start, stop) in sequence.prompt.spans.items()}
            sequences.append(replace(sequence, prompt=replace(sequence.prompt, spans=spans), soft={}))
        return Lesson(lesson.example_id, tuple(sequences))

    labels = taught(sound, objectives("answer", "rationale"))
    assert checked(labels)["end"].passed
    assert checked(replace(labels, lessons=[endless(lesson) for lesson in labels.lessons]))["end"].stops


def test_little_captured_mass_is_a_warning_for_losses_that_read_the_rest(sound: Plan) -> None:
    kept = float(np.mean([1 - sound.read([p.place]).tail_N.mean() for s in _sequences(sound) for p in s.soft.values()]))
    assert kept < 0.5
    found = checked(taught(sound, objectives("reverse_kl")))["captured mass"]
    assert (found.passed, found.is_fatal) == (False, False)
    assert "cache.codec.k" in found.remedy
    assert checked(taught(sound, objectives("kl")))["captured mass"].passed
    nearly = taught(replace(sound, read=sure(sound, 0)), objectives("reverse_kl"))
    assert checked(nearly)["captured mass"].found.startswith("0.900")


def _sequences(plan: Plan) -> list[Any]:
    return [sequence for lesson in plan.lessons for sequence in lesson.sequences]


def test_a_student_worse_than_guessing_is_a_warning(sound: Plan) -> None:
    with torch.no_grad():
        sound.module.model.get_output_embeddings().weight *= 20
    found = checked(sound)["loss at start"]
    assert (found.passed, found.is_fatal) == (False, False)


def test_an_untrained_student_starts_near_the_uniform_loss(sound: Plan) -> None:
    with torch.no_grad():
        sound.module.model.get_output_embeddings().weight.zero_()
    found = checked(replace(sound, is_from_scratch=True))["loss at start"]
    assert found.passed
    assert found.found == "5.77 nats per token; ln V = 5.77"  # ln 320


def test_a_loss_without_gradient_stops_the_run(sound: Plan) -> None:
    sound.module.model.requires_grad_(False)
    assert checked(sound)["gradients"].stops


def test_a_loss_that_does_nothing_beside_another_is_a_warning(sound: Plan) -> None:
    both = objectives("answer", "kl")
    losses = both | {"kl": replace(both["kl"], weight=1e-4)}
    found = checked(taught(sound, losses))["balance"]
    assert (found.passed, found.is_fatal) == (False, False)
    assert "raise loss.kl.weight" in found.remedy


def test_gradient_norms_are_those_of_the_training_loss(sound: Plan) -> None:
    alone = taught(sound, objectives("answer"))
    batch = collated(alone, alone.lessons[:4], alone.prompts.end)
    logits_BTV = alone.module.model(batch.input_ids_BT, attention_mask=batch.mask_BT).logits
    is_used_N = batch.is_labelled_N & (batch.span_N == 0)
    logits_NV = logits_BTV[batch.sequence_N, batch.before_N][is_used_N, : alone.prompts.vocabulary_size]
    torch.nn.functional.cross_entropy(logits_NV, batch.label_N[is_used_N]).backward()
    norm = torch.stack([p.grad.norm() for p in alone.module.parameters()]).norm() * alone.objectives["answer"].weight
    alone.module.zero_grad()
    assert checked(alone)["gradients"].found == f"weighted answer {norm:.3g}"


def test_a_loss_with_nothing_to_read_is_a_warning(sound: Plan) -> None:
    found = checked(taught(sound, objectives("answer", "rationale_kl")))["losses"]
    assert (found.passed, found.is_fatal) == (False, False)
    assert "rationale_kl" in found.found


def test_numbers_that_are_not_finite_stop_the_run(sound: Plan) -> None:
    def broken(places: Sequence[Place]) -> SoftTargets:
        soft = sound.read(places)
        return replace(soft, logprobs_E=np.where(np.arange(len(soft.logprobs_E)) == 0, np.nan, soft.logprobs_E))

    assert checked(replace(sound, read=broken))["finite"].stops
    with torch.no_grad():
        next(sound.module.model.parameters())[3, 5] = torch.nan
    assert checked(sound)["finite"].stops


def test_a_step_that_is_not_finite_stops_the_run(sound: Plan) -> None:
    kl = objectives("kl")
    assert checked(taught(sound, {"kl": replace(kl["kl"], weight=float("inf"))}))["finite step"].stops


class Hoarder(torch.optim.SGD):
    """Keeps a petabyte for a parameter, by its own account."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                self.state[weight]["kept"] = torch.zeros(1).expand(2**48)


def test_more_memory_and_disk_than_there_is_stops_the_run(sound: Plan) -> None:
    assert {"memory", "disk"} <= {f.check for f in preflight(replace(sound, make_optimizer=Hoarder)) if f.stops}


def test_optimizer_states_are_counted(sound: Plan) -> None:
    assert _states_per_weight(sound) == pytest.approx(2, abs=1e-4)  # AdamW: two moments, and a count
    assert _states_per_weight(replace(sound, make_optimizer=torch.optim.SGD)) == 0


def test_activations_grow_with_the_lessons(sound: Plan) -> None:
    weights = sum(p.numel() * p.element_size() for p in sound.module.parameters())
    one, four = (
        _measured_step(sound, collated(sound, [sound.lessons[0]] * number, 1))[0] - weights for number in (1, 4)
    )
    assert four == pytest.approx(4 * one, rel=0.15)
    assert four > 4 * sum(len(s.prompt.ids) for s in sound.lessons[0].sequences) * 32 * 4 * 2  # hidden states, 2 layers


def test_free_memory_is_the_least_that_any_limit_leaves(tmp_path: Path) -> None:
    group = tmp_path / "sys/fs/cgroup/jobs/mine"
    group.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    cpu = torch.device("cpu")
    assert free_memory(cpu, tmp_path) is None
    (tmp_path / "proc/meminfo").write_text("MemTotal:  9000 kB\nMemAvailable:  5000 kB\n")
    assert free_memory(cpu, tmp_path) == 5000 * 1024
    (tmp_path / "proc/self/cgroup").write_text("0::/jobs/mine\n")
    for folder, limit in ((group, "max"), (group.parent, "2000000")):
        (folder / "memory.max").write_text(limit)
        (folder / "memory.current").write_text("900000")
        (folder / "memory.stat").write_text("anon 600000\nfile 300000\n")
    assert free_memory(cpu, tmp_path) == 2000000 - 900000 + 300000
    (group / "memory.max").write_text("1000000")
    assert free_memory(cpu, tmp_path) == 1000000 - 900000 + 300000
    assert free_memory(torch.device("meta"), tmp_path) is None


def trained(sound: Plan, folder: Path, *, is_checked: bool) -> dict[str, torch.Tensor]:
    """Weights of a student with dropout after two steps."""
    lightning.seed_everything(0, verbose=False)
    module = student_module(open_student(folder, **WHOLE_STUDENT), sound.prompts, *LOSSES)
    data = DistillData(
        train=sound.lessons,
        validation=sound.lessons,
        read=sound.read,
        batch_size=4,
        microbatch_size=2,
        batch_unit="examples",
        arrangement=Arrangement(),
        num_steps=2,
        seed=0,
        padding_id=sound.prompts.end,
        num_workers=0,
    )
    module.model.train()
    module.model.model.layers[0].eval()
    modes = [part.training for part in module.modules()]
    states = torch.get_rng_state(), np.random.get_state()[1].tolist()
    if is_checked:
        assert len(preflight(replace(sound, module=module))) == 17
    assert [part.training for part in module.modules()] == modes
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]
    assert all(weight.grad is None and weight.requires_grad for weight in module.parameters())
    module.train()
    trainer = lightning.Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        accumulate_grad_batches=2,
        limit_val_batches=0,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, data)
    return module.model.state_dict()


def test_random_numbers_modes_and_buffers_are_put_back(sound: Plan) -> None:
    def drawn() -> list[Any]:
        return [random.random(), np.random.rand(), torch.rand(()).item()]

    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    expected = drawn()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    model = sound.module.model.train()
    model.register_buffer("count", torch.zeros(2))
    with suppress(KeyError), _without_trace(model, torch.device("cpu")):
        drawn()
        model.eval()
        model.count += 1
        raise KeyError
    assert drawn() == expected
    assert model.training
    assert model.count.tolist() == [0, 0]


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:Trainer was configured with")
def test_training_goes_the_same_way_with_and_without(sound: Plan, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "dropout", seed=3, attention_dropout=0.5)
    without, with_ = (trained(sound, folder, is_checked=is_checked) for is_checked in (False, True))
    assert all(torch.equal(value, with_[name]) for name, value in without.items())


def test_activations_that_are_computed_twice_are_checked_too(sound: Plan, student_folder: Path) -> None:
    model = open_student(student_folder, **WHOLE_STUDENT | {"gradient_checkpointing": True})
    twice = replace(sound, module=student_module(model, sound.prompts, *LOSSES))
    assert failed(twice) == set()
    assert checked(twice)["gradients"].found == checked(sound)["gradients"].found


def test_a_table_fits_a_terminal_and_says_what_to_do_below_a_failure(sound: Plan) -> None:
    findings = [*preflight(sound), Finding("mask", False, "a " * 60, "b " * 40, "do this " * 20, False)]
    lines = table(findings).splitlines()
    assert max(map(len, lines)) <= 110
    at = next(i for i, line in enumerate(lines) if line.startswith("warn"))
    assert any("-> do this" in line for line in lines[at:])
    assert not any("->" in line for line in lines[:at])
