"""A student whose weights are shared out over processes, by torch's FSDP2.

Zhao et al., PyTorch FSDP (https://arxiv.org/abs/2304.11277): each process keeps a part of every weight, and has the
whole ones for as long as a layer is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard

from distill.students.causal_lm import layer_list


def shard(module: Any) -> None:
    """Share the weights of a module's model out over all processes, in place: each layer by itself, then the rest.

    Within the module's forward pass, and in the backward pass of that, the weights are whole.
    """
    for layer in getattr(module.model.base_model, layer_list(module.model) or "", ()):
        fully_shard(layer)
    fully_shard(module)


def in_one_piece(module: Any, fresh: Callable[[], nn.Module]) -> Any:
    """The module's model, or where that is sharded a fresh one with its weights, on the first process.

    All processes have to call it, since each gives its part; the others get one without these weights.
    """
    model, is_sharded = module.model, isinstance(module, FSDPModule)
    if not is_sharded:
        return model
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    whole = fresh()
    if weights:
        whole.load_state_dict(weights)
    return whole
