"""The report's sentences: verdicts and notes, and what a sweep's settings, costs, rationales and data came to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from distill.reports.charts import Effect, effects
from distill.reports.costs import TIME, Cost, Yield, cost, yields
from distill.reports.runs import Json, Run, mappings
from distill.reports.verdicts import Summary

NOTHING = "No distilled student was evaluated, so there is nothing to judge."


def remarks(summary: Summary) -> list[str]:
    """Verdicts with their caveats, then all else that a reader must know, a sentence each."""
    said = [" ".join((verdict.sentence, *verdict.caveats)) for verdict in summary.verdicts]
    return (said or [NOTHING]) + list(summary.notes)


def facts(summary: Summary, given: Json) -> list[str]:
    """What mattered in a sweep, what it cost, what became of the rationales, and how clean the data is."""
    spent = [cost_note([cost(arm, given) for arm in summary.trained])] if summary.trained else []
    mattered = effect_lines(effects(summary.trained))
    return [*mattered, *spent, *yield_lines(yields(summary.trained)), *contamination_lines(summary.runs)]


def effect_lines(found: Sequence[Effect]) -> list[str]:
    """A sentence on how much each setting of a sweep matters."""
    parts = ", ".join(f"{effect.setting} {100 * effect.share:.0f} %" for effect in found)
    return [f"What mattered, as a share of the variance of accuracy between runs: {parts}."] if found else []


def cost_note(costs: Sequence[Cost]) -> str:
    """What the costs are counted in, and what they hold."""
    units = " and ".join(dict.fromkeys(part.unit for part in costs))
    why = " because no price of the machine was given (`cost` of the configuration)" if TIME in units else ""
    return (
        f"Costs in {units}{why}. Paid back after: the requests to the student instead of the teacher that save what "
        "annotation, training and evaluation cost; never where they save nothing. Labels alone need no annotation."
    )


def yield_lines(found: Sequence[Yield]) -> list[str]:
    """A sentence for each set of rationales on how many were kept, and why the others were not."""
    lines = []
    for part in found:
        reasons = ", ".join(f"{reason} {num}" for reason, num in sorted(part.rejected.items()))
        total = part.kept + sum(part.rejected.values())
        rest = f"; rejected: {reasons}" if reasons else ""
        lines.append(
            f"Rationales of {', '.join(part.labels)}: {part.kept} of {total} kept ({100 * part.share:.0f} %){rest}."
        )
    return lines


def contamination_lines(runs: Sequence[Run]) -> list[str]:
    """A sentence on training examples that share text with validation or test, once for the same finding."""
    found = []
    for told in (run.facts.get("contamination") for run in runs):
        if isinstance(told, Mapping):
            number = told.get("num_train", len(mappings(told.get("found"))))
            found.append(
                f"Contamination: {number} training questions share {told.get('n')} words in a row with validation or "
                f"test; {told.get('num_dropped')} of them were dropped."
            )
    return list(dict.fromkeys(found)) or ["Contamination: not measured."]
