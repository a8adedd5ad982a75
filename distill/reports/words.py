"""Students compared with counting words: with the bag of words that was fitted on the same targets in the same run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from distill.reports.arms import Arm
from distill.reports.differences import Difference, compare, percent
from distill.reports.measures import ACCURACY, Status
from distill.reports.runs import BAG_OF_WORDS, number

METHOD = "TF-IDF and logistic regression on the same targets"
_LEADS: Mapping[Status, str] = {
    "better": "The student is better than counting words{seeds}",
    "not shown": "The student is not shown to be better than counting words",
    "worse": "The student is worse than counting words",
}


def against_words(arms: Sequence[Arm], level: float) -> tuple[Difference, ...]:
    """Compare each trained arm with its bags of words; `level` applies to all these comparisons together."""
    judged = [arm for arm in arms if arm.runs and arm.measure is ACCURACY]
    pairs = [(arm, rival) for arm in judged if (rival := _rival(arm))]
    return tuple(compare(arm, rival, level, len(pairs)) for arm, rival in pairs)


def _rival(arm: Arm) -> Arm | None:
    """The bags of words of an arm's runs as an arm; None if no run has any."""
    runs = [run for run in arm.runs if number(run.rows.get(BAG_OF_WORDS, {}).get(ACCURACY.key)) is not None]
    rows = tuple(run.rows[BAG_OF_WORDS] for run in runs)
    members = tuple(replace(run, predictions=run.bag_of_words) for run in runs)
    return Arm("words", "bag of words", arm.settings, members, rows) if rows else None


def sentence(difference: Difference) -> str:
    """State whether a student is better than the bag of words."""
    lead = _LEADS[difference.status].format(seeds=" in one seed" if difference.has_one_seed else "")
    measure, ends = difference.measure, ""
    if difference.ends:
        ends = f" ({percent(difference.level)} interval {measure.ends(difference.ends, ' to ')})"
    figure = measure.text(difference.rival.accuracy)
    gap = f"the student is {measure.size(difference.points)} {'above' if difference.points >= 0 else 'below'}{ends}"
    return f"{lead}: a bag of words ({METHOD}) answers {figure} right; {gap}."
