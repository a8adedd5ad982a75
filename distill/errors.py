"""Errors that a user may see. Each has the exit code of the command that it ends."""

from __future__ import annotations


class DistillError(Exception):
    """Base of all errors that the user can fix; shown without a traceback."""

    exit_code = 1


class ConfigError(DistillError):
    """An invalid configuration, with every problem that was found."""

    exit_code = 2

    def __init__(self, *problems: str) -> None:
        """Keep all problems; the message lists one per line."""
        self.problems = problems
        lead = "" if len(problems) == 1 else f"{len(problems)} problems in the configuration:\n"
        super().__init__(lead + "\n".join(f"- {p}" if lead else p for p in problems))


class CacheError(DistillError):
    """A cache that is damaged, incomplete, or made with other settings."""

    exit_code = 3


class OutOfMemoryError(DistillError):
    """The job does not fit into the memory of this machine."""

    exit_code = 7


class PreemptedError(DistillError):
    """The command received a stop signal and saved its state; the same command resumes it."""

    exit_code = 85


class AnswerError(DistillError):
    """A text that contains no readable answer to the task."""


def in_one_line(error: BaseException, limit: int = 300) -> str:
    """The text of an error in one line, with its type where the text alone says too little."""
    text = " ".join(str(error).split())[:limit]
    says_little = not text or isinstance(error, LookupError | AttributeError | TypeError)
    return f"{type(error).__name__}: {text}".removesuffix(": ") if says_little else text
