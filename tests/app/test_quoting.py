"""Overrides that Hydra's grammar does not read are refused with the form that it reads."""

from __future__ import annotations

import re
import shlex
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from distill.app.config import check
from distill.app.overrides import check_command_line
from distill.app.quoting import _quoted, literal, problems_of_grammar
from distill.errors import ConfigError
from tests.conftest import compose
from tests.security.conftest import ANY_TEXT

PATHS = ["d/größe/p.csv", "вопрос.csv", "问.csv", "d/é.csv", "😀", "ＡＢ", 'é\\"', "é\\", "é\\\\"]
PATHS += [
    "a=b.csv",
    "a(1).csv",
    "a;b",
    "a#b",
    "it's",
    "a&b!",
    "<a>^~`",
    "x]",
    "(a",
    "{body} {question}",
    "a\nb",
    'say "so"',
]


def read(words: str) -> Any:
    """The value of the only override that a shell makes of these words."""
    (word,) = shlex.split(words)
    return OverridesParser.create().parse_override(word).value()


def message(*arguments: str) -> str:
    with pytest.raises(ConfigError) as raised:
        check_command_line("train", list(arguments))
    return str(raised.value)


@pytest.mark.parametrize("path", PATHS)
def test_a_value_that_hydra_does_not_read_is_shown_with_quotes_that_keep_it(path: str) -> None:
    text = message("task=jsonl", f"task.path={path}")
    assert text.startswith(f"task.path={path}: Hydra does not read this value (")
    assert read(text.rpartition("quote it: ")[2]) == path


def test_the_form_is_the_one_that_a_shell_takes() -> None:
    assert message("task=jsonl", "task.path=d/größe/p.csv").endswith("quote it: 'task.path=\"d/größe/p.csv\"'")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("[sí,no]", ["sí", "no"]),
        ("[да,'нет, нет',3]", ["да", "нет, нет", 3]),
        ("[[é],{a:ß}]", [["é"], {"a": "ß"}]),
        ("{größe}", "{größe}"),
        ("{a:größe,b:2}", {"a": "größe", "b": 2}),
    ],
)
def test_in_a_list_only_the_items_are_quoted(value: str, expected: Any) -> None:
    assert read(message("task=jsonl", f"task.choices={value}").rpartition("quote it: ")[2]) == expected


def test_all_unreadable_overrides_are_listed_together() -> None:
    text = message("task=jsonl", "task.path=é", "seed=1", "task.test_path=a=b")
    assert re.findall(r"^- ([\w.]+)=", text, re.MULTILINE) == ["task.path", "task.test_path"]


def test_what_no_quotes_mend_says_how_overrides_are_written() -> None:
    for word in ("größe=1", "something"):
        text = message(word)
        assert text.startswith(f"{word}: ")
        assert text.endswith("Write overrides as group=option or key=value")


@pytest.mark.parametrize("path", ["d/a,b.csv", "a, b", "1,2"])
def test_a_comma_outside_of_a_sweep_is_refused(path: str) -> None:
    text = message("task=jsonl", f"task.path={path}")
    assert "several values, but this command is no sweep; add -m" in text
    assert read(text.rpartition("quote it: ")[2]) == path


@pytest.mark.parametrize("word", ["task=jsonl,arithmetic", "seed=0,1", "seed=range(0,3)", "seed=choice(0,1)"])
def test_several_values_need_a_sweep(word: str) -> None:
    assert message(word).startswith(f"{word}: several values, but this command is no sweep; add -m")


@pytest.mark.parametrize("flags", [["-m"], ["--multirun"], ["--multi"], ["hydra.mode=MULTIRUN"]])
def test_a_sweep_takes_several_values(flags: list[str]) -> None:
    check_command_line("train", [*flags, "seed=0,1", "task.examples.num_test=range(4,8)"])


REFERENCES = ["${", "${0", "a ${ b", "}${", "${}", "\\\\${", "${seed", "[${]"]


@pytest.mark.parametrize("text", REFERENCES)
@pytest.mark.parametrize("form", ["task.name={}", "task.name='{}'", 'task.name="{}"'])
def test_a_reference_without_end_is_shown_as_the_text_that_it_may_be(form: str, text: str) -> None:
    (shown,) = shlex.split(
        message("task=arithmetic", form.format(text)).rpartition(": " if form[-1] == "}" else "write ")[2]
    )
    assert compose("task=arithmetic", shown).task.name == text


def test_a_reference_to_an_unknown_key_names_the_setting_that_has_it() -> None:
    with pytest.raises(ConfigError, match=r"^task\.name: Interpolation key 'nothing' not found"):
        check(compose("task=arithmetic", "task.name=${nothing}"))


@given(ANY_TEXT)
def test_a_literal_text_is_read_as_itself(text: str) -> None:
    config = OmegaConf.create({"name": literal(text)})
    assert OmegaConf.to_container(config, resolve=True) == {"name": text}


@given(st.text(min_size=1))
def test_quotes_keep_any_text(text: str) -> None:
    *_, whole = _quoted(f"task.path={text}")
    assert OverridesParser.create().parse_override(whole).value() == text
    assert problems_of_grammar(["task.path=" + literal(whole.partition("=")[2])]) == []
