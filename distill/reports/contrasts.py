"""Pairs of arms whose configurations differ in one section: a second family of comparisons, at its own joint level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from distill.app.console import visible
from distill.reports.arms import Arm
from distill.reports.differences import Difference, compare
from distill.reports.runs import NULL

MAX_CONTRASTS = 28  # each then has a 99.8 % interval


@dataclass(frozen=True)
class Contrast:
    """Two arms with the same losses and task whose configurations differ in one section (`change`)."""

    losses: str
    change: str
    difference: Difference


def contrasts(arms: Sequence[Arm], level: float, notes: list[str]) -> tuple[Contrast, ...]:
    """Compare each pair of arms that differ in one section; if there are too many pairs, add a note instead."""
    pairs = []
    for rival, arm in combinations((arm for arm in arms if arm.runs), 2):
        is_comparable = arm.losses == rival.losses and all(
            arm.settings[key] == rival.settings[key] for key in ("task", "test")
        )
        ours, theirs = arm.choices, rival.choices
        changed = [key for key in {**ours, **theirs} if ours.get(key, NULL) != theirs.get(key, NULL)]
        if is_comparable and len({key.partition(".")[0] for key in changed}) == 1:
            pairs.append((arm, rival, _change(arm, rival, changed)))
    if len(pairs) > MAX_CONTRASTS:
        notes.append(f"{len(pairs)} pairs of arms differ in one section of the configuration: too many to compare.")
        return ()
    return tuple(Contrast(arm.name, change, compare(arm, rival, level, len(pairs))) for arm, rival, change in pairs)


def _change(arm: Arm, rival: Arm, keys: Sequence[str]) -> str:
    """Describe how the arm's settings differ from the rival's; names the first two."""
    mine = [f"{key}={visible(arm.choices.get(key, 'none'), 24)}" for key in keys]
    theirs = [visible(rival.choices.get(key, "none"), 24) for key in keys]
    changes = [f"{new}, not {old}" for new, old in zip(mine, theirs, strict=True)]
    rest = f"; and {len(changes) - 2} more" if len(changes) > 2 else ""
    return "; ".join(changes[:2]) + rest
