"""Requests to stop: a run finishes its step, saves its state, and ends.

A request comes as SIGTERM (`kill`, torchrun, SLURM), SIGUSR1 (SLURM) or SIGINT (Ctrl-C).
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
REPEAT_S = 1.0  # a second Ctrl-C that comes later than this ends the process at once


class Interrupted(Exception):
    """A run was stopped by the signal `signum` and has saved its state; the message says when and where."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name} {message}")
        self.signum = signum


class StopRequest:
    """The signal that asked this process to stop, or 0 if none came.

    Under SLURM and torchrun a worker receives each request twice, once from SLURM and once from torchrun, so a repeated
    signal has no effect. Only a second Ctrl-C raises KeyboardInterrupt, for users who do not want to wait for the end
    of the step.
    """

    signum = 0

    def __init__(self) -> None:
        self._came = 0.0

    def note(self, signum: int, _frame: FrameType | None) -> None:
        """Remembers the first signal; this is the signal handler."""
        if signum == signal.SIGINT and self.signum and time.monotonic() - self._came > REPEAT_S:
            raise KeyboardInterrupt
        if not self.signum:
            self.signum, self._came = signum, time.monotonic()


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Notes the signals within the block instead of letting them end the process.

    Python allows signal handlers in the main thread only; in any other thread no request is ever noted.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request.note) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
