"""Requests to stop: the first signal is recorded, repeated ones have no effect, a second Ctrl-C ends the run at
once.
"""

import os
import signal
import threading

import pytest

from cpr_fast.runtime import interrupt
from cpr_fast.runtime.interrupt import SIGNALS, Interrupted, StopRequest, stop_requests


@pytest.fixture
def clock(monkeypatch):
    """The time that the handler sees; the test sets it."""
    now = [100.0]
    monkeypatch.setattr(interrupt.time, "monotonic", lambda: now[0])
    return now


def test_only_a_later_ctrl_c_ends_the_process_at_once(clock):
    request = StopRequest()
    assert not request.signum
    request.note(signal.SIGINT, None)
    clock[0] += 0.5  # torchrun forwards the same Ctrl-C
    request.note(signal.SIGINT, None)
    clock[0] += 10
    request.note(signal.SIGTERM, None)
    assert request.signum == signal.SIGINT
    with pytest.raises(KeyboardInterrupt):
        request.note(signal.SIGINT, None)


def test_the_first_signal_is_kept(clock):
    request = StopRequest()
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
        request.note(number, None)
        clock[0] += 5
    assert request.signum == signal.SIGUSR1
    with pytest.raises(KeyboardInterrupt):  # the user does not want to wait for the end of the step
        request.note(signal.SIGINT, None)


@pytest.mark.parametrize("number", SIGNALS)
def test_signals_are_noted_within_the_block_only(number):
    before = [signal.getsignal(n) for n in SIGNALS]
    with stop_requests() as request:
        os.kill(os.getpid(), number)
        assert request.signum == number
    assert [signal.getsignal(n) for n in SIGNALS] == before


def test_another_thread_notes_nothing_and_changes_no_handler():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work():
        with stop_requests() as request:
            seen.append((request.signum, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(0, before)]


def test_the_message_names_the_signal():
    stopped = Interrupted(signal.SIGTERM, "after step 7; saved")
    assert str(stopped) == "stopped by SIGTERM after step 7; saved" and stopped.signum == signal.SIGTERM
