"""Causal language model students: cut, frozen, initialized from scratch, adapted, saved."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from distill.app import config as configuration
from distill.errors import ConfigError
from distill.lessons.collate import collate
from distill.lessons.curriculum import build_curriculum, prepare
from distill.losses.head import head_loss
from distill.models.reading import PrefixedReader
from distill.prompts.rendering import Prompts
from distill.students.causal_lm import compiled, merge_adapters, open_student, weights_hash
from distill.students.saving import save_student, size_bytes
from distill.training.fit import build_training, fit
from tests.conftest import WHOLE_STUDENT, compose, lessons, make_model, read, student_module

IDS = torch.tensor([[5, 60, 70, 80, 90, 1]])


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def lora_settings(**changes: Any) -> dict[str, Any]:
    """Settings of a student with the adapters of conf/student/smollm2_lora.yaml."""
    node = compose("student=smollm2_lora").student.lora
    return WHOLE_STUDENT | {"lora": configuration.build(node, **changes)}


def adapted(folder: Path, **changes: Any) -> Any:
    """A student with adapters whose weights are not their initial ones."""
    model = open_student(folder, **lora_settings(**changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def gradients(model: torch.nn.Module, prompts: Prompts) -> dict[str, Tensor]:
    """Loss and gradients of a training step, by parameter name."""
    module, batch = student_module(model.train(), prompts), collate(lessons(prompts, 6), {}, 0, read)
    module.zero_grad()
    loss, _ = head_loss(module.hidden(batch), module.head(), list(module.terms(batch).values()))
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return grads | {"loss": loss.detach()}


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert set(actual) == set(expected)
    for name, value in expected.items():
        assert (actual[name] - value).abs().max() <= tolerance * max(1.0, value.abs().max()), name


@pytest.mark.parametrize("keep", [[0], [0, 2], [2, 0], [0, 1, 2]])
def test_kept_layers_are_those_of_the_model_in_the_configured_order(keep: list[int], teacher_folder: Path) -> None:
    whole, cut = (open_student(teacher_folder, **WHOLE_STUDENT | {"keep_layers": k}) for k in (None, keep))
    assert cut.config.num_hidden_layers == len(cut.model.layers) == len(keep)
    for layer, index in zip(cut.model.layers, keep, strict=True):
        assert all(
            torch.equal(value, whole.model.layers[index].state_dict()[name])
            for name, value in layer.state_dict().items()
        )
    hidden_BTH = whole.model.embed_tokens(IDS)
    angles = whole.model.rotary_emb(hidden_BTH, torch.arange(IDS.shape[1]).unsqueeze(0))
    mask_TT = torch.full((IDS.shape[1],) * 2, -torch.inf).triu(1)[None, None]
    for index in keep:
        layer = whole.eval().model.layers[index]
        out = layer(hidden_BTH, attention_mask=mask_TT, position_embeddings=angles)
        hidden_BTH = out[0] if isinstance(out, tuple) else out
    assert torch.allclose(logits(cut), whole.lm_head(whole.model.norm(hidden_BTH)), atol=1e-4)


@pytest.mark.parametrize("keep", [[0, 2], [1]])
def test_a_cut_student_generates_equally_with_and_without_a_cache(keep: list[int], teacher_folder: Path) -> None:
    cut = open_student(teacher_folder, **WHOLE_STUDENT | {"keep_layers": keep}).eval()
    written = [cut.generate(IDS, max_new_tokens=5, do_sample=False, use_cache=c, pad_token_id=1) for c in (True, False)]
    assert torch.equal(*written)


@pytest.mark.parametrize("keep", [[], [3], [-1], [0, 7]])
def test_missing_layers_are_refused(keep: list[int], teacher_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"the model has layers 0 to 2"):
        open_student(teacher_folder, **WHOLE_STUDENT | {"keep_layers": keep})


def test_only_named_parameters_are_frozen_and_unknown_names_are_refused(student_folder: Path) -> None:
    student = open_student(student_folder, **WHOLE_STUDENT | {"freeze": ["embed_tokens", "layers.0."]})
    for name, parameter in student.named_parameters():
        assert parameter.requires_grad == ("embed_tokens" not in name and "layers.0." not in name)
    with pytest.raises(ConfigError, match="no parameter's name contains"):
        open_student(student_folder, **WHOLE_STUDENT | {"freeze": ["embedings"]})


def test_a_student_from_scratch_has_equal_shapes_and_different_weights(student_folder: Path) -> None:
    old, new = (open_student(student_folder, **WHOLE_STUDENT | {"from_scratch": s}) for s in (False, True))
    assert {n: p.shape for n, p in old.named_parameters()} == {n: p.shape for n, p in new.named_parameters()}
    assert weights_hash(old) == weights_hash(open_student(student_folder, **WHOLE_STUDENT)) != weights_hash(new)


@pytest.mark.parametrize("keep", [None, [1]])
def test_a_saved_student_loads_in_transformers_with_the_same_logits(
    keep: list[int] | None, student_folder: Path, prompts: Prompts, tmp_path: Path
) -> None:
    student = open_student(student_folder, **WHOLE_STUDENT | {"keep_layers": keep})
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.01)
    for _ in range(2):  # the second time replaces the first
        save_student(student, prompts.tokenizer, tmp_path / "student", dtype=torch.float32, max_new_tokens=9)
    assert [path.name for path in tmp_path.iterdir()] == ["student"]
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32)
    assert torch.equal(logits(opened), logits(student))
    assert weights_hash(opened) == weights_hash(student)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "student")
    assert tokenizer.get_vocab() == prompts.tokenizer.get_vocab()
    assert tokenizer("Two and two.").input_ids == prompts.tokenizer("Two and two.").input_ids
    assert size_bytes(tmp_path / "student") == pytest.approx(4 * sum(p.numel() for p in student.parameters()), rel=0.1)
    assert not [path for path in (tmp_path / "student").iterdir() if path.suffix in (".bin", ".pt", ".pkl")]


@pytest.mark.parametrize("is_tied", [False, True])
def test_only_adapters_train_and_they_start_as_zero(is_tied: bool, prompts: Prompts, tmp_path: Path) -> None:
    folder = make_model(tmp_path, seed=3, tie_word_embeddings=is_tied)
    plain, model = open_student(folder, **WHOLE_STUDENT), open_student(folder, **lora_settings())
    assert torch.equal(logits(model), logits(plain))
    assert model.base_model is model.model
    body = {n for n, m in plain.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    expected = {f"{name}.lora_{part}.default.weight" for name in body for part in "AB"}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == expected
    assert set(gradients(model, prompts)) == expected | {"loss"}
    assert model.get_output_embeddings().weight.grad is None


def test_adapters_are_initialized_by_the_seed(student_folder: Path) -> None:
    hashes = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        hashes.append(weights_hash(open_student(student_folder, **lora_settings())))
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_merged_student_is_a_standard_model_with_the_same_logits(
    is_tied: bool, prompts: Prompts, tmp_path: Path
) -> None:
    folder = make_model(tmp_path / "start", seed=3, tie_word_embeddings=is_tied)
    model, start = adapted(folder), open_student(folder, **WHOLE_STUDENT)
    learned = {name: value.clone() for name, value in model.state_dict().items()}
    before = logits(model)
    assert (before - logits(start)).abs().max() > 0.1
    for _ in range(2):  # the second time there is nothing to merge
        merge_adapters(model)
    save_student(model, prompts.tokenizer, tmp_path / "student", dtype=torch.float32, max_new_tokens=9)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32)
    assert torch.equal(logits(opened), logits(model))
    assert torch.allclose(logits(opened), before, atol=1e-5)
    assert set(model.state_dict()) == set(opened.state_dict()) == set(start.state_dict())
    assert not list((tmp_path / "student").glob("adapter*"))
    for name, value in opened.state_dict().items():
        layer, base = name.removesuffix(".weight"), start.state_dict()[name]
        if f"{layer}.lora_A.default.weight" in learned:
            a, b = (learned[f"{layer}.lora_{part}.default.weight"] for part in "AB")
            base = base + 32 / 16 * b @ a  # alpha / rank
        assert torch.allclose(value, base, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ["embed_tokens", "q_proj"]},  # the untied head does not use it
        {"target_modules": ["v_proj"], "use_dora": True},
        {"target_modules": ["v_proj"], "use_rslora": True},
    ],
)
def test_other_kinds_of_adapters_are_merged(changes: dict[str, Any], student_folder: Path) -> None:
    model = adapted(student_folder, **changes)
    before = logits(model)
    assert (before - logits(open_student(student_folder, **WHOLE_STUDENT))).abs().max() > 0.1
    merge_adapters(model)
    assert not any("lora" in name for name in model.state_dict())
    assert torch.allclose(logits(model), before, atol=1e-5)


def test_nested_adapters_of_experts_are_merged(tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    experts = ["experts.gate_up_proj", "experts.down_proj"]
    model = adapted(tmp_path, target_modules=["q_proj"], target_parameters=experts)
    before, names = logits(model), open_student(tmp_path, **WHOLE_STUDENT).state_dict().keys()
    merge_adapters(model)
    assert model.state_dict().keys() == names
    assert torch.allclose(logits(model), before, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize(
    ("is_tied", "changes", "message"),
    [
        (False, {"target_modules": ["lm_head", "q_proj"]}, "exclude_modules"),
        (True, {"target_modules": ["lm_head", "q_proj"]}, "exclude_modules"),
        (True, {"target_modules": ["embed_tokens", "q_proj"]}, "exclude_modules"),
        (False, {"target_modules": ["q_prog"]}, "q_prog"),
        (False, {"r": 0}, "r"),
        (False, {"modules_to_save": ["norm"]}, "cannot be merged"),
        (False, {"layer_replication": [(0, 2), (1, 2)]}, "cannot be merged"),
    ],
)
def test_adapters_that_the_loss_or_the_saved_folder_would_ignore_are_refused(
    is_tied: bool, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = make_model(tmp_path, seed=3, tie_word_embeddings=is_tied)
    with pytest.raises(ConfigError, match=f"student.lora.*{message}"):
        open_student(folder, **lora_settings(**changes))


BRIEF_LORA = ("student.lora={_target_:peft.LoraConfig,r:4,lora_alpha:8,target_modules:all-linear}", "loss=[answer,kl]")
BRIEF_LORA += ("optim.optimizer.lr=0.05", "optim.schedule.num_warmup_steps=0", "optim.schedule.num_training_steps=4")
BRIEF_LORA += ("trainer.log_every_n_steps=1", "validate_every=2", "batch_size=4")


@pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:You're resuming from a checkpoint")
def test_a_resumed_run_continues_with_its_adapters(configured: Callable[..., DictConfig], tmp_path: Path) -> None:
    def trained(folder: str, *overrides: str) -> dict[str, Tensor]:
        job = prepare(configured(*BRIEF_LORA, *overrides), tmp_path / folder)
        torch.manual_seed(0)
        student = open_student(
            job.student_folder, **WHOLE_STUDENT | {"lora": configuration.build(job.config.student.lora)}
        )
        fit(job, build_training(job, build_curriculum(job), student, []))
        return student.state_dict()

    whole = trained("whole", "trainer.max_steps=4")
    checkpoint = tmp_path / "whole" / "checkpoints" / "step-00000002.ckpt"
    resumed = trained("resumed", "trainer.max_steps=4", f"resume='{checkpoint}'")
    assert_close(resumed, whole, 0)
    with (tmp_path / "resumed" / "metrics.csv").open() as file:
        assert {int(row["step"]) for row in csv.DictReader(file)} == {2, 3}
    assert any("lora_B" in name and value.abs().max() > 1e-3 for name, value in whole.items())


def num_saved_bytes(model: torch.nn.Module, prompts: Prompts) -> int:
    """Bytes that a forward pass saves for the backward pass, counting every storage once."""
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    module, batch = student_module(model.train(), prompts), collate(lessons(prompts, 6), {}, 0, read)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden_NH = module.hidden(batch)
    return sum(storages.values()) if hidden_NH.requires_grad else 0


@pytest.mark.parametrize("freeze", [[], ["embed_tokens"]])
def test_gradient_checkpointing_saves_memory_and_changes_no_gradient(
    freeze: list[str], student_folder: Path, prompts: Prompts
) -> None:
    plain, checkpointed = (
        open_student(student_folder, **WHOLE_STUDENT | {"freeze": freeze, "gradient_checkpointing": is_checkpointed})
        for is_checkpointed in (False, True)
    )
    assert_close(gradients(checkpointed, prompts), gradients(plain, prompts), 1e-6)
    assert 0 < num_saved_bytes(checkpointed, prompts) < 0.5 * num_saved_bytes(plain, prompts)


def test_adapters_train_with_gradient_checkpointing(student_folder: Path, prompts: Prompts) -> None:
    results = []
    for is_checkpointed in (False, True):
        torch.manual_seed(0)
        model = open_student(student_folder, **lora_settings() | {"gradient_checkpointing": is_checkpointed})
        results.append(gradients(model, prompts))
    assert_close(*results, 1e-6)


def test_gradient_checkpointing_does_not_change_generation(student_folder: Path) -> None:
    plain, checkpointed = (
        open_student(student_folder, **WHOLE_STUDENT | {"gradient_checkpointing": is_checkpointed}).eval()
        for is_checkpointed in (False, True)
    )
    written = [
        PrefixedReader(m, (5, 60), 320).read([(70, 80)]).greedy(max_new_tokens=5, stops=[1])
        for m in (plain, checkpointed)
    ]
    assert written[0] == written[1]


def test_a_model_that_cannot_checkpoint_is_refused(student_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    with pytest.raises(ConfigError, match="gradient_checkpointing=false"):
        open_student(student_folder, **WHOLE_STUDENT | {"gradient_checkpointing": True})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised by torch while compiling
def test_a_compiled_body_has_the_same_gradients_and_is_restored(student_folder: Path, prompts: Prompts) -> None:
    model = open_student(student_folder, **WHOLE_STUDENT | {"keep_layers": [0]})
    names, expected = list(model.state_dict()), gradients(model, prompts)
    (graphs := torch._dynamo.utils.counters).clear()
    with compiled(model):
        assert list(model.state_dict()) == names
        actual = gradients(model, prompts)
        assert graphs.pop("stats")["unique_graphs"] == 1
    assert_close(actual, expected, 1e-5)
    torch._dynamo.reset()  # so that code that is still compiled would be recompiled
    gradients(model, prompts)
    assert "stats" not in graphs
