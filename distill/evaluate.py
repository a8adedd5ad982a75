"""Evaluate: measure a model folder on a task's split."""

from __future__ import annotations

from distill.app.command import command
from distill.app.config import Config


def main(config: Config) -> float:
    """Evaluate one model folder; return its accuracy."""
    from distill.evaluation.job import evaluate  # takes seconds: after the configuration is known to be right

    return evaluate(config)


if __name__ == "__main__":
    command("evaluate", main)
