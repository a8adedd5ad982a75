"""Sweeps: one annotation for all jobs, failures that stop nobody and are told, studies that go on, ranks that agree."""

from __future__ import annotations

import base64
import html
import importlib.util
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from transformers import AutoModelForCausalLM
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

from distill.app import config as configuration
from distill.app.command import command
from distill.app.overrides import check_command_line
from distill.errors import ConfigError
from distill.evaluation.answers import Evaluation
from distill.lessons.curriculum import prepare
from tests.app.conftest import MADE_RANKS, WHOLE, inspected
from tests.conftest import compose, conf_names, environment, reviews, run, start, tiny_overrides


@pytest.mark.slow
def test_a_failed_job_stops_no_other_and_is_listed_at_the_end(swept: Callable[..., Any], tmp_path: Path) -> None:
    wrong = {1: ConfigError("wrong"), 2: OSError(28, "No space left", "shard"), 3: ZeroDivisionError("a bug")}
    ran = []

    def work(config: DictConfig) -> float:
        ran.append((config.seed, config.batch_size))
        if config.seed in wrong:
            raise wrong[config.seed]
        return 0.5

    code, err = swept(work, "seed=0,1,2,3,4", "batch_size=16")
    assert ran == [(seed, 16) for seed in range(5)]
    assert code == 4  # the largest of 2, 4 and 1
    told = err[err.index("3 jobs failed") :].splitlines()
    assert told[1:] == [
        "  job 1, exit code 2: seed=1",
        "    ConfigError: wrong",
        "  job 2, exit code 4: seed=2",
        "    OSError: [Errno 28] No space left: 'shard'",
        "  job 3, exit code 1: seed=3",
        "    ZeroDivisionError: a bug",
    ]
    assert err.count("Traceback") == 1  # only of the bug
    (sweep,) = (tmp_path / "sweeps").iterdir()
    assert sorted(path.parent.name for path in sweep.glob("*/failed.json")) == ["1", "2", "3"]


@pytest.mark.slow
def test_failures_of_an_earlier_attempt_are_not_listed(swept: Callable[..., Any], tmp_path: Path) -> None:
    def fails(config: DictConfig) -> float:
        raise ConfigError("wrong")

    here = f"hydra.sweep.dir={tmp_path / 'sweep'}"
    assert swept(fails, here, "seed=0,1,2")[0] == 2
    code, err = swept(lambda config: 0.5, here, "seed=0,1")
    assert sorted(path.parent.name for path in tmp_path.rglob("failed.json")) == ["2"]
    assert code == 0
    assert "failed;" not in err


def manifests(cache: Path) -> list[dict[str, Any]]:
    """Lines of all manifests on shards."""
    lines = [json.loads(line)["line"] for path in cache.glob("manifests/*/*") for line in path.read_text().splitlines()]
    return [line for line in lines if "shard" in line]


def _keys(line: dict[str, Any]) -> list[bytes]:
    packed = base64.b64decode(line["keys"])
    size = len(packed) // line["records"]
    return [packed[start : start + size] for start in range(0, len(packed), size)]


