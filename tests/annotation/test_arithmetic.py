"""False equations in rationales are detected; anything that cannot be evaluated is ignored."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.annotation.rationales import has_wrong_arithmetic
from tests.annotation.conftest import reason_for

WRONG = [
    "84 / 2 = 41.",
    "9 * 2 = $19",
    "5 x 3 = 16",
    "5x3=16",
    "5 * 3 equals 16",
    "6 ÷ 2 × 4 = 11",
    "2 − 3 = 1",
    "1,000 + 2,500 = 3,600",
    "$1.50 + $2 = $3.60",
    "1.5 + 2 = 4",
    "10 / 3 = 3.34",
    "10 / 3 = 3",
    "20% * 50 = 11",
    "20% + 30% = 60%",
    "50 - 20% = 41",
    "1 / 3 = 34%",
    "(2 + 3) * 4 = 21",
    "He has 9 (5 + 3 = 9).",
    "[5 + 3 = 9]",
    "2 + 3 = 5 - 1 = 3",
    "2 + 3 = 6 - 2 = 4",
    "2 + 3 = 5 + 1",
    "5 + 3 = 8 and 8 - 2 = 7",
    "Total = 5 + 3 = 9",
    "x + 3 = 2 + 5 = 8",
    "**5 + 3 = 9**",
    "- 5 + 3 = 9",
    "1) 3 + 5 = 9",
    "<<5+3=9>>9",
    "First 5 + 3 = 8.\nThen 8 - 1 = 6.",
]


RIGHT = [
    "84 / 2 = 42.",
    "9 * 2 = $18",
    "5 x 3 = 15",
    "6 ÷ 2 × 4 = 12",
    "5 - -3 = 8",
    "-5 + 8 = 3",
    "1,000 + 2,500 = 3,500",
    "$1.50 + $2 = $3.50",
    "10 / 3 = 3.33",
    "2/3 = 0.67",
    "20% * 50 = 10",
    "20% + 30% = 50%",
    "50 - 20% = 40",
    "1 / 3 = 33.3%",
    "20/80 * 100 = 25%",
    "1/2 + 1/3 = 5/6",
    "(2 + 3) * 4 = 20",
    "((2 + 3) * 4 = 20)",
    "2 + 3 = 5 - 1 = 4",
    "2 + 3 = 4 + 1 = 5",
    "The total is 3 x $4 = $12.",
    "- 5 + 3 = 8",
    "<<5+3=8>>8",
]


IGNORED = [
    "x = 4",
    "3 feet = 1 yard",
    "5 apples + 3 apples = 8 apples",
    "5 apples + 3 * 2 = 11",
    "apples - 3 = 2 + 5 = 7",
    "2 + 3 = 4 + apples",
    "4 * (2 apples + 3) = 20",
    "2(3 + 4) = 14",
    "(2 + 3) (4 + 1) = 25",
    "f(3 + 5) = 64",
    "20% of 50 + 10 = 20",
    "half of 3 + 5 = 4",
    "5! - 3 + 1 = 118",
    "2^3 + 1 = 9",
    "2**3 + 1 = 9",
    "10:30 + 45 = 11:15",
    "3 1/2 + 1 = 4.5",
    "1,5 + 2 = 3,5",
    "7 / 2 = 3 remainder 1",
    "7 / 2 = 3 r 1",
    "7 / 2 = 3 and 1 is left",
    "5 * 1000 = 5 thousand",
    "5 + 3 != 9",
    "5 / 0 = 3",
    "9" * 300 + " + 1 = 2",
]


@pytest.mark.parametrize("text", WRONG)
def test_false_equations_are_detected(text: str) -> None:
    assert has_wrong_arithmetic(text)
    assert reason_for(f"So it goes on. {text}" if "\n" not in text and text[0] != "-" else text, arithmetic=True) == (
        "wrong arithmetic"
    )


@pytest.mark.parametrize("text", [*RIGHT, *IGNORED])
def test_true_equations_and_those_that_cannot_be_evaluated_pass(text: str) -> None:
    assert not has_wrong_arithmetic(text)
    assert reason_for(text, arithmetic=True) is None


@given(
    st.integers(0, 999),
    st.sampled_from("+-*/"),
    st.integers(1, 999),
    st.integers(0, 3),
    st.integers(-3, 3),
    st.booleans(),
)
def test_an_equation_is_true_exactly_if_its_result_is_rounded_correctly(
    a: int, sign: str, b: int, digits: int, error: int, in_dollars: bool
) -> None:
    exact = {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[sign]
    result = round(exact, digits) + error * 10**-digits
    text = f"{a} {sign} {b} = {'$' if in_dollars else ''}{result:.{digits}f}".replace("$-", "-$")
    written = float(f"{result:.{digits}f}")
    gap = abs(written - exact)
    if digits and math.isclose(gap, 0.5 * 10**-digits, rel_tol=1e-6):
        return  # halves may be rounded up or down
    assert has_wrong_arithmetic(text) == (gap > (0.5 * 10**-digits if digits else 1e-9))
