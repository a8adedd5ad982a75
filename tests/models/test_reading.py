"""Law 11 for reading: a shared prefix gives the same results as reading it in every row, for any attention."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoConfig,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PreTrainedModel,
    Qwen3Config,
)

from distill.cache import uniforms
from distill.errors import ConfigError
from distill.models.body import max_positions
from distill.models.generation import draw
from distill.models.reading import PrefixedReader

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

LOCAL = GPTNeoConfig(
    vocab_size=VOCABULARY + 32,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    attention_types=[[["global", "local"], 1]],
    window_size=20,  # more than the check at opening reads, and not known to the cache
    initializer_range=0.25,
)


def make_model(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config({**CONFIGS, "local": LOCAL}[name], dtype=dtype).eval()


def random_ids(number: int, seed: int) -> list[int]:
    return torch.randint(2, VOCABULARY, (number,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def plain(loaded: PreTrainedModel, *pieces: list[int]) -> Tensor:
    """Log-probabilities [T, V] after every token of a text, read alone in a single pass."""
    whole = torch.tensor([[i for piece in pieces for i in piece]])
    return loaded(whole).logits[0, :, :VOCABULARY].float().log_softmax(-1)


@pytest.mark.parametrize("length", [0, 1, 11])
@pytest.mark.parametrize("name", CONFIGS)
def test_batching_and_padding_change_no_probability(name: str, length: int) -> None:
    loaded, prefix = make_model(name), random_ids(length, 1)
    questions = [random_ids(2 + 3 * row, 10 + row) for row in range(5)]
    reader = PrefixedReader(loaded, prefix, VOCABULARY)
    assert bool(reader.shares_prefix) == (length > 0)
    reading = reader.read(questions)
    first, second = [random_ids(2, 20 + row) for row in range(5)], [random_ids(3, 30 + row) for row in range(5)]
    hidden = [reading.last_BH.unsqueeze(1), reading.feed(torch.tensor(first))]
    reading.rewind(1)
    hidden.append(reading.feed(torch.tensor(second)))
    batched_BTV = reader.logprobs(torch.cat(hidden, 1))
    for row, question in enumerate(questions):
        before = plain(loaded, prefix, question, first[row])[-3:]
        after = plain(loaded, prefix, question, first[row][:1], second[row])[-3:]
        assert torch.allclose(batched_BTV[row], torch.cat([before, after]), atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_text_equals_that_of_transformers(name: str) -> None:
    loaded, prefix = make_model(name), random_ids(9, 1)
    questions = [random_ids(2 + 3 * row, 10 + row) for row in range(5)]
    generated = PrefixedReader(loaded, prefix, VOCABULARY + 32).read(questions).greedy(max_new_tokens=8, stops=[1])
    for question, row in zip(questions, generated, strict=True):
        whole = torch.tensor([prefix + question])
        expected = loaded.generate(whole, max_new_tokens=8, do_sample=False, eos_token_id=1, pad_token_id=1)
        assert expected[0, whole.shape[1] :].tolist() == row


def nucleus(logits: list[float], temperature: float, top_p: float) -> list[float]:
    """Softmax of logits / temperature restricted to its nucleus, computed naively."""
    weights = [math.exp(logit / temperature) for logit in logits]
    p = [weight / sum(weights) for weight in weights]
    kept, mass = set[int](), 0.0
    for token in sorted(range(len(p)), key=lambda token: -p[token]):
        if mass < top_p:
            kept.add(token)
            mass += p[token]
    return [p[token] / mass if token in kept else 0.0 for token in range(len(p))]


@pytest.mark.parametrize("top_p", [0.05, 0.6, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_tokens_are_drawn_with_the_probabilities_of_the_nucleus(temperature: float, top_p: float) -> None:
    logits, number = [0.3, -1.0, 2.0, 1.2, -4.0, 1.9], 20_000
    uniform_B = (torch.arange(number, dtype=torch.float64) + 0.5) / number  # so frequencies are exact to 1 / number
    drawn_B = draw(torch.tensor([logits]).expand(number, -1), uniform_B, temperature=temperature, top_p=top_p)
    frequencies = torch.bincount(drawn_B, minlength=len(logits)) / number
    assert frequencies.tolist() == pytest.approx(nucleus(logits, temperature, top_p), abs=1.5 / number)


def test_tokens_of_independent_uniforms_pass_a_chi_square_test() -> None:
    logits, number = [1.0, 0.0, -0.5, 0.7], 20_000
    uniform_B = torch.from_numpy(uniforms("key", number, 0))
    drawn_B = draw(torch.tensor([logits]).expand(number, -1), uniform_B, temperature=0.7, top_p=1.0)
    expected = [number * p for p in nucleus(logits, 0.7, 1.0)]
    counts = torch.bincount(drawn_B, minlength=4).tolist()
    assert (
        sum((a - b) ** 2 / b for a, b in zip(counts, expected, strict=True)) < 16.27
    )  # quantile 0.999 of chi-square with 3 degrees of freedom


def test_a_nucleus_contains_the_most_probable_token_and_no_impossible_one() -> None:
    logits_BV = torch.tensor([[0.0, 5.0, -torch.inf, -torch.inf]]).expand(3, -1)
    ends_B = torch.tensor([0.0, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    assert draw(logits_BV, ends_B, temperature=1.0, top_p=1e-9).tolist() == [1, 1, 1]
    assert draw(logits_BV, ends_B, temperature=1.0, top_p=1.0).tolist() == [1, 1, 0]
    assert draw(logits_BV, ends_B, temperature=1e-308, top_p=1.0).tolist() == [1, 1, 1]


def test_a_uniform_of_zero_breaks_ties_as_greedy_does() -> None:
    logits_BV = torch.randint(3, (50, 2000), generator=torch.Generator().manual_seed(0)).float()
    drawn_B = draw(logits_BV, torch.zeros(50, dtype=torch.float64), temperature=0.7, top_p=0.9)
    assert drawn_B.tolist() == logits_BV.argmax(-1).tolist()


def test_sampled_text_equals_naive_sampling_of_single_rows() -> None:
    loaded, prefix = make_model("grouped"), random_ids(9, 1)
    questions = [random_ids(2 + 3 * row, 10 + row) for row in range(4)]
    uniforms_BN = torch.from_numpy(np.stack([uniforms(str(row), 7, 0) for row in range(4)]))
    reading = PrefixedReader(loaded, prefix, VOCABULARY).read(questions)
    before_BV = reading.first_BV
    generated = reading.sampled(uniforms_BN=uniforms_BN, stops=[-1], temperature=1.3, top_p=0.9)
    assert torch.equal(before_BV, reading.reader.logprobs(reading.last_BH))
    for question, row, numbers in zip(questions, generated, uniforms_BN.tolist(), strict=True):
        text: list[int] = []
        for number in numbers:
            p = nucleus(plain(loaded, prefix, question, text)[-1].tolist(), 1.3, 0.9)
            order, mass = sorted(range(VOCABULARY), key=lambda token: -p[token]), 0.0
            for token in order:
                mass += p[token]
                if mass >= number:
                    break
            text.append(token)
        assert row == text


@pytest.mark.parametrize("settings", [(0.0, 5.0, 1.0), (0.7, 1e-4, 1.0), (0.7, 5.0, 1e-9)])
def test_sampling_approaches_greedy_as_uniform_temperature_or_top_p_vanish(
    settings: tuple[float, float, float],
) -> None:
    number, temperature, top_p = settings
    reader = PrefixedReader(make_model("grouped"), random_ids(9, 1), VOCABULARY)
    questions = [random_ids(4, row) for row in range(5)]
    greedy = reader.read(questions).greedy(max_new_tokens=8, stops=[7])
    limits = {"stops": [7], "temperature": temperature, "top_p": top_p}
    numbers_BN = torch.full((5, 8), number, dtype=torch.float64)
    assert reader.read(questions).sampled(uniforms_BN=numbers_BN, **limits) == greedy
    others_BN = torch.full((5, 8), 0.7, dtype=torch.float64)
    assert reader.read(questions).sampled(uniforms_BN=others_BN, stops=[7], temperature=5.0, top_p=1.0) != greedy


def test_sampling_stops_at_the_stop_token_and_more_tokens_can_be_fed() -> None:
    reader = PrefixedReader(make_model("grouped"), random_ids(9, 1), VOCABULARY)
    questions = [random_ids(4, row) for row in range(5)]
    settings = {"uniforms_BN": torch.from_numpy(uniforms("k", 40, 0)).view(5, 8), "temperature": 1.0, "top_p": 1.0}
    whole = reader.read(questions).sampled(stops=[-1], **settings)
    end = whole[0][3]
    reading, fed = reader.read(questions), torch.full((5, 2), 3)
    cut = reading.sampled(stops=[end], **settings)
    assert cut == [row[: row.index(end) + 1] if end in row else row for row in whole]
    assert len(cut[0]) <= 4
    assert torch.allclose(reading.feed(fed), reader.read(questions).feed(fed), atol=1e-5)


@pytest.mark.parametrize("length", [12, 30, 60])
@pytest.mark.parametrize("name", ["windowed", "local"])
def test_a_text_may_grow_longer_than_an_attention_window(name: str, length: int) -> None:
    loaded, prefix = make_model(name), random_ids(length, 1)
    reader, prompts = PrefixedReader(loaded, prefix, VOCABULARY), [random_ids(10, 2), random_ids(3, 3)]
    reading, fed = reader.read(prompts), [random_ids(4, 4), random_ids(4, 5)]
    reading.feed(torch.tensor(fed))
    reading.rewind(3)
    last_BTV = reader.logprobs(reading.feed(torch.tensor([row[1:] for row in fed])))
    scored_NV = reader.logprobs(reader.hidden_before_targets(prompts, fed))
    for row, (prompt, ids) in enumerate(zip(prompts, fed, strict=True)):
        expected_TV = plain(loaded, prefix, prompt, ids)
        assert torch.allclose(last_BTV[row], expected_TV[-3:], atol=1e-4)
        assert torch.allclose(scored_NV[4 * row : 4 * row + 4], expected_TV[-5:-1], atol=1e-4)


@pytest.mark.parametrize("name", ["windowed", "grouped"])
def test_what_was_rewound_is_forgotten_even_if_the_text_outgrows_the_window_later(name: str) -> None:
    loaded, prefix = make_model(name), random_ids(12, 1)
    reader, prompts = PrefixedReader(loaded, prefix, VOCABULARY), [random_ids(10, 2), random_ids(3, 3)]
    fed, later = [random_ids(8, 4), random_ids(8, 5)], [random_ids(20, 6), random_ids(20, 7)]
    reading = reader.read(prompts)
    reading.feed(torch.tensor(fed))
    reading.rewind(2)
    reading.rewind(0)
    reading.rewind(3)  # 12 + 10 + 3 tokens remain of 40 that the window holds
    later_BTV = reader.logprobs(reading.feed(torch.tensor(later)))
    for row, (prompt, ids) in enumerate(zip(prompts, later, strict=True)):
        assert torch.allclose(later_BTV[row], plain(loaded, prefix, prompt, fed[row][:3], ids)[-20:], atol=1e-4)


@pytest.mark.parametrize("name", ["absolute", "grouped"])
def test_a_text_longer_than_the_positions_of_a_model_is_refused_and_none_is_generated(name: str) -> None:
    loaded = AutoModelForCausalLM.from_config(replace_positions(CONFIGS[name], 40)).eval()
    reader = PrefixedReader(loaded, random_ids(30, 1), VOCABULARY)
    with pytest.raises(ConfigError, match=r"a text of 41 tokens, .* exceeds the 40 positions of"):
        reader.read([random_ids(11, 2)])
    with pytest.raises(ConfigError, match=r"a text of 41 tokens"):
        reader.hidden_before_targets([random_ids(8, 2)], [random_ids(4, 2)])
    with pytest.raises(ConfigError, match=r"a text of 41 tokens"):
        PrefixedReader(loaded, random_ids(41, 1), VOCABULARY)
    for prompt_length, num_written in ((4, 7), (9, 2), (10, 1)):  # the last token is not read
        (written,) = reader.read([random_ids(prompt_length, 2)]).greedy(max_new_tokens=20, stops=[-1])
        assert len(written) == num_written


def replace_positions(config: Any, number: int) -> Any:
    changed = copy.deepcopy(config)
    changed.max_position_embeddings = number
    return changed


@pytest.mark.parametrize(
    ("rope", "positions"),
    [
        ({"rope_type": "default"}, 64),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "linear", "factor": 2.0}, 128),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}, 64),
    ],
    ids=str,
)
def test_positions_that_a_scaled_rotation_adds_count(rope: dict[str, Any], positions: int) -> None:
    config = LlamaConfig(**SIZES, max_position_embeddings=64, rope_parameters={"rope_theta": 1e4} | rope)
    assert max_positions(config) == positions


LENGTH_DEPENDENT = [
    {"rope_type": "dynamic", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 40},
    {
        "rope_type": "longrope",
        "factor": 4.0,
        "original_max_position_embeddings": 40,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
    },
]


@pytest.mark.parametrize("rope", LENGTH_DEPENDENT, ids=lambda rope: f"{rope['rope_type']} {len(rope)}")
def test_a_rotation_that_depends_on_the_length_is_used_up_to_its_original_length(rope: dict[str, Any]) -> None:
    """Beyond it, tokens that were read before would have been rotated otherwise in the whole text."""
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, max_position_embeddings=64, rope_parameters={"rope_theta": 1e4} | rope)
    limit = rope.get("original_max_position_embeddings", 64)
    assert max_positions(config) == limit
    config.rope_parameters = {"full_attention": config.rope_parameters, "sliding_attention": {"rope_type": "default"}}
    assert max_positions(config) == limit
    config.rope_parameters = {"rope_theta": 1e4} | rope
    loaded, prefix = LlamaForCausalLM(config).eval(), random_ids(9, 1)
    reader = PrefixedReader(loaded, prefix, VOCABULARY)
    question = random_ids(limit - 9 - 5, 2)
    (written,) = reader.read([question]).greedy(max_new_tokens=20, stops=[-1])
    assert len(written) == 6  # the last one is not read
    whole = plain(loaded, prefix, question, written[:-1])
    assert [int(logprobs_V.argmax()) for logprobs_V in whole[-6:]] == written
    with pytest.raises(ConfigError, match=f"exceeds the {limit} positions"):
        reader.read([random_ids(limit - 8, 3)])


def test_a_model_with_a_different_attention_gets_copies_of_the_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as attention sinks, with which attention weights do not sum to 1."""
    loaded, prefix, question = make_model("grouped"), random_ids(9, 1), random_ids(4, 2)
    library = "transformers.integrations.sdpa_attention.torch.nn.functional.scaled_dot_product_attention"
    attention = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(library, lambda *args, **kwargs: 0.9 * attention(*args, **kwargs))
    reader = PrefixedReader(loaded, prefix, VOCABULARY)
    assert not reader.shares_prefix
    assert torch.allclose(reader.read([question]).first_BV[0], plain(loaded, prefix, question)[-1], atol=1e-4)


