"""The report's sentences: verdicts, notes, effects of a sweep's settings, costs, rationales and contamination."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from distill.app.files import Json
from distill.reports.arms import Arm
from distill.reports.charts import Effect, effects
from distill.reports.costs import TIME, Cost, Yield, cost, yields
from distill.reports.measures import ACCURACY, TEACHER_CROSS_ENTROPY
from distill.reports.rows import losses_of_rows
from distill.reports.runs import Run, mapping, mappings, number
from distill.reports.steps import pairs_note
from distill.reports.verdicts import Summary

FREE_TEXTS = (
    "Cross-entropy (CE) says how improbable the {texts} are to a student (lower is better), not whether the texts "
    "that it writes are good. chrF compares the wording of these with the {texts}, 0 to 100, and cannot see that "
    "another wording is as good. Neither says whether a text is true."
)
BAGS_OF_WORDS = (
    "Bag of words: TF-IDF of words and pairs of words, and logistic regression, on the same examples and the targets "
    "that the losses on answers read. It knows no language: a student that is not better has learned which words go "
    "with which answer."
)
_CALIBRATION = ("temperature", "ece_before", "ece", "brier_before", "brier")  # in run.json
_CALIBRATED = (
    "Logits of {} were divided by a temperature of {:.2f}, fitted on the labels of validation: calibration error "
    "{:.3f} -> {:.3f}, Brier score {:.3f} -> {:.3f} on test"
)
DRAFTED = 4  # tokens of a student that its teacher checks in a pass
_DRAFT = (
    "As a draft of its teacher in speculative decoding at temperature 1, {student} would have {rate} of its tokens "
    "accepted along the teacher's answers: the teacher writes {tokens} tokens in a pass instead of one, with {number} "
    "drafted in each."
)
WITHOUT_GOLD = " There are no gold texts, so they say how close a student comes to its teacher, not how good that is."


def remarks(summary: Summary) -> list[str]:
    """Return the verdicts with their caveats, then rows that were lost and the notes."""
    verdicts = [" ".join((verdict.sentence, *verdict.caveats)) for verdict in summary.verdicts]
    return [*verdicts, *notes(summary)]


def notes(summary: Summary) -> list[str]:
    """Return what speaks against a simple reading: large losses of rows, damaged files, runs that were left out."""
    return [*losses_of_rows(summary.runs), *summary.notes]


def facts(summary: Summary, prices: Json) -> list[str]:
    """Return sentences on effects of settings, costs, yield of rationales and contamination."""
    costs = [cost_note([cost(arm, prices) for arm in summary.trained])] if summary.trained else []
    settings = effect_lines(effects(summary.trained))
    texts = [*of_results(summary), *pairs_note(summary.trained)]
    return [*texts, *settings, *costs, *yield_lines(yields(summary.trained)), *contamination_lines(summary.runs)]


def of_results(summary: Summary) -> list[str]:
    """State what a bag of words is, what the figures of free texts can show, and how probabilities were calibrated."""
    words = [BAGS_OF_WORDS] if any(arm.kind == "words" for arm in summary.arms) else []
    measures = dict.fromkeys(arm.measure for arm in summary.trained if arm.measure is not ACCURACY)
    texts = [
        FREE_TEXTS.format(texts=measure.texts) + (WITHOUT_GOLD if measure is TEACHER_CROSS_ENTROPY else "")
        for measure in measures
    ]
    writing = [arm for arm in summary.trained if arm.measure is not ACCURACY]  # an answer of a word needs no draft
    return [*words, *texts, *calibration_lines(summary.trained), *draft_lines(writing)]


def calibration_lines(arms: Sequence[Arm]) -> list[str]:
    """State for each calibrated arm the temperature and what it changed on test, as means over seeds."""
    lines = []
    for arm in arms:
        figures = [mapping(run.facts.get("calibration")) for run in arm.runs]
        rows = [[value for key in _CALIBRATION if (value := number(row.get(key))) is not None] for row in figures]
        if complete := [row for row in rows if len(row) == len(_CALIBRATION)]:
            seeds = f" (means of {len(complete)} seeds)" if len(complete) > 1 else ""
            means = map(statistics.fmean, zip(*complete, strict=True))
            lines.append(f"{_CALIBRATED.format(arm.label, *means)}{seeds}.")
    return lines


def draft_lines(arms: Sequence[Arm]) -> list[str]:
    """State how good a draft the best student is for its teacher; nothing where no vocabulary is shared."""
    bounds = {arm.label: (arm.stat("acceptance_low").mean, arm.stat("acceptance_high").mean) for arm in arms}
    measured = {label: ends for label, ends in bounds.items() if not math.isnan(sum(ends))}
    if not measured:
        return []
    best = max(measured, key=lambda label: measured[label])
    rate = _range(*(f"{100 * end:.1f}" for end in measured[best]))
    tokens = _range(*(f"{tokens_per_pass(end, DRAFTED):.2f}" for end in measured[best]))
    return [_DRAFT.format(student=best, rate=f"{rate} %", tokens=tokens, number=DRAFTED)]


def tokens_per_pass(acceptance: float, number: int) -> float:
    """Return the expected tokens that a pass gives with `number` drafted ones (Leviathan et al. 2023, eq. 1).

    Acceptances of successive tokens are taken to be independent and equally likely.
    """
    return math.fsum(acceptance**accepted for accepted in range(number + 1))


def _range(low: str, high: str) -> str:
    return low if low == high else f"{low} to {high}"


def effect_lines(swept: Sequence[Effect]) -> list[str]:
    """State how much of the variance each setting of a sweep explains."""
    parts = ", ".join(f"{effect.setting} {100 * effect.share:.0f} %" for effect in swept)
    return [f"Part of the variance of accuracy between runs that each setting explains: {parts}."] if swept else []


def cost_note(costs: Sequence[Cost]) -> str:
    """State the unit of the costs and explain the columns."""
    units = " and ".join(dict.fromkeys(cost.unit or "an unnamed currency" for cost in costs))
    why = ", because no machine price is configured (`cost`)" if TIME in units else ""
    return (
        f"Costs in {units}{why}. Total: annotation, training and evaluation. Breaks even after: the number of requests "
        "that save the total by going to the student instead of the teacher; never if a request to the student is not "
        "cheaper, not shown if the measured times overlap. Labels alone need no annotation."
    )


def yield_lines(entries: Sequence[Yield]) -> list[str]:
    """State for each set of rationales how many were kept, and why the others were rejected."""
    lines = []
    for entry in entries:
        reasons = ", ".join(f"{reason} {num}" for reason, num in sorted(entry.rejected.items()))
        total = entry.kept + sum(entry.rejected.values())
        rest = f"; rejected: {reasons}" if reasons else ""
        lines.append(
            f"Rationales of {', '.join(entry.labels)}: {entry.kept} of {total} kept ({100 * entry.share:.0f} %){rest}."
        )
    return lines


def contamination_lines(runs: Sequence[Run]) -> list[str]:
    """State how many training questions share text with validation or test; equal findings only once."""
    lines = []
    for finding in (run.facts.get("contamination") for run in runs):
        if isinstance(finding, dict):
            number = finding.get("num_train", len(mappings(finding.get("found"))))
            lines.append(
                f"Contamination: {number} training questions share {finding.get('n')} consecutive words with "
                f"validation or test; {finding.get('num_dropped')} of them were dropped."
            )
    return list(dict.fromkeys(lines)) or ["Contamination: not measured."]
