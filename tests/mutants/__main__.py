"""Draw mutants, run those without a result, write the table."""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import tests.mutants
from tests.mutants.drawing import AREAS, Mutant, draw
from tests.mutants.running import (
    Copies,
    Result,
    append,
    import_libraries,
    read_results,
    run,
    seconds_without_mutant,
)

ROOT = Path(__file__).parents[2]
_BAR = 0.95


def main(arguments: Sequence[str]) -> int:
    """Run a sample; return the exit code."""
    options = _options(arguments)
    mutants = draw(ROOT, options.only, options.number, options.seed)
    if options.list:
        for mutant in mutants:
            print(f"{mutant.name}\n{mutant.diff((ROOT / mutant.path).read_text())}")
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    results = _results(mutants, options.out, options.processes)
    text = table(results)
    (options.out / "mutants.md").write_text(text)
    print(f"{text}\n{options.out / 'mutants.md'}")
    return int(killed(results) < _BAR)


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("scripts/mutants", description=tests.mutants.__doc__, formatter_class=formatter)
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--number", type=int, default=300, help="of mutants")
    parser.add_argument("--only", nargs="+", choices=[*AREAS], default=[*AREAS], help="areas that are drawn from")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="mutants that run at once")
    data = Path(os.environ.get("DISTILL_ROOT", ROOT / "distill-data"))
    parser.add_argument("--out", type=Path, default=data / "mutants", help="folder of the copies and results")
    parser.add_argument("--list", action="store_true", help="print the sample, run nothing")
    return parser.parse_args(arguments)


def _results(mutants: Sequence[Mutant], folder: Path, processes: int) -> list[Result]:
    """The results of all mutants: those that are kept, and the others as they are found."""
    path, sources = folder / "results.jsonl", {m.path: (ROOT / m.path).read_text() for m in mutants}
    keys = {mutant: (mutant.name, mutant.diff(sources[mutant.path])) for mutant in mutants}
    results = read_results(path)
    missing = [mutant for mutant, key in keys.items() if key not in results]
    say = sys.stderr.write
    if missing:
        say(
            f"{len(mutants) - len(missing)} of {len(mutants)} mutants have a result; timing the tests without one ...\n"
        )
        import_libraries()
        copies = Copies(ROOT, folder, min(processes, len(missing)), [*sources])
        seconds = seconds_without_mutant(copies, [mutant.path for mutant in missing])
        for done, result in enumerate(run(copies, missing, seconds), start=1):
            append(path, result)
            results[keys[result.mutant]] = result
            say(f"{done}/{len(missing)} {result.outcome:<8} {result.seconds:5.0f} s  {result.mutant.name}\n")
    return [results[key] for key in keys.values()]


def killed(results: Sequence[Result]) -> float:
    """The share of mutants that the tests noticed; a test that hangs has noticed it."""
    return sum(result.outcome != "survived" for result in results) / max(1, len(results))


def table(results: Sequence[Result]) -> str:
    """Outcomes by module in Markdown, then the changes that survived."""
    counts = {path: Counter[str]() for path in sorted({result.mutant.path for result in results})}
    for result in results:
        counts[result.mutant.path][result.outcome] += 1
    outcomes = ("killed", "timeout", "survived")
    rows = [f"| {path} | {' | '.join(str(c[outcome]) for outcome in outcomes)} |" for path, c in counts.items()]
    lines = [f"| module | {' | '.join(outcomes)} |", "|---|---|---|---|", *rows]
    lines += ["", f"{100 * killed(results):.1f} % of {len(results)} killed; expected at least {100 * _BAR:.0f} %"]
    for result in (result for result in results if result.outcome == "survived"):
        lines += ["", f"{result.mutant.name}", "```diff", result.diff, "```"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
