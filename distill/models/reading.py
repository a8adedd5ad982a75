"""Prompts read behind one prefix, which passes through the model once and is never copied.

The queries of all rows meet two blocks of keys: the prefix's, of which there is one for all rows, and each
row's own. The scores of both go through one softmax, so this is plain attention (the idea is Hydragen's,
Juravsky et al. 2024, arXiv 2402.05099):

    softmax([Q K_prefix', Q K_own']) [V_prefix; V_own]

A model that attends in another way (with sinks, say) is found out by comparison, and gets a copy of the
prefix's keys and values for each row. Attention windows must hold a whole text: padding would shift them.
"""

from __future__ import annotations

import copy
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
_HEAD_ROWS, _FEW_ROWS = 256, 32
Blocks = list[tuple[Tensor, Tensor]]
Pick = Callable[[Tensor, int], Tensor]  # a token [B, 1] for each row, from its logits [B, V] and its place in the text


@final
class PrefixedReader:
    """Reads many prompts behind one prefix."""

    def __init__(self, model: Any, prefix_ids: Sequence[int], vocabulary_size: int) -> None:
        """Read the prefix. `model` is one that `models.load` opened; head rows from `vocabulary_size` on are padding.

        What is read holds for the model's weights as they are now.
        """
        self.vocabulary_size = vocabulary_size
        self.device: torch.device = model.device
        self._model, self._shape = model, Shape.of(model)
        self._prefix_ids = tuple(prefix_ids)
        layers = DynamicCache(config=model.config).layers
        windows = [layer.sliding_window for layer in layers if isinstance(layer, DynamicSlidingWindowLayer)]
        self._window: int | None = min(windows, default=None)
        self._prefix = self._read_prefix() if prefix_ids else None
        self._blocks: Blocks = []  # the prefix's keys and values [G, P, D] by layer, where all rows share them
        if self._prefix is not None and type(model)._supports_attention_backend:
            self._share_prefix(self._prefix.layers)

    @torch.inference_mode()
    def logits(self, hidden: Float[Tensor, "... H"]) -> Float[Tensor, "... V"]:
        """What the head makes of hidden states, in float32."""
        return self._head(hidden).float()

    def logprobs(self, hidden: Float[Tensor, "... H"]) -> Float[Tensor, "... V"]:
        """Log of the full softmax over the vocabulary, in float32."""
        return self.logits(hidden).log_softmax(-1)

    def read(self, prompts: Sequence[Sequence[int]]) -> Reading:
        """Read a batch of prompts; what follows them can be fed to the result."""
        # Padded on the left, so that every prompt ends in the same column and what follows needs no padding inside.
        longest = max(len(prompt) for prompt in prompts)
        ids = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        mask = [[False] * (longest - len(prompt)) + [True] * len(prompt) for prompt in prompts]
        ids_BT = torch.tensor(ids, dtype=torch.long, device=self.device)
        return Reading(self, ids_BT, torch.tensor(mask, dtype=torch.bool, device=self.device))

    def before_targets(
        self, prompts: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]
    ) -> Float[Tensor, "N H"]:
        """Read prompts with what follows them; return the hidden states that predict each target's tokens, in order."""
        # Padded on the right: nothing looks at what comes later. The last token predicts nothing, so it is not read.
        rows = [[*prompt, *target[:-1]] for prompt, target in zip(prompts, targets, strict=True)]
        ids_BT = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        is_read_BT, is_before_BT = (torch.zeros_like(ids_BT, dtype=torch.bool) for _ in range(2))
        for row, (ids, target) in enumerate(zip(rows, targets, strict=True)):
            ids_BT[row, : len(ids)] = torch.tensor(ids)
            is_read_BT[row, : len(ids)] = True
            is_before_BT[row, len(ids) - len(target) : len(ids)] = True
        ids_BT, is_read_BT = ids_BT.to(self.device), is_read_BT.to(self.device)
        return self.advance(ids_BT, is_read_BT, self.new_cache(len(rows)))[is_before_BT.to(self.device)]

    def in_pieces(self, hidden_NH: Float[Tensor, "N H"]) -> Iterator[Float[Tensor, "M V"]]:
        """Log-probabilities of hidden states, a few rows at a time, small enough for a processor's cache."""
        few = _HEAD_ROWS if self.device.type == "cuda" else _FEW_ROWS
        for part_NH in hidden_NH.split(_HEAD_ROWS):
            for logits_MV in self._head(part_NH).split(few):
                yield logits_MV.float().log_softmax(-1)

    def _head(self, hidden: Float[Tensor, "... H"]) -> Float[Tensor, "... V"]:
        head: nn.Module = self._model.get_output_embeddings()
        return self._shape(head(hidden)[..., : self.vocabulary_size])

    def new_cache(self, num_rows: int) -> DynamicCache:
        """Keys and values for so many rows that have read the prefix and nothing else."""
        if self._prefix is None or self._blocks:
            return DynamicCache()
        cache = copy.deepcopy(self._prefix)
        cache.batch_repeat_interleave(num_rows)
        return cache

    @torch.inference_mode()
    def advance(
        self, ids_BT: Int[Tensor, "B T"], mask_BS: Bool[Tensor, "B S"], cache: DynamicCache
    ) -> Float[Tensor, "B T H"]:
        """Read T further tokens, the last of the S tokens that `mask_BS` describes; return their hidden states."""
        num_new, num_all = ids_BT.shape[1], len(self._prefix_ids) + mask_BS.shape[1]
        if self._window and num_all > self._window:
            raise ConfigError(
                f"a text of {num_all} tokens, demonstrations included, does not fit into this model's attention "
                f"window of {self._window}; lower prompt.num_shots or prompt.max_length"
            )
        positions_BS = (len(self._prefix_ids) + mask_BS.cumsum(1) - 1).clamp(min=0)
        given = {"position_ids": positions_BS[:, -num_new:], "past_key_values": cache, "use_cache": True}
        if self._blocks:
            with _attending(self._model.config, _SHARED):
                mask_B1TS = _causal(mask_BS, num_new)
                out = self._model.base_model(ids_BT, attention_mask=mask_B1TS, shared_prefix=self._blocks, **given)
        elif self._prefix is None and num_new == mask_BS.shape[1] and mask_BS[:, 0].all():
            # Nothing before, padding after: the mask is the causal one, which attention kernels know by themselves.
            out = self._model.base_model(ids_BT, **given)
        else:
            mask_BP = mask_BS.new_ones(len(mask_BS), len(self._prefix_ids))
            out = self._model.base_model(ids_BT, attention_mask=torch.cat([mask_BP, mask_BS], 1).long(), **given)
        hidden_BTH: Tensor = out.last_hidden_state
        return hidden_BTH

    @torch.inference_mode()
    def _read_prefix(self) -> DynamicCache:
        ids_BT = torch.tensor([self._prefix_ids], device=self.device)
        cache = DynamicCache()
        self._model.base_model(ids_BT, past_key_values=cache, use_cache=True)
        return cache

    def _share_prefix(self, layers: Sequence[Any]) -> None:
        """From here on all rows share the prefix, if that is found to change nothing."""
        ids_BT = torch.tensor([self._prefix_ids[:4]] * 2, device=self.device)
        mask_BT = torch.ones_like(ids_BT, dtype=torch.bool)
        wanted_BTH = self.advance(ids_BT, mask_BT, self.new_cache(2))
        AttentionInterface.register(_SHARED, _attend)
        self._blocks = [(layer.keys[0], layer.values[0]) for layer in layers]
        gap = (self.advance(ids_BT, mask_BT, self.new_cache(2)) - wanted_BTH).abs().max()
        if gap > torch.finfo(wanted_BTH.dtype).eps ** 0.5 * wanted_BTH.abs().max():
            self._blocks = []


