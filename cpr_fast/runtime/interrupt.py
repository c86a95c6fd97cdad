"""Requests to stop: a run finishes its step, saves its state, and ends; any other command removes what is unfinished.

A request comes as SIGTERM (`kill`, torchrun, SLURM), SIGUSR1 (SLURM), SIGINT (Ctrl-C), or SIGHUP (the terminal or the
connection was closed) unless `nohup` ignores that one.
"""

from __future__ import annotations

import _thread
import concurrent.futures.thread
import math
import os
import signal
import socket
import stat
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from cpr_fast.runtime.files import discard
from cpr_fast.runtime.progress import announce

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
REPEAT_S = 1.0  # a second Ctrl-C that comes later than this ends the process at once
ANSWER_S = 0.7  # a command that still runs this long after a request to stop says that it is stopping
RETRY_S = 0.05  # how often a request is repeated that came at an unsafe moment
_LOCKING = (threading.__file__, concurrent.futures.thread.__file__)  # files whose functions hold locks
_WEAK = ("weakref.py", "_weakrefset.py")  # files whose functions are called where exceptions are ignored

AT_ONCE = "a second Ctrl-C ends the command at once"

_after = ["Stopping as soon as the current operation ends"]  # what a command says then; the last one is valid


class Interrupted(Exception):
    """A run was stopped by the signal `signum` and has saved its state; the message says when and where."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name} {message}")
        self.signum = signum


class Stopped(KeyboardInterrupt):
    """The signal `signum` asked a command to stop that has no steps to finish. It acts as Ctrl-C does, which Python
    turns into a KeyboardInterrupt, so that the same blocks remove unfinished files."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
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
        if signum == signal.SIGHUP:
            _leave_terminal()
        if not self.signum:
            self.signum, self._came = signum, time.monotonic()


def _leave_terminal() -> None:
    """Sends what is printed from now on to nowhere, if it went to a terminal: writing to a closed one is an error,
    which would end the run before it has saved its state."""
    for stream in (sys.__stdout__, sys.__stderr__):
        try:
            if stream is not None and stat.S_ISCHR(os.fstat(stream.fileno()).st_mode):
                discard(stream.fileno())
        except (OSError, ValueError):  # the stream is closed or has no file
            continue


@contextmanager
def stopping(text: str) -> Iterator[None]:
    """Replaces what a command says if it has not ended soon after a request to stop that comes within the block."""
    _after.append(text)
    try:
        yield
    finally:
        _after.pop()


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Notes the signals within the block instead of letting them end the process.

    Python allows signal handlers in the main thread only; in any other thread no request is ever noted.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    with stopping("Stopping after the current step, and saving its state"), _handled(SIGNALS, request.note):
        yield request


@contextmanager
def signals_raise() -> Iterator[None]:
    """Within the block, SIGTERM, SIGUSR1 and SIGHUP raise Stopped in the main thread, and Ctrl-C KeyboardInterrupt. If
    the block has not ended soon after one of them, a line says that the command is stopping.

    One that is repeated at once has no effect, since SLURM and torchrun both send it; a later one ends the process.
    While a module is imported or a lock is held, they wait for the end of it, see `_WhenSafe`.
    """
    came: list[float] = []

    def stop(signum: int, _frame: FrameType | None) -> None:
        if signum == signal.SIGHUP:
            _leave_terminal()
        if came and time.monotonic() - came[0] > REPEAT_S:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        if not came:
            came.append(time.monotonic())
            raise KeyboardInterrupt if signum == signal.SIGINT else Stopped(signum)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # A shell lets commands in the background ignore Ctrl-C.
    ignored = signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    handler = _WhenSafe(stop)
    with _says_that_it_stops(handler), _handled([n for n in SIGNALS if n != signal.SIGINT or not ignored], handler):
        try:
            yield
        finally:
            handler.close()


