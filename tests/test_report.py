"""The report: numbers that can be checked by hand, an honest verdict, and a page that no data can break."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from omegaconf import OmegaConf

from distill.errors import ConfigError
from distill.reports import charts, runs
from distill.reports import page as report
from distill.reports.statistics import detectable, family_level, paired_interval

Make = Callable[..., Path]
HOSTILE = "<script>alert(1)</script> \x1b[31mred\x1b[0m \u202eright-to-left \ud800 | `code` **bold** $x_1$"


def row(accuracy: float, num_examples: int = 500, **more: Any) -> dict[str, Any]:
    """A row of results.json with the normal 95 % interval of one run."""
    half = 1.96 * math.sqrt(accuracy * (1 - accuracy) / num_examples)
    bins = [
        {"confidence": c, "accuracy": min(1, accuracy * c / 0.75), "num": n}
        for c, n in ((0.55, 60), (0.75, 200), (0.95, 240))
    ]
    return {
        "accuracy": accuracy,
        "interval": [accuracy - half, accuracy + half],
        "num_examples": num_examples,
        "generated_accuracy": accuracy - 0.01,
        "num_unreadable": 2,
        "agreement": 0.8,
        "kl": 0.123,
        "ece": 0.051,
        "parameters": 50_000_000,
        "size_bytes": 200_000_000,
        "ms_per_example": 12.0,
        "training_seconds": 42.1,
        "reliability": bins,
        **more,
    }


def facts(losses: tuple[str, ...], seed: int) -> dict[str, Any]:
    """A run.json as the train command writes it."""
    name = f"{'+'.join(losses)}-seed{seed}"
    return {
        "name": name,
        "losses": list(losses),
        "seed": seed,
        "command": ["distill.train", f"seed={seed}"],
        "started": f"2026-11-21T21:0{seed}:00+00:00",
        "seconds": {"annotate": 0.0, "train": 42.1, "evaluate": 9.0},
        "steps": 120,
        "batch_size": 16,
        "start": "5f3a9c0d77e1",
        "version": "0.1.0",
        "commit": None,
        "is_dirty": True,
        "packages": {"torch": "2.13.0", "transformers": "5.0.0"},
        "device": "cpu, 2 cores",
        "task": "movie_reviews",
        "teacher": "big-instruct-4b",
        "student": "small-50m",
        "cache": {
            "dir": "/cache/0f",
            "fingerprint": "0f" * 8,
            "num_records": 2800,
            "annotation_seconds": 123.4,
        },
        "counts": {
            "train": 2100,
            "labelled": 100,
            "validation": 200,
            "test": 500,
            "dropped": {"train": 3},
            "rationales_kept": 150,
            "rationales_rejected": {"disagrees": 40, "truncated": 3},
        },
        "tracking": {"mode": "offline", "where": "/runs/wandb", "upload": "wandb sync /runs/wandb"},
    }


def prediction(index: int, is_correct: bool, agrees: bool) -> dict[str, Any]:
    """One line of predictions.jsonl."""
    student = "positive" if is_correct else "negative"
    teacher = student if agrees else {"positive": "negative", "negative": "positive"}[student]
    return {
        "id": f"{index:032x}",
        "question": f"Review {index}: the plot is thin, but the two leads carry every scene that they share.",
        "gold": "positive",
        "teacher_answer": teacher,
        "teacher_rationale": "The praise of the leads outweighs the complaint about the plot.",
        "student_answer": student,
        "student_confidence": 0.81,
        "student_rationale": "The review likes the leads." if index % 3 else None,
        "is_correct": is_correct,
    }


def shuffled(share: float, number: int, name: str) -> list[bool]:
    """True for that share of the examples, drawn by name."""
    values = [k < round(share * number) for k in range(number)]
    random.Random(name).shuffle(values)
    return values


def answers(losses: tuple[str, ...], accuracy: float, seed: int, number: int = 500) -> list[dict[str, Any]]:
    """Predictions of that accuracy, each run's drawn on its own; the teacher is right on 82 % in every run."""
    student, teacher = shuffled(accuracy, number, f"{losses}{seed}"), shuffled(0.82, number, "teacher")
    return [prediction(k, student[k], student[k] == teacher[k]) for k in range(number)]


def learning_curve(losses: tuple[str, ...], accuracy: float) -> str:
    """A metrics.csv in which training and validation rows alternate, with empty cells."""
    lines = ["step,epoch," + ",".join(f"train/{loss}" for loss in losses) + ",val/answer,val/accuracy"]
    for step in range(10, 121, 10):
        fall = math.exp(-step / 50)
        train = ",".join(f"{0.4 + fall + 0.1 * index:.4f}" for index, _ in enumerate(losses))
        lines.append(f"{step},0,{train},,")
        lines.append(f"{step},0,{',' * (len(losses) - 1)},{0.5 + fall / 2:.4f},{accuracy - 0.2 * fall:.4f}")
    return "\n".join(lines) + "\n"


