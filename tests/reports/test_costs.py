"""Costs, the yield of rationales, contamination and the tables as plain rows."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from distill.reports.costs import break_even_text, cost, read_prices, yields
from distill.reports.page import to_html
from distill.reports.tables import tables
from distill.reports.text import to_markdown, to_text
from distill.reports.verdicts import Summary
from tests.reports.conftest import HOSTILE, Make, Page, answers, summary_of, two_classes, with_latency, with_words


def test_costs_and_break_even_follow_from_the_prices(make_run: Make) -> None:
    # An hour is 1 EUR + 0.5 kW · 2 EUR = 2 EUR. Total: 123.4 s annotation + 42.1 s + 9 s = 174.5 s.
    # The student takes 3 ms, the teacher costs 0.01 EUR per 1000.
    prices = {"price_per_hour": 1, "watts": 500, "price_per_kwh": 2, "currency": "EUR", "requests_per_day": 1000}
    config = {"cost": prices | {"teacher_price_per_1000": 0.01}}
    summary = summary_of(make_run(("answer",), config=config), make_run(config=config, student=with_latency(3.0)))
    baseline, distilled = tables(summary)["cost"]
    total = 174.5 / 3600 * 2
    saved = 0.01 / 1000 - 0.003 / 3600 * 2
    assert distilled["total"] == pytest.approx(total)
    assert distilled["unit"] == "EUR"
    assert distilled["break_even_requests"] == pytest.approx(total / saved)
    assert distilled["break_even_days"] == pytest.approx(total / saved / 1000)
    assert baseline["annotation_seconds"] == 0
    assert f"{math.ceil(total / saved):,} (" in " ".join(to_text(summary).split())


def test_without_prices_costs_are_machine_seconds(make_run: Make) -> None:
    summary = summary_of(make_run(student=with_latency(2.0)))
    (cost,) = tables(summary)["cost"]
    assert cost["unit"] == "machine seconds"
    assert cost["total"] == pytest.approx(174.5)
    assert cost["break_even_requests"] == pytest.approx(174.5 / (0.012 - 0.002))
    assert "machine seconds" in Page(to_html(summary)).text


def test_given_prices_override_those_of_the_run(make_run: Make) -> None:
    summary = summary_of(make_run(config={"cost": {"price_per_hour": 1, "currency": "EUR"}}))
    (cost,) = tables(summary, {"price_per_hour": 7.2, "currency": None})["cost"]
    assert (cost["unit"], cost["total"]) == ("EUR", pytest.approx(174.5 * 0.002))


def test_a_baseline_on_the_teachers_answers_pays_for_them(make_run: Make) -> None:
    counts = {"train": 2100, "labelled": 0, "test": 500}
    summary = summary_of(make_run(("teacher_answer",), counts=counts), make_run(("kl",), counts=counts))
    assert [arm.kind for arm in summary.trained] == ["baseline", "distilled"]
    assert [row["annotation_seconds"] for row in tables(summary)["cost"]] == [123.4, 123.4]


def test_seeds_with_other_prices_are_all_charged_those_of_the_last(make_run: Make) -> None:
    runs = [make_run(seed=seed, config={"cost": {"price_per_hour": price}}) for seed, price in enumerate((100, 7.2))]
    (cost,) = tables(summary_of(*runs))["cost"]
    assert cost["total"] == pytest.approx(174.5 * 0.002)


def test_a_student_that_is_not_cheaper_never_breaks_even_and_missing_values_are_not_measured(make_run: Make) -> None:
    summary = summary_of(make_run(student=with_latency(12.0)))
    assert cost_cells(summary)[-1] == "never"
    unmeasured = summary_of(make_run(student={"ms_per_example": None}, seconds=None))
    no = "not measured"  # annotation took 123.4 s, and 1000 requests to the teacher take 12 s
    assert cost_cells(unmeasured) == ["answer + kl + rationale", "2.1 min", no, no, no, no, "12.0 s", no]


def cost_cells(summary: Summary) -> list[str]:
    """Cells of the last line of the table of costs."""
    lines = [line for line in to_markdown(summary).split("## Cost and data")[1].splitlines() if "|" in line]
    return [text.strip() for text in lines[-1].strip("|").split("|")]


def test_yield_contamination_and_preflight_checks_are_shown(make_run: Make) -> None:
    overlaps = [{"train_id": "a1", "other_id": "b2", "split": "test", "ngram": f"shared words {HOSTILE}"}]
    checks = [
        {"check": "free disk", "passed": True, "found": "9 GB", "expected": "1 GB", "remedy": ""},
        {"check": HOSTILE, "passed": False, "found": 1, "expected": 2, "remedy": "Take another."},
        {"check": "peak", "passed": None, "found": None, "expected": None, "remedy": None},
    ]
    summary = summary_of(make_run(contamination={"n": 8, "found": overlaps, "num_dropped": 5}, preflight=checks))
    text, page = " ".join(to_text(summary).split()), " ".join(Page(to_html(summary)).text.split())
    assert "150 of 193 kept (78 %); rejected: disagrees 40, truncated 3." in text
    for shown in (text, page):
        assert "Contamination: 1 training questions share 8 consecutive words with validation or test; 5 of" in shown
    for shown in ("1 training example shares text", "b2", "✓ yes", "✗ no", "Take another.", "not measured"):
        assert shown in page
    nothing = Page(to_html(summary_of(make_run(counts={"test": 500})))).text
    for shown in ("Contamination: not measured", "Yield of rationales: not measured", "Peak memory: not measured"):
        assert shown in nothing


def test_a_card_of_data_names_its_runs(make_run: Make) -> None:
    few, many = ({"train": n + 400, "labelled": n, "test": 500} for n in (100, 200))
    folders = [make_run(("kl",), seed=0, counts=few), make_run(("kl",), seed=1, counts=few), make_run(counts=many)]
    page = to_html(summary_of(*folders))
    titles = [title for title in re.findall(r"<h3>(.*?)</h3>", page) if "seed" in title]
    assert titles == ["kl-seed0, kl-seed1", "answer+kl+rationale-seed0"]


def test_tables_are_plain_rows_with_equal_keys(make_run: Make) -> None:
    predictions = [
        line | {"teacher_confidence": 0.55 + 0.4 * (k % 2)}
        for k, line in enumerate(two_classes(answers(("kl",), 0.8, 0)))
    ]
    others = [make_run(("answer",), 0.6, config={"order": order}) for order in ("shuffled", "short_first")]
    run = make_run(("kl",), 0.8, predictions=predictions, config={"order": "shuffled"})
    summary = summary_of(*others, with_words(run, 0.7))
    rows_by_table = tables(summary)
    names = {
        "differences",
        "contrasts",
        "bag_of_words",
        "comparison",
        "guesses",
        "steps_to_equal",
        "classes",
        "cost",
        "by_confidence",
        "selective",
        "yield",
    }
    assert set(rows_by_table) == names
    for rows in rows_by_table.values():
        assert rows
        assert {tuple(line) for line in rows} == {tuple(rows[0])}
        assert all(value is None or isinstance(value, str | int | float) for line in rows for value in line.values())
    assert [(line["low"], line["num"]) for line in rows_by_table["by_confidence"]] == [(0.5, 250), (0.9, 250)]
    assert rows_by_table["differences"][0]["points"] == pytest.approx(20)


def cost_row(*folders: Path, **overrides: Any) -> dict[str, Any]:
    """The last row of the table of costs."""
    return dict(tables(summary_of(*folders), overrides)["cost"][-1])


@pytest.mark.parametrize(
    ("prices", "per_hour"),
    [
        ({"price_per_hour": 3}, 3),
        ({"watts": 500, "price_per_kwh": 0.4}, 0.2),
        ({"price_per_hour": 3, "watts": 500}, 3),
        ({"price_per_hour": 3, "price_per_kwh": 0.4}, 3),
        ({"price_per_hour": 0, "watts": 250, "price_per_kwh": 0.4}, 0.1),
        ({"watts": 500}, None),
        ({}, None),
    ],
)
def test_an_hour_costs_the_machine_and_its_power_as_far_as_they_are_known(
    prices: dict[str, float], per_hour: float | None
) -> None:
    found = read_prices({"cost": prices | {"currency": "EUR"}}, {})
    assert found.per_hour == pytest.approx(per_hour)
    assert found.unit == ("machine seconds" if per_hour is None else "EUR")
    assert found.of(7200.0) == pytest.approx(7200 if per_hour is None else 2 * per_hour)
    assert found.of(None) is None
    assert (found.teacher_per_request, found.requests_per_day) == (None, None)


def test_without_a_name_a_currency_is_empty() -> None:
    assert read_prices({"cost": {"price_per_hour": 1}}, {}).unit == ""
    assert read_prices({}, {"price_per_hour": 1, "teacher_price_per_1000": 5}).teacher_per_request == 0.005


def test_a_price_per_request_counts_only_where_an_hour_has_a_price(make_run: Make) -> None:
    bought = {"teacher_price_per_1000": 500}
    assert cost_row(make_run(("kl",)), **bought)["teacher_per_1000"] == pytest.approx(12.0)  # seconds, as measured
    assert cost_row(make_run(("kl",)), **bought, price_per_hour=1)["teacher_per_1000"] == pytest.approx(500)


def test_costs_are_means_over_the_seeds_that_were_measured(make_run: Make) -> None:
    seconds: list[dict[str, float | None]] = [{"train": 10.0, "evaluate": 1.0}, {"train": 40.0, "evaluate": None}]
    found = cost_row(*(make_run(("kl",), 0.7, seed, seconds=part) for seed, part in enumerate(seconds)))
    assert (found["training_seconds"], found["evaluation_seconds"]) == (25.0, 1.0)
    assert found["total"] == pytest.approx(123.4 + 25 + 1)
    unmeasured = cost_row(make_run(("kl",), seconds={"train": 10.0}))
    assert (unmeasured["total"], unmeasured["break_even_requests"]) == (None, None)


@pytest.mark.parametrize(("per_day", "days"), [(None, None), (0, None), (250, 174.5 / 0.01 / 250)])
def test_days_to_break_even_need_a_number_of_requests_a_day(
    make_run: Make, per_day: float | None, days: float | None
) -> None:
    found = cost_row(make_run(("kl",), student=with_latency(2.0)), requests_per_day=per_day)
    assert found["break_even_requests"] == pytest.approx(174.5 / 0.01)
    assert found["break_even_days"] == pytest.approx(days)


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        ((1, 2), (3, 4), True),
        ((3, 4), (1, 2), False),
        ((1, 3), (2, 4), None),
        ((2, 4), (1, 3), None),
        ((1, 4), (2, 3), None),
        ((2, 2), (2, 2), False),
        ((2, 3), (1, 2), False),
        ((1, 2), (2, 3), True),
    ],
)
def test_a_student_is_cheaper_if_its_slowest_request_is_not_above_the_fastest_of_the_teacher(
    make_run: Make, student: tuple[float, float], teacher: tuple[float, float], expected: bool | None
) -> None:
    folder = make_run(("kl",))
    results = json.loads((folder / "results.json").read_text())
    for name, (low, high) in (("student", student), ("teacher", teacher)):
        times = {"ms_per_example": (low + high) / 2, "ms_fastest": low, "ms_slowest": high}
        results["rows"][name] |= times
    (folder / "results.json").write_text(json.dumps(results))
    (arm,) = (arm for arm in summary_of(folder).trained if arm.losses == ("kl",))
    found = cost(arm, {})
    assert found.is_cheaper is expected
    assert (found.break_even_requests is not None) == (expected is True)
    if not expected:
        assert break_even_text(found) == ("not shown" if expected is None else "never")


def test_requests_to_break_even_are_rounded_up_and_days_have_two_digits(make_run: Make) -> None:
    (arm,) = (arm for arm in summary_of(make_run(("kl",), student=with_latency(2.0))).trained if arm.losses)
    found = cost(arm, {})._replace(break_even_requests=12345.1, break_even_days=None)
    assert break_even_text(found) == "12,346"
    assert break_even_text(found._replace(break_even_days=1.256)) == "12,346 (1.3 days)"
    for missing in ("total", "student_per_1000", "teacher_per_1000"):
        assert break_even_text(found._replace(**{missing: None})) == "not measured"


def test_arms_with_the_same_counts_of_rationales_share_a_yield(make_run: Make) -> None:
    counts = {"rationales_kept": 3, "rationales_rejected": {"disagrees": 1, "truncated": 0}}
    others = {"rationales_kept": 0, "rationales_rejected": {"truncated": 2}}
    nothing = {"rationales_kept": 0, "rationales_rejected": {}}
    parts = ((("kl",), 0, counts), (("kl",), 1, counts), (("rationale",), 0, counts), (("answer", "kl"), 0, others))
    folders = [make_run(losses, 0.7, seed, counts=part) for losses, seed, part in parts]
    found = yields(summary_of(*folders, make_run(("answer",), counts=nothing)).trained)
    assert {(part.labels, part.kept, part.share) for part in found} == {
        (("kl", "rationale"), 3, 0.75),
        (("answer + kl",), 0, 0.0),
    }