@contextmanager
def _says_that_it_stops(handler: _WhenSafe) -> Iterator[None]:
    """Prints a line if the block has not ended `ANSWER_S` after a request to stop, and ends the process if it has not
    ended `ANSWER_S` after a second Ctrl-C.

    Python writes the number of a signal to a socket at once, also while the main thread computes in C++, where it
    cannot run a handler. A thread waits at the other end of the socket.
    """
    read, write = socket.socketpair()
    write.setblocking(False)
    ended = threading.Event()

    def wait() -> None:
        first, received, pressed = math.inf, 0, 0
        while came := read.recv(64):
            if not set(came) & set(SIGNALS):
                continue
            received += came.count(signal.SIGINT)
            before, pressed = pressed, max(pressed, received - handler.sent[signal.SIGINT])
            if first == math.inf:
                first = time.monotonic()
                if not ended.wait(ANSWER_S):
                    announce(f"{_after[-1]}; {AT_ONCE}")
            elif pressed > before and time.monotonic() - first > REPEAT_S and not ended.wait(ANSWER_S):
                os._exit(128 + signal.SIGINT)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    descriptor = signal.set_wakeup_fd(write.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(descriptor)
        ended.set()
        write.shutdown(socket.SHUT_RDWR)  # closing it would not end `recv` while a forked process has it open, too
        write.close()
        thread.join()
        read.close()


class _WhenSafe:
    """A signal handler that calls `handler` as soon as an exception does no harm, see `_unsafe`, or at the second
    request.

    torch and others import modules in blocks that ignore every exception. A request to stop was lost in one, and the
    command went on with a half-imported numpy. An exception that is raised while a lock is taken or given back leaves
    it closed for ever: threads that need it hung, or the command ended in "release unlocked lock".
    """

    def __init__(self, handler: Callable[[int, FrameType | None], None]) -> None:
        self._handler = handler
        self._came: dict[int, float] = {}  # the signals that wait
        self._again: list[int] = []  # those that were sent again by `_send`
        self.sent: Counter[int] = Counter()  # how often `_send` has sent each
        self._closed = False

    def close(self) -> None:
        """Forgets the requests that wait: what they would stop has ended."""
        self._closed = True

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        again = signum in self._again
        if again:
            self._again.remove(signum)
            if signum not in self._came:
                return  # it was answered meanwhile, by a second request
        second = not again and time.monotonic() - self._came.get(signum, math.inf) > REPEAT_S
        if second or not _unsafe(frame):
            self._came.pop(signum, None)
            self._handler(signum, frame)
        elif again or signum not in self._came:
            self._came.setdefault(signum, time.monotonic())
            # Not threading.Timer, whose start takes a lock that the interrupted code may hold.
            _thread.start_new_thread(self._send, (signum,))

    def _send(self, signum: int) -> None:
        time.sleep(RETRY_S)
        if not self._closed:
            self._again.append(signum)
            self.sent[signum] += 1
            os.kill(os.getpid(), signum)


def _unsafe(frame: FrameType | None) -> bool:
    """Returns whether an exception raised at `frame` would be ignored, in an import or while an object is deleted, or
    might leave a lock of `threading` or a thread pool in disorder. Code that waits there may be interrupted."""
    waits = frame is not None and _waits(frame)
    while frame is not None:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if file.startswith("<frozen importlib") or name == "__del__" or os.path.basename(file) in _WEAK:
            return True
        if file in _LOCKING and (not waits or name in ("start", "submit")):
            return True
        frame = frame.f_back
    return False


def _waits(frame: FrameType) -> bool:
    """Returns whether a frame waits in `threading`, in a block that leaves its locks in order if it is interrupted."""
    if frame.f_code.co_filename != threading.__file__:
        return False
    name = frame.f_code.co_name
    return name in ("join", "_wait_for_tstate_lock") or name == "wait" and "gotit" in frame.f_locals


@contextmanager
def _handled(signals: Sequence[int], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handles signals within the block, but not SIGHUP if nohup ignores it: the run goes on without its terminal."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    numbers = [number for number in signals if number != signal.SIGHUP or not ignored]
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
