"""Stop signals, as a scheduler sends them before it takes the machine back: recorded at once, obeyed between steps.

Nothing heavy is imported here, so that a command can install the handlers first.
"""

from __future__ import annotations

import ctypes
import os
import signal
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_PR_SET_PDEATHSIG = 1  # prctl(2)


class SignalRecorder:
    """A signal handler that only records the signal, so that no step is interrupted."""

    has_received = False

    def __call__(self, _number: int, _frame: FrameType | None) -> None:
        """Record the signal."""
        self.has_received = True


def watch() -> None:
    """Record stop signals from now on. On Linux, a process with a local rank above 0 is killed when its parent ends."""
    recorder = SignalRecorder()
    for number in _SIGNALS:
        signal.signal(number, recorder)
    if int(os.environ.get("LOCAL_RANK", "0")) and os.uname().sysname == "Linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def watch_again() -> None:
    """Install the handler again after a library has replaced it."""
    if recorder := _recorder():
        signal.signal(signal.SIGTERM, recorder)


def is_stop_requested() -> bool:
    """Whether this process has received a stop signal since `watch`."""
    recorder = _recorder()
    return recorder is not None and recorder.has_received


def ignore() -> None:
    """Ignore further signals: called last, so that a signal during shutdown does not turn success into failure."""
    if _recorder():
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def _recorder() -> SignalRecorder | None:
    handler = signal.getsignal(signal.SIGUSR1)  # Lightning does not replace a handler of this signal
    return handler if isinstance(handler, SignalRecorder) else None
