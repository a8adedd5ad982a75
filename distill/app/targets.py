"""Which names a `_target_` node may have, and whether its values fit the signature."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_type_hints

# Only classes and functions that run no code given to them; torch.load and Lightning's instantiate_class would.
_ALLOWED = re.compile(
    r"distill\.|torch\.optim\.|torch\.distributed\.fsdp\.|transformers\.(get_\w*schedule\w*$|optimization\.)|peft\.\w+Config$"
    r"|lightning\.(Trainer$|pytorch\.(Trainer$|callbacks\.|loggers\.|plugins\.|profilers\.|strategies\.))"
)
_ALLOWED_TEXT = (
    "distill, torch.optim, torch.distributed.fsdp, lightning.Trainer, callbacks, loggers, plugins, profilers and "
    "strategies of lightning.pytorch, schedules of transformers, configurations of peft"
)


def nodes(value: Any, path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """All `_target_` nodes of a nested value, each with its dotted path."""
    if isinstance(value, dict):
        if "_target_" in value:
            yield path, value
        for key, item in value.items():
            yield from nodes(item, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from nodes(item, f"{path}[{index}]")


def problems_of(node: Mapping[str, Any]) -> list[str]:
    """All problems of a `_target_` node."""
    name = str(node["_target_"])
    if not _ALLOWED.match(name):
        return [f"_target_ {name} is not from {_ALLOWED_TEXT}"]
    try:
        target = _locate(name)
    except (ImportError, AttributeError) as error:
        hint = "; pip install 'distill[lora]'" if error.name == "peft" else ""
        return [f"_target_ {name} does not exist: {error}{hint}"]
    if getattr(target, "__module__", "").partition(".")[0] != name.partition(".")[0]:
        return [f"_target_ {name} is imported there, not defined there; name it where it is defined"]
    values = {key: value for key, value in node.items() if not key.startswith("_")}
    parameters = inspect.signature(target).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return []
    problems = [f"{name} has no parameter {key!r}{suggest(key, parameters)}" for key in values if key not in parameters]
    required = [key for key, p in parameters.items() if p.default is p.empty and p.kind is not p.VAR_POSITIONAL]
    if not node.get("_partial_"):
        problems += [f"{name} requires {key!r}" for key in required if key not in values]
    return problems + _check_types(target, name, values)


def _check_types(target: Any, name: str, values: Mapping[str, Any]) -> list[str]:
    if not name.startswith("distill."):
        return []
    from pydantic import ConfigDict, TypeAdapter, ValidationError  # here, so that a misspelt key is reported sooner

    hints = get_type_hints(target.__init__ if inspect.isclass(target) else target, include_extras=True)
    problems = []
    for key, value in values.items():
        is_unresolved = isinstance(value, str) and "${" in value  # refers to a missing value
        if key in hints and not is_unresolved and not (isinstance(value, dict) and "_target_" in value):
            try:
                TypeAdapter(hints[key], config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
            except ValidationError as error:
                problems.append(f"{key}={value!r}: {error.errors()[0]['msg']}")
    return problems


def _locate(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def suggest(word: str, candidates: Iterable[str]) -> str:
    """The end of a message: the candidate that is closest to a misspelt word, if one is close."""
    close = difflib.get_close_matches(word, list(candidates), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""
