"""The report: numbers that can be checked by hand, an honest verdict, and a page that no data can break."""

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


def test_arms_that_differ_in_the_number_of_labels_make_a_curve_and_enough_of_them_a_power_law(make_run: Make) -> None:
    def sweep(labelled: tuple[int, ...]) -> str:
        counts = [{"train": n + 1600, "labelled": n, "test": 500} for n in labelled]
        folders = [make_run(("kl",), 1 - 0.5 * n**-0.2, counts=part) for n, part in zip(labelled, counts, strict=True)]
        return Page(to_html(summary_of(*folders))).text

    assert "x-0.200, exponent [-0.200, -0.200]" in sweep((10, 100, 1000))
    assert "too few distinct values for a power law" in sweep((10, 100))
    assert "Accuracy against data" not in sweep((10,))


def test_arms_that_differ_in_unlabelled_examples_are_not_seeds_of_one_arm_but_baselines_are(make_run: Make) -> None:
    counts = [{"train": 100 + n, "labelled": 100, "test": 500} for n in (400, 1600)]
    folders = [make_run(("answer",), 0.6, seed, counts=part) for seed, part in enumerate(counts)]
    summary = summary_of(*folders, *(make_run(("kl",), 0.8, seed, counts=part) for seed, part in enumerate(counts)))
    assert [len(arm.rows) for arm in summary.trained] == [2, 1, 1]
    assert [arm.label for arm in summary.trained[1:]] == ["kl (unlabelled=400)", "kl (unlabelled=1600)"]
    assert "unlabelled examples" in Page(to_html(summary)).text


def test_what_a_sweep_varied_is_told_by_what_it_explains(make_run: Make) -> None:
    # The weight sets the accuracy but for 0.01; the order and the seed change nothing.
    folders = []
    for weight, order, seed in itertools.product((0.5, 1.0, 2.0), ("shuffled", "short_first"), (0, 1)):
        accuracy = 0.6 + weight / 10 + 0.01 * ((order == "shuffled") ^ seed)
        losses = {"answer": {"weight": 1.0}, "kl": {"weight": weight, "doubled": 2 * weight}}
        config = {"loss": losses, "order": order, "root": f"/runs/{len(folders)}"}
        folders.append(make_run(("answer", "kl"), accuracy, seed, config=config))
    folders += [make_run(("answer",), 0.5, config={"order": "shuffled"})]  # has no such weight
    summary = summary_of(*folders)
    found = {effect.setting: effect for effect in charts.effects(summary.trained)}
    assert next(iter(found)) == "loss.kl.weight"  # what changes with it under a longer name is not told again
    assert set(found) == {"loss.kl.weight", "loss", "order", "seed"}
    assert found["loss.kl.weight"].share == pytest.approx(0.99, abs=0.01)
    assert found["order"].share == found["seed"].share == 0
    assert {level.name: sorted(level.accuracies) for level in found["loss.kl.weight"].levels} == {
        str(weight): pytest.approx([0.6 + weight / 10 + bonus for bonus in (0, 0, 0.01, 0.01)])
        for weight in (0.5, 1.0, 2.0)
    }
    html = to_html(summary)
    drawn = html.partition("<h2>What mattered</h2>")[2].partition("</section>")[0]
    assert drawn.count('<circle class="hollow"') == 12 + 3 * 13
    for chart in re.findall(r"<svg.*?</svg>", drawn, flags=re.DOTALL):
        ElementTree.fromstring(chart)
    said = "What mattered, as a share of the variance of accuracy between runs: loss.kl.weight 99 %, "
    assert said in " ".join(to_text(summary).split())


def test_numbers_that_a_search_drew_are_compared_by_thirds(make_run: Make) -> None:
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


def test_losses_and_seeds_alone_are_no_settings_to_tell(make_run: Make) -> None:
    folders = [make_run(losses, 0.7, seed) for losses in (("answer",), ("answer", "kl")) for seed in (0, 1)]
    assert charts.effects(summary_of(*folders).trained) == []
    assert "What mattered" not in to_html(summary_of(*folders))


def test_arms_are_chosen_by_accuracy_size_latency_and_cost_of_making(make_run: Make) -> None:
    # The second beats the first in all; the third is less accurate than both, but was made in half the time.
    seconds = {"annotate": 0.0, "evaluate": 0.0}
    folders = [
        make_run(("answer",), 0.70, seconds=seconds | {"train": 200.0}),
        make_run(("answer", "kl"), 0.75, seconds=seconds | {"train": 60.0}),
        make_run(("answer", "rationale"), 0.65, cache={"annotation_seconds": 0.0}, seconds=seconds | {"train": 90.0}),
    ]
    summary = summary_of(*folders)
    making = [cost(arm, {}).making if arm.runs else None for arm in summary.arms]
    assert making == [None, None, 200.0, pytest.approx(183.4), 90.0]
    chosen = dict(zip((arm.label for arm in summary.arms), charts.unbeaten(summary.arms, making), strict=True))
    assert [label for label, is_chosen in chosen.items() if is_chosen][-2:] == ["answer + kl", "answer + rationale"]
    assert not chosen["student on labels alone"]
    (front,) = charts.fronts(summary.arms, making, "s")
    assert front.title == "cost of making, s"
    assert {point.arm.label: is_best for point, is_best in zip(front.points, front.is_best, strict=True)} == {
        "student on labels alone": False,
        "answer + kl": True,
        "answer + rationale": True,
    }
