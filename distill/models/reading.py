"""Batched reading and generation after a shared prefix, which passes through the model once and is never copied.

The queries of all rows attend to two blocks of keys: those of the prefix, shared by all rows, and those of their
own row. The scores of both go through one softmax, so this is plain attention (Hydragen, Juravsky et al. 2024,
arXiv 2402.05099):

    softmax([Q K_prefix', Q K_own']) [V_prefix; V_own]

A model with a different attention (such as attention sinks) is detected by a comparison, and gets a copy of the
prefix's keys and values for every row. A whole text must fit into an attention window: padding would shift it.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from distill.errors import ConfigError
from distill.losses.head import Shape

_SHARED = "distill_shared_prefix"
_HEAD_ROWS, _CPU_ROWS = 256, 32
Blocks = list[tuple[Tensor, Tensor]]
ChooseToken = Callable[[Tensor, int], Tensor]  # logits [B, V], index of the new token -> tokens [B, 1]


@final
class PrefixedReader:
    """Reads many prompts after a shared prefix."""

    def __init__(self, model: Any, prefix_ids: Sequence[int], vocabulary_size: int) -> None:
        """Read the prefix with a model from `loading.load`; head rows from `vocabulary_size` on are padding.

        The reader is invalid once the model's weights change.
        """
        self.vocabulary_size = vocabulary_size
        self.device: torch.device = model.device
        self._dtype: torch.dtype = model.dtype
        self._model, self._shape = model, Shape.of(model)
        self._prefix_ids = tuple(prefix_ids)
        layers = DynamicCache(config=model.config).layers
        windows = [layer.sliding_window for layer in layers if isinstance(layer, DynamicSlidingWindowLayer)]
        self._window: int | None = min(windows, default=None)
        self._prefix = self._read_prefix() if prefix_ids else None
        self._blocks: Blocks = []  # the prefix's keys and values [G, P, D] by layer, if all rows share them
        if self._prefix is not None and type(model)._supports_attention_backend:
            self._share_prefix(self._prefix.layers)

    @property
    def is_valid(self) -> bool:
        """Whether the model is where it was, and of the type that it had, when it read the prefix."""
        return (self._model.device, self._model.dtype) == (self.device, self._dtype)

    @torch.inference_mode()
    def logits(self, hidden: Float[Tensor, "... H"]) -> Float[Tensor, "... V"]:
        """Logits of hidden states, in float32."""
        return self._head(hidden).float()

    def logprobs(self, hidden: Float[Tensor, "... H"]) -> Float[Tensor, "... V"]:
        """Log of the full softmax over the vocabulary, in float32."""
        return self.logits(hidden).log_softmax(-1)

    def read(self, prompts: Sequence[Sequence[int]]) -> Reading:
        """Read a batch of prompts; further tokens can be fed to the result."""
        # Padded on the left, so that all prompts end in the same column and no padding precedes the tokens fed later.
        longest = max(len(prompt) for prompt in prompts)
        ids = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        mask = [[False] * (longest - len(prompt)) + [True] * len(prompt) for prompt in prompts]
        ids_BT = torch.tensor(ids, dtype=torch.long, device=self.device)
        return Reading(self, ids_BT, torch.tensor(mask, dtype=torch.bool, device=self.device))

    def hidden_before_targets(
        self, prompts: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]
    ) -> Float[Tensor, "N H"]:
        """Read prompts with their targets; return the hidden states that predict the targets' tokens, in order."""
        # Padded on the right, which no earlier token attends to. The last token predicts nothing, so it is not read.
        rows = [[*prompt, *target[:-1]] for prompt, target in zip(prompts, targets, strict=True)]
        ids_BT = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        is_read_BT, is_before_BT = (torch.zeros_like(ids_BT, dtype=torch.bool) for _ in range(2))
        for row, (ids, target) in enumerate(zip(rows, targets, strict=True)):
            ids_BT[row, : len(ids)] = torch.tensor(ids)
            is_read_BT[row, : len(ids)] = True
            is_before_BT[row, len(ids) - len(target) : len(ids)] = True
        ids_BT, is_read_BT = ids_BT.to(self.device), is_read_BT.to(self.device)
        return self.advance(ids_BT, is_read_BT, self.new_cache(len(rows)))[is_before_BT.to(self.device)]

    def logprobs_in_chunks(self, hidden_NH: Float[Tensor, "N H"]) -> Iterator[Float[Tensor, "M V"]]:
        """Log-probabilities of hidden states, in chunks of a few rows that fit into a CPU's cache."""
        num_rows = _CPU_ROWS if self.device.type == "cpu" else _HEAD_ROWS
        for chunk_NH in hidden_NH.split(_HEAD_ROWS):
            for logits_MV in self._head(chunk_NH).split(num_rows):
                yield logits_MV.float().log_softmax(-1)

    def _head(self, hidden: Float[Tensor, "... H"]) -> Float[Tensor, "... V"]:
        head: nn.Module = self._model.get_output_embeddings()
        return self._shape(head(hidden)[..., : self.vocabulary_size])

    def new_cache(self, num_rows: int) -> DynamicCache:
        """Keys and values of `num_rows` rows that have read only the prefix."""
        if self._prefix is None or self._blocks:
            return DynamicCache()
        cache = copy.deepcopy(self._prefix)
        cache.batch_repeat_interleave(num_rows)
        return cache

    @torch.inference_mode()
    def advance(
        self, ids_BT: Int[Tensor, "B T"], mask_BS: Bool[Tensor, "B S"], cache: DynamicCache
    ) -> Float[Tensor, "B T H"]:
        """Read the last T of the S tokens of `mask_BS`, the others being in `cache`; return their hidden states."""
        num_new, num_all = ids_BT.shape[1], len(self._prefix_ids) + mask_BS.shape[1]
        if self._window and num_all > self._window:
            raise ConfigError(
                f"a text of {num_all} tokens, demonstrations included, exceeds this model's attention "
                f"window of {self._window}; lower prompt.num_shots or prompt.max_length"
            )
        positions_BS = (len(self._prefix_ids) + mask_BS.cumsum(1) - 1).clamp(min=0)
        arguments = {"position_ids": positions_BS[:, -num_new:], "past_key_values": cache, "use_cache": True}
        if self._blocks:
            with _attention(self._model.config, _SHARED):
                mask_B1TS = _causal(mask_BS, num_new)
                out = self._model.base_model(ids_BT, attention_mask=mask_B1TS, shared_prefix=self._blocks, **arguments)
        elif self._prefix is None and num_new == mask_BS.shape[1] and mask_BS[:, 0].all():
            # No prefix, padding on the right: without a mask, attention kernels use their built-in causal mask.
            out = self._model.base_model(ids_BT, **arguments)
        else:
            mask_BP = mask_BS.new_ones(len(mask_BS), len(self._prefix_ids))
            out = self._model.base_model(ids_BT, attention_mask=torch.cat([mask_BP, mask_BS], 1).long(), **arguments)
        hidden_BTH: Tensor = out.last_hidden_state
        return hidden_BTH

    @torch.inference_mode()
    def _read_prefix(self) -> DynamicCache:
        ids_BT = torch.tensor([self._prefix_ids], device=self.device)
        cache = DynamicCache()
        self._model.base_model(ids_BT, past_key_values=cache, use_cache=True)
        return cache

    def _share_prefix(self, layers: Sequence[Any]) -> None:
        """Share the prefix between all rows, unless a comparison shows that this changes hidden states."""
        ids_BT = torch.tensor([self._prefix_ids[:4]] * 2, device=self.device)
        mask_BT = torch.ones_like(ids_BT, dtype=torch.bool)
        expected_BTH = self.advance(ids_BT, mask_BT, self.new_cache(2))
        AttentionInterface.register(_SHARED, _attend)
        self._blocks = [(layer.keys[0], layer.values[0]) for layer in layers]
        gap = (self.advance(ids_BT, mask_BT, self.new_cache(2)) - expected_BTH).abs().max()
        if gap > torch.finfo(expected_BTH.dtype).eps ** 0.5 * expected_BTH.abs().max():
            self._blocks = []