@final
class Reading:
    """A batch of prompts that were read, their keys and values kept."""

    def __init__(self, reader: PrefixedReader, ids_BT: Int[Tensor, "B T"], mask_BT: Bool[Tensor, "B T"]) -> None:
        """Read the prompts behind the reader's prefix."""
        self.reader = reader
        self._cache = reader.new_cache(len(ids_BT))
        self._mask_BS = mask_BT
        self.last_BH = reader.advance(ids_BT, mask_BT, self._cache)[:, -1]

    @cached_property
    def first_BV(self) -> Float[Tensor, "B V"]:  # noqa: N802 - a tensor's dimensions stand in its name
        """Log-probabilities of the token after each prompt."""
        return self.reader.logprobs(self.last_BH)

    def feed(self, ids_BT: Int[Tensor, "B T"]) -> Float[Tensor, "B T H"]:
        """Read further tokens (padding on the right is harmless); return the hidden state at each of them."""
        self._mask_BS = torch.cat([self._mask_BS, torch.ones_like(ids_BT, dtype=torch.bool)], 1)
        return self.reader.advance(ids_BT, self._mask_BS, self._cache)

    def rewind(self, num_tokens: int) -> None:
        """Forget the last `num_tokens` columns."""
        if num_tokens:
            self._cache.crop(-num_tokens)
            self._mask_BS = self._mask_BS[:, :-num_tokens]

    def choice_logprobs(self, first_BV: Float[Tensor, "B V"], choices: Sequence[Sequence[int]]) -> Float[Tensor, "B C"]:
        """Log-probability of each choice's tokens as what follows; `first_BV` are those of its first token."""
        scores = []
        for ids in choices:
            score_B = first_BV[:, ids[0]]
            if len(ids) > 1:
                rest_BT = torch.tensor([ids[1:]] * len(first_BV), device=first_BV.device)
                fed_BT = torch.tensor([ids[:-1]] * len(first_BV), device=first_BV.device)
                logprobs_BTV = self.reader.logprobs(self.feed(fed_BT))
                score_B = score_B + logprobs_BTV.gather(-1, rest_BT.unsqueeze(-1)).sum((1, 2))
                self.rewind(len(ids) - 1)
            scores.append(score_B)
        return torch.stack(scores, -1)

    def greedy(self, *, max_new_tokens: int, stop: int) -> list[list[int]]:
        """Continue each prompt with the most likely tokens, up to and including `stop` or to the limit."""
        return self._continued(lambda logits_BV, _: logits_BV.argmax(-1, keepdim=True), max_new_tokens, stop)

    def sampled(
        self, *, uniforms_BN: Float[Tensor, "B N"], stop: int, temperature: float, top_p: float
    ) -> list[list[int]]:
        """Continue each prompt with drawn tokens, up to and including `stop`; the n-th is drawn by the n-th number.

        At most as many as there are numbers. A row of zeros gets the most likely tokens.
        """
        uniforms_BN = uniforms_BN.to(self.reader.device)

        def pick(logits_BV: Float[Tensor, "B V"], place: int) -> Int[Tensor, "B 1"]:
            return draw(logits_BV, uniforms_BN[:, place], temperature=temperature, top_p=top_p).unsqueeze(-1)

        return self._continued(pick, uniforms_BN.shape[1], stop)

    def _continued(self, pick: Pick, max_new_tokens: int, stop: int) -> list[list[int]]:
        written_BT = pick(self.reader.logits(self.last_BH), 0)
        while written_BT.shape[1] < max_new_tokens and not (written_BT == stop).any(1).all():
            last_BH = self.feed(written_BT[:, -1:])[:, -1]
            written_BT = torch.cat([written_BT, pick(self.reader.logits(last_BH), written_BT.shape[1])], 1)
        self.rewind(written_BT.shape[1] - 1)
        rows: list[list[int]] = written_BT.tolist()
        return [row[: row.index(stop) + 1] if stop in row else row for row in rows]


