"""Report: compare run folders in tables, plots and one page that says whether distillation helped."""

from __future__ import annotations

from pathlib import Path

from omegaconf import OmegaConf

from distill.app.command import command
from distill.app.config import Config
from distill.app.console import terminal_width


def main(config: Config) -> None:
    """Write the report of the run folders; print its tables and its path."""
    from distill.reports.page import write_report
    from distill.reports.runs import find_runs, mapping
    from distill.reports.text import to_text

    folders = [config.runs] if isinstance(config.runs, str) else list(config.runs)
    out = Path(config.out or folders[0]).resolve()
    prices = mapping(OmegaConf.to_container(config.cost))
    summary = write_report(find_runs(folders), out, level=config.confidence_level, prices=prices)
    print(f"{to_text(summary, prices, width=terminal_width())}\n\nreport  {out / 'report.html'}")


if __name__ == "__main__":
    command("report", main)
