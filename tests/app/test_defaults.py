"""Defaults that suit any task, and lab notes that say what they asked and found."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig

from distill.app import config as configuration
from tests.app.conftest import exit_code
from tests.conftest import compose, conf_names

TASKS = [name for name in conf_names("task") if name != "movie_reviews"]


def weights(*overrides: str) -> dict[str, float]:
    """The weight of every loss of conf/loss/."""
    nodes = compose(f"loss=[{','.join(conf_names('loss'))}]", *overrides).loss
    return {name: configuration.build(node).weight for name, node in nodes.items()}


@pytest.mark.parametrize("task", TASKS)
def test_every_loss_has_weight_one_on_any_task(task: str) -> None:
    assert set(weights(f"task={task}").values()) == {1.0}


def test_the_demonstration_keeps_its_own_weights() -> None:
    own = {"answer": 0.1, "rationale": 0.03, "rationale_kl": 0.03}
    assert weights("task=movie_reviews") == dict.fromkeys(conf_names("loss"), 1.0) | own


def test_a_weight_that_is_given_goes_before_that_of_the_task() -> None:
    assert weights("loss.answer.weight=0.7")["answer"] == 0.7
    assert weights("task=jsonl", "+task.weights.kl=0.5")["kl"] == 0.5


@pytest.mark.parametrize("name", [name for name in conf_names("experiment") if "svamp" in name])
def test_the_findings_on_word_problems_keep_the_weights_that_they_were_found_with(name: str) -> None:
    loss = compose(f"experiment={name}", "loss=[answer,teacher_answer,kl,rationale]").loss
    assert {key: node.weight for key, node in loss.items()} == {
        "answer": 1.0,
        "teacher_answer": 1.0,
        "kl": 1.0,
        "rationale": 0.03,
    }


def test_a_command_returns_the_accuracy_on_validation() -> None:
    assert compose().objective == "validation"
    assert all(compose(f"experiment={name}").objective == "validation" for name in conf_names("experiment"))


@pytest.mark.parametrize(
    "search",
    [["experiment=search"], pytest.param(["hydra/sweeper=optuna", "seed=choice(0,1)"], marks=pytest.mark.slow)],
)
def test_a_search_by_the_accuracy_on_test_is_refused(swept: Callable[..., Any], search: list[str]) -> None:
    pytest.importorskip("optuna")  # here, where its warnings at import do not fail the test
    ran: list[DictConfig] = []
    code, err = swept(lambda config: ran.append(config), *search, "hydra.sweeper.n_trials=1", "objective=test")
    assert (code, ran) == (2, []), err
    assert "objective=test under the sweeper OptunaSweeper" in err
    assert "Use objective=validation" in err


def test_an_agent_of_a_wandb_sweep_does_not_choose_by_test(
    swept: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", "s3")
    code, err = swept(lambda config: 0.5, "objective=test", "seed=0")
    assert code == 2
    assert "objective=test under an agent of a W&B sweep" in err


def test_a_single_run_of_such_an_agent_does_not_either(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", "s3")
    monkeypatch.setattr(sys, "argv", ["train", "task=arithmetic", f"root={tmp_path}", "objective=test"])
    assert exit_code(lambda _: 0.5) == 2
    assert "objective=test under an agent of a W&B sweep" in capsys.readouterr().err


@pytest.mark.parametrize("objective", [pytest.param("validation", marks=pytest.mark.slow), "test"])
def test_a_sweep_over_all_combinations_compares_nothing(objective: str, swept: Callable[..., Any]) -> None:
    assert swept(lambda config: 0.5, f"objective={objective}", "seed=0,1")[0] == 0


@pytest.mark.parametrize("name", conf_names("experiment"))
def test_every_experiment_says_what_it_asked_what_it_found_and_how_to_run_it(name: str) -> None:
    text = (configuration.CONF / "experiment" / f"{name}.yaml").read_text()
    starts = [line.split()[1] for line in text.splitlines() if line.startswith(("# asked:", "# found:", "# run:"))]
    assert starts == ["asked:", "found:", "run:"]
    assert f"experiment={name}" in text[: text.index("\n", text.index("# run:"))]
