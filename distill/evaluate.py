"""Evaluate: measure a model folder on one split of a task."""

from __future__ import annotations

from distill.app.command import command
from distill.app.config import Config


def main(config: Config) -> float:
    """Evaluate a model folder; return its accuracy."""
    from distill.evaluation.job import evaluate  # slow: only once the overrides are checked

    return evaluate(config)


if __name__ == "__main__":
    command("evaluate", main)
