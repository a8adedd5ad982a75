"""The configuration is checked whole: every mistake named, with what to write instead, before anything loads."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf

from distill.app import config as configuration
from distill.errors import ConfigError
from distill.lessons.curriculum import prepare
from tests.app.conftest import exit_code
from tests.conftest import compose, conf_names

WHOLE = ("task=arithmetic", "teacher=causal_lm", "student=causal_lm", "teacher.model=x", "student.model=x")
GROUPS = ("task", "teacher", "student", "prompt", "cache", "rationales", "optim", "trainer", "callback", "tracking")


def problems(*overrides: str) -> tuple[str, ...]:
    """What is wrong with the train configuration."""
    with pytest.raises(ConfigError) as raised:
        configuration.check(compose(*overrides))
    return raised.value.problems


@pytest.mark.parametrize(("group", "name"), [(group, name) for group in GROUPS for name in conf_names(group)])
def test_every_option_of_every_group_composes_and_passes_the_check(group: str, name: str) -> None:
    missing = OmegaConf.missing_keys(compose(f"{group}={name}"))
    given = (f"{key}={'[x]' if key.endswith('files') else 'x'}" for key in missing)
    configuration.check(compose(f"{group}={name}", *given))


@pytest.mark.parametrize("name", ["annotate", "evaluate", "export", "judge", "report", "train"])
def test_every_command_composes_and_names_required_values(name: str) -> None:
    config = compose(name=name)
    missing = OmegaConf.missing_keys(config)
    if missing:
        with pytest.raises(ConfigError) as raised:
            configuration.check(config)
        assert len(raised.value.problems) == len(missing)
        assert all(any(key in problem for key in missing) for problem in raised.value.problems)
    else:
        configuration.check(config)


def test_missing_values_are_named() -> None:
    assert problems("teacher=causal_lm", "student=causal_lm") == (
        "student.model must be given: student.model=…",
        "teacher.model must be given: teacher.model=…",
    )


def test_all_problems_are_reported_together() -> None:
    found = problems(
        *WHOLE,
        "+loss.kl.temperatur=2",
        "task.examples.num_test=many",
        "+task.examples.max_nummer=3",
        "tracking.mode=perhaps",
        "tracking=wandb",
        "+extra._target_=os.system",
        "+other._target_=distill.losses.Nothing",
        "loss.kl.span=question",
    )
    wanted = [
        "loss.kl: distill.losses.Objective has no parameter 'temperatur'; did you mean temperature?",
        "task.examples: num_test='many'",
        "task.examples: distill.tasks.arithmetic.Arithmetic has no parameter 'max_nummer'; did you mean max_number?",
        "tracking: mode='perhaps'",
        "extra: _target_ os.system is not from distill, torch",
        "other: _target_ distill.losses.Nothing does not exist",
        "loss.kl: span='question'",
    ]
    assert all(any(problem.startswith(lead) for problem in found) for lead in wanted), found
    assert len(found) == len(wanted)


@pytest.mark.parametrize(
    "target", ["os.system", "subprocess.run", "builtins.eval", "distillery.x", "torchvision.x", "torch"]
)
def test_targets_outside_the_allowed_packages_are_refused(target: str) -> None:
    (problem,) = problems(*WHOLE, f"loss.kl.divergence._target_={target}")
    assert target in problem


def test_a_missing_required_argument_is_named() -> None:
    config = compose(*WHOLE)
    OmegaConf.set_struct(config, False)
    del config.loss.kl.weight
    with pytest.raises(ConfigError, match="requires 'weight'"):
        configuration.check(config)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    (problem,) = problems("student=smollm2_lora")
    assert problem.startswith("student.lora: ")
    assert problem.endswith("pip install 'distill[lora]'")


def train_command(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[Any, str]:
    """Exit code and message of the train command, stopped before its work."""

    def work(config: DictConfig) -> None:
        configuration.check(config)

    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    return exit_code(work), capsys.readouterr().err


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("batch_sise=4", "batch_sise is not a key of this configuration; did you mean batch_size?"),
        ("optim.optimizer.lrr=1", "did you mean optim.optimizer.lr?"),
        ("loss=[answer,kll]", "loss=kll does not exist; available: "),
        ("loss=[answer,kll]", "did you mean kl?"),
        ("task=arithmetics", "did you mean arithmetic?"),
        ("student=tiny", "student=tiny does not exist; available: causal_lm"),
        ("teacher.model", "teacher.model"),
        ("batch_size=many", "batch_size"),
        ("trainer.max_steps=soon", "max_steps"),
        ("tracking.api_key=abc", "must not contain secrets"),
        ("tracking.project=[a", "close its brackets, or quote it"),
        ("tracking.project=é", "quote it: 'tracking.project=\"é\"'"),
        ("tracking.project=a,b", "several values, but this command is no sweep"),
    ],
)
def test_a_misspelt_override_is_one_message_without_a_traceback(
    argument: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, err = train_command([*WHOLE, f"root={tmp_path}", argument], monkeypatch, capsys)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert err.count("ConfigError") == 1


@pytest.mark.parametrize(
    "argument", ["teacher.kind.max_new_tokens=8", "max_new_tokens=8", "+optim.optimizer.eps=1e-6", "seed=3"]
)
def test_valid_overrides_are_accepted(
    argument: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, err = train_command([*WHOLE, f"root={tmp_path}", argument], monkeypatch, capsys)
    assert code == 0, err


@pytest.mark.parametrize("words", [[], ["-m", "seed=0,1"]])
def test_a_run_folder_that_cannot_be_created_is_one_message(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("kept")
    code, err = train_command([*words, f"root={tmp_path / 'file'}"], monkeypatch, capsys)
    assert code == 2
    assert "a file is in its place" in err
    assert "Traceback" not in err
    assert (tmp_path / "file").read_text() == "kept"


def test_incompatible_parts_are_refused_before_any_model_loads(configured: Any, tmp_path: Path) -> None:
    assert prepare(configured("cache.codec.temperature=2.0", "loss.kl.temperature=2.0"), tmp_path)
    with pytest.raises(ConfigError) as raised:
        prepare(
            configured("loss=[answer,kl,reverse_kl]", "loss.kl.temperature=2.0", "task.answer_mode=reasoned"), tmp_path
        )
    first, second = raised.value.problems
    assert first.startswith("loss.kl: a loss has temperature 2")
    assert "cache=dense" in first
    assert second.startswith("task.answer_mode=reasoned needs a loss on the words of rationales")


def test_reasoned_answers_need_the_words_of_rationales(configured: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="words of rationales"):
        prepare(configured("loss=[answer,kl,rationale_kl]", "task.answer_mode=reasoned"), tmp_path)
    assert prepare(configured("loss=[answer,rationale,rationale_kl]", "task.answer_mode=reasoned"), tmp_path)


def test_a_run_without_a_loss_is_refused(configured: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="loss is empty"):
        prepare(configured("loss=[]"), tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("api_key", "abc", "hidden"),
        ("wandb_token", "abc", "hidden"),
        ("PASSWORD", "abc", "hidden"),
        ("client_secrets", ["abc", "def"], ["hidden", "hidden"]),
        ("api_key", None, None),
        ("max_new_tokens", 40, 40),
        ("lr", 0.1, 0.1),
    ],
)
def test_secrets_are_hidden_at_any_depth(name: str, value: Any, shown: Any) -> None:
    assert configuration.redacted({"a": [{"b": {name: value}}]}) == {"a": [{"b": {name: shown}}]}


def test_a_saved_configuration_is_resolved_and_holds_no_secret(tmp_path: Path) -> None:
    config = compose(*WHOLE, "+tracking.api_key=canary", "trainer.max_steps=7")
    plain = configuration.save(config, tmp_path / "run" / "config.yaml")
    text = (tmp_path / "run" / "config.yaml").read_text()
    assert yaml.safe_load(text) == plain
    assert plain["optim"]["schedule"]["num_training_steps"] == 7
    assert "canary" not in text
    assert "${" not in text


@pytest.mark.parametrize("name", conf_names("experiment"))
def test_an_experiment_overrides_the_root_configuration(name: str) -> None:
    config = compose(f"experiment={name}")
    node = OmegaConf.to_container(OmegaConf.load(configuration.CONF / "experiment" / f"{name}.yaml"))
    plain = OmegaConf.to_container(config, resolve=False)
    wanted = {key: value for key, value in node.items() if key not in ("defaults", "hydra")}
    for key, value in wanted.items():
        assert _holds(plain[key], value), key


def _holds(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, dict):
        return all(_holds(found[key], value) for key, value in wanted.items())
    return bool(found == wanted)


@pytest.mark.parametrize(
    "argument", ["batch_sise=4", "task=arithmetics", "+loss.kl.temperatur=2", "task.layout.answer_cue=[1]"]
)
def test_a_refused_configuration_leaves_no_run_folder(
    argument: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, err = train_command([*WHOLE, f"root={tmp_path}", argument], monkeypatch, capsys)
    assert code == 2, err
    logging.getLogger("library").warning("after the refusal")
    assert not list(tmp_path.glob("runs/*"))


def test_a_refused_configuration_keeps_the_files_of_a_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.json").write_text("kept")
    code, err = train_command(
        [*WHOLE, f"hydra.run.dir={tmp_path / 'run'}", "+loss.kl.temperatur=2"], monkeypatch, capsys
    )
    assert code == 2, err
    assert (tmp_path / "run" / "results.json").read_text() == "kept"
