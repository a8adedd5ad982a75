"""Annotate: have the teacher answer, and reason about, what the cache lacks; or look into the cache."""

from __future__ import annotations

from distill.app import preemption

if __name__ == "__main__":  # before the imports that take seconds
    preemption.watch()

from distill.app.command import command
from distill.app.config import Config


def main(config: Config) -> float:
    """Fill the cache, or look into it; return how many records are new."""
    from distill.annotation.job import annotate  # takes seconds: after the configuration is known to be right

    return annotate(config)


if __name__ == "__main__":
    command("annotate", main)
