"""Judge: let a language model compare the texts of runs with those of others, blind and in both orders."""

from __future__ import annotations

from distill.app.command import command
from distill.app.config import Config


def main(config: Config) -> float:
    """Compare the texts; return the win rate of the first run."""
    from distill.evaluation.judging import judge  # slow: only once the overrides are checked

    return judge(config)


if __name__ == "__main__":
    command("judge", main)
