"""Hook of mkdocs: makes the pages `configuration.md`, from conf/ and constructors, and `changelog.md` at each build."""

from __future__ import annotations

import html
import importlib
import inspect
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from distill.app.comments import Entry, entries, leading_comment
from distill.app.help import options, summary, takes_several

COMMANDS = ("train", "annotate", "evaluate", "judge", "report", "export")
AS_THEY_ARE = {"experiment": "Experiments", "sweep": "Sweeps of W&B"}  # values of keys that are explained elsewhere
NOT_KEYS = ("_target_", "_partial_", "defaults")
LONGEST = 60  # characters of a default
INTRODUCTION = """# Configuration

Every key of `conf/` with its type, its default and what it does. Keys are written as overrides write them:
`python -m distill.train trainer.max_steps=300`. This page is made from the comments in `conf/` and from the signatures
of what `_target_` names.
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the two pages; a key without explanation is a warning, which `--strict` makes an error."""
    root = Path(config.config_file_path).parent
    reference = Reference(root / "conf")
    for key in reference.unexplained():
        logging.getLogger("mkdocs.hooks.reference").warning("conf/ does not explain %s", key)
    files.append(File.generated(config, "configuration.md", content=reference.page()))
    files.append(File.generated(config, "changelog.md", content=(root / "CHANGELOG.md").read_text()))
    return files


@dataclass(frozen=True)
class Node:
    """A file of conf/: where its keys go, and its keys."""

    path: Path
    prefix: str  # of its keys in an override
    group: str
    values: dict[str, Any]
    entries: tuple[Entry, ...]

    @classmethod
    def read(cls, path: Path, group: str) -> Node:
        """Read a file of a group; "" for the files of commands."""
        text = path.read_text()
        prefix = f"{group.replace('/', '.')}." if group else ""
        return cls(path, prefix, group, yaml.safe_load(text) or {}, tuple(entries(text)))

    @property
    def inherited(self) -> list[str]:
        """The files of the same group that this one changes."""
        defaults = self.values.get("defaults", []) if self.group else []
        return [name for name in defaults if isinstance(name, str) and name != "_self_"]

    def value(self, path: tuple[str, ...]) -> Any:
        """The value at a path, None where there is none."""
        value: Any = self.values
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        return value


