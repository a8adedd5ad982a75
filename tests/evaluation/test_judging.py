"""A judge compares the texts of run folders, blind and in both orders; what was asked is asked once."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from distill.annotation import fill as filling
from distill.app import config as configuration
from distill.errors import ConfigError
from distill.evaluation.judging import judge
from distill.reports.judgements import JUDGEMENTS_FILE
from distill.reports.page import to_html
from distill.reports.text import to_markdown, to_text
from distill.tasks.judging import Judging
from tests.conftest import compose
from tests.reports.conftest import Page, summary_of, write_run

SHOW = compose("runs=x", name="judge").task.examples.show
NUM = 12


def lines(*, student: Callable[[int], str] = lambda k: f"my text {k}") -> list[dict[str, Any]]:
    gold = {k: f"gold text of question {k}" for k in range(NUM)}
    return [
        {
            "id": f"{k:032x}",
            "question": f"What is {k}?",
            "gold": gold[k],
            "teacher_answer": f"teacher {k}",
            "student_answer": student(k),
            "is_correct": None,
        }
        for k in range(NUM)
    ]


def run_folder(folder: Path, losses: tuple[str, ...] = ("answer",), seed: int = 0, **more: Any) -> Path:
    return write_run(folder, losses, 0.5, seed, predictions=lines(**more))


def overrides(root: Path, runs: Sequence[Path], *more: str) -> Any:
    listed = f"runs=[{','.join(map(str, runs))}]"
    return compose(listed, f"root={root}", *more, name="judge")


def verdicts_of(path: Path, prefer: Callable[[str, str], str], runs: Sequence[Path], against: Any) -> list[str]:
    """A recorded judge that prefers as it is told; the overrides with which it judges."""
    task = Judging(runs=list(map(str, runs)), against=against, num_pairs=None, show=SHOW)
    rows = []
    for contest in task.contests:
        for pair in contest.pairs:
            for example, sides in zip(pair.orders, ((pair.answer, pair.rival), (pair.rival, pair.answer)), strict=True):
                rows.append({"question": example.question, "teacher_answer": prefer(*sides)})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["teacher@judge=recorded", f"judge.kind.files=[{path}]", "judge.kind.rationale=null"]


@pytest.fixture
def judged(
    tmp_path: Path, student_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[float, list[dict[str, Any]]]]:
    """Judge runs by a recorded preference; return the win rate and the first run's judgements of its rival."""
    monkeypatch.setattr(configuration, "run_dir", lambda: tmp_path)

    def make(
        prefer: Callable[[str, str], str], runs: Sequence[Path], against: Any = "gold"
    ) -> tuple[float, list[dict[str, Any]]]:
        rivals = f"[{','.join(map(str, against))}]" if isinstance(against, list) else against
        recorded = verdicts_of(tmp_path / "verdicts.jsonl", prefer, runs, against)
        rate = judge(overrides(tmp_path, runs, *recorded, f"judge.model={student_folder}", f"against={rivals}"))
        found = [json.loads(line) for line in (runs[0] / JUDGEMENTS_FILE).read_text().splitlines()]
        return rate, [line for line in found if line["against"] != "other questions"]

    return make


def longer(first: str, second: str) -> str:
    return "tie" if len(first) == len(second) else "A" if len(first) > len(second) else "B"


def places(first: str, second: str) -> str:
    """Verdicts by what the pair's text of the student asks for."""
    mine, is_first = (first, True) if first.startswith("my") else (second, False)
    if "better" in mine or "worse" in mine:
        return "A" if is_first == ("better" in mine) else "B"
    if "half" in mine:
        return "A" if is_first else "tie"
    return "A" if "place" in mine else "tie"


TEXTS = ("my better", "my worse", "my place", "my tie", "my half", "gold text of question 5")
SCORES = (1.0, 0.0, 0.5, 0.5, 0.5, 0.5)


