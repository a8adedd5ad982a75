"""The page is complete, self-contained, and safe from any text in a run folder."""

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
from tests.reports.conftest import HOSTILE, Make, Page, prediction, rationale_line, summary_of


@pytest.mark.parametrize("name", runs.FILES)
def test_a_missing_file_is_reported_and_never_fatal(make_run: Make, name: str) -> None:
    complete = make_run(("answer",))
    summary = summary_of(complete, make_run(without=(name,)))
    page = Page(to_html(summary)).text
    assert f"{name} is missing" in page
    assert f"{name} is missing" in to_text(summary)
    assert bool(summary.verdicts) == (name not in ("run.json", "results.json"))
    assert ("is incomplete" in page) == (name in ("run.json", "results.json"))


@pytest.mark.parametrize("name", ["config.yaml", "run.json", "results.json", "predictions.jsonl", "rejected.jsonl"])
def test_a_truncated_file_is_reported_and_never_fatal(make_run: Make, name: str) -> None:
    folder = make_run()
    text = "a: [1, 2" if name == "config.yaml" else (folder / name).read_text()[:-9]
    (folder / name).write_text(text)
    summary = summary_of(folder)
    assert f"{name} is damaged" in to_text(summary)
    assert to_html(summary)


def test_a_report_on_interrupted_runs_only_can_be_written(make_run: Make) -> None:
    summary = summary_of(make_run(without=("results.json", "metrics.csv", "predictions.jsonl", "rejected.jsonl")))
    assert "nothing to judge" in to_html(summary)
    assert "nothing to judge" in to_text(summary)


def test_all_folders_without_a_run_are_named(make_run: Make, tmp_path: Path) -> None:
    empty, other = tmp_path / "empty", tmp_path / "other"
    empty.mkdir()
    other.mkdir()
    (other / "notes.txt").write_text("hello")
    with pytest.raises(ConfigError) as caught:
        write_report([make_run(), empty, other, tmp_path / "absent"], tmp_path / "out")
    assert len(caught.value.problems) == 3
    for problem, content in zip(caught.value.problems, ("an empty folder", "notes.txt", "no such folder"), strict=True):
        assert content in problem
        assert "expected config.yaml or run.json" in problem
        assert "runs=[dir,dir,...]" in problem
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="no run folder was given"):
        write_report([], tmp_path / "out")


