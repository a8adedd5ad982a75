"""The body of a model, without its head, and a prefix that it has read: one call per block of tokens."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from distill.errors import ConfigError
from distill.models.loading import MODEL_ERRORS
from distill.models.shared_prefix import Blocks, causal_mask, shared_attention

_POSITIONS = ("max_position_embeddings", "max_target_positions", "max_seq_len")  # a family has one of these names
_WINDOW = re.compile(r"(window|attention_chunk)(_size|_len|_length)?$")
# How texts are read, fastest first. Which one a model allows is a matter of its architecture, see `verification`.
#   batched   rows padded on the left, one cache
#   grouped   rows of equal length together, without padding, a cache for each length
#   stepwise  the same, but only single tokens follow a cache; prompts and texts are read whole
#   plain     one row at a time, without a cache
Way = Literal["batched", "grouped", "stepwise", "plain"]


@final
class Body:
    """A model's body after a prefix."""

    def __init__(self, model: Any, prefix_ids: Sequence[int], way: Way) -> None:
        """Read the prefix, unless the way is to read every text whole."""
        self.way, self.prefix_ids = way, tuple(prefix_ids)
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        self._model = model
        parameters = inspect.signature(model.base_model.forward).parameters
        self._takes_any = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
        self._parameters = frozenset(parameters)
        self.max_positions = max_positions(model.config)
        self.window = _attention_window(model.config)
        self._blocks: Blocks = []  # the prefix's keys and values, if all rows share them
        self._prefix: DynamicCache | None = None
        if prefix_ids and way in ("batched", "grouped"):
            self._check_length(len(prefix_ids))
            self._prefix = _empty_cache(model.config)
            self._call(torch.tensor([self.prefix_ids], device=self.device), past_key_values=self._prefix)
        if self._prefix is not None and way == "batched" and type(model)._supports_attention_backend:
            self._share_prefix(self._prefix)

    @property
    def shares_prefix(self) -> bool:
        """Whether all rows read one copy of the prefix."""
        return bool(self._blocks)

    def fits_window(self, num_tokens: int) -> bool:
        """Whether padding between the prefix and texts of this length is out of reach of a limited attention."""
        return self.window is None or len(self.prefix_ids) + num_tokens <= self.window

    def new_cache(self, num_rows: int) -> DynamicCache:
        """A cache of `num_rows` rows that have read only the prefix."""
        if self._prefix is None or self._blocks:
            return _empty_cache(self._model.config)
        return self._copied_prefix(num_rows)

    def advance(
        self, ids_BT: Int[Tensor, "B T"], mask_BS: Bool[Tensor, "B S"], cache: DynamicCache
    ) -> Float[Tensor, "B T H"]:
        """Read the last T of the S tokens of `mask_BS`, padded, the others being in `cache`; return hidden states."""
        num_new = ids_BT.shape[1]
        self._check_length(len(self.prefix_ids) + mask_BS.shape[1])
        positions_BS = (len(self.prefix_ids) + mask_BS.cumsum(1) - 1).clamp(min=0)
        arguments = {"position_ids": positions_BS[:, -num_new:], "past_key_values": cache}
        if self._blocks:
            with shared_attention(self._model.config):
                mask_B1TS = causal_mask(mask_BS, num_new)
                return self._call(ids_BT, attention_mask=mask_B1TS, shared_prefix=self._blocks, **arguments)
        if self._prefix is None and num_new == mask_BS.shape[1] and mask_BS[:, 0].all():
            # No prefix, padding on the right: without a mask, attention kernels use their built-in causal mask.
            return self._call(ids_BT, **arguments)
        mask_BP = mask_BS.new_ones(len(mask_BS), len(self.prefix_ids))
        return self._call(ids_BT, attention_mask=torch.cat([mask_BP, mask_BS], 1).long(), **arguments)

    def begin(self, ids_BT: Int[Tensor, "B T"]) -> tuple[Float[Tensor, "B T H"], DynamicCache | None]:
        """Read rows of equal length after the prefix, without padding; return hidden states and the cache."""
        self._check_length(len(self.prefix_ids) + ids_BT.shape[1])
        if self._prefix is not None:
            cache = self._copied_prefix(len(ids_BT))
            return self._call(ids_BT, past_key_values=cache), cache
        whole_BT = torch.cat([ids_BT.new_tensor(self.prefix_ids).expand(len(ids_BT), -1), ids_BT], 1)
        if self.way == "plain":
            rows = [self._call(ids_T.unsqueeze(0), use_cache=False) for ids_T in whole_BT]
            return torch.cat(rows)[:, len(self.prefix_ids) :], None
        new = _empty_cache(self._model.config)
        return self._call(whole_BT, past_key_values=new)[:, len(self.prefix_ids) :], new

    def proceed(self, ids_BT: Int[Tensor, "B T"], num_read: int, cache: DynamicCache) -> Float[Tensor, "B T H"]:
        """Read further tokens of rows of equal length, of which `num_read` tokens and the prefix are in `cache`."""
        self._check_length(len(self.prefix_ids) + num_read + ids_BT.shape[1])
        return self._call(ids_BT, past_key_values=cache)

    @torch.inference_mode()
    def _call(self, ids_BT: Int[Tensor, "B T"], **arguments: Any) -> Float[Tensor, "B T H"]:
        """Call the body with those of the arguments that it takes."""
        arguments = {"use_cache": True} | arguments
        taken = arguments if self._takes_any else {n: a for n, a in arguments.items() if n in self._parameters}
        hidden_BTH: Tensor = self._model.base_model(ids_BT, **taken).last_hidden_state
        return hidden_BTH

    def _copied_prefix(self, num_rows: int) -> DynamicCache:
        assert self._prefix is not None
        return copied_rows(self._prefix, [0] * num_rows, self.device)

    def _share_prefix(self, prefix: DynamicCache) -> None:
        """Share the prefix between all rows, unless this fails or changes hidden states."""
        ids_BT = torch.tensor([self.prefix_ids[:4]] * 2, device=self.device)
        mask_BT = torch.ones_like(ids_BT, dtype=torch.bool)
        expected_BTH = self.advance(ids_BT, mask_BT, self.new_cache(2))
        try:
            self._blocks = [(layer.keys[0], layer.values[0]) for layer in prefix.layers]  # type: ignore[index, union-attr]
            gap = (self.advance(ids_BT, mask_BT, self.new_cache(2)) - expected_BTH).abs().max()
        except torch.OutOfMemoryError:
            raise
        except MODEL_ERRORS:  # another attention: narrower values, sinks, states
            self._blocks = []
            return
        if not gap <= torch.finfo(expected_BTH.dtype).eps ** 0.5 * expected_BTH.abs().max():
            self._blocks = []

    def _check_length(self, num_tokens: int) -> None:
        check_length(self._model, num_tokens)