@final
class Reading:
    """A batch of prompts that have been read, with their keys and values."""

    def __init__(self, reader: PrefixedReader, ids_BT: Int[Tensor, "B T"], mask_BT: Bool[Tensor, "B T"]) -> None:
        """Read the prompts after the reader's prefix."""
        self.reader = reader
        self._cache = reader.new_cache(len(ids_BT))
        self._mask_BS = mask_BT
        self.last_BH = reader.advance(ids_BT, mask_BT, self._cache)[:, -1]

    @cached_property
    def first_BV(self) -> Float[Tensor, "B V"]:  # noqa: N802 - names of tensors end in their dimensions
        """Log-probabilities of the token after each prompt."""
        return self.reader.logprobs(self.last_BH)

    def feed(self, ids_BT: Int[Tensor, "B T"]) -> Float[Tensor, "B T H"]:
        """Read further tokens, padded on the right; return the hidden states at all of them."""
        self._mask_BS = torch.cat([self._mask_BS, torch.ones_like(ids_BT, dtype=torch.bool)], 1)
        return self.reader.advance(ids_BT, self._mask_BS, self._cache)

    def rewind(self, num_tokens: int) -> None:
        """Drop the last `num_tokens` columns."""
        if num_tokens:
            self._cache.crop(-num_tokens)
            self._mask_BS = self._mask_BS[:, :-num_tokens]

    def choice_logprobs(self, first_BV: Float[Tensor, "B V"], choices: Sequence[Sequence[int]]) -> Float[Tensor, "B C"]:
        """Log-probability of each choice as the continuation; `first_BV` holds those of its first token."""
        return torch.stack([logprobs_BT.sum(-1) for logprobs_BT in self.token_logprobs(first_BV, choices)], -1)

    def token_logprobs(
        self, first_BV: Float[Tensor, "B V"], choices: Sequence[Sequence[int]]
    ) -> list[Float[Tensor, "B _"]]:
        """Log-probabilities of the tokens of each choice; a beginning that choices share is read once."""
        tokens = [[first_BV[:, ids[0]]] for ids in choices]
        read: tuple[int, ...] = ()
        for ids in sorted({tuple(ids[:-1]) for ids in choices if len(ids) > 1}):  # depth-first over shared beginnings
            shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(read, ids, strict=False)))
            self.rewind(len(read) - shared)
            fed_BT = torch.tensor([ids[shared:]] * len(first_BV), device=first_BV.device)
            logprobs_BTV = self.reader.logprobs(self.feed(fed_BT))
            for depth, (column, choice) in itertools.product(range(shared, len(ids)), enumerate(choices)):
                if len(choice) > depth + 1 and tuple(choice[: depth + 1]) == ids[: depth + 1]:
                    tokens[column].append(logprobs_BTV[:, depth - shared, choice[depth + 1]])
            read = ids
        self.rewind(len(read))
        return [torch.stack(columns, -1) for columns in tokens]

    def greedy(self, *, max_new_tokens: int, stop: int) -> list[list[int]]:
        """Continue all prompts with the most likely tokens, up to and including `stop` or the limit."""
        return self._generate(lambda logits_BV, _: logits_BV.argmax(-1, keepdim=True), max_new_tokens, stop)

    def sampled(
        self, *, uniforms_BN: Float[Tensor, "B N"], stop: int, temperature: float, top_p: float
    ) -> list[list[int]]:
        """Continue all prompts with sampled tokens, up to and including `stop` or to N tokens.

        Token n of a row is drawn with `uniforms_BN[row, n]`, in [0, 1). A row of zeros gets the most likely tokens.
        """
        uniforms_BN = uniforms_BN.to(self.reader.device)

        def choose(logits_BV: Float[Tensor, "B V"], index: int) -> Int[Tensor, "B 1"]:
            return draw(logits_BV, uniforms_BN[:, index], temperature=temperature, top_p=top_p).unsqueeze(-1)

        return self._generate(choose, uniforms_BN.shape[1], stop)

    def _generate(self, choose: ChooseToken, max_new_tokens: int, stop: int) -> list[list[int]]:
        generated_BT = choose(self.reader.logits(self.last_BH), 0)
        while generated_BT.shape[1] < max_new_tokens and not (generated_BT == stop).any(1).all():
            last_BH = self.feed(generated_BT[:, -1:])[:, -1]
            generated_BT = torch.cat([generated_BT, choose(self.reader.logits(last_BH), generated_BT.shape[1])], 1)
        self.rewind(generated_BT.shape[1] - 1)
        rows: list[list[int]] = generated_BT.tolist()
        return [row[: row.index(stop) + 1] if stop in row else row for row in rows]


