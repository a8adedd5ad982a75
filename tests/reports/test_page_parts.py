"""The report: numbers that can be checked by hand, an honest verdict, and a page that no data can break."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from distill.errors import ConfigError
from distill.reports import runs
from distill.reports.page import to_html, write_report
from distill.reports.samples import outcomes, reasoning
from distill.reports.text import to_markdown, to_text
from tests.reports.conftest import HOSTILE, Make, Page, lesson, prediction, summary_of


@pytest.mark.parametrize("name", runs.FILES)
def test_a_missing_file_is_reported_and_never_fatal(make_run: Make, name: str) -> None:
    whole = make_run(("answer",))
    summary = summary_of(whole, make_run(without=(name,)))
    page = Page(to_html(summary)).text
    assert f"{name} is missing" in page
    assert f"{name} is missing" in to_text(summary)
    assert bool(summary.verdicts) == (name not in ("run.json", "results.json"))
    assert ("is incomplete" in page) == (name in ("run.json", "results.json"))


@pytest.mark.parametrize("name", ["config.yaml", "run.json", "results.json", "predictions.jsonl", "rejected.jsonl"])
def test_a_file_cut_off_in_the_middle_is_reported_and_never_fatal(make_run: Make, name: str) -> None:
    folder = make_run()
    text = "a: [1, 2" if name == "config.yaml" else (folder / name).read_text()[:-9]
    (folder / name).write_text(text)
    summary = summary_of(folder)
    assert f"{name} is damaged" in to_text(summary)
    assert to_html(summary)


def test_a_report_on_nothing_but_interrupted_runs_can_be_made(make_run: Make) -> None:
    summary = summary_of(make_run(without=("results.json", "metrics.csv", "predictions.jsonl", "rejected.jsonl")))
    assert "nothing to judge" in to_html(summary)
    assert "nothing to judge" in to_text(summary)


def test_folders_that_are_no_runs_are_all_named(make_run: Make, tmp_path: Path) -> None:
    empty, other = tmp_path / "empty", tmp_path / "other"
    empty.mkdir()
    other.mkdir()
    (other / "notes.txt").write_text("hello")
    with pytest.raises(ConfigError) as caught:
        write_report([make_run(), empty, other, tmp_path / "absent"], tmp_path / "out")
    assert len(caught.value.problems) == 3
    for problem, found in zip(caught.value.problems, ("an empty folder", "notes.txt", "no such folder"), strict=True):
        assert found in problem
        assert "wanted config.yaml or run.json" in problem
        assert "runs=[dir,dir,...]" in problem
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="no run folder was given"):
        write_report([], tmp_path / "out")


def test_write_report_leaves_two_whole_files_and_nothing_else(make_run: Make, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    folders = [make_run(("answer",)), make_run(accuracy=0.9)]
    write_report(folders, out)
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    summary = write_report([*folders, folders[0]], out)
    assert sorted(first) == ["report.html", "report.md"]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == first
    assert len(summary.runs) == 2


def test_page_is_self_contained_and_its_charts_are_well_formed(make_run: Make) -> None:
    html = to_html(summary_of(make_run(("answer",)), make_run(accuracy=0.9), make_run(accuracy=0.88, seed=1)))
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert page.links == []
    assert "url(" not in html
    assert "@import" not in html
    charts = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    for chart in charts:
        ElementTree.fromstring(chart)
        assert "nan" not in chart
    metrics = 2 + 3  # val/accuracy, val/answer; train/answer, train/kl, train/rationale
    assert sum('class="panel"' in chart for chart in charts) == metrics + 1  # accuracy over the cost of making
    assert sum('class="square"' in chart for chart in charts) == 4
    assert (
        html.index("at equal budget")
        < html.index("<h2>Differences")
        < html.index("<h2>Results")
        < html.index("<h2>Comparison")
        < html.index("<h2>Cost")
        < html.index("<h2>Learning")
        < html.index("<h2>Reliability")
        < html.index("<h2>Each seed")
        < html.index("<h2>Sample")
    )


def test_hostile_text_stays_text_everywhere(make_run: Make) -> None:
    line = prediction(1, True, True)
    hostile = line | {key: HOSTILE for key, value in line.items() if isinstance(value, str)}
    folder = make_run(
        ("kl", HOSTILE), predictions=[hostile], name=HOSTILE, task=HOSTILE, teacher=HOSTILE, device=HOSTILE
    )
    (folder / "rejected.jsonl").write_text(json.dumps({"id": HOSTILE, "reason": HOSTILE, "text": HOSTILE}) + "\n{oops")
    summary = summary_of(folder, make_run(("answer",), task=HOSTILE))
    html, text, markdown = to_html(summary), to_text(summary), to_markdown(summary)
    assert "script" not in Page(html).tags
    assert "<script>alert(1)</script> ⟨U+001B⟩[31mred⟨U+001B⟩[0m ⟨U+202E⟩right-to-left ⟨U+D800⟩" in Page(html).text
    for output in (html, text, markdown):
        output.encode("utf-8")
        assert not set("\x1b\u202e\x07") & set(output)
    assert not re.search(r"(?<!\\)<script", markdown)
    assert len({line.count("|") - line.count("\\|") for line in markdown.splitlines() if line.startswith("| ")}) == 3


def test_text_is_cut_at_500_characters_and_says_by_how_much(make_run: Make) -> None:
    long = prediction(1, True, True) | {"question": "x" * 800}
    html = to_html(summary_of(make_run(predictions=[long])))
    assert "x" * 500 + "… (300 more)" in html
    assert "x" * 501 not in html


def test_samples_are_where_student_and_teacher_part_and_where_both_fail(make_run: Make) -> None:
    items = [prediction(k, k > 1, k % 10 > 0) for k in range(100)]
    folder = make_run(predictions=items[::-1])
    run, groups = outcomes(summary_of(folder))
    # Gold is "positive": the teacher is wrong where it agrees with a wrong student, and where it does not with a right.
    assert run == runs.read_run(folder)
    assert [(group.num, [item["id"][-2:] for item in group.shown]) for group in groups] == [
        (9, ["0a", "14", "1e", "28", "32", "3c", "46", "50"]),
        (1, ["00"]),
        (1, ["01"]),
    ]
    page = " ".join(Page(to_html(summary_of(folder))).text.split())
    for text in ("Student right, teacher wrong: 9 of 100", "Teacher right, student wrong: 1", "Both wrong: 1"):
        assert text in page


def test_what_the_run_says_of_correctness_goes_before_equality_of_texts(make_run: Make) -> None:
    said = prediction(0, False, False) | {"teacher_answer": "Positive!", "is_teacher_correct": True, "agrees": True}
    old = prediction(1, True, True)
    unasked = prediction(2, True, True) | {"teacher_answer": None}
    read = runs.read_run(make_run(predictions=[said, old, unasked])).predictions
    assert [(line["is_teacher_correct"], line["agrees"]) for line in read] == [(True, True), (True, True), (None, None)]


def test_rationales_pass_the_filters_of_their_answer_and_of_their_fate(make_run: Make) -> None:
    told = [lesson(100, "positive", None), lesson(101, "negative", "disagrees"), lesson(102, "positive", HOSTILE)]
    folder = make_run(predictions=[prediction(k, k < 20, True) for k in range(30)], rationales=told)
    summary = summary_of(folder)
    filters, shown = reasoning(summary)
    assert filters == ["right", "wrong", "kept", f"rejected: {HOSTILE}", "rejected: disagrees"]
    fates = {line["id"]: marks for marks, line in shown}
    assert fates[told[0]["id"]] == ["right", "kept"]
    assert fates[told[1]["id"]] == ["wrong", "rejected: disagrees"]
    assert sum(marks == ["right"] for marks in fates.values()) == 12  # of twenty
    assert sum(marks == ["wrong"] for marks in fates.values()) == 10
    html = to_html(summary)
    assert "script" not in Page(html).tags
    assert html.count('type="radio"') == 1 + len(filters)
    kept = filters.index("kept")
    assert f".browse:has(#f{kept}:checked) .sample:not(.m{kept}) {{ display: none; }}" in html
    assert html.count(f'class="sample m{filters.index("right")} m{kept}"') == 1
