"""What others put into models, data, names and settings does not run and leads nowhere; no key is written down."""

from __future__ import annotations

import re
import tomllib

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.security.conftest import ROOT


def pins(*names: str) -> dict[str, str]:
    """Names and versions in files of locked requirements; every line is exact, and no name stands twice."""
    found: dict[str, str] = {}
    for name in names:
        lines = [line for line in (ROOT / name).read_text().splitlines() if line and line[0] not in "#-"]
        for line in lines:
            package, version = re.fullmatch(r"([\w.-]+)==([\w.+!-]+)(?: --hash=sha256:[0-9a-f]{64})*", line).groups()
            assert canonicalize_name(package) not in found, line
            found[canonicalize_name(package)] = version
    return found


def test_every_dependency_is_locked_to_a_version_that_it_allows() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    locks = sorted(path.name for path in ROOT.glob("requirements*.txt"))
    assert locks[:2] == ["requirements-dev.txt", "requirements.txt"]
    runtime, every = pins("requirements.txt"), pins(*locks)
    wanted = {"": project["dependencies"], **project["optional-dependencies"]}
    del wanted["ray"]  # does not go with the newest of what the others need, and is in no lock
    for extra, lines in wanted.items():
        lock = every if extra else runtime
        for requirement in map(Requirement, lines):
            name = canonicalize_name(requirement.name)
            assert name in lock, f"{requirement} of {extra or 'the project'} is locked nowhere"
            assert requirement.specifier.contains(lock[name], prereleases=True), (
                f"{requirement}, locked is {lock[name]}"
            )


def test_no_requirement_names_another_index_or_url() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    every = [*project["dependencies"], *(line for part in project["optional-dependencies"].values() for line in part)]
    assert not [line for line in every if Requirement(line).url]
    for path in ROOT.glob("requirements*.txt"):
        options = [line for line in path.read_text().splitlines() if line.startswith("-")]
        assert set(options) <= {"-r requirements.txt"}, path