def draw(
    logits_BV: Float[Tensor, "B V"], uniform_B: Float[Tensor, "B"], *, temperature: float, top_p: float
) -> Int[Tensor, "B"]:
    """Sample a token per row from the nucleus of softmax(logits / temperature), by inverting its CDF at `uniform_B`.

    The nucleus is the smallest set of most probable tokens with at least `top_p` of the mass (Holtzman et al. 2020,
    arXiv 1904.09751, eq. 2). The CDF starts at the most probable token, so a uniform of 0 draws that token.
    """
    ordered_BV, ids_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    # The greatest logit is subtracted so that no temperature overflows; the sum in double loses no token.
    mass_BV = ((ordered_BV - ordered_BV[:, :1]).double() / temperature).softmax(-1).cumsum(-1)
    last_B1 = (mass_BV < top_p).sum(-1, keepdim=True).clamp(max=mass_BV.shape[1] - 1)
    point_B1 = uniform_B.unsqueeze(-1) * mass_BV.gather(-1, last_B1)
    return ids_BV.gather(-1, torch.searchsorted(mass_BV, point_B1)).squeeze(-1)


def _causal(mask_BS: Bool[Tensor, "B S"], num_new: int) -> Bool[Tensor, "B 1 T S"]:
    """Which tokens of its own row each of the last `num_new` tokens attends to."""
    position_S = torch.arange(mask_BS.shape[1], device=mask_BS.device)
    earlier_TS = position_S <= position_S[-num_new:].unsqueeze(-1)
    return mask_BS[:, None, None, :] & earlier_TS


