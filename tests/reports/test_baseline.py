"""The command for a missing baseline repeats the run with all its settings."""

from __future__ import annotations

import shlex
from typing import Any

import pytest

from distill.reports.page import to_html
from distill.reports.text import to_text
from tests.reports.conftest import Make, Page, summary_of


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["seed=0"], ["loss=[answer]", "seed=0"]),
        (
            ["task=jsonl", "task.path=my data/train.jsonl", "loss=[answer,kl]", "task.choices=[yes,no]"],
            ["loss=[answer]", "task=jsonl", "task.path=my data/train.jsonl", "task.choices=[yes,no]"],
        ),
        (["loss.kl.weight=2", "++loss.answer.weight=3", "+loss.kl.a=1"], ["loss=[answer]", "++loss.answer.weight=3"]),
        (["hydra.run.dir=runs/mine/", "loss=[kl]"], ["loss=[answer]", "hydra.run.dir=runs/mine-baseline"]),
        (["-m", "loss=[kl],[kl,answer]", "seed=0,1"], ["-m", "loss=[answer]", "seed=0,1"]),
        (["seed=0", "--multirun", "lossy=1"], ["--multirun", "loss=[answer]", "seed=0", "lossy=1"]),
        (["task.layout.instruction='It\\'s $HOME'"], ["loss=[answer]", "task.layout.instruction='It\\'s $HOME'"]),
    ],
)
def test_the_command_repeats_every_override_but_the_losses(
    make_run: Make, given: list[str], expected: list[str]
) -> None:
    summary = summary_of(make_run(command=["train.py", *given]))
    (verdict,) = summary.verdicts
    command = verdict.caveats[-1].removeprefix("To run the baseline: ")
    assert shlex.split(command) == ["python", "-m", "distill.train", *expected]
    assert command in to_text(summary).splitlines()  # in one line, to be copied
    assert command in Page(to_html(summary)).text


def test_the_command_of_an_arm_with_several_seeds_trains_them_all(make_run: Make) -> None:
    (verdict,) = summary_of(*(make_run(seed=seed) for seed in (0, 1, 2))).verdicts
    assert "python -m distill.train -m 'loss=[answer]' seed=0,1,2" in verdict.caveats[-1]


@pytest.mark.parametrize("command", [None, "train", []])
def test_a_run_without_a_recorded_command_has_a_command_for_its_baseline(make_run: Make, command: Any) -> None:
    (verdict,) = summary_of(make_run(command=command)).verdicts
    assert "python -m distill.train 'loss=[answer]'" in verdict.caveats[-1]


def test_a_long_command_is_not_cut(make_run: Make) -> None:
    command = ["train.py", *(f"task.examples.a_rather_long_setting_{k}=a rather long value {k}" for k in range(12))]
    summary = summary_of(make_run(command=command))
    assert "a rather long value 11" in Page(to_html(summary)).text
    assert "a rather long value 11" in to_text(summary)