def write_run(
    folder: Path,
    losses: tuple[str, ...] = ("answer", "kl", "rationale"),
    accuracy: float = 0.74,
    seed: int = 0,
    *,
    config: Mapping[str, Any] | None = None,
    student: Mapping[str, Any] | None = None,
    predictions: list[dict[str, Any]] | None = None,
    rationales: list[dict[str, Any]] | None = None,
    without: tuple[str, ...] = (),
    **changes: Any,
) -> Path:
    """Write a run folder; keywords replace facts, `without` leaves files out."""
    folder.mkdir()
    num_test = (student or {}).get("num_examples", 500)
    rows = {"teacher": row(0.82, agreement=None, kl=None), "before": row(0.52)}
    rows["student"] = row(accuracy, num_test) | dict(student or {})
    if predictions is None:
        predictions = answers(losses, accuracy, seed, num_test)
    rejected = [{"id": f"{k:032x}", "reason": "disagrees", "text": "So it is good."} for k in range(3)]
    seeded = {"seed": seed, "loss": {loss: {"weight": 1.0} for loss in losses}, "optim": {"lr": 3e-4, "seed": seed}}
    texts = {
        "config.yaml": yaml.safe_dump(seeded | dict(config or {})),
        "run.json": json.dumps(facts(losses, seed) | changes),
        "metrics.csv": learning_curve(losses, accuracy),
        "results.json": json.dumps({"rows": rows}),
        "predictions.jsonl": "".join(json.dumps(line) + "\n" for line in predictions),
        "rejected.jsonl": "".join(json.dumps(line) + "\n" for line in rejected),
    }
    if rationales is not None:
        texts["rationales.jsonl"] = "".join(json.dumps(line) + "\n" for line in rationales)
    for name, text in texts.items():
        if name not in without:
            (folder / name).write_bytes(text.encode("utf-8", "surrogatepass"))
    return folder


@pytest.fixture
def make_run(tmp_path: Path) -> Make:
    """Write a run folder of its own below `tmp_path`."""
    return lambda *values, **more: write_run(tmp_path / f"run{len(list(tmp_path.iterdir()))}", *values, **more)


def summary_of(*folders: Path) -> report.Summary:
    """Read and summarise."""
    return report.summarise([report.read_run(folder) for folder in folders])