def test_write_report_writes_two_files_and_nothing_else(make_run: Make, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    folders = [make_run(("answer",)), make_run(accuracy=0.9)]
    write_report(folders, out)
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    summary = write_report([*folders, folders[0]], out)
    assert sorted(first) == ["report.html", "report.md"]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == first
    assert len(summary.runs) == 2


def test_the_page_is_self_contained_and_its_charts_are_well_formed(make_run: Make) -> None:
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
    assert sum('class="panel"' in chart for chart in charts) == metrics + 1  # accuracy over the total cost
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


def test_hostile_text_stays_text_in_every_format(make_run: Make) -> None:
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
    assert len({line.count("|") - line.count("\\|") for line in markdown.splitlines() if line.startswith("| ")}) == 4


def test_a_sentence_counts_the_rationales_that_were_kept(make_run: Make) -> None:
    text = " ".join(to_text(summary_of(make_run())).split())
    assert "150 of 193 kept (78 %); rejected: disagrees 40, truncated 3." in text


def test_contamination_is_counted_beyond_the_pairs_that_are_listed(make_run: Make) -> None:
    finding = {"n": 8, "num_train": 500, "num_dropped": 0, "found": [{"train_id": "1"}] * 200}
    text = " ".join(to_text(summary_of(make_run(contamination=finding))).split())
    assert "500 training questions share 8 consecutive words with validation or test; 0 of them were dropped." in text


def test_text_is_cut_to_500_characters_and_the_rest_is_counted(make_run: Make) -> None:
    long = prediction(1, True, True) | {"question": "x" * 800}
    html = to_html(summary_of(make_run(predictions=[long])))
    assert "x" * 500 + "… (300 more)" in html
    assert "x" * 501 not in html


def test_samples_show_where_student_and_teacher_differ_and_where_both_fail(make_run: Make) -> None:
    items = [prediction(k, k > 1, k % 10 > 0) for k in range(100)]
    folder = make_run(predictions=items[::-1])
    run, groups = outcomes(summary_of(folder))
    # Gold is "positive": the teacher is wrong if it agrees with a wrong student or differs from a right one.
    assert run == runs.read_run(folder)
    assert [(group.num, [item["id"][-2:] for item in group.shown]) for group in groups] == [
        (9, ["0a", "14", "1e", "28", "32", "3c", "46", "50"]),
        (1, ["00"]),
        (1, ["01"]),
    ]
    page = " ".join(Page(to_html(summary_of(folder))).text.split())
    for text in ("Student right, teacher wrong: 9 of 100", "Teacher right, student wrong: 1", "Both wrong: 1"):
        assert text in page


def test_recorded_correctness_takes_precedence_over_equality_of_texts(make_run: Make) -> None:
    recorded = prediction(0, False, False) | {"teacher_answer": "Positive!", "is_teacher_correct": True, "agrees": True}
    unrecorded = prediction(1, True, True)
    without_teacher = prediction(2, True, True) | {"teacher_answer": None}
    lines = runs.read_run(make_run(predictions=[recorded, unrecorded, without_teacher])).predictions
    assert [(line["is_teacher_correct"], line["agrees"]) for line in lines] == [
        (True, True),
        (True, True),
        (None, None),
    ]


def test_a_test_example_is_right_or_wrong_by_the_students_answer(make_run: Make) -> None:
    folder = make_run(predictions=[prediction(1, True, False), prediction(2, False, False)])  # the teacher's is reverse
    _, shown = reasoning(summary_of(folder))
    assert {line["is_correct"]: marks for marks, line in shown} == {True: ["right"], False: ["wrong"]}


def test_rationales_are_filtered_by_correctness_and_by_rejection(make_run: Make) -> None:
    written = [
        rationale_line(100, "positive", None),
        rationale_line(101, "negative", "disagrees"),
        rationale_line(102, "positive", HOSTILE),
    ]
    folder = make_run(predictions=[prediction(k, k < 20, True) for k in range(30)], rationales=written)
    summary = summary_of(folder)
    filters, shown = reasoning(summary)
    assert filters == ["right", "wrong", "kept", f"rejected: {HOSTILE}", "rejected: disagrees"]
    marks_by_id = {line["id"]: marks for marks, line in shown}
    assert marks_by_id[written[0]["id"]] == ["right", "kept"]
    assert marks_by_id[written[1]["id"]] == ["wrong", "rejected: disagrees"]
    assert marks_by_id[written[2]["id"]] == ["right", f"rejected: {HOSTILE}"]
    assert sum(marks == ["right"] for marks in marks_by_id.values()) == 12  # of twenty
    assert sum(marks == ["wrong"] for marks in marks_by_id.values()) == 10
    lines = {line["id"]: line for _, line in shown}
    assert lines[written[1]["id"]]["teacher_answer"] == "negative"  # what the rationale led to, not the right answer
    html = to_html(summary)
    assert "script" not in Page(html).tags
    assert html.count('type="radio"') == 1 + len(filters)
    kept = filters.index("kept")
    assert f".browse:has(#f{kept}:checked) .sample:not(.m{kept}) {{ display: none; }}" in html
    assert html.count(f'class="sample m{filters.index("right")} m{kept}"') == 1


def test_a_training_example_is_marked_as_the_run_judged_it_and_not_if_it_has_no_label(make_run: Make) -> None:
    accepted = rationale_line(100, "Positive, or so", None) | {"is_correct": True}
    unlabelled = rationale_line(101, "negative", None) | {"gold": None, "is_correct": False}
    _, shown = reasoning(summary_of(make_run(rationales=[accepted, unlabelled])))
    marks = {line["id"]: marks for marks, line in shown if line.get("is_training")}
    assert marks == {accepted["id"]: ["right", "kept"], unlabelled["id"]: ["kept"]}
