"""Train: annotate what the cache lacks, free the teacher, train a student, evaluate it, report."""

from __future__ import annotations

from distill.app import preemption

if __name__ == "__main__":  # before the imports that take seconds
    preemption.watch()

from distill.app.command import command
from distill.app.config import Config


def main(config: Config) -> float:
    """Run the main job; return the student's accuracy on test, or on validation if that is the objective."""
    from distill.training.job import train  # takes seconds: after the configuration is known to be right

    return train(config)


if __name__ == "__main__":
    command("train", main)
