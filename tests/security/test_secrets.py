"""Keys are neither printed nor written, and no configuration reads or holds one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf

from distill.app import config as configuration
from distill.app.credentials import looks_secret
from distill.errors import ConfigError
from tests.conftest import environment, tiny_overrides
from tests.security.conftest import TrainCommand

CANARIES = {
    "WANDB_API_KEY": "8f3c" * 10,
    "OPENAI_API_KEY": "sk-proj-Zx81cnRb27QwLk39TtYu56",
    "HF_TOKEN": "hf_QwErTyUiOpAsDfGhJkLz",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMIK7MDENGbPxRfiCYCANARYKEY123",
    "AWS_ACCESS_KEY_ID": "AKIAZX81CNRB27QWLK39",
    "GITHUB_TOKEN": "ghp_Zx81cnRb27QwLk39TtYu56",
    "SERVICE_PASSWORD": "correct-horse-battery-canary",
}


@pytest.mark.parametrize(
    "secret",
    [
        *("sk-ant-api03-Zx81cnRb27QwLk39TtYu56", "hf_QwErTyUiOpAsDfGhJkLz", "wandb_v1_Zx81cnRb27QwLk39Tt"),
        *(
            "ghp_Zx81cnRb27QwLk39TtYu56",
            "github_pat_11ABCDEFG0Zx81cnRb27QwLk39",
            "AIzaSyZx81cnRb27QwLk39TtYu56AbCdEfGhI",
        ),
        *("xoxb-123456789012-abcdef", "ASIAZX81CNRB27QWLK39", "-----BEGIN OPENSSH PRIVATE KEY-----"),
        *("8f3c" * 10, "s3://user:word@host/folder"),
    ],
)
def test_the_formats_of_known_services_are_recognised(secret: str) -> None:
    assert looks_secret(f"see {secret} here")


@pytest.mark.parametrize("text", ["a model@" + "8f3c" * 10, "sk-learn", "github.com/a/b", "s3://bucket/folder", "hf_x"])
def test_a_plain_text_is_no_secret(text: str) -> None:
    assert not looks_secret(text)


GIT_SECRETS = {"user": "ghp_UserCanary81cnRb27QwLk", "password": "PasswordCanary81cnRb27", "edit": "EditCanary81cnRb27"}


RUN_COMMANDS = """
import json, os, runpy, shutil, sys, warnings
from pathlib import Path
from hydra.core.global_hydra import GlobalHydra

warnings.simplefilter("ignore")
remove, root = shutil.rmtree, Path(sys.argv[1])

def rmtree(path, *rest, **more):  # keeps the checkpoints that a finished run removes, so that they are searched too
    if Path(path).name == "checkpoints" and Path(path).is_dir():
        Path(path).rename(Path(path).with_name("kept"))
    else:
        remove(path, *rest, **more)

