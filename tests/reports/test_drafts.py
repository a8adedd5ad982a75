"""How good a draft of its teacher the best student is, in one sentence."""

from __future__ import annotations

import random

import pytest

from distill.reports.sentences import draft_lines, tokens_per_pass
from distill.reports.text import to_text
from tests.reports.conftest import Make, summary_of


@pytest.mark.parametrize(("acceptance", "number"), [(0.0, 4), (0.5, 4), (0.8, 2), (1.0, 4)])
def test_the_expected_tokens_are_those_of_simulated_passes(acceptance: float, number: int) -> None:
    drawn, total, num_passes = random.Random(0), 0, 20_000
    for _ in range(num_passes):
        accepted = 0
        while accepted < number and drawn.random() < acceptance:
            accepted += 1
        total += accepted + 1  # the teacher's own token
    assert tokens_per_pass(acceptance, number) == pytest.approx(total / num_passes, abs=0.03)
    if acceptance < 1:
        closed_form = (1 - acceptance ** (number + 1)) / (1 - acceptance)
        assert tokens_per_pass(acceptance, number) == pytest.approx(closed_form)


def test_the_best_draft_has_a_sentence_with_means_over_its_seeds(make_run: Make) -> None:
    bounds = {("answer",): [(0.3, 0.9)], ("kl",): [(0.5, 0.6), (0.7, 0.8)]}
    folders = [
        make_run(losses, seed=seed, student={"acceptance_low": low, "acceptance_high": high})
        for losses, seeds in bounds.items()
        for seed, (low, high) in enumerate(seeds)
    ]
    summary = summary_of(*folders)
    (line,) = draft_lines(summary.trained)
    assert line == (
        "As a draft of its teacher in speculative decoding at temperature 1, kl would have 60.0 to 70.0 % of its "
        "tokens accepted along the teacher's answers: the teacher writes 2.31 to 2.77 tokens in a pass instead of one, "
        "with 4 drafted in each."
    )
    assert "speculative" not in to_text(summary)  # an answer of a word needs no draft


def test_equal_bounds_are_one_number(make_run: Make) -> None:
    run = make_run(("kl",), student={"acceptance_low": 0.6, "acceptance_high": 0.6})
    (line,) = draft_lines(summary_of(run).trained)
    assert "60.0 % of its tokens" in line
    assert "writes 2.31 tokens" in line


@pytest.mark.parametrize("student", [{}, {"acceptance_low": None, "acceptance_high": None}])
def test_a_student_that_was_not_compared_token_by_token_is_no_draft(make_run: Make, student: dict[str, None]) -> None:
    assert not draft_lines(summary_of(make_run(("kl",), student=student)).trained)
