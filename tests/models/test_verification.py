"""Read = plain: a model whose fast reading is wrong is read slowly, and says so, or is refused before annotation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BertConfig, LlamaConfig, Mamba2Config, MptConfig
from transformers.models.llama.modeling_llama import LlamaAttention

from distill.errors import ConfigError
from distill.models import body
from distill.models.reading import PrefixedReader, check_student_reading
from distill.models.shared_prefix import _attend
from tests.models.test_reading import CONFIGS, SIZES, VOCABULARY, make_model, plain, random_ids

_MAMBA: dict[str, Any] = {"hidden_size": 32, "num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1}
_MAMBA |= {"num_hidden_layers": 2, "vocab_size": VOCABULARY + 32, "chunk_size": 16}


def reading_agrees(model: Any) -> bool:
    """Whether batches of unlike length, fed, rewound and scored after a prefix, equal plain forward passes."""
    prefix, prompts, fed = random_ids(9, 1), [random_ids(2, 2), random_ids(6, 3)], [random_ids(3, 4), random_ids(3, 5)]
    reader = PrefixedReader(model, prefix, VOCABULARY)
    reading = reader.read(prompts)
    reading.feed(torch.tensor(fed))
    reading.rewind(2)
    again_BTV = reader.logprobs(reading.feed(torch.tensor([row[1:] for row in fed])))
    scored = reader.logprobs(reader.hidden_before_targets(prompts, fed)).split(3)
    expected = [plain(model, prefix, *pair) for pair in zip(prompts, fed, strict=True)]
    return all(
        torch.allclose(again_BTV[row], expected[row][-2:], atol=1e-4)
        and torch.allclose(scored[row], expected[row][-4:-1], atol=1e-4)
        for row in range(2)
    )


def spread(config: Any) -> Any:
    """A random model whose weights are large enough for every token to matter."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.25)
    return model


def test_a_model_without_a_common_cache_is_read_one_prompt_at_a_time_and_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = spread(Mamba2Config(**_MAMBA))
    assert PrefixedReader(model, (), VOCABULARY).way == "plain"
    assert "Mamba2ForCausalLM is read one prompt at a time without a cache" in capsys.readouterr().err
    assert reading_agrees(model)


def test_a_model_that_padding_on_the_left_shifts_is_read_in_groups_of_equal_length() -> None:
    """As with ALiBi, which counts columns."""
    model = spread(MptConfig(d_model=32, n_heads=4, n_layers=2, max_seq_len=128, vocab_size=VOCABULARY + 32))
    assert PrefixedReader(model, (), VOCABULARY).way == "grouped"
    assert reading_agrees(model)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_of_a_common_family_is_read_in_batches(name: str) -> None:
    model = make_model(name)
    assert PrefixedReader(model, (), VOCABULARY).way == "batched"
    check_student_reading(model, VOCABULARY)


def test_a_model_that_reads_both_ways_is_refused() -> None:
    config = BertConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    with pytest.raises(ConfigError, match=r"BertLMHeadModel is not supported: its logits at a token differ by .* %"):
        PrefixedReader(spread(config), (), VOCABULARY)


FAULTS: dict[str, Callable[[Any], Any]] = {
    "its body ignores the cache": lambda _: {"past_key_values": None},
    "its body ignores positions": lambda _: {"position_ids": None},
    "its body ignores padding": lambda _: {"attention_mask": None},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_fast_way_leads_to_a_slower_one(fault: str) -> None:
    model = make_model("grouped")
    forward = model.base_model.forward

    def faulty(input_ids: Tensor, **arguments: Any) -> Any:
        return forward(input_ids, **arguments | FAULTS[fault](arguments))

    model.base_model.forward = faulty
    assert PrefixedReader(model, (), VOCABULARY).way != "batched"
    assert reading_agrees(model)


def test_a_cache_that_is_not_rewound_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("grouped")
    monkeypatch.setattr(body.DynamicCache, "crop", lambda *_: None)
    assert PrefixedReader(model, (), VOCABULARY).way == "plain"
    assert reading_agrees(model)


def test_a_student_that_padding_on_the_right_changes_is_refused() -> None:
    model = make_model("grouped")
    forward = model.base_model.forward

    def faulty(input_ids: Tensor, **arguments: Any) -> Any:
        return forward(input_ids.flip(0), **arguments)

    model.base_model.forward = faulty
    with pytest.raises(ConfigError, match="cannot be a student: reading a batch that is padded on the right changes"):
        check_student_reading(model, VOCABULARY)


@pytest.mark.parametrize(("name", "value"), [("softcap", 30.0), ("s_aux", torch.ones(4)), ("unheard_of", 1)])
def test_an_argument_that_shared_attention_does_not_know_means_copies_of_the_prefix(
    name: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    query = torch.ones(1, 2, 1, 4)
    with pytest.raises(TypeError, match=name):
        _attend(None, query, query, query, query, scaling=1.0, shared_prefix=[], **{name: value})
    forward = LlamaAttention.forward
    monkeypatch.setattr(LlamaAttention, "forward", lambda self, *a, **k: forward(self, *a, **k | {name: value}))
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, attn_implementation="eager")).eval()
    assert not PrefixedReader(model, random_ids(9, 1), VOCABULARY).shares_prefix
    assert reading_agrees(model)


def test_how_a_model_is_read_is_measured_once_for_all_its_prefixes(
    teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("grouped")
    reader = PrefixedReader(model, random_ids(5, 1), VOCABULARY)
    monkeypatch.setattr("distill.models.reading.verified_way", None)
    assert PrefixedReader(model, random_ids(7, 1), VOCABULARY, reader.way).way == reader.way
