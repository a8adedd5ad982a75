"""Factors of the learning rate: lower layers may learn more slowly than upper ones, and new weights faster.

Howard and Ruder 2018 (ULMFiT, https://arxiv.org/abs/1801.06146), section 3.2: a factor from layer to layer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from distill.errors import ConfigError
from distill.students.layers import layers_of

_EMBEDDING = re.compile(r"emb|wte|wpe")  # in the name of what reads tokens and positions, below the first layer
Rates = list[tuple[list[nn.Parameter], float]]


def rates(model: Any, *, layer_decay: float, new: Sequence[nn.Parameter] = (), new_factor: float = 1.0) -> Rates:
    """Group a model's parameters by the factor of their learning rate, highest factor last.

    A layer has `layer_decay` times the rate of the next one, and the embedding that of the first layer; what stands
    behind the last layer has the whole rate, or `new_factor` times it if it is in `new`.
    """
    layers = layers_of(model) if layer_decay != 1 else None
    if layer_decay != 1 and layers is None:
        raise ConfigError(f"{type(model).__name__} has no known list of layers; set student.kind.layer_decay=1")
    depth = len(layers or ())
    factor_of = {
        id(p): layer_decay ** (depth - 1 - n) for n, layer in enumerate(layers or ()) for p in layer.parameters()
    }
    factor_of |= {id(parameter): new_factor for parameter in new}
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        outside = layer_decay**depth if _EMBEDDING.search(name) else 1.0
        groups.setdefault(factor_of.get(id(parameter), outside), []).append(parameter)
    return [(groups[factor], factor) for factor in sorted(groups)]
