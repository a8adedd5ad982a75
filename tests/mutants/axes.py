"""The axes of tensors, as far as their names tell: `logits_NV` has two, `logits_NV.sum(-1)` has one."""

from __future__ import annotations

import ast
import re

_SUFFIX = re.compile(r"_([A-Z][A-Z0-9]*)$")
_KEEPING = {"cumsum", "flip", "log_softmax", "softmax", "double", "float", "exp", "exp_", "log", "clamp", "sub_"}
_KEEPING |= {"gather", "scatter_"}
_REDUCING = {"amax", "argmax", "logsumexp", "sum", "squeeze"}
_CHANGES = dict.fromkeys(_KEEPING, 0) | dict.fromkeys(_REDUCING, -1) | {"unsqueeze": 1}
_JOINING = {"cat": 2, "stack": 1}  # functions of torch, and the axes of the parts of a matrix


def number(node: ast.expr) -> int | None:
    """The number of axes of an expression, None if its names do not tell."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            suffix = _SUFFIX.search(name)
            return len(suffix[1]) if suffix else None
        case ast.BinOp(left=left, right=right) | ast.Compare(left=left, comparators=[right]):
            return max((count for count in (number(left), number(right)) if count), default=None)
        case ast.Call(func=ast.Attribute(attr=method, value=tensor), keywords=keywords) if number(tensor) is not None:
            is_kept = any(keyword.arg == "keepdim" for keyword in keywords)
            return _changed(tensor, 0 if is_kept else _CHANGES.get(method))
        case ast.Subscript(value=tensor, slice=ast.Tuple(elts=places)):
            is_plain = all(isinstance(place, ast.Slice) or _is_whole(place) for place in places)
            return _changed(tensor, -sum(map(_is_whole, places)) if is_plain else None)
    return None


def is_last_of_a_matrix(node: ast.Call) -> bool:
    """Whether the last axis that a call names is the second one, of a matrix that it reads or makes."""
    if not isinstance(node.func, ast.Attribute):
        return False
    method, tensor = node.func.attr, node.func.value
    if method in _JOINING and node.args:
        return _part(node.args[0]) == _JOINING[method]
    if method == "unsqueeze":
        return number(tensor) == 1
    return method in _KEEPING | _REDUCING and number(tensor) == 2


def _part(parts: ast.expr) -> int | None:
    """The number of axes of a part of a list."""
    match parts:
        case ast.ListComp(elt=part) | ast.List(elts=[part, *_]):
            return number(part)
    return None


def _changed(tensor: ast.expr, change: int | None) -> int | None:
    count = number(tensor)
    return None if count is None or change is None else count + change


def _is_whole(place: ast.expr) -> bool:
    return isinstance(place, ast.Constant) and isinstance(place.value, int)
