"""A student whose weights are shared out over processes, by torch's FSDP2.

Zhao et al., PyTorch FSDP (https://arxiv.org/abs/2304.11277): each process keeps a part of every weight, and has the
whole ones for as long as a layer is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, final

from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard

from distill.student import layer_list

Model = TypeVar("Model", bound=nn.Module)


@final
class Pass(nn.Module):
    """A model, and whatever is computed of it as one forward pass: only within one are the weights of a part whole.

    The loss needs the weight of the output head, and the head's own forward is never called.
    """

    def __init__(self, model: nn.Module) -> None:
        """`model` may be sharded later."""
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[], Any]) -> Any:
        """What the work gives."""
        return work()


def shard(whole: Pass) -> None:
    """Share the weights out over all processes, in place: each layer's by themselves, then all others together."""
    body: Any = whole.model.base_model
    if name := layer_list(whole.model):  # type: ignore[arg-type]
        for layer in getattr(body, name):
            fully_shard(layer)
    fully_shard(whole)


def in_one_piece(model: Model, fresh: Callable[[], Model]) -> Model:
    """The model, or where it is sharded a fresh one with its weights, on the first process; on the others without.

    All processes have to call it, since each gives its part.
    """
    if not any(isinstance(part, FSDPModule) for part in model.modules()):
        return model
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    whole = fresh()
    if weights:
        whole.load_state_dict(weights)
    return whole
