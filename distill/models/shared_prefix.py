"""Attention to a prefix that all rows share: its keys and values are never copied.

The queries of all rows attend to two blocks of keys: those of the prefix, shared by all rows, and those of their
own row. The scores of both go through one softmax, so this is plain attention (Hydragen, Juravsky et al. 2024,
arXiv 2402.05099):

    softmax([Q K_prefix', Q K_own']) [V_prefix; V_own]
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import AttentionInterface

_SHARED = "distill_shared_prefix"
Blocks = list[tuple[Tensor, Tensor]]  # the prefix's keys and values [G, P, D] by layer

# Arguments that change nothing here: dropout is off, and the mask says what is causal.
_WITHOUT_EFFECT = frozenset(
    {
        "cache_position",
        "dropout",
        "is_causal",
        "output_attentions",
        "output_hidden_states",
        "position_ids",
        "return_dict",
        "sliding_window",  # a text longer than the window is not read with shared attention
        "use_cache",
    }
)


@contextmanager
def shared_attention(config: Any) -> Iterator[None]:
    """Within the block, a model with this configuration attends to its argument `shared_prefix`, of type `Blocks`."""
    AttentionInterface.register(_SHARED, _attend)
    previous = config._attn_implementation
    config._attn_implementation = _SHARED
    try:
        yield
    finally:
        config._attn_implementation = previous


def causal_mask(mask_BS: Bool[Tensor, "B S"], num_new: int) -> Bool[Tensor, "B 1 T S"]:
    """Which tokens of its own row each of the last `num_new` tokens attends to."""
    position_S = torch.arange(mask_BS.shape[1], device=mask_BS.device)
    earlier_TS = position_S <= position_S[-num_new:].unsqueeze(-1)
    return mask_BS[:, None, None, :] & earlier_TS


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    *,
    scaling: float,
    shared_prefix: Blocks,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention, called by `transformers`: query [B, R G, T, D]; key, value [B, G, S, D]; R query heads share a key.

    Raises TypeError for an argument that may change the attention, such as a soft cap or sinks.
    """
    if unknown := [name for name, value in others.items() if value is not None and name not in _WITHOUT_EFFECT]:
        raise TypeError(f"shared attention does not support {unknown}")
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
