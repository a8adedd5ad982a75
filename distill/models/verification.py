"""Read = plain: an opened model's batched, cached and rewound reading must equal its own plain forward passes.

It is compared once, on a handful of tokens, when a model is opened for reading. Where the fast way differs, slower
ones are tried, down to one row at a time without a cache; a model for which none is right is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from distill.app.console import say
from distill.errors import ConfigError
from distill.models.body import Body, Way
from distill.models.loading import MODEL_ERRORS
from distill.models.rows import GroupedRows, PaddedRows, hidden_at_all

ToLogits = Callable[[Tensor], Tensor]
_PREFIX, _PROMPTS = 5, (2, 7)  # lengths
_FED, _REWOUND, _FED_AGAIN = 3, 2, 2
_MIN_TOLERANCE = 1e-4


@torch.inference_mode()
def verified_way(model: Any, to_logits: ToLogits, vocabulary_size: int) -> Way:
    """Return the fastest way of reading that equals the model's plain forward passes; raise ConfigError without one.

    `to_logits` is the head with which the reader turns hidden states into logits.
    """
    texts = _texts(vocabulary_size)
    tolerance = _tolerance(model)
    expected = [_plain_logits(model, text, vocabulary_size) for text in texts]
    _check_causal(model, expected, tolerance)
    gaps: dict[Way, float] = {}
    ways: tuple[Way, ...] = get_args(Way)
    for way in ways:
        gaps[way] = _gap(model, way, to_logits, texts, expected)
        if gaps[way] <= tolerance:
            if way == "plain":
                say(
                    f"{type(model).__name__} is read one prompt at a time without a cache, which is slow: reading it "
                    f"in batches with a cache {_result(gaps['grouped'])}"
                )
            return way
    raise ConfigError(
        f"{type(model).__name__} is not supported: reading it with its body and head apart, even one prompt at a time "
        f"without a cache, {_result(gaps['plain'])}"
    )


@torch.inference_mode()
def check_right_padding(model: Any, to_logits: ToLogits, vocabulary_size: int) -> None:
    """Raise ConfigError unless texts of unlike length, padded on the right as in training, are read as if alone."""
    texts = _texts(vocabulary_size)[: len(_PROMPTS)]
    longest = max(map(len, texts))
    ids_BT = torch.tensor([text + [0] * (longest - len(text)) for text in texts], device=model.device)
    mask_BT = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts], device=model.device)
    try:
        hidden_BTH = model.base_model(ids_BT, attention_mask=mask_BT, use_cache=False).last_hidden_state
        pairs = [
            (to_logits(h[: len(t)]), _plain_logits(model, t, vocabulary_size))
            for h, t in zip(hidden_BTH, texts, strict=True)
        ]
        gap = max(_difference(logits, expected, is_exact=True) for logits, expected in pairs)
    except torch.OutOfMemoryError:
        raise
    except MODEL_ERRORS:
        gap = math.inf
    if not gap <= _tolerance(model):
        raise ConfigError(
            f"{type(model).__name__} cannot be a student: reading a batch that is padded on the right {_result(gap)}"
        )


def _tolerance(model: Any) -> float:
    return float(max(_MIN_TOLERANCE, torch.finfo(model.dtype).eps ** 0.5))


def _result(gap: float) -> str:
    return "fails" if math.isinf(gap) else f"changes its logits by {100 * gap:.2g} %"


def _texts(vocabulary_size: int) -> list[list[int]]:
    """Four texts: two prompts after one prefix, each with the tokens fed first, and with those after rewinding."""
    ids = iter(range(3, 10**6, 7))

    def some(number: int) -> list[int]:
        return [next(ids) % vocabulary_size for _ in range(number)]

    prefix, prompts = some(_PREFIX), [some(length) for length in _PROMPTS]
    fed = [some(_FED) for _ in prompts]
    again = [row[: _FED - _REWOUND] + some(_FED_AGAIN) for row in fed]
    return [[*prefix, *prompts[k], *more[k]] for more in (fed, again) for k in range(len(prompts))]


def _plain_logits(model: Any, text: list[int], vocabulary_size: int) -> Float[Tensor, "T V"]:
    try:
        logits_TV: Tensor = model(torch.tensor([text], device=model.device)).logits[0, :, :vocabulary_size].float()
    except torch.OutOfMemoryError:
        raise
    except MODEL_ERRORS as error:
        raise ConfigError(
            f"{type(model).__name__} is not supported: it does not read a plain text ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]})"
        ) from None
    return logits_TV


def _check_causal(model: Any, expected: list[Tensor], tolerance: float) -> None:
    """Raise ConfigError unless the logits at a prompt are the same with different texts after it."""
    num_prompts = len(_PROMPTS)
    for k, length in enumerate(_PROMPTS):
        common = _PREFIX + length + _FED - _REWOUND
        gap = _difference(expected[k][:common], expected[num_prompts + k][:common], is_exact=True)
        if not gap <= tolerance:
            raise ConfigError(
                f"{type(model).__name__} is not supported: its logits at a token differ by {100 * gap:.2g} % with the "
                "text after it, so it does not read from left to right; use a causal language model"
            )


def _gap(model: Any, way: Way, to_logits: ToLogits, texts: list[list[int]], expected: list[Tensor]) -> float:
    """Largest difference between reading in this way and plain forward passes; infinite if it fails."""
    try:
        body = Body(model, texts[0][:_PREFIX], way)
        pairs = [*_fed_pairs(body, texts, expected), *_scored_pairs(body, texts, expected)]
        is_exact = torch.finfo(model.dtype).bits >= 32
        return max(_difference(to_logits(hidden), logits, is_exact=is_exact) for hidden, logits in pairs)
    except torch.OutOfMemoryError:
        raise
    except MODEL_ERRORS:
        return math.inf


def _fed_pairs(body: Body, texts: list[list[int]], expected: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Hidden states of two prompts that are read, fed, rewound and fed again, and the logits expected there."""
    num_prompts, ends = len(_PROMPTS), [_PREFIX + length for length in _PROMPTS]
    first, again = texts[:num_prompts], texts[num_prompts:]
    rows_of = PaddedRows if body.way == "batched" else GroupedRows
    rows = rows_of(body, [text[_PREFIX:end] for text, end in zip(first, ends, strict=True)])
    fed = rows.feed(_tensor(body, [text[-_FED:] for text in first]))
    rows.rewind(_REWOUND)
    one_by_one = [rows.feed(_tensor(body, [[text[k]] for text in again])) for k in range(-_FED_AGAIN, 0)]
    fed_again = torch.cat(one_by_one, 1)
    pairs = [(rows.last_BH[k : k + 1], expected[k][end - 1 : end]) for k, end in enumerate(ends)]
    pairs += [(fed[k], expected[k][-_FED:]) for k in range(num_prompts)]
    return pairs + [(fed_again[k], expected[num_prompts + k][-_FED_AGAIN:]) for k in range(num_prompts)]