@dataclass(frozen=True)
class Reference:
    """The reference of a configuration folder."""

    conf: Path

    @cached_property
    def groups(self) -> dict[str, list[Node]]:
        """The files of each group whose keys are explained."""
        names = sorted({str(path.parent.relative_to(self.conf)) for path in self.conf.rglob("*/*.yaml")})
        return {
            name: [Node.read(path, name) for path in sorted((self.conf / name).glob("*.yaml"))]
            for name in names
            if name not in AS_THEY_ARE
        }

    @cached_property
    def commands(self) -> list[Node]:
        """The root files."""
        return [Node.read(self.conf / f"{name}.yaml", "") for name in ("common", *COMMANDS)]

    @cached_property
    def nodes(self) -> list[Node]:
        """All files whose keys are explained."""
        return [*self.commands, *(node for nodes in self.groups.values() for node in nodes)]

    @cached_property
    def explained(self) -> dict[tuple[str, str], str]:
        """Comments by what is built and its parameter, for the files that repeat it without comment."""
        return {
            (target, entry.path[-1]): entry.comment
            for node in reversed(self.nodes)
            for entry in node.entries
            if entry.comment and (target := self._target(node, entry.path[:-1]))
        }

    def page(self) -> str:
        """The page in Markdown."""
        return "\n".join([INTRODUCTION, *self._command_lines(), *self._group_lines(), *self._whole_lines()])

    def keys(self) -> Iterator[tuple[Node, Entry]]:
        """All keys that need an explanation."""
        for node in self.nodes:
            for entry in node.entries:
                if entry.path[-1] not in NOT_KEYS and not isinstance(node.value(entry.path), dict):
                    yield node, entry

    def unexplained(self) -> list[str]:
        """Keys, and options of groups, without explanation."""
        found = [f"{node.path}: {entry.key}" for node, entry in self.keys() if not self._explanation(node, entry)]
        return found + [str(node.path) for node in self.nodes if not leading_comment(node.path.read_text())]

    def _command_lines(self) -> Iterator[str]:
        yield "\n## Settings of the commands\n"
        for node in self.commands:
            name = node.path.stem
            yield f"\n### {'Every command' if name == 'common' else f'`distill.{name}`'}\n"
            yield f"{_escaped(summary(node.path.read_text()))}\n"
            yield from self._table(node)

    def _group_lines(self) -> Iterator[str]:
        for group, nodes in self.groups.items():
            several = takes_several(self.conf, group)
            yield f"\n## `{group}={'[option,option]' if several else 'option'}`\n"
            yield "| option | |\n|---|---|"
            yield from (f"| `{option}` | {_escaped(line)} |" for option, line in options(self.conf, group).items())
            for node in nodes:
                yield f"\n### `{group}={'[' * several}{node.path.stem}{']' * several}`\n"
                yield f"{_escaped(' '.join(leading_comment(node.path.read_text())))}\n"
                yield from (f"All keys of `{group}={name}`, but for:\n" for name in node.inherited)
                yield from self._table(node)

    def _whole_lines(self) -> Iterator[str]:
        for folder, title in AS_THEY_ARE.items():
            yield f"\n## {title}\n"
            for path in sorted((self.conf / folder).glob("*.yaml")):
                yield f"\n### `{folder}/{path.stem}`\n\n```yaml\n{path.read_text().strip()}\n```"

    def _table(self, node: Node) -> Iterator[str]:
        rows = [*self._rows(node)]
        if rows:
            yield "| key | type | default | |\n|---|---|---|---|"
            yield from (f"| {' | '.join(row)} |" for row in rows)

    def _rows(self, node: Node) -> Iterator[tuple[str, str, str, str]]:
        for entry in node.entries:
            value, key = node.value(entry.path), f"`{node.prefix}{entry.key}`"
            if entry.path[-1] in NOT_KEYS:
                continue
            if not isinstance(value, dict):
                kind = self._type(node, entry, value)
                yield key, _escaped(kind), _default(value), _escaped(self._explanation(node, entry))
            elif entry.comment or "_target_" in value:
                built = f"`{value['_target_']}`" if "_target_" in value else ""
                yield key, built, "", _escaped(entry.comment or _first_line(_located(value["_target_"])))

    def _explanation(self, node: Node, entry: Entry) -> str:
        if entry.comment:
            return entry.comment
        if known := self.explained.get((self._target(node, entry.path[:-1]) or "", entry.path[-1])):
            return known
        value = node.value(entry.path)
        if isinstance(value, str) and value.startswith("${"):
            return f"as {value.strip('${}')}"
        return next((found for found in self._alike(node, entry) if found), "")

    def _alike(self, node: Node, entry: Entry) -> Iterator[str]:
        """What other files of a group say of the same key, those first that this one changes."""
        for other in [*self._bases(node), *self.groups.get(node.group, [])]:
            yield from (found.comment for found in other.entries if found.path == entry.path)

    def _bases(self, node: Node) -> list[Node]:
        """The file and those that it changes."""
        bases = [base for base in self.groups.get(node.group, []) if base.path.stem in node.inherited]
        return [node, *(further for base in bases for further in self._bases(base))]

    def _target(self, node: Node, path: tuple[str, ...]) -> str | None:
        """What is built of the mapping at a path, here or in a file that this one changes."""
        values = (found for base in self._bases(node) if isinstance(found := base.value(path), dict))
        return next((str(value["_target_"]) for value in values if "_target_" in value), None)

    def _type(self, node: Node, entry: Entry, value: Any) -> str:
        target = self._target(node, entry.path[:-1])
        if target:
            return _annotation(_located(target), entry.path[-1])
        return "" if value is None or value == "???" or str(value).startswith("${") else _named(type(value))


def _located(target: str) -> Any:
    module, _, name = target.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _annotation(target: Any, parameter: str) -> str:
    """The type of a constructor's parameter."""
    function = target.__init__ if inspect.isclass(target) else target
    hint = get_type_hints(function).get(parameter) if target.__module__.startswith("distill.") else None
    found = inspect.signature(target).parameters.get(parameter)
    return _named(hint if hint or not found else found.annotation)


def _named(hint: Any) -> str:
    """A type as the page writes it."""
    if get_origin(hint) is Literal:
        return " or ".join(map(str, get_args(hint)))
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(dict.fromkeys(map(_named, get_args(hint))))
    if hint in (None, inspect.Parameter.empty):
        return ""
    if hint is NoneType:
        return "null"
    return str(hint) if get_args(hint) or isinstance(hint, str) else getattr(hint, "__name__", str(hint))


def _default(value: Any) -> str:
    is_line = isinstance(value, str) and "\n" not in value  # a text of several lines is quoted as in YAML
    text = value if is_line else json.dumps(value, ensure_ascii=False)
    if value == "???":
        return "must be given"
    return f"`{text[:LONGEST]}{' …' * (len(text) > LONGEST)}`" if text else "empty"


def _first_line(target: Any) -> str:
    return (inspect.getdoc(target) or "").partition("\n")[0]


def _escaped(text: str) -> str:
    return html.escape(text, quote=False).replace("|", "&#124;").replace("*", "&#42;")
