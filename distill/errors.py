"""Errors that a user may see; each has the exit code of the command that it ends."""

from __future__ import annotations


class DistillError(Exception):
    """Base of the errors that are the user's to mend; shown without a traceback."""

    exit_code = 1


class ConfigError(DistillError):
    """A configuration that cannot work. Takes all problems at once."""

    exit_code = 2

    def __init__(self, *problems: str) -> None:
        """Keep every problem; the message lists them one below the other."""
        self.problems = problems
        lead = "" if len(problems) == 1 else f"{len(problems)} problems in the configuration:\n"
        super().__init__(lead + "\n".join(f"- {p}" if lead else p for p in problems))


class CacheError(DistillError):
    """A cache that is damaged, incomplete, or made by something else."""

    exit_code = 3


class OutOfMemoryError(DistillError):
    """What was asked for does not fit into this machine's memory."""

    exit_code = 7


class PreemptedError(DistillError):
    """The command was asked to stop, has saved its state and can go on."""

    exit_code = 85


class AnswerError(DistillError):
    """A text in which no answer of the task could be read."""
