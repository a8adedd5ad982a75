"""Being asked to stop, as by a scheduler that takes the machine back: noted at once, acted on between two steps.

Nothing heavy is imported here, so that a command can watch before it spends seconds on imports.
"""

from __future__ import annotations

import ctypes
import os
import signal
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_PARENT_DEATH = 1  # prctl(2): PR_SET_PDEATHSIG


class Notice:
    """A signal's handler that takes note of it and does nothing else: no step is broken off in the middle."""

    is_given = False

    def __call__(self, _number: int, _frame: FrameType | None) -> None:
        """Take note."""
        self.is_given = True


def watch() -> None:
    """Take note of being asked to stop, from now on; a process of several ends with the one that started it."""
    notice = Notice()
    for number in _SIGNALS:
        signal.signal(number, notice)
    if int(os.environ.get("LOCAL_RANK", "0")) and os.uname().sysname == "Linux":
        ctypes.CDLL(None).prctl(_PARENT_DEATH, signal.SIGKILL)


def watch_on() -> None:
    """Watch again where a library has put a handler of its own before ours."""
    if notice := _notice():
        signal.signal(signal.SIGTERM, notice)


def is_asked() -> bool:
    """Whether this process was asked to stop since it watches."""
    notice = _notice()
    return notice is not None and notice.is_given


def ignore() -> None:
    """The last act of a command: a signal while Python shuts down must not make a failure of what is done."""
    if _notice():
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def _notice() -> Notice | None:
    handler = signal.getsignal(signal.SIGUSR1)  # Lightning leaves this one alone where it finds it taken
    return handler if isinstance(handler, Notice) else None
