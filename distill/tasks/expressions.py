"""Numbers and arithmetic in text: + - * / and brackets, evaluated exactly and without running any code."""

from __future__ import annotations

import ast
import operator
import re
from fractions import Fraction

# Digits with an optional thousands comma and fraction, taken whole: `7,000`, `3.5`, `.5`.
NUMBER = r"(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?!\d)"
ASCII_SIGNS = str.maketrans({"×": "*", "÷": "/", "−": "-", "–": "-", "[": "(", "]": ")", "$": None})
_MAX_CHARACTERS = 200
_PLAIN = re.compile(r"[0-9.+\-*/() ]+")
_OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def evaluate_expression(text: str) -> Fraction:
    """Evaluate an expression exactly. Thousands commas and $ are ignored; ValueError if the text is no expression."""
    plain = text.translate(ASCII_SIGNS).replace(",", "").strip()
    if len(plain) > _MAX_CHARACTERS:
        raise ValueError(f"an expression of {len(plain)} characters; at most {_MAX_CHARACTERS} are evaluated")
    if not _PLAIN.fullmatch(plain):
        raise ValueError(f"{text[:60]!r} is not an arithmetic expression")
    try:
        return _value(ast.parse(plain, mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError, ZeroDivisionError, OverflowError) as error:
        raise ValueError(f"{text[:60]!r} cannot be evaluated: {error}") from None


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        return _value(node.operand) * (-1 if isinstance(node.op, ast.USub) else 1)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        result: Fraction = _OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
        return result
    raise ValueError(f"{ast.unparse(node)[:60]!r} is not an arithmetic expression")
