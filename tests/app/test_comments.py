"""The reading of YAML comments agrees with a YAML parser on every file of conf/."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill.app.comments import entries, first_sentence, leading_comment

CONF = Path(__file__).parents[2] / "conf"
FILES = sorted(CONF.rglob("*.yaml"))
SAMPLE = """\
# @package _global_
# A sample. Of two sentences.
#   run: this
plain: 1  # what it is
url: pypi://name==1/file#sha256=ab&package=cd
quoted: "a # b"   # not part of the value
long: null        # begins here
                  # and goes on
# above
empty: ''
outer:            # a mapping
  inner:
    - item: 3     # in a list
      other: 4
  text: |
    key: value
  flat:
  - a: 1          # in a list that is not indented
    b: 2
  last: [1, "# 2"]
"""


def keys(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """All keys of nested mappings, with their values."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield (*path, str(key)), item
            yield from keys(item, (*path, str(key)))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONF)))
def test_keys_and_values_are_those_of_a_yaml_parser(path: Path) -> None:
    text = path.read_text()
    parsed = dict(keys(yaml.safe_load(text)))
    read = entries(text)
    assert [entry.path for entry in read] == list(parsed)
    scalars = [entry for entry in read if entry.value and not entry.value.startswith("|")]
    assert {entry.path: yaml.safe_load(entry.value) for entry in scalars} == {e.path: parsed[e.path] for e in scalars}


def test_comments_behind_above_and_below_a_key() -> None:
    comments = {entry.key: (entry.value, entry.comment) for entry in entries(SAMPLE)}
    assert comments == {
        "plain": ("1", "what it is"),
        "url": ("pypi://name==1/file#sha256=ab&package=cd", ""),
        "quoted": ('"a # b"', "not part of the value"),
        "long": ("null", "begins here and goes on"),
        "empty": ("''", "above"),
        "outer": ("", "a mapping"),
        "outer.inner": ("", ""),
        "outer.text": ("|", ""),
        "outer.flat": ("", ""),
        "outer.last": ('[1, "# 2"]', ""),
    }


def test_the_leading_comment_leaves_out_the_package() -> None:
    assert leading_comment(SAMPLE) == ["A sample. Of two sentences.", "run: this"]


@pytest.mark.parametrize(
    ("text", "first"),
    [("One. Two.", "One."), ("Is it? Yes.", "Is it?"), ("bf16.mixed or 1.5", "bf16.mixed or 1.5"), ("", "")],
)
def test_the_first_sentence_ends_at_a_stop_before_a_space(text: str, first: str) -> None:
    assert first_sentence(text) == first
