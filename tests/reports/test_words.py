"""Students beside a bag of words on the same targets: its line, the paired comparison and what the report says."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from distill.reports.conclusion import conclude
from distill.reports.page import to_html
from distill.reports.statistics import family_level, paired_interval
from distill.reports.tables import tables
from distill.reports.text import to_markdown, to_text
from distill.reports.verdicts import Summary
from tests.reports.conftest import CONFIG, Make, Page, answers, shuffled, summary_of, with_words


def texts(summary: Summary) -> tuple[str, str, str]:
    page = " ".join(Page(to_html(summary)).text.split())
    return page, to_markdown(summary).replace("\\", ""), " ".join(to_text(summary).split())


@pytest.mark.parametrize(
    ("accuracy", "expected"),
    [
        (
            0.5,
            "The student is better than counting words in one seed: a bag of words (TF-IDF and logistic regression on ",
        ),
        (
            0.73,
            "The student is not shown to be better than counting words: a bag of words (TF-IDF and logistic ",
        ),
        (
            0.9,
            "The student is worse than counting words: a bag of words (TF-IDF and logistic regression on the ",
        ),
    ],
)
def test_the_report_says_whether_the_student_is_better(make_run: Make, accuracy: float, expected: str) -> None:
    summary = summary_of(make_run(("answer",), 0.6), with_words(make_run(("answer", "kl"), 0.74), accuracy))
    (said,) = (s for s in conclude(summary).sentences if "counting words" in s)
    assert said.startswith(expected)
    assert f"answers {100 * accuracy:.1f} % right; the student is {abs(74 - 100 * accuracy):.1f} points " in said
    (verdict,) = summary.verdicts
    assert (said in verdict.sentence) == (accuracy == 0.5)
    assert (said in verdict.caveats) == (accuracy != 0.5)
    assert all(said in text and "more)" not in text for text in texts(summary))


def matrix(lines: list[list[bool]]) -> Any:
    return np.array(lines, np.float64)


def test_the_comparison_is_paired_by_seed_and_example(make_run: Make) -> None:
    seeds = (0, 1, 2)
    folders = [with_words(make_run(("kl",), 0.74, seed), 0.7, name=f"words{seed}") for seed in seeds]
    (difference,) = summary_of(*folders).words
    students = matrix([[line["is_correct"] for line in answers(("kl",), 0.74, seed)] for seed in seeds])
    words = matrix([shuffled(0.7, 500, f"words{seed}") for seed in seeds])
    assert difference.interval == paired_interval(students, words, level=0.95)
    assert difference.caveats == ()


def test_each_arm_is_compared_with_its_own_bag_and_all_at_one_level(make_run: Make) -> None:
    arms = ((("answer",), 0.6, 0.55), (("answer", "kl"), 0.8, 0.7), (("answer", "teacher_answer"), 0.75, 0.72))
    plain = [make_run(losses, accuracy) for losses, accuracy, _ in arms]
    before = summary_of(*plain)
    summary = summary_of(*(with_words(f, words, name=str(words)) for f, (_, _, words) in zip(plain, arms, strict=True)))
    assert {d.arm.losses: d.rival.accuracy for d in summary.words} == {losses: words for losses, _, words in arms}
    assert {d.level for d in summary.words} == {family_level(0.95, 3)}
    assert [v.difference for v in summary.verdicts if v.difference] != []
    assert [v.difference.interval for v in summary.verdicts if v.difference] == [
        v.difference.interval for v in before.verdicts if v.difference
    ]
    assert [line["accuracy"] for line in tables(summary)["bag_of_words"]] == [d.rival.accuracy for d in summary.words]


def test_a_bag_has_one_line_for_all_runs_that_share_it(make_run: Make) -> None:
    runs = [with_words(make_run(losses, 0.7, seed), 0.71) for losses in (("answer", "kl"), ("kl",)) for seed in (0, 1)]
    labels = with_words(make_run(("answer",), 0.6), 0.55, name="labels", targets={"labels": 100})
    summary = summary_of(*runs, labels)
    lines = [(arm.label, arm.accuracy) for arm in summary.arms if arm.kind == "words"]
    assert sorted(lines) == [("bag of words (labels + teacher's soft targets)", 0.71), ("bag of words (labels)", 0.55)]
    assert all(name in text for name, _ in lines for text in texts(summary)[:2])  # the terminal wraps them
    assert all("pairs of words, and logistic regression" in text for text in texts(summary))
    assert not any(arm.kind == "words" for arm in summary.trained)


def test_bags_of_other_weights_have_other_labels(make_run: Make) -> None:
    summary = summary_of(*(with_words(make_run((loss,), 0.7), 0.7, name=loss) for loss in ("kl", "reverse_kl")))
    labels = {arm.label for arm in summary.arms if arm.kind == "words"}
    assert labels == {f"bag of words (labels + teacher's soft targets) (targets=bow-{n})" for n in ("kl", "reverse_kl")}


def test_without_a_bag_the_report_is_as_before(make_run: Make) -> None:
    summary = summary_of(make_run(("answer",), 0.6), make_run(("answer", "kl"), 0.74))
    assert summary.words == ()
    assert all("counting words" not in text and "bag of words (" not in text for text in texts(summary))


@pytest.mark.parametrize("damaged", [{}, {"accuracy": None}, {"accuracy": "high"}, []])
def test_a_damaged_row_is_no_bag(make_run: Make, damaged: Any) -> None:
    folder = with_words(make_run(("kl",), 0.74), 0.7)
    results = json.loads((folder / "results.json").read_text())
    results["rows"]["bag_of_words"] = damaged
    (folder / "results.json").write_text(json.dumps(results))
    assert summary_of(folder).words == ()


def test_without_its_answers_the_intervals_are_compared(make_run: Make) -> None:
    folder = with_words(make_run(("kl",), 0.74), 0.5)
    (folder / "bag_of_words.jsonl").unlink()
    (difference,) = summary_of(folder).words
    assert difference.interval is None
    assert difference.status == "better"


def test_folds_have_the_answers_of_all_their_bags(make_run: Make) -> None:
    lines, folders = answers(("kl",), 0.75, 0, 400), []
    for fold in (0, 1):
        config = CONFIG | {"task": CONFIG["task"] | {"examples": {"folds": 2, "fold": fold}}}
        part = lines[200 * fold : 200 * (fold + 1)]
        accuracy = sum(line["is_correct"] for line in part) / 200
        run = make_run(("kl",), accuracy, config=config, student={"num_examples": 200}, predictions=part)
        folders.append(with_words(run, 0.6, number=400))  # of which those of this fold's test are paired
    (difference,) = summary_of(*folders).words
    assert difference.interval is not None
    assert difference.interval.num_examples == 400
    assert difference.points == pytest.approx(15)


def test_the_setting_makes_no_arm(make_run: Make) -> None:
    folders = [
        make_run(("kl",), 0.7, seed, config={"bag_of_words": value}) for seed, value in ((0, "auto"), (1, False))
    ]
    (arm,) = summary_of(*folders).trained
    assert len(arm.runs) == 2