def copied_rows(cache: DynamicCache, rows: Sequence[int], device: torch.device) -> DynamicCache:
    """A new cache with these rows of another one, which stays as it is."""
    copied = copy.copy(cache)
    # A layer of keys and values only replaces its tensors; others change theirs, or hold them in containers.
    copied.layers = [copy.copy(x) if type(x) is DynamicLayer else copy.deepcopy(x) for x in cache.layers]
    copied.reorder_cache(torch.tensor(rows, dtype=torch.long, device=device))  # type: ignore[arg-type]
    return copied


def check_length(model: Any, num_tokens: int) -> None:
    """Raise ConfigError if a text of this length exceeds the positions of a model."""
    limit = max_positions(model.config) if hasattr(model, "config") else None
    if limit is not None and num_tokens > limit:
        raise ConfigError(
            f"a text of {num_tokens} tokens, demonstrations included, exceeds the {limit} positions of "
            f"{type(model).__name__}; lower prompt.num_shots or prompt.max_length, or use a model with more positions"
        )


def max_positions(config: Any) -> int | None:
    """Number of positions that a model supports, None if its configuration has no limit.

    Dynamic and long rotary embeddings turn all positions of a text by its length once it is longer than their original
    length, so a token's logits would depend on the tokens after it and on the other rows; such texts are not supported.
    """
    settings = config.get_text_config()
    limits = [getattr(settings, name, None) for name in _POSITIONS]
    limit = next((limit for limit in limits if isinstance(limit, int) and limit > 0), None)
    if limit is None:
        return None
    rope = getattr(settings, "rope_parameters", None) or {}
    kinds = [rope] if "rope_type" in rope else [kind for kind in rope.values() if isinstance(kind, dict)]
    return min((_rotary_limit(kind, settings, limit) for kind in kinds), default=limit)


def _rotary_limit(rope: Mapping[str, Any], settings: Any, limit: int) -> int:
    """Number of positions with a rotary embedding, which may be more or fewer than those of the configuration."""
    own = rope.get("original_max_position_embeddings")
    original = int(own or getattr(settings, "original_max_position_embeddings", None) or limit)
    if rope.get("rope_type") in ("dynamic", "longrope"):
        return original
    if rope.get("rope_type") in ("linear", "yarn"):
        return max(limit, int(original * float(rope.get("factor") or 1)))
    return limit


def _attention_window(config: Any) -> int | None:
    """The smallest number of tokens that a layer attends to, None if all attend to all.

    The cache knows most windows. Where it does not, as of GPT-Neo, the configuration's numbers of that name count.
    """
    named = [value for name, value in config.get_text_config(decoder=True).to_dict().items() if _WINDOW.search(name)]
    windows = {value for value in named if type(value) is int and value > 0}
    with suppress(*MODEL_ERRORS):
        layers = DynamicCache(config=config).layers
        windows |= {layer.sliding_window for layer in layers if isinstance(layer, DynamicSlidingWindowLayer)}
    return min(windows, default=None)


def _empty_cache(config: Any) -> DynamicCache:
    """A cache with a layer of the right kind for each layer of the model.

    Layers with limited attention keep all keys, and masks limit it: a cache that drops keys cannot be rewound.
    """
    try:
        cache = DynamicCache(config=config)
    except MODEL_ERRORS:
        return DynamicCache()
    only_keys = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
    return DynamicCache() if only_keys else cache