def test_a_text_wins_if_both_orders_say_so_and_else_it_is_a_tie(
    judged: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_folder(tmp_path / "run", student=lambda k: TEXTS[k] if k < len(TEXTS) else "my better")
    rate, found = judged(places, [run])
    assert [line["score"] for line in found] == [*SCORES, *[1.0] * (NUM - len(TEXTS))]
    assert rate == pytest.approx((1 + 4 * 0.5 + NUM - len(TEXTS)) / NUM)
    assert [line["is_changed"] for line in found[:6]] == [False, False, True, False, True, False]
    assert [line["verdicts"] for line in found[:6]] == [*map(list, ("AB", "BA", "AA")), ["tie"] * 2, ["A", "tie"], []]
    assert [line["is_identical"] for line in found[:6]] == [False] * 5 + [True]
    out = " ".join(capsys.readouterr().out.split())
    assert f"{100 * 2 / NUM:.1f} %" in out  # of the verdicts changed with the order
    assert "this judge cannot tell them apart reliably" in out


@pytest.mark.slow
def test_runs_are_judged_against_runs_and_seeds_together(judged: Any, tmp_path: Path) -> None:
    soft = [run_folder(tmp_path / f"s{n}", ("answer", "kl"), n, student=lambda k: "long " * 9) for n in (0, 1)]
    hard = [run_folder(tmp_path / f"h{n}", ("answer",), n, student=lambda k: "short") for n in (0, 1)]
    rate, found = judged(longer, soft, [str(folder) for folder in hard])
    assert rate == 1
    assert {line["against"] for line in found} == {"answer"}
    summary = summary_of(*soft, *hard)
    for text in (to_text(summary), to_markdown(summary), Page(to_html(summary)).text):
        joined = " ".join(text.replace("\\", "").split())
        assert "order changed" in joined
        assert "100.0 % [" in joined
        assert "reference texts of other questions" in joined


@pytest.mark.slow
def test_a_model_judges_and_is_asked_once(
    tmp_path: Path, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(configuration, "run_dir", lambda: tmp_path)
    run = run_folder(tmp_path / "run")
    settings = [f"judge.model={teacher_folder}", "judge.kind.dtype=float32", "against=teacher", "cache.codec.k=4"]
    rate = judge(overrides(tmp_path, [run], *settings))
    first = (run / JUDGEMENTS_FILE).read_bytes()
    assert 0 <= rate <= 1
    found = [json.loads(line) for line in first.splitlines()]
    assert [line["against"] for line in found] == ["teacher"] * NUM + ["other questions"] * NUM
    assert {verdict for line in found for verdict in line["verdicts"]} <= {"A", "B", "tie"}
    monkeypatch.setattr(filling, "loaded", pytest.fail)
    assert judge(overrides(tmp_path, [run], *settings)) == rate
    assert (run / JUDGEMENTS_FILE).read_bytes() == first
    assert "0 calls" in capsys.readouterr().err


@pytest.mark.slow
def test_pairs_that_are_too_long_are_counted_and_not_judged(
    tmp_path: Path, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(configuration, "run_dir", lambda: tmp_path)
    run = run_folder(tmp_path / "run", student=lambda k: "words " * (200 if k < 4 else 1))
    settings = [f"judge.model={teacher_folder}", "judge.kind.dtype=float32", "task.max_length=400"]
    judge(overrides(tmp_path, [run], *settings))
    found = [json.loads(line) for line in (run / JUDGEMENTS_FILE).read_text().splitlines()][:NUM]
    assert [line["score"] is None for line in found] == [True] * 4 + [False] * (NUM - 4)
    assert f"{NUM - 4} of {NUM}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"against": "nowhere"}, "cannot be read"),
        ({"against": ["gold", "gold", "gold"]}, "3 rivals for 1 runs"),
        ({"show": "{question} {first}"}, "expected {question}, {first} and {second}"),
    ],
)
def test_what_cannot_be_judged_is_refused(change: dict[str, Any], problem: str, tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    settings = {"runs": [str(run)], "against": "gold", "num_pairs": None, "show": SHOW} | change
    with pytest.raises(ConfigError) as error:
        Judging(**settings).contests  # noqa: B018
    assert problem in str(error.value)
