"""The report: numbers that can be checked by hand, an honest verdict, and a page that no data can break."""

from __future__ import annotations

import re

import numpy as np
import pytest

from distill.reports.page import to_html
from distill.reports.statistics import family_level, paired_interval
from distill.reports.text import to_markdown, to_text
from tests.reports.conftest import PLAIN, Make, Page, summary_of


def test_arms_that_are_one_choice_apart_are_held_against_each_other(make_run: Make) -> None:
    folders = [
        make_run(losses, accuracy + 0.01 * seed, seed, config=PLAIN | {"order": order} | more)
        for losses, order, more, accuracy in (
            (("answer", "kl"), "shuffled", {}, 0.7),
            (("answer", "kl"), "short_first", {}, 0.6),
            (("answer", "kl"), "short_first", {"balance": "answer"}, 0.65),  # two from the first, one from the second
            (("answer", "rationale"), "shuffled", {}, 0.5),  # from the first only by its losses
        )
        for seed in (0, 1, 2)
    ]
    summary = summary_of(*folders)
    found = {each.choice: each for each in summary.contrasts}
    assert set(found) == {"order=shuffled, not short_first", "balance=none, not answer"}
    contrast = found["order=shuffled, not short_first"]
    arms = {(arm.choices["order"], arm.choices["balance"]): arm for arm in summary.trained if "kl" in arm.losses}
    first, second = (
        np.array([[line["is_correct"] for line in run.predictions] for run in arms[order, "none"].runs], np.float64)
        for order in ("shuffled", "short_first")
    )
    wanted = paired_interval(first, second, level=family_level(0.95, 2))
    assert contrast.difference.arm is arms["shuffled", "none"]
    assert contrast.difference.points == pytest.approx(100 * wanted.estimate) == pytest.approx(10)
    assert contrast.difference.ends == pytest.approx((100 * wanted.low, 100 * wanted.high))
    assert contrast.difference.status == "better"
    for text in (to_text(summary), to_markdown(summary), Page(to_html(summary)).text):
        assert "one choice apart" in text
        assert "97.5 % interval" in text
        assert contrast.choice in re.sub(r"[\\\s]+", " ", text).replace(" _", "_").replace(" =", "=")


def test_a_verdict_is_told_to_its_end_however_long_its_arms_are_called(make_run: Make) -> None:
    named = {f"setting_{k}": f"a rather long value {k}" for k in range(5)}
    rationales = [{name: f"{value} {end}" for name, value in named.items()} for end in ("a", "b")]
    summary = summary_of(make_run(("answer",)), *(make_run(config={"rationales": each}) for each in rationales))
    page = Page(to_html(summary)).text
    for verdict in summary.verdicts:
        assert len(verdict.sentence) > 500
        assert verdict.sentence in page


def test_a_sweep_of_many_choices_is_not_taken_apart_pair_by_pair(make_run: Make) -> None:
    folders = [make_run(accuracy=0.7, config={"order": f"order {k}"}) for k in range(9)]
    assert len(summary_of(*folders[:8]).contrasts) == 28
    summary = summary_of(*folders)
    assert summary.contrasts == ()
    assert "36 pairs of arms are one choice apart: too many to be held against each other." in to_text(summary)
