"""Train: annotate what the cache lacks, free the teacher, train a student, evaluate it, report."""

from __future__ import annotations

from distill.app import preemption

if __name__ == "__main__":  # before any slow import
    preemption.watch()

from distill.app.command import command
from distill.app.config import Config


def main(config: Config) -> float:
    """Run the whole pipeline; return the accuracy of the student on the split that `objective` names."""
    from distill.training.job import train  # slow: only once the overrides are checked

    return train(config)


if __name__ == "__main__":
    command("train", main)
