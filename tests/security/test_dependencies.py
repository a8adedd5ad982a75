"""Locked requirements: exact, hashed, from the default index."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.security.conftest import ROOT


def pins(*names: str) -> dict[str, str]:
    """Versions by package in files of locked requirements; every line is exact, and no package appears twice."""
    version_by_package: dict[str, str] = {}
    for name in names:
        lines = [line for line in (ROOT / name).read_text().splitlines() if line and line[0] not in "#-"]
        for line in lines:
            package, version = re.fullmatch(r"([\w.-]+)==([\w.+!-]+)(?: --hash=sha256:[0-9a-f]{64})*", line).groups()
            assert canonicalize_name(package) not in version_by_package, line
            version_by_package[canonicalize_name(package)] = version
    return version_by_package


def test_every_dependency_is_locked_to_a_version_that_it_allows() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    locks = sorted(path.name for path in ROOT.glob("requirements*.txt"))
    assert locks[:2] == ["requirements-dev.txt", "requirements.txt"]
    runtime, all_locks = pins("requirements.txt"), pins(*locks)
    requirements_by_extra = {"": project["dependencies"], **project["optional-dependencies"]}
    del requirements_by_extra["ray"]  # conflicts with the newest dependencies of the others, and is not locked
    for extra, requirements in requirements_by_extra.items():
        lock = all_locks if extra else runtime
        for requirement in map(Requirement, requirements):
            name = canonicalize_name(requirement.name)
            assert name in lock, f"{requirement} of {extra or 'the project'} is not locked"
            assert requirement.specifier.contains(lock[name], prereleases=True), (
                f"{requirement}: locked to {lock[name]}"
            )


def test_every_module_can_be_imported_without_the_extras() -> None:
    required = pins("requirements.txt")
    distributions = packages_distributions()
    missing = []
    for path in sorted((ROOT / "distill").rglob("*.py")):
        for node in ast.parse(path.read_text()).body:  # not within functions, nor under TYPE_CHECKING
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in {module.split(".")[0] for module in modules} - sys.stdlib_module_names - {"distill"}:
                if not any(canonicalize_name(package) in required for package in distributions[name]):
                    missing.append(f"{path.relative_to(ROOT)}:{node.lineno} {name}")
    assert not missing


def test_no_requirement_names_another_index_or_url() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [
        *project["dependencies"],
        *(line for extra_lines in project["optional-dependencies"].values() for line in extra_lines),
    ]
    assert not [line for line in requirements if Requirement(line).url]
    for path in ROOT.glob("requirements*.txt"):
        options = [line for line in path.read_text().splitlines() if line.startswith("-")]
        assert set(options) <= {"-r requirements.txt"}, path
