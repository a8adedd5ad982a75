"""Mathematical answers: found in a text, read and compared by math-verify in a process of its own.

The library parses LaTeX into sympy without running any of it as code, but sympy may compute for ever or fill the memory
on a formula as short as 9^{9^{9^9}}, and the library's time limits are signals, which the main thread alone can use.
In a process of its own they work from any thread, and what they cannot interrupt ends with the process.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import re
import select
import subprocess
import sys
import threading
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import final

from distill.app.console import say
from distill.errors import AnswerError, ConfigError
from distill.tasks.numerals import read_expression, read_number

_MAX_TEXT, _MAX_FORMULA = 4000, 300  # characters: of the end of a text that is searched, and of a formula
_SECONDS = 12.0  # for one formula or two; the library's own limits, which do not end the process, are shorter
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_FORMULA = re.compile(r"\$\$(.+?)\$\$|\\\((.+?)\\\)|\\\[(.+?)\\\]|(?<![\\\d])\$([^$\n]+)\$", re.DOTALL)
_NUMERAL = re.compile(r"[-−]?\s*\\?[$€£¥₹]?[0-9.][0-9.,eE+-]*")
_COMMAND = re.compile(r"\\(?:text|textbf|mathrm|operatorname|mbox)\s*\{[^{}]*\}|\\[A-Za-z]+|\\.")
_NAMES = "sin cos tan cot sec csc log ln exp sqrt pi max min gcd lcm mod and or inf"
_NAME = re.compile(rf"\b(?:{_NAMES.replace(' ', '|')})\b")
_LINK = re.compile(r"^(?:and|or)\b|\b(?:and|or)$")  # what stands between two amounts of dollars
_PROSE = re.compile(r"[^\W\d_]{4,}|(?:^|\s)[^\W\d_]{2,}(?=[\s,.;:!?]|$)")  # a word; runs of fewer letters are factors


def require_math() -> None:
    """Raise ConfigError if the library is missing."""
    if find_spec("math_verify") is None:
        raise ConfigError(
            "task.read.kind=math reads answers by math-verify, which is missing; pip install 'distill[math]'"
        )


def read_math(text: str) -> tuple[str, str]:
    """Read a formula or number from a text; return it, and the text around a number that may change its value.

    The formula is that of the last box; without one, what stands behind the last `####`; else the last formula between
    dollars or in brackets of LaTeX; else the whole text. Of prose, it is the last number. AnswerError if there is none
    of these, or the library cannot read it.
    """
    end = text.strip()[-_MAX_TEXT:]
    marked = _boxed(end) or _behind_mark(end)
    if marked is not None:
        return _readable(marked), ""
    formulas = [formula for match in _FORMULA.finditer(end) if (formula := match[match.lastindex or 0].strip())]
    for formula in [*reversed(formulas), end]:
        if not _is_prose(formula):
            return _readable(formula), ""
    return read_number(-1, end)


def is_same(answer: str, reference: str) -> bool:
    """Whether an answer equals a reference, both as they are read.

    Not symmetrical, as in math-verify: an answer may say more than the reference, so `2x+z=1` equals the reference 1,
    and 1 does not equal the reference `2x+z=1`; an interval equals a reference such as `1<x<2`.
    """
    return value(answer) == value(reference) or _is_verified(reference, answer)


def value(answer: str) -> str:
    """The exact value of plain arithmetic; the spelling of any other answer, without spaces."""
    with suppress(AnswerError):
        expression, rest, exact = read_expression(answer)
        if not rest and expression:
            return str(exact)
    return "".join(answer.split())


@functools.lru_cache(maxsize=100_000)
def _is_verified(reference: str, answer: str) -> bool:
    verdict = _process(os.getpid()).ask([reference, answer])
    if verdict is None:
        say(f"{answer!r:.60} was not compared with {reference!r:.60} in the time allowed: counted as different")
    return verdict is True


@functools.lru_cache(maxsize=100_000)
def _can_read(formula: str) -> bool:
    return _process(os.getpid()).ask([formula]) is True


def _readable(formula: str) -> str:
    """The canonical form of a formula; AnswerError if it is none."""
    shown, formula = formula[:60], formula.strip().rstrip(".").rstrip()
    if _NUMERAL.fullmatch(formula) or _is_prose(formula):
        with suppress(AnswerError):
            number, rest = read_number(0, formula)
            if not rest:
                return number
    if len(formula) > _MAX_FORMULA:
        raise AnswerError(f"{shown!r} … has {len(formula)} characters; formulas of at most {_MAX_FORMULA} are read")
    if not formula or _is_prose(formula) or not _can_read(formula):
        raise AnswerError(f"{shown!r} is no formula that math-verify can read and evaluate")
    return formula


def _is_prose(formula: str) -> bool:
    """Whether it has words, which the library would read as products of their letters."""
    return bool(_PROSE.search(_NAME.sub(" ", _COMMAND.sub(" ", formula))) or _LINK.search(formula))


def _boxed(text: str) -> str | None:
    """The content of the last box; None without one, or if it is not closed."""
    starts = [match.end() for match in _BOX.finditer(text)]
    depth = 1
    for place in range(starts[-1], len(text)) if starts else ():
        depth += (text[place] == "{") - (text[place] == "}")
        if depth == 0:
            return text[starts[-1] : place]
    return None


def _behind_mark(text: str) -> str | None:
    _, mark, behind = text.rpartition("####")
    return behind.strip().partition("\n")[0] if mark else None


@functools.lru_cache(maxsize=1)
def _process(pid: int) -> _Process:  # noqa: ARG001 - the key of the cache
    """The library's process; another one in a forked process, which would share its pipes."""
    process = _Process()
    atexit.register(process.stop)
    return process


@final
class _Process:
    """The process in which the library runs; started when it is needed, and anew after it had to be ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: subprocess.Popen[str] | None = None

    def ask(self, formulas: list[str]) -> bool | None:
        """Whether a formula can be read, or whether the second of two equals the first; None if it took too long."""
        with self._lock:
            process = self._running = self._running or _start()
            assert process.stdin
            assert process.stdout
            with suppress(BrokenPipeError):
                process.stdin.write(json.dumps(formulas) + "\n")
                process.stdin.flush()
                if select.select([process.stdout], [], [], _SECONDS)[0] and (line := process.stdout.readline()):
                    verdict: bool | None = json.loads(line)
                    return verdict
            self.stop()
            return None

    def stop(self) -> None:
        """End the process, if it runs."""
        if self._running:
            self._running.kill()
            self._running.communicate()
            self._running = None


def _start() -> subprocess.Popen[str]:
    script = Path(__file__).with_name("mathematics_process.py")
    # -P: the modules beside the script are not importable by their short names.
    command = [sys.executable, "-P", str(script)]
    pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
    process = subprocess.Popen(command, encoding="utf-8", stdin=pipe, stdout=pipe, stderr=nowhere)
    assert process.stdout
    process.stdout.readline()  # it has imported what it needs, which the limit of a comparison does not cover
    return process
