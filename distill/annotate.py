"""Annotate: let the teacher answer the examples that the cache lacks, or inspect the cache."""

from __future__ import annotations

from distill.app import preemption

if __name__ == "__main__":  # before any slow import
    preemption.watch()

from distill.app.command import command
from distill.app.config import Config


def main(config: Config) -> float:
    """Fill or inspect the cache; return the number of new records."""
    from distill.annotation.job import annotate  # slow: only once the overrides are checked

    return annotate(config)


if __name__ == "__main__":
    command("annotate", main)
