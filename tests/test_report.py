"""The report: numbers that can be checked by hand, an honest verdict, and a page that no data can break."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill import report
from distill.records import ConfigError

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


def learning_curve(losses: tuple[str, ...], accuracy: float) -> str:
    """A metrics.csv in which training and validation rows alternate, with empty cells."""
    lines = ["step,epoch," + ",".join(f"train/{loss}" for loss in losses) + ",val/answer,val/accuracy"]
    for step in range(10, 121, 10):
        fall = math.exp(-step / 50)
        train = ",".join(f"{0.4 + fall + 0.1 * index:.4f}" for index, _ in enumerate(losses))
        lines.append(f"{step},0,{train},,")
        lines.append(f"{step},0,{',' * (len(losses) - 1)},{0.5 + fall / 2:.4f},{accuracy - 0.2 * fall:.4f}")
    return "\n".join(lines) + "\n"


@pytest.fixture
def make_run(tmp_path: Path) -> Make:
    """Write a run folder; keywords replace facts, `without` leaves files out."""

    def make(
        losses: tuple[str, ...] = ("answer", "kl", "rationale"),
        accuracy: float = 0.74,
        seed: int = 0,
        *,
        config: Mapping[str, Any] | None = None,
        student: Mapping[str, Any] | None = None,
        predictions: list[dict[str, Any]] | None = None,
        without: tuple[str, ...] = (),
        **changes: Any,
    ) -> Path:
        written = facts(losses, seed) | changes
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        num_test = (student or {}).get("num_examples", 500)
        rows = {"teacher": row(0.82, agreement=None, kl=None), "before": row(0.52)}
        rows["student"] = row(accuracy, num_test) | dict(student or {})
        if predictions is None:
            predictions = [prediction(k, k % 4 > 0, k % 3 > 0) for k in range(60)]
        rejected = [{"id": f"{k:032x}", "reason": "disagrees", "text": "So it is good."} for k in range(3)]
        seeded = {
            "seed": seed,
            "loss": {loss: {"weight": 1.0} for loss in losses},
            "optim": {"lr": 3e-4, "seed": seed},
        }
        texts = {
            "config.yaml": yaml.safe_dump(seeded | dict(config or {})),
            "run.json": json.dumps(written),
            "metrics.csv": learning_curve(losses, accuracy),
            "results.json": json.dumps({"rows": rows}),
            "predictions.jsonl": "".join(json.dumps(line) + "\n" for line in predictions),
            "rejected.jsonl": "".join(json.dumps(line) + "\n" for line in rejected),
        }
        for name, text in texts.items():
            if name not in without:
                (folder / name).write_bytes(text.encode("utf-8", "surrogatepass"))
        return folder

    return make


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


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.7062), (2, 4.30265), (10, 2.22814), (11, 2.20099), (30, 2.04227), (1000, 1.96234)],
)
def test_t_quantiles_are_those_of_the_printed_tables(freedom: int, quantile: float) -> None:
    assert report.t_975(freedom) == pytest.approx(quantile, abs=1e-3)


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
def test_verdict_claims_only_what_the_intervals_show(
    make_run: Make, accuracy: float, status: str, points: float, phrase: str
) -> None:
    (verdict,) = summary_of(make_run(("answer",), 0.68), make_run(accuracy=accuracy)).verdicts
    assert verdict.status == status
    assert verdict.points == pytest.approx(points)
    assert phrase in verdict.sentence
    assert any("one seed" in caveat for caveat in verdict.caveats)


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


@pytest.mark.parametrize("name", report.FILES)
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
    assert sum('class="panel"' in chart for chart in charts) == metrics
    assert sum('class="square"' in chart for chart in charts) == 4
    assert (
        html.index("at equal budget")
        < html.index("<h2>Results")
        < html.index("<h2>Learning")
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
    assert len({line.count("|") - line.count("\\|") for line in markdown.splitlines() if line.startswith("| ")}) == 2


def test_text_is_cut_at_500_characters_and_says_by_how_much(make_run: Make) -> None:
    long = prediction(1, True, True) | {"question": "x" * 800}
    html = report.to_html(summary_of(make_run(predictions=[long])))
    assert "x" * 500 + "… (300 more)" in html
    assert "x" * 501 not in html


def test_samples_mix_right_and_wrong_agreeing_and_not(make_run: Make) -> None:
    items = [prediction(k, k > 1, k % 10 > 0) | {"student_rationale": "Because."} for k in range(100)]
    silent = [prediction(k, k % 2 > 0, True) | {"student_rationale": None} for k in range(100, 200)]
    folder = make_run(predictions=[*silent, *items[::-1]])
    run, chosen = report.samples(summary_of(folder))
    kinds = [(item["is_correct"], item["student_answer"] == item["teacher_answer"]) for item in chosen]
    assert run == report.read_run(folder)
    assert {kind: kinds.count(kind) for kind in kinds} == {
        (False, False): 1, (False, True): 1, (True, False): 9, (True, True): 9,
    }  # fmt: skip
    assert chosen == report.samples(summary_of(make_run(predictions=items)))[1]


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
