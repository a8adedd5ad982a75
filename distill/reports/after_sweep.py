"""Report on a sweep when it ends."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback

from distill.app.config import Config
from distill.app.console import terminal_width
from distill.errors import ConfigError


class AfterSweep(Callback):
    """Hydra callback that writes a sweep's report to the sweep's folder."""

    def on_multirun_end(self, config: Config, **kwargs: Any) -> None:  # noqa: ARG002
        """Write and print the report once all jobs have ended, also if some failed."""
        from distill.reports.page import write_report  # here, because every run imports this callback
        from distill.reports.runs import find_runs
        from distill.reports.text import to_text

        out = Path(config.hydra.sweep.dir).resolve()
        try:
            summary = write_report(find_runs([str(out)]), out)
        except ConfigError as error:
            print(f"\nno report: {error}", file=sys.stderr)
            return
        print(f"\n{to_text(summary, width=terminal_width())}\n\nreport  {out / 'report.html'}")