@contextmanager
def _attention(config: Any, implementation: str) -> Iterator[None]:
    previous = config._attn_implementation
    config._attn_implementation = implementation
    try:
        yield
    finally:
        config._attn_implementation = previous


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    *,
    scaling: float,
    shared_prefix: Blocks,
    **_others: Any,
) -> tuple[Tensor, None]:
    """Attention, called by `transformers`: query [B, R G, T, D]; key, value [B, G, S, D]; R query heads share a key."""
    num_rows, num_groups, num_new = len(query), key.shape[1], query.shape[2]
    key_GPD, value_GPD = shared_prefix[module.layer_idx]
    query_BGQD = (query * scaling).reshape(num_rows, num_groups, -1, query.shape[-1])
    own_BGQS = query_BGQD @ key.mT
    hidden_BGTS = ~attention_mask.expand(-1, num_groups, -1, -1)
    own_BGQS.masked_fill_(hidden_BGTS.repeat(1, 1, own_BGQS.shape[2] // num_new, 1), -torch.inf)
    scores = torch.cat([_over_rows(query_BGQD, key_GPD.mT), own_BGQS], -1)
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    to_prefix, to_own = weights.split([key_GPD.shape[1], own_BGQS.shape[-1]], -1)
    out_BGQD = _over_rows(to_prefix, value_GPD) + to_own @ value
    return out_BGQD.reshape(query.shape).transpose(1, 2), None


def _over_rows(left: Float[Tensor, "B G Q I"], right: Float[Tensor, "G I J"]) -> Float[Tensor, "B G Q J"]:
    """A batched product over groups for all rows at once; broadcasting would copy `right` for every row."""
    num_rows, num_groups, num_queries, _ = left.shape
    product = left.transpose(0, 1).reshape(num_groups, num_rows * num_queries, -1) @ right
    return product.view(num_groups, num_rows, num_queries, -1).transpose(0, 1)
