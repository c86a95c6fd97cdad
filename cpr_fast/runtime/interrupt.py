"""Being asked to stop: finish the step, save, leave. By SIGTERM (`kill`, torchrun, SLURM) or SIGUSR1 (SLURM)."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Interrupted(Exception):
    """A run was asked to stop by the signal `signum` and has saved first; the message says when and where."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name} {message}")
        self.signum = signum


class StopRequest:
    """The signal that asked this process to stop, or 0.

    Under SLURM and torchrun one request comes twice, from each of them, so repeating it changes nothing.
    """

    signum = 0

    def note(self, signum: int, _frame: FrameType | None) -> None:
        """Remembers the signal."""
        self.signum = self.signum or signum


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Within the block the signals are noted instead of ending the process. Only a main thread can: others see none."""
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