def draw(
    logits_BV: Float[Tensor, "B V"], uniform_B: Float[Tensor, "B"], *, temperature: float, top_p: float
) -> Int[Tensor, "B"]:
    """A token for each row by its number in [0, 1), from softmax(logits / temperature) cut to the nucleus.

    The nucleus is the smallest set of the most probable tokens that has `top_p` of the mass (Holtzman et al. 2020,
    arXiv 1904.09751, eq. 2). The distribution function runs from the most probable token down, so 0 draws that one.
    """
    ordered_BV, ids_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    # From the greatest down, so that no temperature is too low; summed in double, so that no token is lost.
    mass_BV = ((ordered_BV - ordered_BV[:, :1]).double() / temperature).softmax(-1).cumsum(-1)
    last_B1 = (mass_BV < top_p).sum(-1, keepdim=True).clamp(max=mass_BV.shape[1] - 1)
    point_B1 = uniform_B.unsqueeze(-1) * mass_BV.gather(-1, last_B1)
    return ids_BV.gather(-1, torch.searchsorted(mass_BV, point_B1)).squeeze(-1)


def _causal(mask_BS: Bool[Tensor, "B S"], num_new: int) -> Bool[Tensor, "B 1 T S"]:
    """Which of a row's own tokens each of its last `num_new` tokens may look at."""
    place_S = torch.arange(mask_BS.shape[1], device=mask_BS.device)
    earlier_TS = place_S <= place_S[-num_new:].unsqueeze(-1)
    return mask_BS[:, None, None, :] & earlier_TS


@contextmanager
def _attending(config: Any, implementation: str) -> Iterator[None]:
    before = config._attn_implementation
    config._attn_implementation = implementation
    try:
        yield
    finally:
        config._attn_implementation = before


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
    """Attention as `transformers` calls it: query [B, R G, T, D]; key and value [B, G, S, D]; R queries share a key."""
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
    """One product per group for all rows together, where broadcasting would copy `right` for each."""
    num_rows, num_groups, num_queries, _ = left.shape
    product = left.transpose(0, 1).reshape(num_groups, num_rows * num_queries, -1) @ right
    return product.view(num_groups, num_rows, num_queries, -1).transpose(0, 1)
