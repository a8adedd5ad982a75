"""Report: tables, plots and one page over run folders, which say whether distillation helped."""

from __future__ import annotations

from pathlib import Path

from omegaconf import OmegaConf

from distill.app.command import command
from distill.app.config import Config


def main(config: Config) -> None:
    """Report on run folders, print the tables and say where the page is."""
    from distill.reports.page import write_report
    from distill.reports.runs import find_runs, mapping
    from distill.reports.text import to_text

    named = [config.runs] if isinstance(config.runs, str) else list(config.runs)
    out = Path(config.out or named[0]).resolve()
    prices = mapping(OmegaConf.to_container(config.cost))
    summary = write_report(find_runs(named), out, level=config.confidence_level, prices=prices)
    print(f"{to_text(summary, prices)}\n\nreport  {out / 'report.html'}")


if __name__ == "__main__":
    command("report", main)