shutil.rmtree = rmtree
for command, *arguments in json.loads(sys.argv[2]):
    sys.argv = ["distill." + command, *arguments]
    GlobalHydra.instance().clear()
    try:
        runpy.run_module("distill." + command, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        assert not ended.code, (command, ended.code)
"""


def git_with_secrets(folder: Path) -> None:
    """Make a git repository with a password in its remote URL and a secret in an uncommitted edit."""
    (folder / "notes.txt").write_text("notes\n")
    url = f"https://{GIT_SECRETS['user']}:{GIT_SECRETS['password']}@git.example/a.git"
    author = ["-c", "user.name=a", "-c", "user.email=a@b.example"]
    for arguments in (["init"], ["remote", "add", "origin", url], ["add", "notes.txt"], [*author, "commit", "-m", "a"]):
        subprocess.run(["git", "-C", str(folder), *arguments], check=True, capture_output=True)
    (folder / "notes.txt").write_text(f"notes\n{GIT_SECRETS['edit']}\n")


@pytest.fixture(scope="module")
def after_all_commands(
    tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, student_folder: Path
) -> tuple[Path, str]:
    """Run every command with keys in the environment; return the folder and the output."""
    root = tmp_path_factory.mktemp("worked")
    git_with_secrets(root)
    tiny = [*tiny_overrides(root, teacher_folder, student_folder), "trainer.max_steps=2", "batch_size=4"]
    tiny += ["trainer.log_every_n_steps=1"]
    tiny = [option for option in tiny if not option.startswith("tracking")]
    tiny += ["num_samples=1", "max_new_tokens=3", "loss=[answer,kl]", "evaluate_before=false"]
    foreign = ("student", "trainer", "loss", "num_samples", "max_new", "batch", "evaluate")
    run_dir = str(root / "one")
    commands = [
        ["annotate", *(option for option in tiny if not option.startswith(foreign))],
        ["train", *tiny, "tracking=wandb", f"hydra.run.dir={run_dir}"],
        ["train", "-m", *tiny, "seed=1,2", "tracking=wandb"],
        [
            "evaluate",
            *(o for o in tiny if o.startswith(("task", "root"))),
            f"model={run_dir}/student",
            "max_new_tokens=3",
        ],
        ["export", f"root={root}", f"run={run_dir}", f"to={root}/exported"],
        ["report", f"root={root}", f"runs={run_dir}", f"out={root}/reported"],
    ]
    (root / "reported").mkdir()
    variables = environment(DISTILL_ROOT=str(root), WANDB_MODE="offline", HOME=str(root / "home"), **CANARIES)
    command = [sys.executable, "-W", "ignore", "-c", RUN_COMMANDS, str(root), json.dumps(commands)]
    process = subprocess.run(command, env=variables, cwd=root, capture_output=True, text=True, timeout=200, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    return root, process.stdout + process.stderr


def searchable_bytes(path: Path) -> bytes:
    """The bytes of a file; for a Parquet table, whose texts are compressed, also its rows."""
    rows = str(pq.read_table(path).to_pylist()) if path.suffix == ".parquet" else ""
    return path.read_bytes() + rows.encode()


@pytest.mark.slow
def test_no_command_writes_or_prints_a_key_of_the_environment(after_all_commands: tuple[Path, str]) -> None:
    root, output = after_all_commands
    git_paths = (root / ".git", root / "notes.txt")
    files = [
        file for file in root.rglob("*") if file.is_file() and not any(file.is_relative_to(path) for path in git_paths)
    ]
    kinds = {path.suffix for path in files} | {path.name for path in files}
    expected_kinds = {
        ".ckpt",
        ".wandb",
        ".safetensors",
        ".parquet",
        ".html",
        ".md",
        ".csv",
        "multirun.yaml",
        "hydra.yaml",
    }
    assert expected_kinds <= kinds
    canaries = {**CANARIES, **GIT_SECRETS}
    leaks = {
        (name, str(file.relative_to(root)))
        for file in files
        for name, key in canaries.items()
        if key.encode() in searchable_bytes(file)
    }
    assert not leaks
    assert not [name for name, key in canaries.items() if key in output]


@pytest.mark.slow
def test_no_wandb_record_holds_a_key_of_the_environment(after_all_commands: tuple[Path, str]) -> None:
    root, _ = after_all_commands
    folders = sorted((root / "one").rglob("*.wandb"))
    assert len(folders) == 1
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folders[0].parent)]
    variables = environment(WANDB_ERROR_REPORTING="false")
    process = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60, check=True)
    assert '"test/accuracy"' in process.stdout
    assert str(json.loads((root / "one" / "run.json").read_text())["commit"]) in process.stdout
    assert not [name for name, key in {**CANARIES, **GIT_SECRETS}.items() if key in process.stdout]


OPENAI, HUB, WANDB = (CANARIES[name] for name in ("OPENAI_API_KEY", "HF_TOKEN", "WANDB_API_KEY"))


AWS, GITHUB = CANARIES["AWS_ACCESS_KEY_ID"], CANARIES["GITHUB_TOKEN"]


@pytest.mark.parametrize(
    ("argument", "secret"),
    [
        ("+api_key=abcxyz", "abcxyz"),
        ("++tracking.password=abcxyz", "abcxyz"),
        ("teacher.kind.token=abcxyz", "abcxyz"),
        ("+loss.kl.extra={server:{client_secret:abcxyz}}", "abcxyz"),
        ("+loss.kl.extra=[{apiKey:abcxyz}]", "abcxyz"),
        (f"task.name={OPENAI}", OPENAI),
        (f"+note='see {HUB}'", HUB),
        (f"tracking.project={AWS}", AWS),
        (f"+extra={WANDB}", WANDB),
        (f"+extra=[1,{{a:{WANDB}}}]", WANDB),
        (f"seed=1,{WANDB}", WANDB),
        (f"+extra={GITHUB}", GITHUB),
        ("root=s3://someone:abcxyz@storage.example/folder", "abcxyz"),
        ("cache.dir='https://:abcxyz@storage.example/folder'", "abcxyz"),
        (f"hydra.run.dir=/tmp/{HUB}", HUB),
        ("+hydra.job.env_set.HF_TOKEN=abcxyz", "abcxyz"),
        (f"+hydra.job.env_set.PLAIN={OPENAI}", OPENAI),
        ("hydra.job.env_copy=[OPENAI_API_KEY]", OPENAI),
        ("hydra.job.env_copy=[HOME,SERVICE_PASSWORD]", CANARIES["SERVICE_PASSWORD"]),
        (f"task.name=[{OPENAI}", OPENAI),
        (f"--config-dir=/tmp/{OPENAI}", OPENAI),
        (OPENAI, OPENAI),
    ],
)
def test_a_secret_on_the_command_line_is_refused_before_anything_is_written(
    argument: str, secret: str, train_command: TrainCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, key in CANARIES.items():
        monkeypatch.setenv(name, key)
    code, output = train_command(*(["-m"] if "," in argument else []), argument)
    assert code == 2, output
    assert secret not in output
    assert "environment" in output or "may be copied" in output
    assert output.count("ConfigError") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "model",
    [
        f"someone/model@{WANDB}",
        f"/cache/snapshots/{WANDB}",
        "pypi://a==1/b.gguf#sha256=" + "0" * 64 + "&package=" + "1" * 64,
    ],
)
def test_a_value_that_only_resembles_a_secret_is_accepted(
    model: str, train_command: TrainCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    instruction = "task.layout.instruction='Ask sk-learn and the desk-clerk at https://a.example: one@two'"
    code, output = train_command(
        "student=causal_lm", f"student.model='{model}'", instruction, "hydra.job.env_copy=[SLURM_JOB_ID]"
    )
    assert code == 0, output


@pytest.mark.parametrize("line", ["token: abcxyz", f"note: {OPENAI}", "note: ${oc.env:OPENAI_API_KEY}"])
def test_a_secret_in_a_configuration_file_is_refused_before_anything_is_written(
    line: str, train_command: TrainCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", OPENAI)
    conf = shutil.copytree(configuration.CONF, tmp_path / "conf")
    with (conf / "teacher" / "causal_lm.yaml").open("a") as file:
        file.write(f"\n{line}\n")
    monkeypatch.setattr(configuration, "CONF", conf)
    code, output = train_command("teacher=causal_lm", "teacher.model=a/b")
    assert code == 2, output
    assert "teacher." in output
    assert "abcxyz" not in output
    assert OPENAI not in output
    assert [path.name for path in tmp_path.iterdir()] == ["conf"]


@pytest.mark.parametrize("text", ["${oc.env:OPENAI_API_KEY}", OPENAI])
def test_a_configuration_from_elsewhere_is_checked_too(text: str) -> None:
    with pytest.raises(ConfigError, match=r"task\.layout\.instruction: ") as raised:
        configuration.check(OmegaConf.create({"task": {"layout": {"instruction": text}}}))
    assert OPENAI not in str(raised.value)


def test_a_secret_is_hidden_in_saved_configurations_under_any_name() -> None:
    assert configuration.redacted({"a": [f"x {OPENAI}", "plain"]}) == {"a": ["hidden", "plain"]}


@pytest.mark.parametrize(
    "value",
    [
        "${oc.env:OPENAI_API_KEY}",
        "${oc.env:OPENAI_API_KEY,none}",
        "a-${ oc.env : OPENAI_API_KEY }",
        "${oc.env:${name}}",
        "${oc.decode:${oc.env:OPENAI_API_KEY}}",
        "${oc.env:SLURM_JWT}",
        "${oc.env:DISTILL_TOKEN}",
    ],
)
@pytest.mark.parametrize("key", ["task.name", "hydra.run.dir", "+hydra.job.env_set.PLAIN"])
def test_no_configuration_reads_a_secret_of_the_environment(
    value: str, key: str, train_command: TrainCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OPENAI_API_KEY", "SLURM_JWT", "DISTILL_TOKEN"):
        monkeypatch.setenv(name, "canary")
    code, output = train_command("+name=OPENAI_API_KEY", "+resolver=env", f"{key}='{value}'")
    assert code, output
    assert "canary" not in output
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if "canary" in path.read_text()]
    assert not [path for path in tmp_path.rglob("*") if "canary" in path.name]


def test_a_resolver_with_a_computed_name_reads_no_secret(
    train_command: TrainCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "canary")
    code, output = train_command("+resolver=env", "task.name='${oc.${resolver}:OPENAI_API_KEY}'")
    assert code == 2
    assert "may not read OPENAI_API_KEY" in output
    assert "canary" not in output
