"""Keys of a YAML file with their comments, read line by line: fast enough for `--help`, and all that the docs need.

Reads the YAML that `conf/` is written in: block mappings, and lists and block scalars as values that are not entered.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

_KEY = re.compile(r"(?P<indent> *)(?P<name>[\w./@-]+):(?: +(?P<rest>.*))?$")
_VALUE = re.compile(r"""("(?:[^"\\]|\\.)*"|'(?:[^']|'')*'|(?:(?!\s\#|^\#).)*)(?:\s+|^)?(?:\#\s?(.*))?$""")
_COMMENT = re.compile(r"(?P<indent> *)#\s?(?P<text>.*)$")


@dataclass(frozen=True, slots=True)
class Entry:
    """A key, the text of its value ("" where the value stands on the lines below) and its comment."""

    path: tuple[str, ...]
    value: str
    comment: str

    @property
    def key(self) -> str:
        """The path as an override writes it."""
        return ".".join(self.path)


def leading_comment(text: str) -> list[str]:
    """The comment lines at the top of a file, without Hydra's `@package`."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line[1:].strip())
    return [line for line in lines if not line.startswith("@package")]


def first_sentence(text: str) -> str:
    """The text up to its first full stop or question mark that ends a sentence."""
    match = re.match(r".*?[.?!](?=\s|$)", text)
    return match[0] if match else text


def entries(text: str) -> list[Entry]:
    """All keys of a file in their order; lists and block scalars are not entered."""
    lines = text.splitlines()
    found: list[Entry] = []
    above: list[str] = []
    parents: list[tuple[int, str]] = []  # indentation and name of the keys around a line
    column = -1  # of the last trailing comment, which aligned lines continue
    for line in _mapping_lines(lines[_num_leading(lines) :]):
        if comment := _COMMENT.match(line):
            if found and len(comment["indent"]) == column:
                found[-1] = replace(found[-1], comment=_joined(found[-1].comment, comment["text"]))
            else:
                above.append(comment["text"])
        elif key := _KEY.match(line):
            parents = [(indent, name) for indent, name in parents if indent < len(key["indent"])]
            value, trailing = _split(key["rest"] or "")
            path = (*(name for _, name in parents), key["name"])
            found.append(Entry(path, value, _joined(*above, trailing)))
            parents.append((len(key["indent"]), key["name"]))
            above, column = [], line.rfind(f"# {trailing}") if trailing else -1
    return found


def _num_leading(lines: list[str]) -> int:
    return next((index for index, line in enumerate(lines) if not line.startswith("#")), len(lines))


def _mapping_lines(lines: list[str]) -> Iterator[str]:
    """Lines that hold keys or comments, not the items of a list or the text of a block scalar."""
    skipped_below: int | None = None  # the indentation of the key whose value is skipped
    last = 0
    for line in filter(str.strip, lines):
        indent = len(line) - len(line.lstrip())
        is_item = line.lstrip().startswith("- ")
        if skipped_below is not None and indent > skipped_below:
            continue
        skipped_below = last if is_item else None
        if is_item:
            continue
        if key := _KEY.match(line):
            last = indent
            skipped_below = indent if _split(key["rest"] or "")[0].startswith(("|", ">")) else None
        yield line


def _split(rest: str) -> tuple[str, str]:
    match = _VALUE.match(rest)
    assert match
    return match[1].strip(), (match[2] or "").strip()


def _joined(*texts: str) -> str:
    return " ".join(text.strip() for text in texts if text.strip())
