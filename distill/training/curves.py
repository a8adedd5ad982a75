"""A run's metrics.csv, kept across resumption."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path
from typing import Any, final

from lightning.pytorch.loggers import CSVLogger


@final
class Curves(CSVLogger):
    """Writes a run's `metrics.csv`; a resumed run keeps the rows of the steps before its checkpoint."""

    def __init__(self, folder: Path) -> None:
        """Write into the run's folder, which also holds other files."""
        super().__init__(folder, name="", version="")

    def resume(self, num_steps: int) -> None:
        """Keep the rows of the first `num_steps` steps."""
        path, rows = Path(self.log_dir) / "metrics.csv", list[dict[str, Any]]()
        if path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                rows = [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Experiment logs directory")
            self.experiment.metrics = [row for row in rows if int(row["step"]) < num_steps]  # replaces the file
