"""Optuna's sweeper, which also ends without a traceback if every trial failed."""

from __future__ import annotations

from pathlib import Path

from hydra_plugins.hydra_optuna_sweeper.optuna_sweeper import OptunaSweeper

from distill.app.files import FAILED


class Search(OptunaSweeper):
    """A search that may find nothing: then Optuna has no best trial, and the callbacks list the failures."""

    def sweep(self, arguments: list[str]) -> None:
        """Run the trials, and save the best one if any succeeded."""
        try:
            super().sweep(arguments)
        except ValueError:
            jobs = [path.parent for path in Path(self.sweeper.sweep_dir).rglob(".hydra")]
            if not jobs or not all((job / FAILED).is_file() for job in jobs):
                raise
