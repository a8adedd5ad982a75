"""`--help` names every option, every setting and examples that work, and imports nothing but Python."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from distill.app.help import _WIDTH, examples, help_text, options
from distill.app.overrides import check_command_line

CONF = Path(__file__).parents[2] / "conf"
COMMANDS = ("train", "annotate", "evaluate", "judge", "report", "export")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_every_group_has_a_line(command: str) -> None:
    lines = help_text(CONF, command).splitlines()
    defaults = yaml.safe_load((CONF / f"{command}.yaml").read_text())["defaults"]
    groups = {key.removeprefix("optional ") for item in defaults if isinstance(item, dict) for key in item}
    for group in groups:
        if "@" in group:
            assert any(line.startswith(f"  {group}=") for line in lines)
            continue
        start = next(index for index, line in enumerate(lines) if line.startswith(f"  {group}="))
        explained = options(CONF, group)
        shown = [line[4:].split(maxsplit=1) for line in lines[start + 1 : start + 1 + len(explained)]]
        assert [name for name, _ in shown] == list(explained)
        for (_, line), whole in zip(shown, explained.values(), strict=True):
            assert len(line) > 10
            assert whole.startswith(line.removesuffix(" ..."))


def test_the_options_that_a_command_begins_with_are_marked() -> None:
    lines = help_text(CONF, "train").splitlines()
    marked = {line.split()[1] for line in lines if line.startswith("  * ")}
    config = yaml.safe_load((CONF / "train.yaml").read_text())["defaults"]
    chosen = {key: value for item in config if isinstance(item, dict) for key, value in item.items() if value}
    names = {name for value in chosen.values() for name in (value if isinstance(value, list) else [value])}
    assert marked == {str(name) for name in names}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_setting_of_the_command_has_an_explanation(command: str) -> None:
    text = help_text(CONF, command)
    values = yaml.safe_load((CONF / f"{command}.yaml").read_text())
    for key, value in values.items():
        if key in ("defaults", "hydra"):
            continue
        for name in [f"{key}.{inner}" for inner in value] if isinstance(value, dict) else [key]:
            line = next(line for line in text.splitlines() if line.startswith(f"  {name}="))
            assert len(line.split(maxsplit=1)) == 2, line


@pytest.mark.parametrize("command", COMMANDS)
def test_lines_fit_into_a_terminal(command: str) -> None:
    long = [line for line in help_text(CONF, command).splitlines() if len(line) > _WIDTH]
    assert long == []


def test_train_has_three_examples() -> None:
    assert len(examples((CONF / "train.yaml").read_text())) == 3


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_compose(command: str) -> None:
    lines = examples((CONF / f"{command}.yaml").read_text())
    assert lines
    for line in lines:
        assert line in help_text(CONF, command)
        python, flag, module, *words = shlex.split(line)
        assert (python, flag, module) == ("python", "-m", f"distill.{command}")
        check_command_line(command, words)


def test_help_imports_nothing_but_python() -> None:
    code = "import sys, distill.app.help; print(*{name.partition('.')[0] for name in sys.modules})"
    names = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True).stdout
    assert set(names.split()) - set(sys.stdlib_module_names) <= {"distill", "__main__"}