class Page(HTMLParser):
    """Collects tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [
            value or "" for name, value in attrs if name in ("src", "href", "srcset") or name.startswith("on")
        ]

    def handle_data(self, data: str) -> None:
        self.text += data


# --- numbers ------------------------------------------------------------------------------------------------


def test_interval_over_seeds_joins_test_sampling_and_seeds(make_run: Make) -> None:
    summary = summary_of(*(make_run(accuracy=p, seed=k) for k, p in enumerate((0.70, 0.74, 0.78))))
    (arm,) = [arm for arm in summary.arms if arm.kind == "distilled"]
    # mean 0.74; sd = sqrt((0.04² + 0 + 0.04²) / 2) = 0.04
    # h_test = 1.96 sqrt(0.74 · 0.26 / 500) = 0.0384485; h_seed = 4.3027 · 0.04 / sqrt(3) = 0.0993666
    half = math.sqrt(0.0384485**2 + 0.0993666**2)
    assert arm.stat("accuracy") == pytest.approx((0.74, 0.04))
    assert arm.interval == pytest.approx((0.74 - half, 0.74 + half), abs=1e-5)
    assert len(summary.seeds) == 3
    assert report.cell(arm, report.COLUMNS[0]) == "74.0 ± 4.0 % [63.3, 84.7]"


def test_one_seed_keeps_the_interval_that_evaluation_wrote(make_run: Make) -> None:
    summary = summary_of(make_run(student={"interval": [0.61, 0.83]}))
    assert summary.arms[-1].interval == (0.61, 0.83)
    assert report.cell(summary.arms[-1], report.COLUMNS[0]) == "74.0 % [61.0, 83.0]"


def test_rows_come_in_order_with_the_baseline_above_the_distilled(make_run: Make) -> None:
    summary = summary_of(make_run(), make_run(("kl",)), make_run(("answer",)))
    assert [arm.kind for arm in summary.arms] == ["teacher", "before", "baseline", "distilled", "distilled"]


def test_arms_that_differ_in_a_loss_setting_are_not_taken_for_seeds(make_run: Make) -> None:
    folders = [make_run(("kl",), config={"loss": {"kl": {"temperature": t}}}) for t in (1, 2)]
    labels = [arm.label for arm in summary_of(*folders).arms if arm.kind == "distilled"]
    assert labels == ["kl (loss.kl.temperature=1)", "kl (loss.kl.temperature=2)"]


def test_a_seed_run_twice_counts_once_and_says_so(make_run: Make) -> None:
    first, second = make_run(accuracy=0.70), make_run(accuracy=0.74, started="2026-11-22T00:00:00+00:00")
    summary = summary_of(second, first)
    assert summary.arms[-1].accuracy == 0.74
    assert len(summary.arms[-1].rows) == 1
    assert any(str(first) in note and "same seed" in note for note in summary.notes)


# --- verdicts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accuracy", "status", "points", "phrase"),
    [
        (0.80, "better", 12.0, "12.0 points above labels alone at equal budget"),
        (0.70, "not shown", 2.0, "It is not shown that the student is better."),
        (0.66, "not shown", -2.0, "The student is not better."),
        (0.55, "worse", -13.0, "13.0 points below labels alone at equal budget"),
    ],
)
def test_verdict_claims_only_what_the_interval_of_the_difference_shows(
    make_run: Make, accuracy: float, status: str, points: float, phrase: str
) -> None:
    (verdict,) = summary_of(make_run(("answer",), 0.68), make_run(accuracy=accuracy)).verdicts
    assert verdict.status == status
    assert verdict.points == pytest.approx(points)
    assert phrase in verdict.sentence
    assert ("which holds 0" in verdict.sentence) == (status == "not shown")
    assert ("would have shown a difference of" in verdict.sentence) == (status == "not shown")
    assert any("one seed" in caveat for caveat in verdict.caveats)


def test_the_interval_is_that_of_the_correctness_matrices_matched_by_seed_and_id(make_run: Make) -> None:
    sides = [(("answer",), 0.68), (("answer", "kl"), 0.73)]
    folders = [
        make_run(losses, p, seed, predictions=answers(losses, p, seed)[:: -1 if "kl" in losses else 1])
        for losses, p in sides
        for seed in (2, 0, 1)
    ]
    (verdict,) = summary_of(*folders).verdicts
    right, left = (np.array([shuffled(p, 500, f"{losses}{k}") for k in range(3)], float) for losses, p in sides)
    expected = paired_interval(left, right)
    assert verdict.difference is not None
    assert verdict.difference.ends == pytest.approx((100 * expected.low, 100 * expected.high))
    assert verdict.difference.detectable == pytest.approx(100 * detectable(expected))
    assert "paired by 3 seeds and 500 test examples" in verdict.sentence


def test_examples_that_are_right_or_wrong_in_both_arms_make_the_verdict_sharper(make_run: Make) -> None:
    base = answers(("answer",), 0.68, 0)
    wrong = [k for k, line in enumerate(base) if not line["is_correct"]]
    more = [prediction(k, line["is_correct"] or k in wrong[:15], True) for k, line in enumerate(base)]
    folders = [make_run(("answer",), 0.68, predictions=base), make_run(accuracy=0.71, predictions=more)]
    (verdict,) = summary_of(*folders).verdicts
    assert verdict.status == "better"
    (unpaired,) = summary_of(make_run(("answer",), 0.68, seed=1), make_run(accuracy=0.71, seed=1)).verdicts
    assert unpaired.status == "not shown"


def test_only_seeds_that_both_arms_have_are_paired_and_it_is_said(make_run: Make) -> None:
    folders = [make_run(("answer",), 0.5, 0), make_run(("answer",), 0.9, 7), make_run(accuracy=0.7, seed=0)]
    (verdict,) = summary_of(*folders).verdicts
    assert verdict.points == pytest.approx(20)
    assert any("Paired on seed 0 alone" in caveat for caveat in verdict.caveats)


def test_only_examples_that_both_arms_tell_are_paired_and_it_is_said(make_run: Make) -> None:
    told = answers(("answer", "kl"), 0.8, 0)[:400]
    (verdict,) = summary_of(make_run(("answer",), 0.6), make_run(("answer", "kl"), 0.8, predictions=told)).verdicts
    assert verdict.difference is not None
    assert verdict.difference.interval is not None
    assert verdict.difference.interval.num_examples == 400
    assert any("400 of 500 test examples" in caveat for caveat in verdict.caveats)


@pytest.mark.parametrize(("accuracy", "status"), [(0.80, "better"), (0.70, "not shown"), (0.55, "worse")])
def test_without_predictions_the_arms_own_intervals_are_compared_and_it_is_said(
    make_run: Make, accuracy: float, status: str
) -> None:
    folders = [make_run(("answer",), 0.68), make_run(accuracy=accuracy, without=("predictions.jsonl",))]
    (verdict,) = summary_of(*folders).verdicts
    assert verdict.status == status
    assert ("do not overlap" in verdict.sentence) == (status != "not shown")
    assert any("own 95 % intervals are compared" in caveat for caveat in verdict.caveats)


def test_several_arms_are_judged_at_the_level_at_which_all_hold_together(make_run: Make) -> None:
    arms = [("answer", "kl"), ("answer", "rationale"), ("answer", "kl", "rationale")]
    summary = summary_of(make_run(("answer",), 0.68), *(make_run(losses, 0.72) for losses in arms))
    for verdict in summary.verdicts:
        assert verdict.difference is not None
        assert verdict.difference.level == pytest.approx(family_level(0.95, 3)) == pytest.approx(1 - 0.05 / 3)
        assert "98.3 % for each of the 3 arms is 95 % for all together" in verdict.sentence
    (alone,) = summary_of(make_run(("answer",), 0.68), make_run(arms[0], 0.72)).verdicts
    assert "The 95 % interval" in alone.sentence
    assert "together" not in alone.sentence


def test_soft_targets_are_also_set_against_hard_labels_of_the_same_teacher(make_run: Make) -> None:
    hard = ("answer", "teacher_answer")
    folders = [make_run(("answer",), 0.6), make_run(hard, 0.7), make_run(("answer", "kl"), 0.75)]
    other, soft = sorted(summary_of(*folders).verdicts, key=lambda verdict: verdict.arm.has_hard_labels)[::-1]
    assert other.arm.losses == hard
    assert other.beside is None
    assert other.points == pytest.approx(10)
    assert soft.points == pytest.approx(15)
    assert soft.beside is not None
    assert soft.beside.points == pytest.approx(5)
    assert "+5.0 [" in report.to_text(summary_of(*folders))
    assert "over hard labels" in Page(report.to_html(summary_of(*folders))).text


def test_hard_labels_of_another_budget_are_no_rival(make_run: Make) -> None:
    folders = [make_run(("answer",), 0.6), make_run(("answer", "teacher_answer"), 0.7, steps=7), make_run()]
    assert all(verdict.beside is None for verdict in summary_of(*folders).verdicts)


def test_the_share_of_the_teachers_advantage_is_told(make_run: Make) -> None:
    (verdict,) = summary_of(make_run(("answer",), 0.62), make_run(accuracy=0.72)).verdicts
    assert verdict.difference is not None
    assert verdict.difference.share is not None
    assert verdict.difference.share.estimate == pytest.approx((0.72 - 0.62) / (0.82 - 0.62))
    assert re.search(r"It recovers 50 % \[\d+, \d+\] of the teacher's advantage", verdict.sentence)


def test_a_teacher_no_better_than_labels_alone_has_nothing_to_recover(make_run: Make) -> None:
    (verdict,) = summary_of(make_run(("answer",), 0.85), make_run(accuracy=0.9)).verdicts
    assert "The teacher is no better than labels alone." in verdict.sentence
    assert "recovers" not in verdict.sentence


def test_seeds_that_draw_their_own_start_are_one_arm_and_are_compared(make_run: Make) -> None:
    config = {"student": {"model": "m", "from_scratch": True}}
    folders = [
        make_run(losses, p, seed, config=config, start=f"start{seed}{losses}")
        for losses, p in ((("answer",), 0.6), (("kl",), 0.8))
        for seed in (0, 1)
    ]
    summary = summary_of(*folders)
    assert [len(arm.rows) for arm in summary.trained] == [2, 2]
    assert summary.verdicts[0].status == "better"


def test_verdict_without_baseline_names_the_command(make_run: Make) -> None:
    summary = summary_of(make_run())
    assert summary.verdicts[0].status == "no baseline"
    for text in (report.to_text(summary), Page(report.to_html(summary)).text):
        assert "not run" in text
        assert "python -m distill.train 'loss=[answer]'" in " ".join(text.split())
    assert "not run" in report.to_markdown(summary)


@pytest.mark.parametrize(
    "change",
    [{"steps": 240}, {"batch_size": 32}, {"start": "0badc0de"}, {"counts": {"labelled": 900, "test": 500}}],
)
def test_verdict_refuses_unequal_budgets_and_says_which(make_run: Make, change: dict[str, Any]) -> None:
    (verdict,) = summary_of(make_run(("answer",), 0.5, **change), make_run(accuracy=0.9)).verdicts
    key = "labelled" if "counts" in change else next(iter(change))
    assert verdict.status == "not compared"
    assert verdict.points is None
    assert f"{key} " in verdict.sentence
    assert "budgets differ" in verdict.sentence


def test_verdict_takes_the_baseline_of_the_same_budget_and_the_best_of_several(make_run: Make) -> None:
    folders = [make_run(("answer",), p, config={"optim": {"lr": lr}}) for p, lr in ((0.60, 1e-4), (0.72, 1e-3))]
    folders.append(make_run(("answer",), 0.2, steps=7))
    (verdict,) = summary_of(*folders, make_run(accuracy=0.74)).verdicts
    assert verdict.points == pytest.approx(2.0)
    assert any("2 baselines" in caveat for caveat in verdict.caveats)


def test_another_tasks_baseline_is_no_baseline(make_run: Make) -> None:
    (verdict,) = summary_of(make_run(("answer",), task="arithmetic"), make_run()).verdicts
    assert verdict.status == "no baseline"


def test_a_student_no_better_than_before_training_is_called_so(make_run: Make) -> None:
    (verdict,) = summary_of(make_run(accuracy=0.50)).verdicts
    assert any("not better than before training (52.0 %)" in caveat for caveat in verdict.caveats)


# --- incomplete and damaged runs ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", runs.FILES)
def test_a_missing_file_is_reported_and_never_fatal(make_run: Make, name: str) -> None:
    whole = make_run(("answer",))
    summary = summary_of(whole, make_run(without=(name,)))
    page = Page(report.to_html(summary)).text
    assert f"{name} is missing" in page
    assert f"{name} is missing" in report.to_text(summary)
    assert bool(summary.verdicts) == (name not in ("run.json", "results.json"))
    assert ("is incomplete" in page) == (name in ("run.json", "results.json"))


@pytest.mark.parametrize("name", ["config.yaml", "run.json", "results.json", "predictions.jsonl", "rejected.jsonl"])
def test_a_file_cut_off_in_the_middle_is_reported_and_never_fatal(make_run: Make, name: str) -> None:
    folder = make_run()
    text = "a: [1, 2" if name == "config.yaml" else (folder / name).read_text()[:-9]
    (folder / name).write_text(text)
    summary = summary_of(folder)
    assert f"{name} is damaged" in report.to_text(summary)
    assert report.to_html(summary)


def test_a_report_on_nothing_but_interrupted_runs_can_be_made(make_run: Make) -> None:
    summary = summary_of(make_run(without=("results.json", "metrics.csv", "predictions.jsonl", "rejected.jsonl")))
    assert "nothing to judge" in report.to_html(summary)
    assert "nothing to judge" in report.to_text(summary)


def test_folders_that_are_no_runs_are_all_named(make_run: Make, tmp_path: Path) -> None:
    empty, other = tmp_path / "empty", tmp_path / "other"
    empty.mkdir()
    other.mkdir()
    (other / "notes.txt").write_text("hello")
    with pytest.raises(ConfigError) as caught:
        report.write_report([make_run(), empty, other, tmp_path / "absent"], tmp_path / "out")
    assert len(caught.value.problems) == 3
    for problem, found in zip(caught.value.problems, ("an empty folder", "notes.txt", "no such folder"), strict=True):
        assert found in problem
        assert "wanted config.yaml or run.json" in problem
        assert "runs=[dir,dir,...]" in problem
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="no run folder was given"):
        report.write_report([], tmp_path / "out")


# --- the page, the text, the Markdown -----------------------------------------------------------------------


def test_write_report_leaves_two_whole_files_and_nothing_else(make_run: Make, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    folders = [make_run(("answer",)), make_run(accuracy=0.9)]
    report.write_report(folders, out)
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    summary = report.write_report([*folders, folders[0]], out)
    assert sorted(first) == ["report.html", "report.md"]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == first
    assert len(summary.runs) == 2


def test_page_is_self_contained_and_its_charts_are_well_formed(make_run: Make) -> None:
    html = report.to_html(summary_of(make_run(("answer",)), make_run(accuracy=0.9), make_run(accuracy=0.88, seed=1)))
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
    html, text, markdown = report.to_html(summary), report.to_text(summary), report.to_markdown(summary)
    assert "script" not in Page(html).tags
    assert "<script>alert(1)</script> ⟨U+001B⟩[31mred⟨U+001B⟩[0m ⟨U+202E⟩right-to-left ⟨U+D800⟩" in Page(html).text
    for output in (html, text, markdown):
        output.encode("utf-8")
        assert not set("\x1b\u202e\x07") & set(output)
    assert not re.search(r"(?<!\\)<script", markdown)
    assert len({line.count("|") - line.count("\\|") for line in markdown.splitlines() if line.startswith("| ")}) == 3


def test_text_is_cut_at_500_characters_and_says_by_how_much(make_run: Make) -> None:
    long = prediction(1, True, True) | {"question": "x" * 800}
    html = report.to_html(summary_of(make_run(predictions=[long])))
    assert "x" * 500 + "… (300 more)" in html
    assert "x" * 501 not in html


def test_samples_are_where_student_and_teacher_part_and_where_both_fail(make_run: Make) -> None:
    items = [prediction(k, k > 1, k % 10 > 0) for k in range(100)]
    folder = make_run(predictions=items[::-1])
    run, groups = report.outcomes(summary_of(folder))
    # Gold is "positive": the teacher is wrong where it agrees with a wrong student, and where it does not with a right.
    assert run == runs.read_run(folder)
    assert [(group.num, [item["id"][-2:] for item in group.shown]) for group in groups] == [
        (9, ["0a", "14", "1e", "28", "32", "3c", "46", "50"]),
        (1, ["00"]),
        (1, ["01"]),
    ]
    page = " ".join(Page(report.to_html(summary_of(folder))).text.split())
    for text in ("Student right, teacher wrong: 9 of 100", "Teacher right, student wrong: 1", "Both wrong: 1"):
        assert text in page


def test_what_the_run_says_of_correctness_goes_before_equality_of_texts(make_run: Make) -> None:
    said = prediction(0, False, False) | {"teacher_answer": "Positive!", "is_teacher_correct": True, "agrees": True}
    old = prediction(1, True, True)
    unasked = prediction(2, True, True) | {"teacher_answer": None}
    read = runs.read_run(make_run(predictions=[said, old, unasked])).predictions
    assert [(line["is_teacher_correct"], line["agrees"]) for line in read] == [(True, True), (True, True), (None, None)]


def lesson(index: int, answer: str, reason: str | None) -> dict[str, Any]:
    """One line of rationales.jsonl."""
    return {
        "id": f"{index:032x}",
        "sample": 0,
        "question": f"Review {index}?",
        "gold": "positive",
        "answer": answer,
        "rationale": f"Thought {index}.",
        "gold_rationale": None,
        "confidence": 0.9,
        "reason": reason,
    }


def test_rationales_pass_the_filters_of_their_answer_and_of_their_fate(make_run: Make) -> None:
    told = [lesson(100, "positive", None), lesson(101, "negative", "disagrees"), lesson(102, "positive", HOSTILE)]
    folder = make_run(predictions=[prediction(k, k < 20, True) for k in range(30)], rationales=told)
    summary = summary_of(folder)
    filters, shown = report.reasoning(summary)
    assert filters == ["right", "wrong", "kept", f"rejected: {HOSTILE}", "rejected: disagrees"]
    fates = {line["id"]: marks for marks, line in shown}
    assert fates[told[0]["id"]] == ["right", "kept"]
    assert fates[told[1]["id"]] == ["wrong", "rejected: disagrees"]
    assert sum(marks == ["right"] for marks in fates.values()) == 12  # of twenty
    assert sum(marks == ["wrong"] for marks in fates.values()) == 10
    html = report.to_html(summary)
    assert "script" not in Page(html).tags
    assert html.count('type="radio"') == 1 + len(filters)
    kept = filters.index("kept")
    assert f".browse:has(#f{kept}:checked) .sample:not(.m{kept}) {{ display: none; }}" in html
    assert html.count(f'class="sample m{filters.index("right")} m{kept}"') == 1


# --- cost, data, curves -------------------------------------------------------------------------------------


def with_latency(milliseconds: float) -> dict[str, Any]:
    return {"ms_per_example": milliseconds}


def test_costs_and_break_even_are_those_of_the_prices(make_run: Make) -> None:
    # An hour is 1 EUR + 0.5 kW · 2 EUR = 2 EUR. Making: 123.4 s annotation + 42.1 s + 9 s = 174.5 s.
    # The student takes 3 ms, the teacher costs 0.01 EUR per 1000.
    prices = {"price_per_hour": 1, "watts": 500, "price_per_kwh": 2, "currency": "EUR", "requests_per_day": 1000}
    config = {"cost": prices | {"teacher_price_per_1000": 0.01}}
    summary = summary_of(make_run(("answer",), config=config), make_run(config=config, student=with_latency(3.0)))
    baseline, distilled = report.tables(summary)["cost"]
    making = 174.5 / 3600 * 2
    saved = 0.01 / 1000 - 0.003 / 3600 * 2
    assert distilled["making"] == pytest.approx(making)
    assert distilled["unit"] == "EUR"
    assert distilled["break_even_requests"] == pytest.approx(making / saved)
    assert distilled["break_even_days"] == pytest.approx(making / saved / 1000)
    assert baseline["annotation_seconds"] == 0
    assert f"{math.ceil(making / saved):,} (" in " ".join(report.to_text(summary).split())


def test_without_prices_costs_are_seconds_of_the_machine(make_run: Make) -> None:
    summary = summary_of(make_run(student=with_latency(2.0)))
    (cost,) = report.tables(summary)["cost"]
    assert cost["unit"] == "machine seconds"
    assert cost["making"] == pytest.approx(174.5)
    assert cost["break_even_requests"] == pytest.approx(174.5 / (0.012 - 0.002))
    assert "machine seconds" in Page(report.to_html(summary)).text


def test_prices_that_are_given_go_before_those_of_the_run(make_run: Make) -> None:
    summary = summary_of(make_run(config={"cost": {"price_per_hour": 1, "currency": "EUR"}}))
    (cost,) = report.tables(summary, {"price_per_hour": 7.2, "currency": None})["cost"]
    assert (cost["unit"], cost["making"]) == ("EUR", pytest.approx(174.5 * 0.002))


def test_a_student_that_is_not_cheaper_never_pays_back_and_what_is_missing_was_not_measured(make_run: Make) -> None:
    summary = summary_of(make_run(student=with_latency(12.0)))
    assert cost_cells(summary)[-1] == "never"
    unmeasured = summary_of(make_run(student={"ms_per_example": None}, seconds=None))
    no = "not measured"  # annotation took 123.4 s, and 1000 requests to the teacher take 12 s
    assert cost_cells(unmeasured) == ["answer + kl + rationale", "2.1 min", no, no, no, no, "12", no]


def cost_cells(summary: report.Summary) -> list[str]:
    """The last line of the table of costs."""
    lines = [line for line in report.to_markdown(summary).split("## Cost and data")[1].splitlines() if "|" in line]
    return [text.strip() for text in lines[-1].strip("|").split("|")]


def test_yield_contamination_and_checks_are_told(make_run: Make) -> None:
    found = [{"train_id": "a1", "other_id": "b2", "split": "test", "ngram": f"shared words {HOSTILE}"}]
    checks = [
        {"check": "free disk", "passed": True, "found": "9 GB", "wanted": "1 GB", "remedy": ""},
        {"check": HOSTILE, "passed": False, "found": 1, "wanted": 2, "remedy": "Take another."},
        {"check": "peak", "passed": None, "found": None, "wanted": None, "remedy": None},
    ]
    summary = summary_of(make_run(contamination={"n": 8, "found": found, "num_dropped": 5}, preflight=checks))
    text, page = " ".join(report.to_text(summary).split()), " ".join(Page(report.to_html(summary)).text.split())
    assert "150 of 193 kept (78 %); rejected: disagrees 40, truncated 3." in text
    for shown in (text, page):
        assert "Contamination: 1 training questions share 8 words in a row with validation or test; 5 of" in shown
    for shown in ("1 example of training that shares text", "b2", "✓ yes", "✗ no", "Take another.", "not measured"):
        assert shown in page
    nothing = Page(report.to_html(summary_of(make_run(counts={"test": 500})))).text
    for shown in ("Contamination: not measured", "Yield of rationales: not measured", "Peak memory: not measured"):
        assert shown in nothing


def test_a_card_of_data_names_the_runs_that_it_is_of(make_run: Make) -> None:
    few, many = ({"train": n + 400, "labelled": n, "test": 500} for n in (100, 200))
    folders = [make_run(("kl",), seed=0, counts=few), make_run(("kl",), seed=1, counts=few), make_run(counts=many)]
    page = report.to_html(summary_of(*folders))
    titles = [title for title in re.findall(r"<h3>(.*?)</h3>", page) if "seed" in title]
    assert titles == ["kl-seed0, kl-seed1", "answer+kl+rationale-seed0"]


def test_tables_are_plain_rows_of_the_same_keys(make_run: Make) -> None:
    told = [line | {"teacher_confidence": 0.55 + 0.4 * (k % 2)} for k, line in enumerate(answers(("kl",), 0.8, 0))]
    others = [make_run(("answer",), 0.6, config={"order": order}) for order in ("shuffled", "short_first")]
    summary = summary_of(*others, make_run(("kl",), 0.8, predictions=told, config={"order": "shuffled"}))
    found = report.tables(summary)
    assert set(found) == {"differences", "contrasts", "comparison", "cost", "by_confidence", "yield"}
    for rows in found.values():
        assert rows
        assert {tuple(line) for line in rows} == {tuple(rows[0])}
        assert all(value is None or isinstance(value, str | int | float) for line in rows for value in line.values())
    assert [(line["low"], line["num"]) for line in found["by_confidence"]] == [(0.5, 250), (0.9, 250)]
    assert found["differences"][0]["points"] == pytest.approx(20)


def test_arms_that_differ_in_the_number_of_labels_make_a_curve_and_enough_of_them_a_power_law(make_run: Make) -> None:
    def sweep(labelled: tuple[int, ...]) -> str:
        counts = [{"train": n + 1600, "labelled": n, "test": 500} for n in labelled]
        folders = [make_run(("kl",), 1 - 0.5 * n**-0.2, counts=part) for n, part in zip(labelled, counts, strict=True)]
        return Page(report.to_html(summary_of(*folders))).text

    assert "x-0.200, exponent [-0.200, -0.200]" in sweep((10, 100, 1000))
    assert "too few distinct values for a power law" in sweep((10, 100))
    assert "Accuracy against data" not in sweep((10,))


def test_arms_that_differ_in_unlabelled_examples_are_not_seeds_of_one_arm_but_baselines_are(make_run: Make) -> None:
    counts = [{"train": 100 + n, "labelled": 100, "test": 500} for n in (400, 1600)]
    folders = [make_run(("answer",), 0.6, seed, counts=part) for seed, part in enumerate(counts)]
    summary = summary_of(*folders, *(make_run(("kl",), 0.8, seed, counts=part) for seed, part in enumerate(counts)))
    assert [len(arm.rows) for arm in summary.trained] == [2, 1, 1]
    assert [arm.label for arm in summary.trained[1:]] == ["kl (unlabelled=400)", "kl (unlabelled=1600)"]
    assert "unlabelled examples" in Page(report.to_html(summary)).text


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
    html = report.to_html(summary)
    drawn = html.partition("<h2>What mattered</h2>")[2].partition("</section>")[0]
    assert drawn.count('<circle class="hollow"') == 12 + 3 * 13
    for chart in re.findall(r"<svg.*?</svg>", drawn, flags=re.DOTALL):
        ElementTree.fromstring(chart)
    said = "What mattered, as a share of the variance of accuracy between runs: loss.kl.weight 99 %, "
    assert said in " ".join(report.to_text(summary).split())


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
    assert "What mattered" not in report.to_html(summary_of(*folders))


def test_arms_are_chosen_by_accuracy_size_latency_and_cost_of_making(make_run: Make) -> None:
    # The second beats the first in all; the third is less accurate than both, but was made in half the time.
    seconds = {"annotate": 0.0, "evaluate": 0.0}
    folders = [
        make_run(("answer",), 0.70, seconds=seconds | {"train": 200.0}),
        make_run(("answer", "kl"), 0.75, seconds=seconds | {"train": 60.0}),
        make_run(("answer", "rationale"), 0.65, cache={"annotation_seconds": 0.0}, seconds=seconds | {"train": 90.0}),
    ]
    summary = summary_of(*folders)
    making = [report.cost(arm, {}).making if arm.runs else None for arm in summary.arms]
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


def test_terminal_table_fits_in_110_columns(make_run: Make) -> None:
    big = {
        "parameters": 123_456_789_012,
        "size_bytes": 987_654_321_012,
        "ms_per_example": 12345.6,
        "training_seconds": 360_000,
    }
    losses = ("answer", "kl", "rationale", "reverse_kl", "a_loss_with_a_rather_long_name")
    runs = [make_run(losses, 0.9 + 0.01 * seed, seed, student=big) for seed in range(3)]
    text = report.to_text(summary_of(*runs, make_run(("answer",))))
    assert max(map(len, text.splitlines())) <= 110
    assert "123.5 B" in text
    assert "100.0 h" in text


def test_terminal_tables_of_differences_and_costs_fit_in_110_columns(make_run: Make) -> None:
    losses = ("answer", "kl", "rationale", "reverse_kl", "a_loss_with_a_rather_long_name")
    prices = {"price_per_hour": 9e5, "requests_per_day": 0.37}
    same = [row | {"teacher_answer": "positive"} for row in answers(("answer",), 0.8, 0)]
    hard = make_run(("answer", "teacher_answer"), 0.8, student=with_latency(11.999))
    priced = [
        hard,
        make_run(("answer",), 0.80, predictions=same),
        make_run(losses, 0.805, student={"ms_per_example": None}),
    ]
    text = report.to_text(summary_of(*priced), prices)
    assert max(map(len, text.splitlines())) <= 110
    assert "[unbounded]" in text


PLAIN: dict[str, Any] = {
    "order": "shuffled",
    "balance": "none",
    "rationales": {"arithmetic": True},
    "teacher": {"num_rationales": 60, "kind": {"files": ["/a/said.jsonl"]}},
    "overlap": {"action": "report"},
    "trainer": {"gradient_clip_val": 1.0, "devices": 1, "max_steps": 120},
    "task": {"path": "/a/train.jsonl", "answer_mode": "direct", "examples": {"split_seed": 0}},
    "microbatch_size": 8,
    "root": "/a",
    "cache": {"dir": "/a/cache"},
}


@pytest.mark.parametrize(
    "change",
    [
        {"order": "short_first"},
        {"balance": "answer"},
        {"rationales": {"arithmetic": False}},
        {"teacher": {"num_rationales": 120}},
        {"overlap": {"action": "drop"}},
        {"trainer": {"gradient_clip_val": 0.5}},
        {"task": {"answer_mode": "reasoned"}},
        {"task": {"examples": {"split_seed": 1}}},
        {"a_part_that_is_new": {"share": 0.5}},
    ],
    ids=str,
)
def test_runs_that_were_taught_in_another_way_are_no_seeds_of_one_arm(change: dict[str, Any], make_run: Make) -> None:
    plain = PLAIN | {name: {} for name in change if name not in PLAIN}
    config = OmegaConf.to_container(OmegaConf.merge(plain, change))
    runs = [make_run(config=plain), make_run(seed=1, config=plain), make_run(seed=2, config=config)]
    summary = summary_of(*runs)
    assert sorted(len(arm.runs) for arm in summary.trained) == [1, 2]
    (name,) = change
    assert any(name in arm.label for arm in summary.trained if arm.runs)


def test_runs_that_were_only_made_elsewhere_or_in_other_pieces_are_seeds_of_one_arm(make_run: Make) -> None:
    elsewhere = {
        "task": PLAIN["task"] | {"path": "/b/train.jsonl"},
        "teacher": PLAIN["teacher"] | {"kind": {"files": ["/b/said.jsonl"]}},
        "trainer": PLAIN["trainer"] | {"devices": 2, "strategy": {"_target_": "a.Strategy"}},
        "microbatch_size": 4,
        "root": "/b",
        "cache": {"dir": None},
    }
    summary = summary_of(make_run(config=PLAIN), make_run(seed=1, config=PLAIN | elsewhere))
    (arm,) = (arm for arm in summary.trained if arm.runs)
    assert [run.seed for run in arm.runs] == ["0", "1"]


def test_what_the_teacher_did_is_of_no_matter_to_labels_alone(make_run: Make) -> None:
    other = PLAIN | {"rationales": {"arithmetic": False}, "teacher": {"num_rationales": 120}}
    summary = summary_of(make_run(("answer",), config=PLAIN), make_run(("answer",), seed=1, config=other))
    (arm,) = (arm for arm in summary.trained if arm.runs)
    assert len(arm.rows) == 2


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
    for text in (report.to_text(summary), report.to_markdown(summary), Page(report.to_html(summary)).text):
        assert "one choice apart" in text
        assert "97.5 % interval" in text
        assert contrast.choice in re.sub(r"[\\\s]+", " ", text).replace(" _", "_").replace(" =", "=")


def test_a_verdict_is_told_to_its_end_however_long_its_arms_are_called(make_run: Make) -> None:
    named = {f"setting_{k}": f"a rather long value {k}" for k in range(5)}
    rationales = [{name: f"{value} {end}" for name, value in named.items()} for end in ("a", "b")]
    summary = summary_of(make_run(("answer",)), *(make_run(config={"rationales": each}) for each in rationales))
    page = Page(report.to_html(summary)).text
    for verdict in summary.verdicts:
        assert len(verdict.sentence) > 500
        assert verdict.sentence in page


def test_a_sweep_of_many_choices_is_not_taken_apart_pair_by_pair(make_run: Make) -> None:
    folders = [make_run(accuracy=0.7, config={"order": f"order {k}"}) for k in range(9)]
    assert len(summary_of(*folders[:8]).contrasts) == 28
    summary = summary_of(*folders)
    assert summary.contrasts == ()
    assert "36 pairs of arms are one choice apart: too many to be held against each other." in report.to_text(summary)