def _scored_pairs(body: Body, texts: list[list[int]], expected: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Hidden states at all tokens of two texts that are read whole, and the logits expected there."""
    hidden = read_whole(body, [text[_PREFIX:] for text in texts[: len(_PROMPTS)]])
    return [(hidden_TH, expected[k][_PREFIX:]) for k, hidden_TH in enumerate(hidden)]


def read_whole(body: Body, texts: list[list[int]]) -> list[Tensor]:
    """Hidden states [T, H] at every token of each text; padded on the right, which no earlier token attends to."""
    longest = max(map(len, texts))
    if body.way != "batched" or not body.fits_window(longest):
        return hidden_at_all(body, texts)
    ids_BT = torch.tensor([text + [0] * (longest - len(text)) for text in texts], device=body.device)
    lengths_B1 = torch.tensor([[len(text)] for text in texts], device=body.device)
    mask_BT = torch.arange(longest, device=body.device) < lengths_B1
    hidden_BTH = body.advance(ids_BT, mask_BT, body.new_cache(len(texts)))
    return [hidden_TH[: len(text)] for hidden_TH, text in zip(hidden_BTH, texts, strict=True)]


def _tensor(body: Body, rows: list[list[int]]) -> Tensor:
    return torch.tensor(rows, device=body.device)


def _difference(logits_TV: Tensor, expected_TV: Tensor, *, is_exact: bool) -> float:
    """Length of the difference of two logit vectors, relative to how far those expected vary over the vocabulary.

    The largest of all positions; in half precision their median, since there one that is routed to another expert
    may differ by rounding alone.
    """
    spread_T = (expected_TV - expected_TV.mean(-1, keepdim=True)).norm(dim=-1)
    gap_T = (logits_TV - expected_TV).norm(dim=-1) / spread_T.clamp(min=torch.finfo(torch.float32).tiny)
    gap = float(gap_T.max() if is_exact else gap_T.median())
    return math.inf if math.isnan(gap) else gap
