"""Reports on free texts: judged by held-out cross-entropy, never by accuracy."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill.reports.measures import CROSS_ENTROPY
from distill.reports.page import to_html, write_report
from distill.reports.statistics import linearized_ratio, paired_interval, student_t
from distill.reports.text import to_markdown, to_text
from distill.reports.verdicts import Summary
from tests.reports.conftest import Make, Page, row, summary_of

LABELS, SOFT = ("answer",), ("answer", "kl")
NUM_TEXTS = 60


def texts(level: float, seed: int, number: int = NUM_TEXTS) -> list[dict[str, Any]]:
    """Predictions with about `level` nats per byte on texts of several lengths, which are the same in every run."""
    lengths, noise = random.Random("lengths"), random.Random(f"{level} {seed}")
    lines = []
    for index in range(number):
        num_bytes = lengths.randint(20, 400)
        difficulty = lengths.uniform(0.8, 1.2)
        nats = num_bytes * (level * difficulty + noise.gauss(0, 0.005))
        lines.append(
            {
                "id": f"{index:032x}",
                "question": f"Summarise {index}",
                "gold": "the same text" if index % 2 else "another text",
                "student_answer": "some\ntext",
                "teacher_answer": "a text",
                "is_correct": None,
                "is_teacher_correct": None,
                "agrees": None,
                "gold_nats": nats,
                "gold_tokens": num_bytes // 4,
                "gold_bytes": num_bytes,
                "chrf": 100 * (1 - level) + noise.gauss(0, 5),
                "rouge_l": 90 * (1 - level) + noise.gauss(0, 4),
                "length": 10,
                "has_ended": True,
            }
        )
    return lines


def figures(lines: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
    nats = math.fsum(line["gold_nats"] for line in lines)
    shared = {key: value for key, value in row(0.5).items() if key in ("parameters", "size_bytes", "ms_per_example")}
    return shared | {
        "num_examples": len(lines),
        "num_unmeasured": 0,
        "cross_entropy": nats / sum(line["gold_tokens"] for line in lines),
        "cross_entropy_per_byte": nats / sum(line["gold_bytes"] for line in lines),
        "teacher_cross_entropy": 1.5,
        "kl": 0.4,
        "chrf": 30.0,
        "teacher_chrf": 35.0,
        "rouge_l": 20.0,
        "teacher_rouge_l": 25.0,
        "length_ratio": 0.9,
        "ended": 1.0,
        "training_seconds": 3.0,
        **more,
    }


@pytest.fixture
def make_texts(make_run: Make) -> Make:
    """Write the folder of a run on free texts."""

    def make(losses: tuple[str, ...], level: float, seed: int = 0, number: int = NUM_TEXTS, **more: Any) -> Path:
        lines = texts(level, seed, number)
        folder = make_run(losses, 0.5, seed, predictions=lines, **more)
        unknown = dict.fromkeys(("cross_entropy", "cross_entropy_per_byte", "kl", "teacher_chrf", "teacher_rouge_l"))
        results = {
            "teacher": figures(lines, **unknown, chrf=41.0),
            "before": figures(texts(0.9, 0, number)),
            "student": figures(lines),
        }
        (folder / "results.json").write_text(json.dumps({"rows": results}))
        (folder / "metrics.csv").write_text("step,train/answer,val/answer\n10,2.0,\n10,,1.9\n20,,1.5\n")
        return folder

    return make


@pytest.fixture
def make_unlabelled(make_texts: Make) -> Make:
    """Write the folder of a run on free texts without gold texts: the teacher's are the only reference."""

    def make(losses: tuple[str, ...], level: float, seed: int = 0) -> Path:
        folder = make_texts(losses, level, seed)
        lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
        for line in lines:
            line |= {name.replace("gold", "teacher"): line[name] for name in ("gold_nats", "gold_bytes")}
            line |= {"gold": "", "gold_nats": None, "gold_bytes": 0, "chrf": None, "teacher_chrf": line["chrf"]}
            line |= {"rouge_l": None, "teacher_rouge_l": line["rouge_l"]}
        (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        rows = json.loads((folder / "results.json").read_text())["rows"]
        for figures_ in rows.values():
            per_byte = figures_["cross_entropy_per_byte"]
            figures_ |= dict.fromkeys(("cross_entropy", "cross_entropy_per_byte", "chrf", "rouge_l"))
            figures_["teacher_cross_entropy_per_byte"] = per_byte
        (folder / "results.json").write_text(json.dumps({"rows": rows}))
        facts = json.loads((folder / "run.json").read_text())
        facts["counts"]["labelled"] = 0
        (folder / "run.json").write_text(json.dumps(facts))
        return folder

    return make


def of_two_arms(make_texts: Make, seeds: Sequence[int] = (0, 1, 2)) -> Summary:
    levels = ((LABELS, 0.60), (SOFT, 0.55))
    return summary_of(*(make_texts(losses, level + 0.002 * seed, seed) for losses, level in levels for seed in seeds))


def test_the_lower_cross_entropy_is_better(make_texts: Make) -> None:
    (verdict,) = of_two_arms(make_texts).verdicts
    assert (verdict.status, verdict.wording) == ("better", "lower cross-entropy")
    assert verdict.points == pytest.approx(-0.05, abs=0.003)
    low, high = verdict.difference.ends
    assert low < verdict.points < high < 0
    assert "has a lower cross-entropy" in verdict.sentence
    arms = verdict.difference.arm, verdict.difference.rival
    for key, name in (("chrf", "chrF"), ("rouge_l", "ROUGE-L")):
        soft, labels = (
            np.mean([line[key] for lines in arm.predictions.values() for line in lines.values()]) for arm in arms
        )
        interval = verdict.difference.overlaps[name]
        assert interval.low < interval.estimate < interval.high
        assert interval.estimate == pytest.approx(soft - labels)
        assert f"{name} {soft - labels:+.1f} [" in verdict.sentence
    assert "nats per byte below labels alone at equal budget" in verdict.sentence
    (turned,) = summary_of(make_texts(LABELS, 0.55), make_texts(SOFT, 0.60)).verdicts
    assert (turned.status, turned.wording) == ("worse", "higher cross-entropy")
    assert turned.points > 0


def test_the_difference_is_that_of_the_figures_in_the_table(make_texts: Make) -> None:
    summary = of_two_arms(make_texts, [0])
    (verdict,) = summary.verdicts
    labels, soft = (arm.stat("cross_entropy_per_byte").mean for arm in summary.trained)
    assert verdict.points == pytest.approx(soft - labels, abs=1e-12)
    assert verdict.wording == "lower cross-entropy in one seed"


def test_equal_students_are_not_shown_to_differ(make_texts: Make) -> None:
    (verdict,) = summary_of(make_texts(LABELS, 0.6), make_texts(SOFT, 0.6)).verdicts
    assert (verdict.status, verdict.points) == ("not shown", 0)


@pytest.mark.slow
def test_free_texts_are_never_called_right_or_wrong(make_texts: Make) -> None:
    summary = of_two_arms(make_texts)
    for text in (to_text(summary), to_markdown(summary), Page(to_html(summary)).text.partition("Did distillation")[2]):
        assert "accura" not in text.lower()
        assert "points" not in text
        assert "recovers" not in text
        assert "right" not in text.replace("neither right nor wrong", "")
        assert "nan" not in text.lower().split()
        assert "nats per byte" in text
        assert "chrF" in text
    assert not summary.guesses


def test_accuracy_and_texts_stand_side_by_side_in_one_report(make_texts: Make, make_run: Make, tmp_path: Path) -> None:
    folders = [make_texts(LABELS, 0.6), make_run(LABELS, 0.7, task="other"), make_run(SOFT, 0.8, task="other")]
    summary = write_report(folders, tmp_path / "report")
    assert {arm.measure.name for arm in summary.trained} == {"accuracy", "cross-entropy"}
    assert "cross-entropy, nats per byte" in (tmp_path / "report" / "report.md").read_text()


def test_unpaired_arms_are_compared_by_their_own_intervals(make_texts: Make) -> None:
    folders = [make_texts(LABELS, 0.6, 0), make_texts(SOFT, 0.55, 1)]
    (verdict,) = summary_of(*folders).verdicts
    assert verdict.difference.interval is None
    arm, rival = verdict.difference.arm, verdict.difference.rival
    assert (arm.interval[1] < rival.interval[0]) == (verdict.status == "better")
    assert arm.interval[0] < arm.stat(CROSS_ENTROPY.key).mean < arm.interval[1]


def test_without_gold_texts_students_are_judged_along_the_teachers(make_unlabelled: Make) -> None:
    hard, soft = ("teacher_answer",), ("teacher_answer", "kl")
    folders = [make_unlabelled(losses, level, seed) for losses, level in ((hard, 0.6), (soft, 0.55)) for seed in (0, 1)]
    summary = summary_of(*folders)
    (verdict,) = summary.verdicts
    assert (verdict.status, verdict.wording) == ("better", "lower cross-entropy")
    assert verdict.points == pytest.approx(-0.05, abs=0.003)
    assert verdict.over_hard_labels is None  # they are the baseline
    assert "nats per byte below the teacher's answers alone at equal budget" in verdict.sentence
    chrf = verdict.difference.overlaps["chrF"]
    assert f"Difference in wording to the teacher's texts: chrF {chrf.estimate:+.1f}" in verdict.sentence
    for text in (to_text(summary), to_markdown(summary), Page(to_html(summary)).text.partition("Did distillation")[2]):
        joined = " ".join(text.split())
        assert "nats per byte along the teacher's texts of the test" in joined
        assert "than the same student trained on the teacher's answers alone" in joined
        assert "not how good that is" in joined
    assert "labels alone" not in to_text(summary)


def test_the_command_for_a_missing_baseline_without_labels_learns_the_teachers_answers(make_unlabelled: Make) -> None:
    (verdict,) = summary_of(make_unlabelled(("kl",), 0.55)).verdicts
    assert verdict.status == "no baseline"
    assert any("distill.train 'loss=[teacher_answer]'" in caveat for caveat in verdict.caveats)


def test_a_linearized_ratio_has_the_ratio_as_its_mean_and_its_spread() -> None:
    generator = np.random.default_rng(0)
    numbers = generator.integers(5, 50, 400).astype(float)
    totals = numbers * generator.normal(0.7, 0.1, 400)
    values = np.array(linearized_ratio(totals.tolist(), numbers.tolist()))
    assert values.mean() == pytest.approx(totals.sum() / numbers.sum(), rel=1e-12)
    places = generator.integers(0, 400, (4000, 400))
    drawn = totals[places].sum(1) / numbers[places].sum(1)
    assert values.std(ddof=1) / 20 == pytest.approx(drawn.std(), rel=0.05)
    assert linearized_ratio([2.0, 4.0], [1.0, 2.0]) == pytest.approx([2.0, 2.0])


@pytest.mark.parametrize("number", [2, 5, 40])
def test_the_interval_of_a_mean_is_at_least_students(number: int) -> None:
    values = np.random.default_rng(number).normal(1.0, 0.3, (1, number))
    interval = paired_interval(values, 0 * values, is_proportion=False)
    half = student_t(0.95, number - 1) * values.std(ddof=1) / math.sqrt(number)
    assert interval.high - interval.estimate >= half * (1 - 1e-9)
    assert interval.estimate - interval.low >= half * (1 - 1e-9)


def test_damaged_predictions_of_texts_are_left_out(make_texts: Make) -> None:
    folder = make_texts(SOFT, 0.55)
    lines = (folder / "predictions.jsonl").read_text().splitlines()
    changed = [json.loads(line) for line in lines]
    changed[0] |= {"gold_nats": "many"}
    changed[1] |= {"gold_bytes": 0}
    changed[2] |= {"gold_nats": float("inf")}
    (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in changed))
    (verdict,) = summary_of(make_texts(LABELS, 0.6), folder).verdicts
    assert verdict.difference.interval.num_examples == NUM_TEXTS - 3
    assert any(f"Paired on {NUM_TEXTS - 3} of {NUM_TEXTS}" in caveat for caveat in verdict.caveats)


def test_a_report_says_how_good_a_draft_a_student_that_writes_is(make_texts: Make) -> None:
    folder = make_texts(("kl",), 0.5)
    results = json.loads((folder / "results.json").read_text())
    results["rows"]["student"] |= {"acceptance_low": 0.5, "acceptance_high": 0.6}
    (folder / "results.json").write_text(json.dumps(results))
    summary = summary_of(folder)
    for text in (to_text(summary), Page(to_html(summary)).text, to_markdown(summary)):
        assert "kl would have 50.0 to 60.0 % of its tokens accepted" in " ".join(text.split())
