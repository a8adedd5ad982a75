"""What became of the rows, and names for readers."""

from __future__ import annotations

from typing import Any

from distill.reports.page import to_html
from distill.reports.rows import losses_of_rows, row_counts
from distill.reports.text import to_markdown, to_text
from tests.reports.conftest import Make, Page, prediction, summary_of

ROWS: dict[str, Any] = {
    "train": {"read": 1000, "lost": {"repeated": 20, "too long": 310}, "kept": 670},
    "test": {"read": 500, "lost": {"repeated": 4}, "kept": 496},
}


def test_lost_rows_are_a_table_and_a_large_loss_is_a_sentence(make_run: Make) -> None:
    summary = summary_of(make_run(("answer",), rows=ROWS), make_run(rows=ROWS))
    assert [entry[1:] for entry in row_counts(summary.runs)] == [
        ("train", 1000, {"repeated": 20, "too long": 310}, 670),
        ("test", 500, {"repeated": 4}, 496),
    ]
    sentence = "330 of 1,000 train rows (33 %) were not used: too long 310, repeated 20."
    text, markdown, page = to_text(summary), to_markdown(summary), Page(to_html(summary)).text
    for shown in (" ".join(text.split()), markdown, page):
        assert shown.count(sentence) == 1
        assert "500 test rows" not in shown
    assert "| train | 1,000 | 20 | 310 | 670 |" in markdown
    assert "What became of the rows" in page


def test_runs_with_different_rows_are_named(make_run: Make) -> None:
    other = {"train": {"read": 9, "lost": {}, "kept": 9}}
    markdown = to_markdown(summary_of(make_run(("kl",), rows=ROWS), make_run(("answer",), rows=other)))
    assert "| train: kl-seed0 | 1,000 |" in markdown
    assert "| train: answer-seed0 | 9 |" in markdown


def test_runs_with_equal_rows_share_a_line_that_names_them(make_run: Make) -> None:
    runs = summary_of(make_run(("kl",), rows=ROWS), make_run(("answer",), rows=ROWS)).runs
    assert [entry.runs for entry in row_counts(runs)] == [("kl-seed0", "answer-seed0")] * 2


def test_rationales_without_an_answer_to_compare_with_are_a_loss(make_run: Make) -> None:
    rows = {"rationales": {"read": 10, "lost": {"no reference": 6}, "kept": 4}}
    assert losses_of_rows(summary_of(make_run(rows=rows)).runs) == [
        "6 of 10 rationales (60 %) were not used: no reference 6."
    ]


def test_runs_without_counts_have_no_table(make_run: Make) -> None:
    for rows in ({}, {"rows": None}, {"rows": {"train": 3}}):
        assert to_html(summary_of(make_run(**rows)))
    assert "What became of the rows" not in to_html(summary_of(make_run()))


def test_arms_have_the_plain_names_of_their_losses(make_run: Make) -> None:
    named = {"answer": {"label": "labels", "weight": 1.0}, "kl": {"label": "teacher's soft targets", "weight": 1.0}}
    unnamed = {name: {"weight": 1.0} for name in named}
    folders = [
        make_run(("answer", "kl"), 0.7, seed, config={"loss": loss}) for seed, loss in enumerate((unnamed, named))
    ]
    (arm,) = summary_of(*folders).trained  # a run of a version without labels is a seed of the same arm
    assert len(arm.runs) == 2
    (later,) = summary_of(folders[1]).trained
    assert later.label == "labels + teacher's soft targets"
    assert "labels + teacher's soft targets" in to_text(summary_of(folders[1]))


def test_ids_are_shortened_on_the_page(make_run: Make) -> None:
    page = Page(to_html(summary_of(make_run(predictions=[prediction(0xABC, False, False)])))).text
    assert f"{0xABC:032x}" not in page
    assert "00000000…" in page


def test_samples_are_of_the_arm_to_prefer(make_run: Make) -> None:
    more_losses = make_run(("answer", "kl", "rationale"), 0.55)
    best = make_run(("answer", "kl"), 0.8)
    html = Page(to_html(summary_of(make_run(("answer",), 0.6), more_losses, best))).text
    assert "Test examples of answer+kl-seed0" in html


def test_rows_that_a_setting_leaves_out_are_no_loss(make_run: Make) -> None:
    lost = {"over num_unlabelled": 900, "no label": 20, "too long": 12}
    rows = {
        "train": {"read": 1000, "lost": lost, "kept": 68},
        "rationales": {"read": 9, "lost": {"over 1": 9}, "kept": 0},
    }
    assert losses_of_rows(summary_of(make_run(rows=rows)).runs) == [
        "12 of 80 train rows (15 %) were not used: too long 12."
    ]
