"""What identifies a part: everything that its constructor was given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Fingerprinted(Protocol):
    """A part with a fingerprint."""

    def fingerprint(self) -> Any:
        """Everything that the part's results depend on, as JSON values."""
        ...


def arguments_of(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a constructor, given the `locals()` at its start."""
    return {name: value for name, value in variables.items() if name != "self"}


def fingerprint_of(part: object, arguments: Mapping[str, Any], **contents: Any) -> dict[str, Any]:
    """Return the name of a part's class and its constructor's arguments as JSON values.

    A part keeps the `arguments_of` its constructor, so a new parameter is in the fingerprint without further code.
    Only those that the class lists in `not_in_key` are left out. `contents` replace arguments that say where something
    is by what it is, such as a path by a hash. Raises TypeError for an argument of another type.
    """
    excluded = getattr(part, "not_in_key", ())
    named = {name: value for name, value in arguments.items() if name not in excluded} | contents
    return {"part": type(part).__name__} | {name: _plain(value) for name, value in named.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Fingerprinted):
        return value.fingerprint()
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(f"{value!r} has no JSON form; give its content instead, or list the parameter in not_in_key")
