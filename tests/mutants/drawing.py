"""All mutants of a module, and a seeded sample of those of several."""

from __future__ import annotations

import ast
import difflib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

from tests.mutants import axes

Place = tuple[int, int]  # line, column
AREAS = {
    "losses": ("distill/losses/*.py",),
    "codecs": ("distill/cache/codecs/*.py",),
    "store": ("distill/cache/store.py",),
    "prompts": ("distill/prompts/*.py",),
    "generation": ("distill/models/reading.py", "distill/models/rows.py", "distill/models/shared_prefix.py"),
    "teachers": ("distill/teachers/*.py",),
    "lessons": ("distill/lessons/join.py", "distill/lessons/collate.py", "distill/lessons/loader.py"),
    "metrics": ("distill/evaluation/metrics.py",),
    "statistics": tuple(f"distill/reports/{name}.py" for name in ("statistics", "proportions", "differences")),
    "verdicts": ("distill/reports/verdicts.py",),
    "costs": ("distill/reports/costs.py",),
}
_SPEAKS = {"say", "warn", "print"}  # functions whose arguments are texts for people


@dataclass(frozen=True)
class Mutant:
    """One change of one module: the `occurrence`-th place at which the operator fits."""

    path: str
    line: int
    operator: str
    occurrence: int

    @property
    def name(self) -> str:
        """What tells it from others, and where it is."""
        return f"{self.path}:{self.line} {self.operator.removeprefix('core/')} #{self.occurrence}"

    def source(self, original: str) -> str:
        """The module with the change."""
        mutated = mutate_code(original, get_operator(self.operator)(), self.occurrence)
        assert mutated is not None
        return str(mutated)

    def diff(self, original: str) -> str:
        """The changed lines."""
        lines = difflib.unified_diff(original.splitlines(), self.source(original).splitlines(), n=0, lineterm="")
        return "\n".join(line for line in lines if not line.startswith(("---", "+++", "@@")))


def modules(root: Path, areas: Sequence[str]) -> list[str]:
    """The modules of these areas, relative to the repository."""
    found = {path for area in areas for pattern in AREAS[area] for path in root.glob(pattern)}
    return sorted(str(path.relative_to(root)) for path in found)


def draw(root: Path, areas: Sequence[str], number: int, seed: int) -> list[Mutant]:
    """A sample in random order: places first, then one operator for each; a place comes again once all were drawn."""
    generator = random.Random(seed)
    places = [group for path in modules(root, areas) for group in by_place(path, (root / path).read_text())]
    for group in places:
        generator.shuffle(group)
    generator.shuffle(places)
    rounds = max(map(len, places), default=0)
    drawn = (group[index] for index in range(rounds) for group in places if index < len(group))
    sources = {path: (root / path).read_text() for path in modules(root, areas)}
    differing = (mutant for mutant in drawn if is_different_program(sources[mutant.path], mutant))
    return [*islice(differing, number)]


def is_different_program(original: str, mutant: Mutant) -> bool:
    """Whether Python can read the mutant, and it is more than another name for the last axis of a matrix.

    The star before keyword-only parameters looks like a product; divided, it allows more calls and changes none.
    """
    source = mutant.source(original)
    if not is_program(source) or _without_kinds(source) == _without_kinds(original):
        return False
    is_sign = mutant.operator.removeprefix("core/ReplaceUnaryOperator_") in ("Delete_USub", "USub_UAdd")
    return not (is_sign and _without_last_axes(source) == _without_last_axes(original))


def _without_kinds(source: str) -> str:
    """A program in which no parameter is for keywords alone, or for positions alone."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.arguments) and not node.vararg:
            node.args = [*node.posonlyargs, *node.args, *node.kwonlyargs]
            defaults = [*[None] * (len(node.args) - len(node.kwonlyargs) - len(node.defaults)), *node.defaults]
            node.kw_defaults = [*defaults, *node.kw_defaults]
            node.posonlyargs, node.kwonlyargs, node.defaults = [], node.args, []
            node.args = []
    return ast.unparse(tree)


def _without_last_axes(source: str) -> str:
    """A program in which the last axis of a matrix is always 1, be it written as 1, +1 or -1."""
    tree = ast.parse(source)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and axes.is_last_of_a_matrix(node)]
    for node in calls:
        node.args = [ast.Constant(1) if ast.unparse(a) in ("1", "-1", "+1") else a for a in node.args]
    return ast.unparse(tree)


def is_program(source: str) -> bool:
    """Whether Python can read it: the star of keyword-only parameters is no product, though it looks like one."""
    try:
        ast.parse(source)
    except SyntaxError:
        return False
    return True


def by_place(path: str, source: str) -> list[list[Mutant]]:
    """The mutants of a module, those of one place together."""
    excluded = [*_excluded(ast.parse(source))]
    nodes = [*ast_nodes(get_ast(source))]
    groups: dict[tuple[Place, Place], list[Mutant]] = {}
    for name in filter(_is_used, sorted(operator_names())):
        operator = get_operator(name)()
        positions = [position for node in nodes for position in operator.mutation_positions(node)]
        for occurrence, (start, stop) in enumerate(positions):
            if not any(first <= start < last for first, last in excluded):
                groups.setdefault((start, stop), []).append(Mutant(path, start[0], name, occurrence))
    return [groups[place] for place in sorted(groups)]


def _is_used(name: str) -> bool:
    """Operators without arguments, but for those between identity and equality, which differ for no sound value."""
    kind, _, change = name.removeprefix("core/").partition("_")
    if kind in ("VariableInserter", "VariableReplacer", "RemoveDecorator"):
        return False
    identities = {"Is", "IsNot"} & set(change.split("_"))
    return kind != "ReplaceComparisonOperator" or len(identities) in (0, 2)


def _excluded(tree: ast.Module) -> Iterator[tuple[Place, Place]]:
    """The parts of a module that no test should notice."""
    for node in ast.walk(tree):
        yield from map(_span, _unnoticed(node))


def _unnoticed(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield from node.decorator_list
    if isinstance(node, ast.FunctionDef) and node.returns:
        yield node.returns
    if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation:
        yield node.annotation
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        yield node
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
        yield from node.exc.args
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        yield from node.args if node.func.id in _SPEAKS else ()
        yield from (keyword.value for keyword in node.keywords if keyword.arg == "strict")


def _span(node: ast.AST) -> tuple[Place, Place]:
    located = node if isinstance(node, ast.expr | ast.stmt) else None
    assert located
    assert located.end_lineno is not None
    assert located.end_col_offset is not None
    return (located.lineno, located.col_offset), (located.end_lineno, located.end_col_offset)
