"""The page of every configuration key is complete: no key without explanation, none left out."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.docs.conftest import ROOT, module_of

CONF = ROOT / "conf"
NOT_KEYS = ("_target_", "_partial_", "defaults")


def reference(conf: Path) -> Any:
    """The reference of a configuration folder, as the site's hook makes it."""
    return module_of(ROOT / "docs" / "reference.py").Reference(conf)


def leaves(value: dict[str, Any], path: str) -> Iterator[str]:
    """The keys of a file, as overrides write them."""
    for key, item in value.items():
        if key not in NOT_KEYS:
            yield from leaves(item, f"{path}{key}.") if isinstance(item, dict) else [f"{path}{key}"]


@pytest.fixture(scope="module")
def page() -> str:
    return reference(CONF).page()


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    return Path(shutil.copytree(CONF, tmp_path / "conf"))


def section(page: str, title: str) -> str:
    """The part of the page below a heading of the third level."""
    return page.split(f"\n### {title}\n", 1)[1].split("\n### ", 1)[0]


def rows(text: str) -> dict[str, list[str]]:
    """The rows of a section's table of keys, by key."""
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:3] == "| `"]
    return {row[0].strip("`"): row[1:] for row in cells}


def title(path: Path) -> str:
    """The heading of a file."""
    if path.parent == CONF:
        return "Every command" if path.stem == "common" else f"`distill.{path.stem}`"
    group = path.parent.relative_to(CONF)
    return f"`{group}=[{path.stem}]`" if group.name in ("loss", "callback") else f"`{group}={path.stem}`"


FILES = [path for path in sorted(CONF.rglob("*.yaml")) if path.parent.name not in ("experiment", "sweep")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONF)))
def test_every_key_of_a_file_has_a_row_with_an_explanation(path: Path, page: str) -> None:
    group = "" if path.parent == CONF else f"{str(path.parent.relative_to(CONF)).replace('/', '.')}."
    shown = rows(section(page, title(path)))
    for key in leaves(yaml.safe_load(path.read_text()), group):
        kind, default, explanation = shown[key]
        assert default, f"{key} has no default"
        assert explanation, f"{key} has no explanation"
        assert not kind.startswith("<"), f"{key} has a type that nobody can read: {kind}"


@pytest.mark.parametrize("path", sorted(CONF.glob("*/*.yaml")), ids=lambda path: str(path.relative_to(CONF)))
def test_experiments_and_sweeps_are_shown_whole(path: Path, page: str) -> None:
    if path.parent.name in ("experiment", "sweep"):
        assert path.read_text().strip() in page


def test_a_key_without_comment_is_named(conf: Path) -> None:
    assert reference(conf).unexplained() == []
    with (conf / "train.yaml").open("a") as file:
        file.write("\nnew_key: 3\n")
    assert reference(conf).unexplained() == [f"{conf}/train.yaml: new_key"]


def test_a_file_without_leading_comment_is_named(conf: Path) -> None:
    path = conf / "optim" / "adamw.yaml"
    path.write_text("\n".join(path.read_text().splitlines()[1:]))
    assert reference(conf).unexplained() == [str(path)]


def test_types_come_from_signatures(page: str) -> None:
    assert rows(section(page, "`cache=topk`"))["cache.codec.k"][0] == "int"
    assert rows(section(page, "`loss=[kl]`"))["loss.kl.source"][0] == "labels or teacher or soft"
    assert rows(section(page, "`rationales=checked`"))["rationales.max_words"][0] == "int or null"
    assert rows(section(page, "`trainer=default`"))["trainer.max_steps"][0] == "int"
    assert rows(section(page, "`task=gsm8k`"))["task.examples.num_validation"][0] == "int or null"
    assert rows(section(page, "`distill.train`"))["evaluate_before"][0] == "bool"


def test_what_repeats_a_part_has_its_explanations(page: str) -> None:
    explained = rows(section(page, "`loss=[answer]`"))["loss.answer.weight"][2]
    assert rows(section(page, "`loss=[reverse_kl]`"))["loss.reverse_kl.weight"][2] == explained
