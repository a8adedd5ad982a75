"""Arms whose configurations differ in one section are compared."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from distill.reports.page import to_html
from distill.reports.statistics import family_level, paired_interval
from distill.reports.text import to_markdown, to_text
from tests.reports.conftest import CONFIG, Make, Page, summary_of


def test_arms_that_differ_in_one_section_are_compared(make_run: Make) -> None:
    folders = [
        make_run(losses, accuracy + 0.01 * seed, seed, config=CONFIG | {"order": order} | more)
        for losses, order, more, accuracy in (
            (("answer", "kl"), "shuffled", {}, 0.7),
            (("answer", "kl"), "short_first", {}, 0.6),
            (
                ("answer", "kl"),
                "short_first",
                {"balance": "answer"},
                0.65,
            ),  # two sections from the first
            (("answer", "rationale"), "shuffled", {}, 0.5),  # other losses than the first
        )
        for seed in (0, 1, 2)
    ]
    summary = summary_of(*folders)
    contrasts = {contrast.change: contrast for contrast in summary.contrasts}
    assert set(contrasts) == {"order=shuffled, not short_first", "balance=none, not answer"}
    contrast = contrasts["order=shuffled, not short_first"]
    arms = {(arm.choices["order"], arm.choices["balance"]): arm for arm in summary.trained if "kl" in arm.losses}
    first, second = (
        np.array([[line["is_correct"] for line in run.predictions] for run in arms[order, "none"].runs], np.float64)
        for order in ("shuffled", "short_first")
    )
    expected = paired_interval(first, second, level=family_level(0.95, 2))
    assert contrast.difference.arm is arms["shuffled", "none"]
    assert contrast.difference.points == pytest.approx(100 * expected.estimate) == pytest.approx(10)
    assert contrast.difference.ends == pytest.approx((100 * expected.low, 100 * expected.high))
    assert contrast.difference.status == "better"
    for text in (to_text(summary), to_markdown(summary), Page(to_html(summary)).text):
        assert "changed setting" in text
        assert "97.5 % interval" in text
        assert contrast.change in re.sub(r"[\\\s]+", " ", text).replace(" _", "_").replace(" =", "=")


def changes(*folders: Path) -> list[str]:
    return [contrast.change for contrast in summary_of(*folders).contrasts]


def test_several_settings_of_one_section_are_one_change(make_run: Make) -> None:
    settings = ({"arithmetic": True, "min_words": 3}, {"arithmetic": False, "min_words": 5})
    folders = [make_run(config=CONFIG | {"rationales": rationales}) for rationales in settings]
    assert changes(*folders) == ["rationales.arithmetic=True, not False; rationales.min_words=3, not 5"]


def test_arms_on_other_tests_are_not_contrasted(make_run: Make) -> None:
    orders = [{"config": CONFIG | {"order": order}} for order in ("shuffled", "short_first")]
    counts = {"train": 2100, "labelled": 100, "test": 400}
    assert len(changes(*(make_run(**order) for order in orders))) == 1
    assert changes(make_run(**orders[0]), make_run(**orders[1], counts=counts)) == []


def test_a_verdict_is_never_cut_however_long_the_labels_of_its_arms(make_run: Make) -> None:
    settings = {f"setting_{k}": f"a rather long value {k}" for k in range(5)}
    rationales = [{name: f"{value} {end}" for name, value in settings.items()} for end in ("a", "b")]
    summary = summary_of(make_run(("answer",)), *(make_run(config={"rationales": settings}) for settings in rationales))
    page = Page(to_html(summary)).text
    for verdict in summary.verdicts:
        assert len(verdict.sentence) > 500
        assert verdict.sentence in page


def test_too_many_pairs_of_arms_are_not_compared(make_run: Make) -> None:
    folders = [make_run(accuracy=0.7, config={"order": f"order {k}"}) for k in range(9)]
    assert len(summary_of(*folders[:8]).contrasts) == 28
    summary = summary_of(*folders)
    assert summary.contrasts == ()
    assert "36 pairs of arms differ in one section of the configuration: too many to compare." in to_text(summary)
