"""A student whose weights are sharded over processes with torch's FSDP2.

Zhao et al., PyTorch FSDP (https://arxiv.org/abs/2304.11277): each process holds a shard of every weight, and gathers
the whole weights of a layer only while that layer is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard

from distill.students.layers import layers_of


def shard(module: Any) -> None:
    """Shard the weights of a module's model over all processes, in place: layer by layer, then the rest.

    During the module's forward pass, and its backward pass, the weights are whole.
    """
    for layer in layers_of(module.model) or ():
        fully_shard(layer)
    fully_shard(module)


def gather_model(module: Any, fresh: Callable[[], nn.Module]) -> Any:
    """Return the module's model; if it is sharded, a fresh unsharded one with its weights, on the first process.

    All processes must call this, since each contributes its shard. On the other processes the fresh model does not
    have these weights.
    """
    is_sharded = isinstance(module, FSDPModule)
    if not is_sharded:
        return module.model
    weights = whole_weights(module)
    whole = fresh()
    if weights:
        whole.load_state_dict(weights)
    return whole


def whole_weights(module: Any) -> dict[str, Any]:
    """Return the weights of a module's model by name; if it is sharded, on the first process only."""
    model, is_sharded = module.model, isinstance(module, FSDPModule)
    if not is_sharded:
        return dict(model.named_parameters())
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