def test_a_shared_prefix_does_not_change_the_model() -> None:
    loaded = make_model("grouped", torch.bfloat16)
    before = loaded.config.to_dict()
    reader = PrefixedReader(loaded, random_ids(9, 1), VOCABULARY)
    assert reader.shares_prefix
    reader.read([random_ids(4, 2)])
    assert loaded.config.to_dict() == before
    assert loaded.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["grouped", "windowed", "absolute"])
def test_choices_are_scored_as_in_a_plain_reading_and_exclude_each_other(name: str) -> None:
    """Choices with shared beginnings, one of them the beginning of others up to its end token, 1."""
    choices = [(5, 1), (5, 7, 1), (5, 7, 9, 1), (6, 1), (5, 8, 9, 1), (7, 5, 1)]
    loaded, prefix = make_model(name), random_ids(3, 1)
    questions = [random_ids(2 + 3 * row, 10 + row) for row in range(3)]
    reading = PrefixedReader(loaded, prefix, VOCABULARY).read(questions)
    score_BC = reading.choice_logprobs(reading.first_BV, choices)
    for row, question in enumerate(questions):
        for column, choice in enumerate(choices):
            logprobs_TV = plain(loaded, prefix, question, list(choice))[-len(choice) - 1 : -1]
            expected = logprobs_TV[range(len(choice)), list(choice)].sum()
            assert score_BC[row, column] == pytest.approx(float(expected), abs=1e-4)
    assert (score_BC.exp().sum(-1) <= 1).all()
    assert torch.allclose(score_BC, reading.choice_logprobs(reading.first_BV, choices), atol=1e-5)


def test_choices_of_each_prompt_are_scored_as_in_a_plain_reading() -> None:
    loaded, prefix = make_model("grouped"), random_ids(3, 1)
    choices = [[(5, 7, 9, 1), (6, 1)], [(8, 1)], [(5, 1), (7, 8, 1), (9, 6, 5, 1)]]
    questions = [random_ids(2 + 3 * row, 10 + row) for row in range(3)]
    reading = PrefixedReader(loaded, prefix, VOCABULARY).read(questions)
    for row, scores in enumerate(reading.own_choice_logprobs(choices)):
        for column, choice in enumerate(choices[row]):
            logprobs_TV = plain(loaded, prefix, questions[row], list(choice))[-len(choice) - 1 : -1]
            expected = logprobs_TV[range(len(choice)), list(choice)].sum()
            assert scores[column] == pytest.approx(float(expected), abs=1e-4)
    single = reading.own_choice_logprobs([[(5,), (7,)], [(8,)], []])  # nothing is read after the prompts
    assert single[0].tolist() == pytest.approx(reading.first_BV[0, [5, 7]].tolist())
    assert [len(scores) for scores in single] == [2, 1, 0]
