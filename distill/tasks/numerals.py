"""Numbers and arithmetic in text, read whole or not at all, and their shortest spelling."""

from __future__ import annotations

import re
from collections.abc import Iterable
from decimal import Decimal
from fractions import Fraction

from distill.errors import AnswerError
from distill.tasks.expressions import ASCII_SIGNS, NUMBER, evaluate_expression

_MAX_DIGITS = 1000  # before or after the decimal point
_DASHES = "-‐‑‒–—−－"
_GROUP_SPACES = " \N{NO-BREAK SPACE}\N{THIN SPACE}\N{NARROW NO-BREAK SPACE}"
_MINUS = str.maketrans(dict.fromkeys("−－", "-"))
# Everything that belongs to one value, well formed or not: 1,234.5 and 1e-05; but also 1,5  1/2  1_000  1 000  2⁵  5½.
_NUMERAL = re.compile(
    rf"((?<![\w).])-)?[$€£¥₹]?((?<![0-9])(?:[0-9]{{1,3}}(?:[{_GROUP_SPACES}][0-9]{{3}})+(?![0-9])|\.?[0-9])"
    r"(?:[0-9]|[.,/⁄∕:^_'’]\.?[0-9]|[eE][+-]?[0-9]|[¼-¾⅐-⅞⁰¹²³⁴-⁹])*)"
)
_NUMBER = re.compile(rf"(?a:{NUMBER})(?:[eE][+-]?[0-9]+)?")
_UNIT_POWER = re.compile(r"(?<=[^\W\d_])[²³]")  # as in m²
_SIGN_APART = re.compile(rf"[{_DASHES}][\s$€£¥₹]*$")  # a minus before the number that the number's pattern left out
_SCALE = re.compile(
    r"\A(?:[kKMB]|[mb]n|mio|mrd)\b|\b(?:hundred|thousand|million|billion|trillion|dozen|half|minus|negative)s?\b",
    re.IGNORECASE,
)
_SYMBOL = re.compile(rf"\s*((?a:{NUMBER})|[-+*/()])")
_PART_OF_VALUE = re.compile(r"[\w^]|[.,:][0-9]")  # directly behind an expression: it goes on, as in 3x or 1,5
_COMPARISON = re.compile(r"[<>≤≥≠≈~±×÷^√∞]")


def read_number(index: int, text: str) -> tuple[str, str]:
    """Read the first (0) or last (-1) number; return it, and the text around it unless that is a mere unit.

    For the last number, only text after a last `####` counts as around it: the format of worked solutions.
    """
    plain = text.translate(_MINUS)
    numerals = list(_NUMERAL.finditer(plain))
    if not numerals:
        raise AnswerError(f"{text[:60]!r} has no number")
    numeral = numerals[index]
    if not _NUMBER.fullmatch(numeral[2]):
        raise AnswerError(f"{numeral[2][:60]!r} is not a plain number such as 1,234.5 or 1e-05")
    try:
        number = shortest(numeral[2])
    except ValueError as error:
        raise AnswerError(str(error)) from None
    before, behind = plain[: numeral.start()], plain[numeral.end() :]
    if index == -1:
        before = before.rpartition("####")[2]
    return (number if number == "0" else (numeral[1] or "") + number), _beyond_unit(before, behind)


def _beyond_unit(before: str, behind: str) -> str:
    """The text around a number if it may change the value, as further digits and "million" do; else nothing."""
    around = f"{before} {_UNIT_POWER.sub('', behind)}"
    may_change = any(c.isnumeric() for c in around) or _COMPARISON.search(around) or _SIGN_APART.search(before)
    return f"{before}…{behind}" if may_change or _SCALE.search(before) or _SCALE.search(behind) else ""


def shortest(number: str) -> str:
    """Write an unsigned number without thousands commas, insignificant zeros and exponent."""
    return plain_decimal(exact(number.replace(",", "")))


def exact(number: str) -> Decimal:
    """Parse a number exactly; ValueError if its exponent is beyond all bounds."""
    try:
        return Decimal(number)
    except ArithmeticError:
        raise ValueError(f"{number[:60]} has more than {_MAX_DIGITS:,} digits") from None


def plain_decimal(value: Decimal) -> str:
    """Write a number exactly, without exponent and insignificant zeros; ValueError if it has too many digits."""
    if abs(value.adjusted()) > _MAX_DIGITS:
        raise ValueError(f"{str(value)[:60]} has more than {_MAX_DIGITS:,} digits")
    text = format(value, "f") if value else "0"
    return text.rstrip("0").rstrip(".") if "." in text else text


def read_expression(text: str) -> tuple[str, str, Fraction]:
    """Read the arithmetic that the first line begins with; return it, the text behind it, and its exact value."""
    first_line, _, rest = text.strip().partition("\n")
    line, end, symbols = first_line.translate(ASCII_SIGNS), 0, list[str]()
    while match := _SYMBOL.match(line, end):
        symbols.append(match[1])
        end = match.end()
    try:
        expression = _format_expression(shortest(symbol) if symbol[-1].isdigit() else symbol for symbol in symbols)
        value = evaluate_expression(expression)
    except ValueError as error:
        raise AnswerError(f"{first_line[:60]!r} does not begin with an expression: {error}") from None
    if _PART_OF_VALUE.match(line, end):
        raise AnswerError(f"{first_line[:60]!r} begins with more than the expression {expression[:60]}")
    return expression, line[end:] + rest, value


def _format_expression(symbols: Iterable[str]) -> str:
    """Join symbols with single spaces around operators, none inside brackets or after a sign."""
    text, previous = "", "("
    for symbol in symbols:
        text += symbol if previous in ("(", "sign") or symbol == ")" else f" {symbol}"
        is_sign = symbol in ("+", "-") and previous in ("(", "sign", "operator")
        previous = "sign" if is_sign else "operator" if symbol in ("+", "-", "*", "/") else symbol
    return text
