"""Curves, effects of settings and Pareto fronts, with numbers that can be checked by hand."""

from __future__ import annotations

import itertools
import re
import xml.etree.ElementTree as ElementTree

import pytest

from distill.reports import charts
from distill.reports.costs import cost
from distill.reports.page import to_html
from distill.reports.text import to_text
from tests.reports.conftest import Make, Page, summary_of


def test_arms_with_different_numbers_of_labels_make_a_curve_and_three_a_power_law(make_run: Make) -> None:
    def sweep(labelled: tuple[int, ...]) -> str:
        counts = [{"train": n + 1600, "labelled": n, "test": 500} for n in labelled]
        folders = [make_run(("kl",), 1 - 0.5 * n**-0.2, counts=part) for n, part in zip(labelled, counts, strict=True)]
        return Page(to_html(summary_of(*folders))).text

    assert "x-0.200, exponent [-0.200, -0.200]" in sweep((10, 100, 1000))
    assert "too few distinct values for a power law" in sweep((10, 100))
    assert "Accuracy against data" not in sweep((10,))


def test_the_number_of_unlabelled_examples_splits_distilled_arms_but_not_baselines(make_run: Make) -> None:
    counts = [{"train": 100 + n, "labelled": 100, "test": 500} for n in (400, 1600)]
    folders = [make_run(("answer",), 0.6, seed, counts=part) for seed, part in enumerate(counts)]
    summary = summary_of(*folders, *(make_run(("kl",), 0.8, seed, counts=part) for seed, part in enumerate(counts)))
    assert [len(arm.rows) for arm in summary.trained] == [2, 1, 1]
    assert [arm.label for arm in summary.trained[1:]] == ["kl (unlabelled=400)", "kl (unlabelled=1600)"]
    assert "unlabelled examples" in Page(to_html(summary)).text


def test_swept_settings_are_ranked_by_the_variance_that_they_explain(make_run: Make) -> None:
    # The weight sets the accuracy but for 0.01; the order and the seed change nothing.
    folders = []
    for weight, order, seed in itertools.product((0.5, 1.0, 2.0), ("shuffled", "short_first"), (0, 1)):
        accuracy = 0.6 + weight / 10 + 0.01 * ((order == "shuffled") ^ seed)
        losses = {"answer": {"weight": 1.0}, "kl": {"weight": weight, "doubled": 2 * weight}}
        config = {"loss": losses, "order": order, "root": f"/runs/{len(folders)}"}
        folders.append(make_run(("answer", "kl"), accuracy, seed, config=config))
    folders += [make_run(("answer",), 0.5, config={"order": "shuffled"})]  # has no such weight
    summary = summary_of(*folders)
    swept = {effect.setting: effect for effect in charts.effects(summary.trained)}
    assert next(iter(swept)) == "loss.kl.weight"  # not repeated for `doubled`, which changes with it
    assert set(swept) == {"loss.kl.weight", "loss", "order", "seed"}
    assert swept["loss.kl.weight"].share == pytest.approx(0.99, abs=0.01)
    assert swept["order"].share == swept["seed"].share == 0
    assert {level.name: sorted(level.accuracies) for level in swept["loss.kl.weight"].levels} == {
        str(weight): pytest.approx([0.6 + weight / 10 + bonus for bonus in (0, 0, 0.01, 0.01)])
        for weight in (0.5, 1.0, 2.0)
    }
    html = to_html(summary)
    drawn = html.partition("<h2>Effect of each setting</h2>")[2].partition("</section>")[0]
    assert drawn.count('<circle class="hollow"') == 12 + 3 * 13
    for chart in re.findall(r"<svg.*?</svg>", drawn, flags=re.DOTALL):
        ElementTree.fromstring(chart)
    sentence = "Part of the variance of accuracy between runs that each setting explains: loss.kl.weight 99 %, "
    assert sentence in " ".join(to_text(summary).split())


def test_numbers_drawn_by_a_search_are_grouped_into_thirds(make_run: Make) -> None:
    drawn = [(k, 1e-5 * 2**k) for k in (4, 0, 7, 2, 8, 1, 6, 3, 5)]
    folders = [make_run(("answer", "kl"), 0.5 + 0.1 * (k // 3), config={"optim": {"lr": lr}}) for k, lr in drawn]
    (effect,) = charts.effects(summary_of(*folders).trained)
    assert effect.setting == "optim.lr"
    assert effect.share == pytest.approx(1.0)
    assert [(level.name, level.accuracies) for level in effect.levels] == [
        ("1e-05 to 4e-05", (0.5, 0.5, 0.5)),
        ("8e-05 to 0.00032", (0.6, 0.6, 0.6)),
        ("0.00064 to 0.00256", (0.7, 0.7, 0.7)),
    ]


def test_losses_and_seeds_alone_have_no_effects_section(make_run: Make) -> None:
    folders = [make_run(losses, 0.7, seed) for losses in (("answer",), ("answer", "kl")) for seed in (0, 1)]
    assert charts.effects(summary_of(*folders).trained) == []
    assert "Effect of each setting" not in to_html(summary_of(*folders))


def test_unbeaten_arms_are_chosen_by_accuracy_size_latency_and_total_cost(make_run: Make) -> None:
    # The second beats the first in everything; the third is less accurate than both, but took half the time.
    seconds = {"annotate": 0.0, "evaluate": 0.0}
    folders = [
        make_run(("answer",), 0.70, seconds=seconds | {"train": 200.0}),
        make_run(("answer", "kl"), 0.75, seconds=seconds | {"train": 60.0}),
        make_run(("answer", "rationale"), 0.65, cache={"annotation_seconds": 0.0}, seconds=seconds | {"train": 90.0}),
    ]
    summary = summary_of(*folders)
    totals = [cost(arm, {}).total if arm.runs else None for arm in summary.arms]
    assert totals == [None, None, 200.0, pytest.approx(183.4), 90.0]
    is_unbeaten = dict(zip((arm.label for arm in summary.arms), charts.unbeaten(summary.arms, totals), strict=True))
    assert [label for label, is_best in is_unbeaten.items() if is_best][-2:] == ["answer + kl", "answer + rationale"]
    assert not is_unbeaten["student on labels alone"]
    (front,) = charts.fronts(summary.arms, totals, "s")
    assert front.title == "total cost, s"
    assert {point.arm.label: is_best for point, is_best in zip(front.points, front.is_best, strict=True)} == {
        "student on labels alone": False,
        "answer + kl": True,
        "answer + rationale": True,
    }
