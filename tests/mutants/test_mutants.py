"""The sample of mutants is a function of the seed; tests tell a mutant that is noticed from one that is not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("cosmic_ray")

from tests.mutants.__main__ import ROOT, killed, table
from tests.mutants.drawing import AREAS, Mutant, by_place, draw, is_different_program, is_program, modules
from tests.mutants.running import Copies, Job, Result, append, ended, forked, read_results, suite_of

SOURCE = '''"""A module of 1 function: 2 + 2."""
from __future__ import annotations
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    LIMIT = 3
def half(x: int | None, y: float = 1) -> int | None:
    for a, b in zip([x], [y], strict=True):
        say("too large", x + 4)
    if x is None:
        raise ValueError(f"x is {x + 5}", 6)
    return x / 7
'''


def lines(source: str) -> set[str]:
    """The changed lines of all mutants of a source."""
    return {
        mutant.diff(source).partition("\n+")[2].replace("=  ", "= ")
        for group in by_place("m.py", source)
        for mutant in group
    }


def test_only_what_decides_a_figure_is_changed() -> None:
    changed = lines(SOURCE)
    assert {"    return x * 7", "    return x / 8", "    if x is not None:"} <= changed
    assert "    for a, b in []:" in changed
    assert {line for line in changed if "def half" in line} == {
        f"def half(x: int | None, y: float = {value}) -> int | None:" for value in ("0", "2")
    }
    assert not [line for line in changed if any(word in line for word in ("say", "raise", "LIMIT", "module", "False"))]


def test_every_mutant_changes_one_line_of_a_program() -> None:
    source = "def total(a, *, b):\n    return a * b\n"
    assert is_program(source)
    assert not all(is_program(mutant.source(source)) for group in by_place("m.py", source) for mutant in group)
    for mutant in draw(ROOT, ["statistics"], 6, seed=0):
        text = (ROOT / mutant.path).read_text()
        assert mutant.diff(text).count("\n+") == 1
        assert is_program(mutant.source(text))


def test_another_name_of_the_last_axis_is_no_mutant() -> None:
    source = "total = x_NV.sum(-1) + y_NV.at(-1) + z_NV.sum(-2)\n"
    mutants = [mutant for group in by_place("m.py", source) for mutant in group]
    drawn = {mutant.source(source) for mutant in mutants if is_different_program(source, mutant)}
    assert source.replace("x_NV.sum(-1)", "x_NV.sum(1)") not in drawn
    assert {source.replace("y_NV.at(-1)", "y_NV.at(1)"), source.replace("sum(-2)", "sum(2)")} <= drawn


@pytest.mark.parametrize(
    ("call", "are_equivalent"),
    [
        ("x_NPB.sum(-1)", [False]),  # of three axes, the second is not the last
        ("x_NPB.sum(-1).cumsum(-1)", [False, True]),
        ("x_T.sum(-1)", [False]),  # there is no second axis
        ("x.sum(-1)", [False]),  # the name does not tell
        ("(x_NV / 2).exp().softmax(-1)", [True]),
        ("(x_NV < 2).sum(-1, keepdim=True).softmax(-1)", [True, True]),
        ("x_N.unsqueeze(-1)", [True]),
        ("x_NV.unsqueeze(-1)", [False]),
        ("self.point_B1.squeeze(-1)", [True]),
        ("torch.stack([y_BT[:, 0] for y_BT in x], -1)", [True]),
        ("torch.stack(columns, -1)", [False]),
        ("torch.cat([x_NK, y_N1], -1)", [True]),
    ],
)
def test_the_last_axis_is_the_second_one_of_a_matrix_only(call: str, are_equivalent: list[bool]) -> None:
    places = [match.start() for match in re.finditer("-1", call)]
    changed = [f"{call[:place]}1{call[place + 2 :]}" for place in places]
    assert [source not in drawn_of(call) for source in changed] == are_equivalent


def drawn_of(source: str) -> set[str]:
    """All mutants of a source that are another program."""
    mutants = [mutant for group in by_place("m.py", source) for mutant in group]
    return {mutant.source(source) for mutant in mutants if is_different_program(source, mutant)}


def test_the_star_of_keyword_only_parameters_is_no_product() -> None:
    source = "def scaled(x, *, by=2, to):\n    return x * by + to\n"
    mutants = [mutant for group in by_place("m.py", source) for mutant in group]
    drawn = {mutant.source(source) for mutant in mutants if is_different_program(source, mutant)}
    assert source.replace("*,", "/,") in {mutant.source(source) for mutant in mutants}
    assert source.replace("*,", "/,") not in drawn
    assert {source.replace("x * by", "x / by"), source.replace("by=2", "by= 3")} <= drawn


def test_a_sample_is_a_function_of_its_seed_and_draws_each_place_once() -> None:
    first = draw(ROOT, ["costs"], 10, seed=3)
    assert draw(ROOT, ["costs"], 10, seed=3) == first
    assert draw(ROOT, ["costs"], 14, seed=3)[:10] == first
    assert draw(ROOT, ["costs"], 10, seed=4) != first
    groups = [g for path in modules(ROOT, ["costs"]) for g in by_place(path, (ROOT / path).read_text())]
    assert all(len(set(group) & set(first)) <= 1 for group in groups)


@pytest.mark.parametrize("area", AREAS)
def test_every_area_has_modules_with_tests_and_the_nearest_come_first(area: str) -> None:
    for path in modules(ROOT, [area]):
        files = suite_of(ROOT, path)
        assert len(files) == len(set(files)) > 0
        assert all((ROOT / file).is_file() for file in files)
    assert suite_of(ROOT, "distill/lessons/loader.py")[0] == "tests/lessons/test_loader.py"


def test_results_are_kept_and_read_back_without_a_line_that_was_cut(tmp_path: Path) -> None:
    mutant = Mutant("distill/x.py", 3, "core/AddNot", 0)
    results = [Result(mutant, "killed", 1.5, "-a\n+b"), Result(mutant, "survived", 2.0, "-a\n+c")]
    for result in results:
        append(tmp_path / "results.jsonl", result)
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"mutant": {"path"')
    assert [*read_results(tmp_path / "results.jsonl").values()] == results


def test_the_table_counts_outcomes_and_shows_what_survived() -> None:
    mutant = Mutant("distill/x.py", 3, "core/AddNot", 0)
    results = [Result(mutant, outcome, 1.0, "-a\n+b") for outcome in ("killed", "timeout", "survived", "killed")]
    assert killed(results) == 0.75
    text = table(results)
    assert "| distill/x.py | 2 | 1 | 1 |" in text
    assert "75.0 % of 4 killed; expected at least 95 %" in text
    assert text.count("```diff\n-a\n+b\n```") == 1


def make_repository(root: Path) -> None:
    """A module with two lines, of which a test looks at one, and what a copy holds beside it."""
    for name in ("conf", "benchmarks", "scripts", "docs"):
        (root / name).mkdir(parents=True)
    for folder in ("distill/toy", "tests/toy"):
        (root / folder).mkdir(parents=True)
    for package in ("distill", "distill/toy"):
        (root / package / "__init__.py").write_text("")
    (root / "distill" / "toy" / "sums.py").write_text("def total(a, b):\n    return a + b\n\n\nunused = 1 > 0\n")
    test = "import sys\nsys.path.insert(0, '.')\nfrom distill.toy.sums import total\n"
    (root / "tests" / "toy" / "test_sums.py").write_text(f"{test}def test_total():\n    assert total(2, 3) == 5\n")
    for name in ("pyproject.toml", "README.md"):
        (root / name).write_text("")


RUN = """
import sys
from pathlib import Path
from tests.mutants.drawing import by_place
from tests.mutants.running import Copies, run, seconds_without_mutant

root, folder = map(Path, sys.argv[1:])
path = "distill/toy/sums.py"
mutants = [group[0] for group in by_place(path, (root / path).read_text())]
copies = Copies(root, folder, 2, [path])
for result in run(copies, mutants, seconds_without_mutant(copies, [path])):
    print(result.mutant.line, result.outcome)
"""


@pytest.mark.slow
def test_a_mutant_that_no_test_looks_at_survives_and_the_repository_is_unchanged(tmp_path: Path) -> None:
    root = tmp_path / "repository"
    make_repository(root)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    path = os.pathsep.join([str(ROOT), *sys.path])
    line = [sys.executable, "-c", RUN, str(root), str(tmp_path / "out")]
    done = subprocess.run(line, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    outcomes = {tuple(line.split()) for line in done.stdout.split("\n") if line}
    assert outcomes == {("2", "killed"), ("5", "survived")}
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


def test_tests_that_do_not_end_are_stopped(tmp_path: Path) -> None:
    make_repository(tmp_path / "repository")
    copies = Copies(tmp_path / "repository", tmp_path / "out", 1, [])
    job = Job(forked(lambda: time.sleep(60) or 0), -1e9, 1.0, copies.free[0], None)
    assert ended([job]) == (job, None)
