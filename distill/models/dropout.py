"""Dropout of a model, wherever its configuration has a probability of it."""

from __future__ import annotations

import re
from collections.abc import Iterator

from transformers import PreTrainedConfig

from distill.errors import ConfigError

_PROBABILITY = re.compile(r"dropout|_pdrop$")  # hidden_dropout_prob, attention_dropout, resid_pdrop, ...


def set_dropout(config: PreTrainedConfig, probability: float) -> None:
    """Set every probability of dropout in a configuration; raise ConfigError if it has none.

    One that is null follows another, and still does.
    """
    places = [(part, name) for part in _parts(config) for name in _probabilities(part)]
    if not places:
        raise ConfigError(
            f"student.dropout={probability}: the configuration of a {config.model_type} model has no dropout; set "
            "student.dropout=null"
        )
    for part, name in places:
        setattr(part, name, probability)


def copy_dropout(config: PreTrainedConfig, source: PreTrainedConfig) -> None:
    """Give the parts of a configuration the probabilities of dropout that the same parts of another one have."""
    sources = {type(part): part for part in _parts(source)}
    for part in _parts(config):
        for name, probability in _probabilities(sources[type(part)]).items():
            setattr(part, name, probability)


def _parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """Yield a configuration and those in it, such as that of the language model among images."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _parts(value)


def _probabilities(config: PreTrainedConfig) -> dict[str, float]:
    return {
        name: value
        for name, value in vars(config).items()
        if _PROBABILITY.search(name) and isinstance(value, int | float) and not isinstance(value, bool)
    }
