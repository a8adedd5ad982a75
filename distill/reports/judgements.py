"""What a judge says of the texts of runs: win rates with intervals, and whether it can tell texts apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from distill.app.files import Json
from distill.reports.arms import Arm
from distill.reports.runs import number
from distill.reports.statistics import paired_interval

JUDGEMENTS_FILE = "judgements.jsonl"
JUDGEMENT_TITLES = ("texts of", "against", "judge", "win rate [95 %]", "ties", "order changed the verdict", "pairs")
CHECK = "other questions"  # the rival of reference texts, to check the judge
CLEARLY = 0.75  # the win rate that the interval of the check must be above
_RIVALS = {"gold": "gold texts", "teacher": "the teacher's texts", CHECK: "reference texts of other questions"}


class Judged(NamedTuple):
    """The texts of one arm against those of a rival; shares are of the `num_pairs` that were judged, of `num_all`.

    `win_rate` counts a tie as half a win, and a pair whose verdict changed with the order as a tie.
    """

    arm: str
    against: str
    judge: str
    win_rate: float
    low: float
    high: float
    ties: float
    changed: float
    num_pairs: int
    num_all: int

    @property
    def interval(self) -> str:
        """The win rate with its interval, in percent."""
        return f"{100 * self.win_rate:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"

    @property
    def cells(self) -> list[str]:
        """The cells of a line of the table."""
        shares = f"{100 * self.ties:.1f} %", f"{100 * self.changed:.1f} %"
        pairs = f"{self.num_pairs:,}" if self.num_pairs == self.num_all else f"{self.num_pairs:,} of {self.num_all:,}"
        rival = _RIVALS.get(self.against, self.against)
        return [self.arm, rival, self.judge, self.interval, *shares, pairs]


def judged(arms: Sequence[Arm]) -> list[Judged]:
    """Compare the texts of each arm with those of each rival, by each judge; the check of a judge is one line."""
    lines, checked = list[Judged](), set[str]()
    for arm in arms:
        keys = dict.fromkeys((str(j.get("judge")), str(j.get("against"))) for run in arm.runs for j in run.judgements)
        for judge, against in keys:
            seeds = [_by_id(run.judgements, judge, against) for run in arm.runs]
            if against == CHECK:
                seeds = [] if judge in checked else [seed for seed in seeds if seed][:1]
                checked.add(judge)
            label = "reference texts" if against == CHECK else arm.label
            lines += [line] if (line := _judged(label, judge, against, [seed for seed in seeds if seed])) else []
    return lines


def verdicts_on_judges(lines: Sequence[Judged]) -> list[str]:
    """State of each judge whether it can tell the reference text of a question from that of another one."""
    checks = {line.judge: line for line in lines if line.against == CHECK}
    return [_on_judge(judge, checks.get(judge)) for judge in dict.fromkeys(line.judge for line in lines)]


def _on_judge(judge: str, check: Judged | None) -> str:
    if check is None:
        return f"{judge} was not checked: no two questions have different reference texts."
    found = f"Against reference texts of other questions, the right ones win {check.interval} with {judge}"
    if check.low <= CLEARLY:
        return f"{found}: this judge cannot tell them apart reliably, so its win rates show nothing."
    return f"{found}: this judge can tell so coarse a difference; that it can tell finer ones does not follow."


def _by_id(judgements: Sequence[Json], judge: str, against: str) -> Mapping[str, Json]:
    return {str(j.get("id")): j for j in judgements if (j.get("judge"), j.get("against")) == (judge, against)}


def _judged(label: str, judge: str, against: str, seeds: Sequence[Mapping[str, Json]]) -> Judged | None:
    """Pair the seeds on the questions that were judged in all of them; None without any."""
    shared = sorted(set.intersection(*(set(seed) for seed in seeds))) if seeds else []
    ids = [id_ for id_ in shared if all(number(seed[id_].get("score")) is not None for seed in seeds)]
    if not ids:
        return None
    score_SE = np.array([[float(seed[id_]["score"]) for id_ in ids] for seed in seeds])
    changed = np.mean([[seed[id_].get("is_changed") is True for id_ in ids] for seed in seeds])
    # Wins minus losses is a difference of paired proportions; the win rate is half of it above one half.
    advantage = paired_interval((score_SE == 1).astype(float), (score_SE == 0).astype(float))
    rate, low, high = (min(1.0, max(0.0, (1 + end) / 2)) for end in advantage[:3])
    ties, num_all = float(np.mean(score_SE == 0.5)), max(map(len, seeds))
    return Judged(label, against, judge, rate, low, high, ties, float(changed), len(ids), num_all)
