"""How texts are generated: settings, the tokens that are drawn, where a text ends, and rows that leave their batch."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.errors import ConfigError
from distill.models.body import Way
from distill.models.generation import Generation, draw
from distill.models.reading import PrefixedReader, _Ending
from tests.models.test_reading import VOCABULARY, make_model, plain, random_ids

SETTINGS = Generation(
    temperature=0.0, sampling_temperature=0.7, top_p=0.95, top_k=None, from_model=False, min_new_tokens=0, stops=[]
)
PREFIX = random_ids(9, 1)
QUESTIONS = [random_ids(2 + 3 * row, 10 + row) for row in range(5)]


def test_settings_that_change_nothing_are_not_in_the_fingerprint() -> None:
    assert SETTINGS.fingerprint() == {"sampling_temperature": 0.7, "top_p": 0.95}
    changes: list[dict[str, Any]] = [
        {"temperature": 0.5},
        {"top_k": 5},
        {"from_model": True},
        {"min_new_tokens": 2},
        {"stops": ["\n"]},
        {"top_p": 0.9},
    ]
    for change in changes:
        assert replace(SETTINGS, **change).fingerprint() == SETTINGS.fingerprint() | change


@pytest.mark.parametrize(
    ("stops", "text", "expected"),
    [
        (["\n\n"], "One.\n\nTwo.\n\nThree.", "One."),
        (["Q:", "."], "It is 3. Q: 4", "It is 3"),
        (["3.", "is"], "It is 3.", "It "),
        (["It"], "It is 3.", ""),
        (["x"], "It is 3.", "It is 3."),
        ([], "It is 3.", "It is 3."),
    ],
)
def test_a_text_ends_before_the_first_of_the_texts_that_stop_it(stops: list[str], text: str, expected: str) -> None:
    assert replace(SETTINGS, stops=stops).cut(text) == expected


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.8, "top_k": 20}, (0.6, 0.6, 0.8, 20)),
        ({"do_sample": True}, (1.0, 1.0, 1.0, 50)),
        ({"do_sample": True, "top_k": 0, "temperature": None}, (1.0, 1.0, 1.0, None)),
        ({"temperature": 0.6, "top_p": 0.8}, (0.0, 0.7, 0.95, None)),
        ({"do_sample": False, "temperature": 0.6}, (0.0, 0.7, 0.95, None)),
    ],
    ids=str,
)
def test_a_models_own_settings_are_those_that_transformers_generates_with(
    own: dict[str, Any], expected: tuple[Any, ...], tmp_path: Path
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(own))
    assert replace(SETTINGS, temperature=0.3).for_model(tmp_path).temperature == 0.3
    resolved = replace(SETTINGS, from_model=True).for_model(tmp_path)
    values = resolved.temperature, resolved.sampling_temperature, resolved.top_p, resolved.top_k
    assert values == expected


@pytest.mark.parametrize("content", [None, "[", "[1]", '{"do_sample": true, "top_p": "x"}'])
def test_a_model_without_readable_settings_is_refused_where_they_are_wanted(
    content: str | None, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"from_model=true: .*generation_config\.json cannot be read"):
        replace(SETTINGS, from_model=True).for_model(tmp_path)


def among_most_likely(logits: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """Probabilities of the nucleus of the most likely tokens, computed naively."""
    order = sorted(range(len(logits)), key=lambda token: -logits[token])[:top_k]
    weights = {token: math.exp(logits[token] / temperature) for token in order}
    kept, mass = dict[int, float](), 0.0
    for token in order:
        if mass < top_p:
            kept[token] = weights[token] / sum(weights.values())
            mass += kept[token]
    return [kept.get(token, 0.0) / mass for token in range(len(logits))]


@pytest.mark.parametrize("top_p", [0.7, 1.0])
@pytest.mark.parametrize("top_k", [1, 2, 4, 99])
def test_tokens_are_drawn_among_the_most_likely_ones(top_k: int, top_p: float) -> None:
    logits, number = [0.3, -1.0, 2.0, 1.2, -4.0, 1.9], 10_000
    uniform_B = (torch.arange(number, dtype=torch.float64) + 0.5) / number
    rows_BV, both = torch.tensor([logits]).expand(number, -1), torch.tensor([0.4, 1.5]).repeat(number // 2)
    drawn_B = draw(rows_BV, uniform_B, temperature=both, top_p=top_p, top_k=top_k)
    for row, temperature in enumerate((0.4, 1.5)):  # each row has a temperature of its own
        frequencies = torch.bincount(drawn_B[row::2], minlength=len(logits)) / (number // 2)
        expected = among_most_likely(logits, temperature, min(top_k, len(logits)), top_p)
        assert frequencies.tolist() == pytest.approx(expected, abs=3 / number)


def read_sizes(model: Any) -> list[int]:
    """The numbers of rows of the model's forward passes from now on."""
    sizes: list[int] = []
    model.base_model.register_forward_pre_hook(lambda _, arguments: sizes.append(len(arguments[0])))
    return sizes