@pytest.fixture(scope="module")
def side_by_side(
    tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, student_folder: Path
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Four jobs, three at a time, on an empty cache, tracked offline; the last is refused once its tracking began."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    root = tmp_path_factory.mktemp("sweep")
    tiny = [*short(root, teacher_folder, student_folder), "hydra/launcher=joblib", "hydra.launcher.n_jobs=3"]
    process = start(root, "-m", *tiny, "student.freeze=[],[model.embed_tokens],[lm_head],[model,lm_head]")
    try:
        output, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    return root, subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def short(root: Path, teacher_folder: Path, student_folder: Path) -> list[str]:
    """What makes a tracked job of a sweep a matter of seconds."""
    tiny = [*tiny_overrides(root, teacher_folder, student_folder), "trainer.max_steps=2", "batch_size=4"]
    tiny += ["num_samples=0", "evaluate_before=false", "max_new_tokens=2", "loss=[answer,kl]"]
    return [*tiny, "tracking=wandb", "tracking.mode=offline"]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_concurrent_jobs_make_each_record_once(
    side_by_side: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    root, done = side_by_side
    (cache,) = (root / "cache").iterdir()
    made = manifests(cache)
    keys = [key for line in made for key in _keys(line)]
    facts = [json.loads(path.read_text()) for path in sorted(root.glob("sweeps/*/[012]/run.json"))]
    assert [run["cache"]["num_records"] for run in facts] == [len(keys)] * 3, done.stderr
    assert len(keys) == len(set(keys)) == 20  # 12 train examples, 4 of validation, 4 of test


@pytest.mark.slow
def test_a_job_that_fails_in_another_process_is_listed_and_the_rest_reported(
    side_by_side: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    root, done = side_by_side
    assert done.returncode == 2, done.stderr
    told = done.stderr[done.stderr.index("1 job failed") :]
    assert "job 3, exit code 2: student.freeze=[model,lm_head]\n" in told
    assert "Traceback" not in done.stderr
    (page,) = root.glob("sweeps/*/report.html")
    assert html.unescape(page.read_text()).count("labels + teacher's soft targets") > 3


@pytest.mark.slow
def test_the_jobs_of_a_sweep_share_a_group_and_each_run_ends_as_its_job_did(
    side_by_side: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    root, _ = side_by_side
    (sweep,) = (root / "sweeps").iterdir()
    ended = {}
    for path in sorted(sweep.glob("*/wandb/offline-run-*")):
        records = {record["type"]: record for record in inspected(str(path))}
        ended[path.parent.parent.name] = (records["run"]["run"]["run_group"], records["exit"]["exit"]["exit_code"])
    assert ended == {"0": (sweep.name, 0), "1": (sweep.name, 0), "2": (sweep.name, 0), "3": (sweep.name, 1)}


@pytest.mark.slow
def test_a_sweep_in_an_existing_folder_repeats_and_overwrites_no_job(
    side_by_side: tuple[Path, subprocess.CompletedProcess[str]], teacher_folder: Path, student_folder: Path
) -> None:
    root, _ = side_by_side
    (sweep,) = (root / "sweeps").iterdir()
    before = {path: path.read_bytes() for path in sweep.glob("[01]/results.json")}
    tiny = short(root, teacher_folder, student_folder)
    done = run(root, "-m", *tiny, f"hydra.sweep.dir={sweep}", "student.freeze=[],[lm_head]")
    assert done.returncode == 2, done.stderr
    told = done.stderr[done.stderr.index("1 job failed") :]
    assert "job 1, exit code 2: student.freeze=[lm_head]\n    ConfigError: " in told
    assert "holds another run: student.freeze" in told
    assert done.stderr.count("holds this run and is complete") == 1
    assert {path: path.read_bytes() for path in sweep.glob("[01]/results.json")} == before


@pytest.mark.slow
def test_a_stopped_sweep_saves_every_running_job(tmp_path: Path, teacher_folder: Path, student_folder: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    tiny = [*tiny_overrides(tmp_path, teacher_folder, student_folder), "batch_size=4", "evaluate_before=false"]
    tiny += [
        "trainer.max_steps=100000",
        "hydra/launcher=joblib",
        "hydra.launcher.n_jobs=2",
        "loss=[answer],[answer,kl]",
    ]
    line = [sys.executable, "-m", "distill.train", "-m", *tiny]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            line, env=environment(), cwd=tmp_path, stdout=log, stderr=log, start_new_session=True
        )
    try:
        begun = time.monotonic()
        while len(list(tmp_path.glob("sweeps/*/*/metrics.csv"))) < 2 and time.monotonic() - begun < 150:
            assert process.poll() is None  # and each has done a few steps by then
            time.sleep(0.2)
        os.killpg(process.pid, signal.SIGTERM)  # as a scheduler does: each process is told
        assert process.wait(150) == 85, (tmp_path / "log").read_text()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    saved = {path.parent.parent.name for path in tmp_path.glob("sweeps/*/*/checkpoints/*.ckpt")}
    assert saved == {"0", "1"}


SEARCH = ("experiment=search", "hydra.sweeper.n_trials=4", "hydra.sweeper.sampler.n_startup_trials=1")


@pytest.fixture
def study() -> Callable[[Path], Any]:
    """Read the study that a search kept."""
    optuna = pytest.importorskip("optuna")
    return lambda folder: optuna.load_study(study_name=folder.name, storage=f"sqlite:///{folder / 'study.db'}")


def test_a_search_counts_a_failed_job_as_a_failed_trial(
    swept: Callable[..., Any], study: Callable[[Path], Any], tmp_path: Path
) -> None:
    rates = []

    def work(config: DictConfig) -> float:
        rates.append(config.optim.optimizer.lr)
        if len(rates) == 2:
            raise ConfigError("wrong")
        return 1000 * float(rates[-1])

    code, err = swept(work, *SEARCH)
    trials = study(tmp_path / "sweeps" / "search").trials
    assert [trial.state.name for trial in trials] == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert [trial.params["optim.optimizer.lr"] for trial in trials] == pytest.approx(rates)
    best = yaml.safe_load((tmp_path / "sweeps" / "search" / "optimization_results.yaml").read_text())
    assert best["best_value"] == pytest.approx(1000 * max(rate for i, rate in enumerate(rates) if i != 1))
    assert code == 2
    assert "1 job failed" in err


@pytest.mark.usefixtures("study")
@pytest.mark.parametrize("num_searches", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_search_in_which_every_trial_fails_lists_them(num_searches: int, swept: Callable[..., Any]) -> None:
    def work(config: DictConfig) -> float:
        raise ConfigError(f"wrong on {config.task.name}")

    for _ in range(num_searches):  # the second goes on with the study
        code, err = swept(work, *SEARCH, "hydra.sweeper.n_trials=2")
        assert code == 2
        assert "Record does not exist" not in err  # Optuna's traceback
        assert "2 jobs failed; no job succeeded" in err
        assert err.count("    ConfigError: wrong on ") == 2


@pytest.mark.usefixtures("study")
def test_another_error_of_a_search_is_not_hidden(swept: Callable[..., Any]) -> None:
    code, err = swept(lambda config: 0.5, *SEARCH, "hydra.sweeper.direction=sideways")
    assert code == 1
    assert "either 'minimize' or 'maximize'" in err


@pytest.mark.usefixtures("study")
def test_a_search_of_a_loss_that_is_not_chosen_is_refused(swept: Callable[..., Any], tmp_path: Path) -> None:
    code, err = swept(lambda config: 0.5, *SEARCH, "loss=[answer,kl]")
    assert code == 2
    assert "hydra.sweeper.params varies loss.rationale.weight, which this configuration does not have" in err
    assert not (tmp_path / "sweeps").exists()
    instead = "optim.optimizer.lr=tag(log,interval(1e-5,1e-3))"
    again = (*SEARCH, "loss=[answer,kl]", "hydra.sweeper.params=null", "hydra.sweeper.n_trials=1", instead)
    assert swept(lambda config: 0.5, *again)[0] == 0


@pytest.mark.slow
def test_a_resumed_study_overwrites_no_job(
    swept: Callable[..., Any], study: Callable[[Path], Any], tmp_path: Path
) -> None:
    def work(config: DictConfig) -> float:
        (configuration.run_dir() / "result").write_text(str(config.optim.optimizer.lr))
        time.sleep(1.1)  # folders are named by the second
        return 0.5

    folder = tmp_path / "sweeps" / "search"
    for _ in range(2):
        assert swept(work, *SEARCH, "hydra.sweeper.n_trials=2")[0] == 0
    rates = sorted(float(path.read_text()) for path in folder.glob("*/result"))
    assert rates == pytest.approx(sorted(trial.params["optim.optimizer.lr"] for trial in study(folder).trials))
    assert len(rates) == 4
    assert len({path.parent.name.rpartition("_")[0] for path in folder.glob("*/result")}) == 2


@pytest.mark.slow
@pytest.mark.usefixtures("study")
def test_a_search_optimizes_the_saved_students_validation_accuracy(
    tmp_path: Path, teacher_folder: Path, student_folder: Path
) -> None:
    tiny = [*tiny_overrides(tmp_path, teacher_folder, student_folder)[1:], *reviews(tmp_path), "teacher.calibrate=0"]
    tiny = [option for option in tiny if not option.startswith("task.examples.num")]
    tiny += ["trainer.max_steps=2", "max_new_tokens=2", "num_samples=0", "evaluate_before=false"]
    tiny += ["task.examples.num_validation=7", "task.examples.num_test=9", "task.examples.num_labelled=8"]
    tiny += ["task.examples.num_unlabelled=6"]
    done = run(tmp_path, "-m", *tiny, "experiment=search", "hydra.sweeper.n_trials=1")
    assert done.returncode == 0, done.stderr
    (sweep,) = (tmp_path / "sweeps").iterdir()
    (folder,) = (path.parent for path in sweep.glob("*/run.json"))
    job = prepare(OmegaConf.load(folder / "config.yaml"), tmp_path / "again")
    model = AutoModelForCausalLM.from_pretrained(folder / "student", dtype=torch.float32)
    evaluation = Evaluation(model, job.prompts, job.annotation_job.task, "direct", 2)
    examples = job.annotation_job.splits.validation
    told = evaluation.predict(examples, {})
    best = yaml.safe_load((sweep / "optimization_results.yaml").read_text())["best_value"]
    assert best == pytest.approx(sum(prediction.is_correct for prediction in told) / len(examples))
    assert best != json.loads((folder / "results.json").read_text())["rows"]["student"]["accuracy"]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["trainer.devices=2"], "trainer.devices=2 on 1 node with trainer.strategy=auto"),
        pytest.param(
            ["trainer.devices=choice([0,1])", "trainer.strategy=ddp"],
            r"devices=\[0, 1\] on 1 node with trainer.strategy=ddp",
            marks=pytest.mark.slow,
        ),
        pytest.param(["trainer.devices=choice('0,1')"], "trainer.devices=0,1 on 1 node", marks=pytest.mark.slow),
        (["trainer.num_nodes=2"], "trainer.devices=1 on 2 nodes"),
        pytest.param(
            ["trainer.devices=2", "trainer.strategy={_target_: lightning.pytorch.strategies.DDPStrategy}"],
            "DDPStrategy",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_sweep_job_that_would_start_its_own_ranks_is_refused(
    settings: list[str], told: str, swept: Callable[..., Any]
) -> None:
    ran = []
    code, err = swept(lambda config: ran.append(config), *settings)
    assert code == 2
    assert not ran
    assert re.search(told, err)
    assert all(way in err for way in ("hydra/launcher=slurm", "torchrun", "trainer.strategy=ddp_spawn"))


@pytest.mark.parametrize(
    "settings",
    [
        ["trainer.devices=1"],
        pytest.param(["trainer.devices=choice(auto,-1)", "trainer.accelerator=cpu"], marks=pytest.mark.slow),
        pytest.param(["trainer.devices=choice([1],'1')"], marks=pytest.mark.slow),
        ["trainer.devices=2", "trainer.strategy=ddp_spawn"],
        pytest.param(
            [
                "trainer.devices=2",
                "trainer.strategy={_target_: lightning.pytorch.strategies.DDPStrategy, start_method: spawn}",
            ],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_sweep_job_with_one_rank_or_spawned_ranks_runs(settings: list[str], swept: Callable[..., Any]) -> None:
    assert swept(lambda config: 0.5, *settings)[0] == 0


@pytest.mark.parametrize("name", [MADE_RANKS[0], *(pytest.param(n, marks=pytest.mark.slow) for n in MADE_RANKS[1:])])
def test_ranks_started_by_a_scheduler_or_torchrun_run_a_sweep(
    name: str, swept: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "0")
    assert swept(lambda config: 0.5, "trainer.devices=2")[0] == 0


def test_a_single_run_may_start_its_own_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = []
    GlobalHydra.instance().clear()
    monkeypatch.setattr(sys, "argv", ["train", *WHOLE, f"root={tmp_path}", "trainer.devices=2"])
    command("train", lambda config: ran.append(config.trainer.devices))
    assert ran == [2]


def test_a_missing_plugin_is_named_with_its_extra(swept: Callable[..., Any]) -> None:
    if importlib.util.find_spec("hydra_plugins.hydra_ray_launcher"):
        pytest.skip("the extra ray is installed")
    code, err = swept(lambda config: 0.5, "hydra/launcher=ray")
    assert code == 2
    assert "pip install 'distill[ray]'" in err


def drawn(parameter: dict[str, Any]) -> list[Any]:
    """The values of a parameter, or the ends of its range."""
    return parameter.get("values") or [parameter["min"], parameter["max"]]


@pytest.mark.slow
@pytest.mark.parametrize("name", conf_names("sweep"))
def test_the_command_of_a_wandb_agent_composes(name: str) -> None:
    sweep = yaml.safe_load((configuration.CONF / "sweep" / f"{name}.yaml").read_text())
    for values in itertools.product(*map(drawn, sweep["parameters"].values())):
        given = {key: {"value": value} for key, value in zip(sweep["parameters"], values, strict=True)}
        line = []
        for word in sweep["command"][4:]:
            words = create_sweep_command_args({"args": given})["args_no_hyphens"]
            line += words if word == "${args_no_hyphens}" else [word]
        check_command_line("train", line)
        config = compose(*line)
        configuration.check(config)
        for key, value in zip(sweep["parameters"], values, strict=True):
            found = OmegaConf.select(config, key)
            assert f"[{','.join(found)}]" == value if key == "loss" else found == value
    assert sweep["command"][:4] == ["${env}", "${interpreter}", "-m", "distill.train"]
    assert sweep["metric"] == {"name": "val/accuracy", "goal": "maximize"}  # a choice never sees test


def test_each_run_of_a_wandb_agent_has_its_own_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "agent", "WANDB_RUN_ID": "a1b2"}.items():
        monkeypatch.setenv(name, value)
    for name in ("DISTILL_RUN", "WANDB_SWEEP_ID"):
        monkeypatch.delenv(name, raising=False)
    assert configuration.run_name("now") == "slurm-7"
    monkeypatch.setenv("WANDB_SWEEP_ID", "s3")
    assert configuration.run_name("now") == "wandb-a1b2"
