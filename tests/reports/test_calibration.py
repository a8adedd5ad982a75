"""What calibration changed is stated for each arm whose students were calibrated."""

from __future__ import annotations

from typing import Any

import pytest

from distill.reports.page import to_html
from distill.reports.runs import read_run
from distill.reports.sentences import calibration_lines
from distill.reports.text import to_markdown, to_text
from distill.reports.verdicts import summarise
from tests.reports.conftest import CONFIG, Make, Page, summary_of

FACTS = {"temperature": 0.5, "ece": 0.04, "brier": 0.25, "ece_before": 0.14, "brier_before": 0.31}
OTHER = {"temperature": 0.7, "ece": 0.06, "brier": 0.27, "ece_before": 0.16, "brier_before": 0.33}


def test_a_calibrated_arm_has_a_sentence_with_the_means_of_its_seeds(make_run: Make) -> None:
    folders = [make_run(("kl",), seed=seed, calibration=facts) for seed, facts in enumerate((FACTS, OTHER))]
    summary = summary_of(make_run(("answer",)), *folders)
    (line,) = calibration_lines(summary.trained)
    assert line == (
        "Logits of kl were divided by a temperature of 0.60, fitted on the labels of validation: calibration error "
        "0.150 -> 0.050, Brier score 0.320 -> 0.260 on test (means of 2 seeds)."
    )
    words = set(line.split())
    assert words <= set(to_text(summary).split())
    assert words <= set(Page(to_html(summary)).text.split())
    assert "0.150 -\\> 0.050" in to_markdown(summary)


@pytest.mark.parametrize("facts", [None, {}, "damaged", FACTS | {"brier": None}, FACTS | {"ece": float("nan")}])
def test_a_student_without_these_figures_has_no_such_sentence(make_run: Make, facts: Any) -> None:
    assert not calibration_lines(summary_of(make_run(("kl",), calibration=facts)).trained)


def test_the_figures_of_one_seed_are_no_means(make_run: Make) -> None:
    (line,) = calibration_lines(summary_of(make_run(("kl",), calibration=FACTS)).trained)
    assert line.endswith("0.310 -> 0.250 on test.")


def test_folds_have_the_means_of_their_figures(make_run: Make) -> None:
    def fold(index: int, facts: dict[str, float]) -> Any:
        config = CONFIG | {"task": {"examples": {"folds": 2, "fold": index}}}
        return read_run(make_run(("kl",), config=config, calibration=facts))

    (line,) = calibration_lines(summarise([fold(0, FACTS), fold(1, OTHER)]).trained)
    assert "temperature of 0.60" in line
    assert "0.150 -> 0.050" in line
