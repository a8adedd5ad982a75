"""A run's metrics.csv."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path
from typing import Any, final

from lightning.pytorch.loggers import CSVLogger


@final
class Curves(CSVLogger):
    """A run's `metrics.csv`. Where the run goes on from a checkpoint, the lines of the steps before it stay."""

    def __init__(self, folder: Path) -> None:
        """The folder is the run's, and holds other files."""
        super().__init__(folder, name="", version="")

    def go_on(self, num_steps: int) -> None:
        """Keep what was logged in the steps that are done."""
        path, rows = Path(self.log_dir) / "metrics.csv", list[dict[str, Any]]()
        if path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                rows = [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Experiment logs directory")
            self.experiment.metrics = [row for row in rows if int(row["step"]) < num_steps]  # in the place of the file