@pytest.mark.parametrize(
    ("name", "way"), [("grouped", None), ("absolute", None), ("windowed", None), ("grouped", "grouped")]
)
def test_rows_whose_text_has_ended_leave_the_batch_and_no_other_text_changes(name: str, way: Way | None) -> None:
    model = make_model(name)
    reader = PrefixedReader(model, PREFIX, VOCABULARY, way)
    whole = reader.read(QUESTIONS).greedy(max_new_tokens=9, stops=[-1])
    stops = [whole[0][2], whole[1][4], whole[2][6]]
    reading = reader.read(QUESTIONS)
    sizes = read_sizes(model)
    cut = reading.greedy(max_new_tokens=9, stops=stops)
    assert cut == [row[: min((row.index(s) for s in stops if s in row), default=8) + 1] for row in whole]
    num_open = [sum(len(row) > n for row in cut) for n in range(1, max(map(len, cut)))]
    assert len(set(num_open)) > 1
    assert sum(sizes) == sum(num_open)
    fed = torch.full((5, 2), 3)  # the prompts that were read are as before
    assert torch.allclose(reading.feed(fed), reader.read(QUESTIONS).feed(fed), atol=1e-5)


def masked_greedy(model: Any, question: list[int], ends: list[int], minimum: int, limit: int) -> list[int]:
    """The most likely tokens, one plain forward pass each; ends have no probability before the minimum."""
    ids: list[int] = []
    while len(ids) < limit and not (ids and ids[-1] in ends):
        logprobs_V = plain(model, PREFIX, question, ids)[-1]
        if len(ids) < minimum:
            logprobs_V[ends] = -torch.inf
        ids.append(int(logprobs_V.argmax()))
    return ids


def test_the_first_token_of_a_vocabulary_can_be_an_end() -> None:
    reader = PrefixedReader(make_model("grouped"), PREFIX, VOCABULARY)
    ending = _Ending(max_new_tokens=4, stops=[0, -1, VOCABULARY], min_new_tokens=1, is_complete=None)
    logits_BV = reader.read(QUESTIONS).first_BV
    assert ending.allowed(logits_BV, 0)[:, 0].eq(-torch.inf).all()
    assert ending.allowed(logits_BV, 0)[:, 1:].equal(logits_BV[:, 1:])


@pytest.mark.parametrize("minimum", [0, 1, 4, 8])
def test_no_end_token_comes_before_the_minimum(minimum: int) -> None:
    model = make_model("grouped")
    reader = PrefixedReader(model, PREFIX, VOCABULARY)
    whole = reader.read(QUESTIONS).greedy(max_new_tokens=8, stops=[-1])
    ends = [whole[0][0], whole[1][1], whole[2][2]]
    written = reader.read(QUESTIONS).greedy(max_new_tokens=8, stops=[*ends, -1], min_new_tokens=minimum)
    assert written == [masked_greedy(model, question, ends, minimum, 8) for question in QUESTIONS]
    assert not any({*row[:minimum]} & {*ends} for row in written)
    uniforms_BN = torch.zeros(5, 8, dtype=torch.float64)
    sampling: dict[str, Any] = {"uniforms_BN": uniforms_BN, "temperature": 0.7, "top_p": 0.9, "top_k": 7}
    assert reader.read(QUESTIONS).sampled(**sampling, stops=ends, min_new_tokens=minimum) == written


def test_a_text_ends_where_it_is_complete() -> None:
    reader = PrefixedReader(make_model("grouped"), PREFIX, VOCABULARY)
    whole = reader.read(QUESTIONS).greedy(max_new_tokens=8, stops=[-1])
    pair = whole[1][2:4]
    complete = reader.read(QUESTIONS).greedy(max_new_tokens=8, stops=[-1], is_complete=lambda ids: ids[-2:] == pair)
    places = [next((n + 2 for n in range(7) if row[n : n + 2] == pair), 8) for row in whole]
    assert complete == [row[:place] for row, place in zip(whole, places, strict=True)]


def test_the_random_numbers_of_a_row_stay_its_own_when_others_leave() -> None:
    reader = PrefixedReader(make_model("grouped"), PREFIX, VOCABULARY)
    numbers_BN: Tensor = torch.rand(5, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    temperature = torch.tensor([0.8, 1.5, 0.8, 1.5, 0.8], dtype=torch.float64)
    settings: dict[str, Any] = {"top_p": 0.95, "stops": [7, 8, 9, 10, 11, 12, 13, 14]}
    together = reader.read(QUESTIONS).sampled(uniforms_BN=numbers_BN, temperature=temperature, **settings)
    assert len({*map(len, together)}) > 1
    for row, text in enumerate(together):
        own = {"uniforms_BN": numbers_BN[row : row + 1], "temperature": float(temperature[row])}
        assert reader.read(QUESTIONS[row : row + 1]).sampled(**own, **settings) == [text]
