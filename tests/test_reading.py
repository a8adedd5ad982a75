"""Law 11 for reading: a prefix read once is a prefix read by every row, whatever the model's attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen3Config,
)

from distill.reading import PrefixedReader
from distill.records import ConfigError

VOCABULARY = 96
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY + 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.25,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
CONFIGS = {
    "grouped": LlamaConfig(**SIZES),
    "ungrouped": LlamaConfig(**SIZES | {"num_key_value_heads": 4}),
    "normed": Qwen3Config(**SIZES, head_dim=16),
    "windowed": MistralConfig(**SIZES, sliding_window=40),
    "capped": Gemma2Config(**SIZES, head_dim=16, final_logit_softcapping=2.0, attn_logit_softcapping=None),
    "scaled": GraniteConfig(**SIZES, logits_scaling=0.2),
    "absolute": GPT2Config(vocab_size=VOCABULARY + 32, n_embd=32, n_layer=2, n_head=4, initializer_range=0.25),
}


def model(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name], dtype=dtype).eval()


def ids(number: int, seed: int) -> list[int]:
    return torch.randint(2, VOCABULARY, (number,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def plain(opened: PreTrainedModel, *pieces: list[int]) -> Tensor:
    """Log-probabilities [T, V] after each token of a text that is read alone and whole."""
    whole = torch.tensor([[i for piece in pieces for i in piece]])
    return opened(whole).logits[0, :, :VOCABULARY].float().log_softmax(-1)


@pytest.mark.parametrize("length", [0, 1, 11])
@pytest.mark.parametrize("name", CONFIGS)
def test_company_and_padding_inside_a_reader_change_no_probability(name: str, length: int) -> None:
    opened, prefix, questions = model(name), ids(length, 1), [ids(2 + 3 * row, 10 + row) for row in range(5)]
    reader = PrefixedReader(opened, prefix, VOCABULARY)
    assert bool(reader._blocks) == (length > 0)
    reading = reader.read(questions)
    first, second = [ids(2, 20 + row) for row in range(5)], [ids(3, 30 + row) for row in range(5)]
    hidden = [reading.last_BH.unsqueeze(1), reading.feed(torch.tensor(first))]
    reading.rewind(1)
    hidden.append(reading.feed(torch.tensor(second)))
    together_BTV = reader.logprobs(torch.cat(hidden, 1))
    for row, question in enumerate(questions):
        before = plain(opened, prefix, question, first[row])[-3:]
        after = plain(opened, prefix, question, first[row][:1], second[row])[-3:]
        assert torch.allclose(together_BTV[row], torch.cat([before, after]), atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_text_is_that_of_the_library(name: str) -> None:
    opened, prefix, questions = model(name), ids(9, 1), [ids(2 + 3 * row, 10 + row) for row in range(5)]
    written = PrefixedReader(opened, prefix, VOCABULARY + 32).read(questions).greedy(max_new_tokens=8, stop=1)
    for question, row in zip(questions, written, strict=True):
        whole = torch.tensor([prefix + question])
        made = opened.generate(whole, max_new_tokens=8, do_sample=False, eos_token_id=1, pad_token_id=1)
        assert made[0, whole.shape[1] :].tolist() == row


def test_a_text_longer_than_an_attention_window_is_refused() -> None:
    reader = PrefixedReader(model("windowed"), ids(30, 1), VOCABULARY)
    reading = reader.read([ids(10, 2), ids(3, 3)])
    with pytest.raises(ConfigError, match=r"a text of 41 tokens.* window of 40"):
        reading.feed(torch.tensor([[5], [5]]))


def test_a_model_whose_attention_differs_unnoticed_gets_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one with attention sinks would, whose weights do not sum to one."""
    opened, prefix, question = model("grouped"), ids(9, 1), ids(4, 2)
    library = "transformers.integrations.sdpa_attention.torch.nn.functional.scaled_dot_product_attention"
    attention = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(library, lambda *given, **others: 0.9 * attention(*given, **others))
    reader = PrefixedReader(opened, prefix, VOCABULARY)
    assert not reader._blocks
    assert torch.allclose(reader.read([question]).first_BV[0], plain(opened, prefix, question)[-1], atol=1e-4)


def test_a_shared_prefix_leaves_the_model_as_it_was() -> None:
    opened = model("grouped", torch.bfloat16)
    before = opened.config.to_dict()
    reader = PrefixedReader(opened, ids(9, 1), VOCABULARY)
    assert reader._blocks
    reader.read([ids(4, 2)])
    assert opened.config.to_dict() == before
    assert opened.config._attn_implementation == "sdpa"
