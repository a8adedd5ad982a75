"""How to write an override that Hydra's grammar does not read, or reads as several values, or a line break."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import GrammarParseError

_KEY = re.compile(r"(?P<key>[~+]{0,2}[A-Za-z_][\w./@:-]*)=(?P<value>.*)", re.DOTALL | re.ASCII)
_ITEM = re.compile(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|[^\[\]{}:,'"]+""")
# A line break or tab that was left as two characters; not the beginning of a LaTeX command such as \nabla or \text.
_ESCAPE = re.compile(r"\\n(?!abla|e\b|eq|eg|ew|i\b|o(?:t|n)|u\b)|\\[tr](?![a-z])")


def escape_problem(key: str, text: str) -> str:
    """The problem of a text with a backslash and a letter instead of a line break or tab; empty if there is none."""
    if not (escape := _ESCAPE.search(text)):
        return ""
    name = key.rpartition(".")[2]
    return (
        f"{key}={text!r} contains a backslash and a letter, {escape[0]}, where a line break or tab was probably meant. "
        f'Write the character itself: in bash $\'{key}="…{escape[0]}…"\', in a YAML file {name}: "…{escape[0]}…"'
    )


def literal(text: str) -> str:
    """The text as a value of a configuration, in which `${` would begin a reference."""
    return re.sub(r"(\\*)\$\{", lambda match: 2 * match[1] + r"\${", text)


def problems_of_grammar(words: list[str]) -> list[str]:
    """A problem for each override that Hydra or OmegaConf cannot read, with the form that they read."""
    return [problem for word in words if (problem := _problem(word))]


def several_values(word: str) -> str:
    """The problem of an override with several values in a command that is no sweep."""
    key, value = word.split("=", 1)
    remedies = [f"add -m to run each of them, or write one list: {key}=[{value}]" if "(" not in value else "add -m"]
    if readable := next(_quoted(word), None):
        remedies.append(f"if the comma belongs to the value, quote it: {shlex.quote(readable)}")
    return f"{word}: several values, but this command is no sweep; {'; '.join(remedies)}"


def _problem(word: str) -> str:
    if not (error := _error(word)):
        return _problem_of_reference(word)
    for candidate in (*_quoted(word), *_quoted(literal(word))):
        if _is_readable(candidate):
            remedy = "quote it" if _are_closed(word) else "close its brackets, or quote it"
            return f"{word}: Hydra does not read this value ({error}); {remedy}: {shlex.quote(candidate)}"
    return f"{word}: {error}. Write overrides as group=option or key=value"


def _problem_of_reference(word: str) -> str:
    """The problem of a value that Hydra reads, but in which `${` begins no reference that OmegaConf reads."""
    if _is_readable(word):
        return ""
    return (
        f"{word}: ${{ begins a reference to another key, such as ${{seed}}, and this one is incomplete; if it is text, "
        f"write {shlex.quote(literal(word))}"
    )


def _is_readable(word: str) -> bool:
    """Whether Hydra reads the override, and OmegaConf the references in its value."""
    try:
        override = OverridesParser.create().parse_override(word)
        if not override.is_sweep_override():
            OmegaConf.create({"value": override.value()})
    except (HydraException, GrammarParseError):
        return False
    return True


def _are_closed(word: str) -> bool:
    return all(word.count(opened) == word.count(closed) for opened, closed in ("[]", "{}"))


def _error(word: str) -> str:
    try:
        OverridesParser.create().parse_override(word)
    except HydraException as error:
        return str(error).splitlines()[0]
    return ""


def _quoted(word: str) -> Iterator[str]:
    """The override with quotes around what needs them within a list or a mapping, then around the whole value."""
    if not (match := _KEY.fullmatch(word)):
        return
    key, value = match["key"], match["value"]
    if value[:1] in ("[", "{"):
        yield f"{key}={_ITEM.sub(lambda item: _item(item[0]), value)}"
    yield f"{key}={_in_quotes(value)}"


def _item(text: str) -> str:
    is_readable = text[0] in "'\"" or not _error(f"key={text}")
    return text if is_readable else _in_quotes(text)


def _in_quotes(value: str) -> str:
    escaped = re.sub(r'(\\*)("|$)', lambda match: 2 * match[1] + ('\\"' if match[2] else ""), value)
    return f'"{escaped}"'  # Hydra reads two backslashes as one before a quote only
