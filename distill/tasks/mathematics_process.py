"""The process that reads and compares formulas for `mathematics`: a line of JSON in, a line out.

A script, not a module of the package: it imports none of it, so that it starts in a second.
"""

from __future__ import annotations

import json
import re
import resource
import sys
from typing import Any

MEMORY_BYTES = 4 << 30
MAX_DIGITS = 10_000
SYMBOL = 1e100  # a power of a formula with variables is taken for one of a large number
READ_SECONDS, VERIFY_SECONDS = 3, 5
FAILURES = (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)  # sympy's
_NUMERAL = re.compile(r"from sympy import \*|Symbol|(?:Integer|Float) *\( *'?[0-9.eE+-]*'? *\)")
_PERCENT = re.compile(r"(.+?)\s*\\?%")
_PROGRAMS = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.Popen", "socket.connect")


class CodeGuard:
    """Refuses, by an audit hook, to run text as code while formulas are parsed; the library evaluates numerals alone.

    Later sympy compiles functions that it has written itself, from formulas and not from their text.
    """

    is_parsing = False

    def check(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Raise PermissionError for code that is none of the library's own, and for other programs."""
        is_text = event == "compile" and self.is_parsing and str(arguments[1]) == "<string>"
        source = arguments[0].decode() if is_text and isinstance(arguments[0], bytes) else str(arguments[:1])
        if (is_text and not _NUMERAL.fullmatch(source)) or event in _PROGRAMS:
            raise PermissionError(f"{event} is not allowed while formulas are read")


def is_huge(formula: Any) -> bool:
    """Whether a power or factorial in it has more digits than can be computed in a short time."""
    import sympy

    for part in sympy.postorder_traversal(formula):  # what is inside has been found to be small
        digits: Any = 0
        if isinstance(part, sympy.Pow) and part.exp.is_number:
            base = abs(sympy.N(part.base)) if part.base.is_number else SYMBOL
            digits = abs(sympy.N(part.exp) * sympy.log(base, 10)) if base else 0
        elif isinstance(part, sympy.factorial | sympy.factorial2) and part.args[0].is_number:
            digits = 10 * abs(sympy.N(part.args[0]))
        if digits > MAX_DIGITS:
            return True
    return False


def read(formula: str, guard: CodeGuard) -> list[Any]:
    """Parse a formula of LaTeX; an empty list if it is none, or has no value."""
    import sympy
    from math_verify import LatexExtractionConfig, parse
    from math_verify.errors import TimeoutException
    from math_verify.utils import timeout

    # Other kinds of extraction evaluate text as code.
    kinds, plain = [LatexExtractionConfig()], formula.replace("\\$", "").replace("$", "")
    share = _PERCENT.fullmatch(plain)
    shown = f"${share[1]}$%" if share else f"${plain}$"
    guard.is_parsing = True
    parsed = parse(shown, kinds, fallback_mode="no_fallback", parsing_timeout=READ_SECONDS)
    guard.is_parsing = False
    try:
        if not parsed or is_huge(parsed[0]):
            return []
        evaluated = timeout(READ_SECONDS)(parsed[0].doit)()
    except (TimeoutException, *FAILURES):
        return []
    return [] if evaluated in (sympy.nan, sympy.zoo) else parsed


def answer(formulas: list[str], guard: CodeGuard) -> bool | None:
    """Whether a formula can be read, or whether the second of two equals the first, the reference; None: too slow."""
    from math_verify import verify
    from math_verify.errors import TimeoutException

    parsed = [read(formula, guard) for formula in formulas]
    if not all(parsed) or len(parsed) == 1:
        return all(parsed)
    try:
        return bool(verify(parsed[0], parsed[1], timeout_seconds=VERIFY_SECONDS, raise_on_error=True))
    except TimeoutException:
        return None
    except FAILURES:
        return False


def main() -> None:
    """Answer lines until there are no more."""
    out, sys.stdout = sys.stdout, sys.stderr
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    guard = CodeGuard()
    answer([r"\frac{1}{2}", "0.5"], guard)  # imports everything
    sys.addaudithook(guard.check)
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line), guard)), file=out, flush=True)


if __name__ == "__main__":
    main()
