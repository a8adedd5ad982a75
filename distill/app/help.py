"""What `--help` prints, read from the comments in `conf/`: nothing is composed, and nothing but Python is imported."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from distill.app.comments import entries, first_sentence, leading_comment

_WIDTH = 118
_DEFAULT = re.compile(
    r"  - (?:optional )?(?P<name>[\w/]+)(?P<place>@\w+)?: *(?P<option>[^#]*?)\s*(?:#\s*(?P<note>.*))?$"
)
_EXAMPLE = "run:"
_FOOTER = "--cfg job prints the composed configuration, --hydra-help the flags of Hydra. docs/ explains every key."


class Group(NamedTuple):
    """A group of a defaults list, the options chosen in it, and the comment beside it."""

    name: str
    place: str
    chosen: tuple[str, ...]
    note: str


def help_text(conf: Path, command: str) -> str:
    """The text of `python -m distill.<command> --help`."""
    text = (conf / f"{command}.yaml").read_text()
    usage = (
        f"usage: python -m distill.{command} [group=option | key=value ...]    -m sweeps over comma-separated values"
    )
    sections = {
        "Groups (* marks the default):": [*_group_lines(conf, [*groups(text)])],
        "Settings:": [*_setting_lines(conf, text)],
        "Examples:": [f"  {example}" for example in examples(text)],
    }
    blocks = ["\n".join([title, *lines]) for title, lines in sections.items() if lines]
    return "\n\n".join([summary(text), usage, *blocks, _FOOTER])


def summary(text: str) -> str:
    """The first sentence of a file's leading comment; of a lab note, its question."""
    return first_sentence(" ".join(leading_comment(text)).removeprefix("asked:").strip())


def examples(text: str) -> list[str]:
    """The commands that a file's leading comment gives as examples."""
    return [line.removeprefix(_EXAMPLE).strip() for line in leading_comment(text) if line.startswith(_EXAMPLE)]


def options(conf: Path, group: str) -> dict[str, str]:
    """The options of a group, each with the first sentence of its file."""
    return {path.stem: summary(path.read_text()) for path in sorted((conf / group).glob("*.yaml"))}


def groups(text: str) -> Iterator[Group]:
    """The groups of a file's defaults list."""
    for line in text.splitlines():
        if match := _DEFAULT.match(line):
            chosen = re.findall(r"[\w-]+", match["option"])
            yield Group(match["name"], match["place"] or "", tuple(chosen), match["note"] or "")


def takes_several(conf: Path, group: str) -> bool:
    """Whether options of a group are combined: each file then holds one key, named after the file."""
    paths = [*(conf / group).glob("*.yaml")]
    return all({entry.path[0] for entry in entries(path.read_text())} == {path.stem} for path in paths)


def _group_lines(conf: Path, chosen: list[Group]) -> Iterator[str]:
    for group in chosen:
        if group.place:
            yield f"  {group.name}{group.place}=<an option of {group.name}>: {group.note}"
            continue
        yield f"  {group.name}={'[option,option]' if takes_several(conf, group.name) else 'option'}"
        for option, line in options(conf, group.name).items():
            yield _row(f"  {'*' if option in group.chosen else ' '} {option}", line, 26)


def _setting_lines(conf: Path, text: str) -> Iterator[str]:
    for entry in [*entries((conf / "common.yaml").read_text()), *entries(text)]:
        if entry.path[0] not in ("defaults", "hydra") and entry.value:
            yield _row(f"  {entry.key}={entry.value}", entry.comment, 34)


def _row(name: str, text: str, column: int) -> str:
    """A name and its explanation, cut to the width of a terminal."""
    start = f"{name:<{column - 1}} "
    return start + textwrap.shorten(text, max(20, _WIDTH - len(start)), placeholder=" ...")
