"""Requests to stop: the first signal is recorded, repeated ones have no effect, a second Ctrl-C ends the run at
once.
"""

import hashlib
import os
import pty
import signal
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import thread as pools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import cpr_fast
from cpr_fast.runtime import interrupt
from cpr_fast.runtime.interrupt import (
    REPEAT_S,
    SIGNALS,
    Interrupted,
    Stopped,
    StopRequest,
    _WhenSafe,
    signals_raise,
    stop_requests,
)

pytestmark = pytest.mark.usefixtures("signals_as_in_a_terminal")


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


def test_nohup_keeps_a_run_going():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_requests() as request:
            signal.raise_signal(signal.SIGHUP)
            assert not request.signum and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


CLOSED = """
import os, sys, time
from cpr_fast.runtime.interrupt import stop_requests
with stop_requests() as stop:
    open(sys.argv[1], "x").close()
    while not stop.signum:
        time.sleep(0.01)
    print("progress", file=sys.stderr, flush=True)  # the terminal is gone
    print("progress", flush=True)
os.rename(sys.argv[1], sys.argv[1] + ".saved")
"""


def test_a_closed_terminal_stops_a_run_that_can_still_print_and_save(tmp_path):
    process, terminal = pty.fork()
    if not process:
        os.execv(sys.executable, [sys.executable, "-c", CLOSED, str(tmp_path / "state")])
    for _ in range(6000):
        if (tmp_path / "state").exists():
            break
        time.sleep(0.01)
    os.close(terminal)  # the kernel sends SIGHUP to the process, and its writes fail from now on
    assert os.waitpid(process, 0)[1] == 0
    assert (tmp_path / "state.saved").exists()


FORKED = """
import os, time
from cpr_fast.runtime.interrupt import signals_raise
with signals_raise():
    child = os.fork()
    if not child:
        os.closerange(0, 3)
        time.sleep(60)
        os._exit(0)
    print(child, flush=True)
"""


def test_a_forked_process_that_stays_does_not_keep_a_command_from_ending():
    command = subprocess.Popen([sys.executable, "-c", FORKED], stdout=subprocess.PIPE, text=True)
    child = int(command.stdout.readline())
    try:
        assert command.wait(10) == 0
    finally:
        os.kill(child, signal.SIGKILL)
        command.kill()
        command.wait()
        command.stdout.close()


@pytest.mark.parametrize("number", [number for number in SIGNALS if number != signal.SIGINT])
def test_other_signals_raise_what_ctrl_c_raises_and_a_repeat_at_once_has_no_effect(number):
    before = [signal.getsignal(n) for n in SIGNALS]
    repeated = []
    with pytest.raises(KeyboardInterrupt) as caught, signals_raise():
        try:
            os.kill(os.getpid(), number)
        finally:
            os.kill(os.getpid(), number)  # torchrun forwards it, too
            repeated.append(True)
    assert caught.value.signum == number and str(caught.value) == f"stopped by {signal.Signals(number).name}"
    assert repeated and [signal.getsignal(n) for n in SIGNALS] == before
    with signals_raise(), stop_requests() as request:  # a run notes it instead
        os.kill(os.getpid(), number)
        assert request.signum == number


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGTERM, "Stopped"), (signal.SIGINT, "KeyboardInterrupt")])
def test_a_request_during_an_import_is_not_lost(tmp_path, number, raised):
    """A package imports a module in a block that ignores every exception, as torch imports numpy."""
    (tmp_path / "slow.py").write_text(
        f"import os, time\nos.kill(os.getpid(), {number.value})\ntime.sleep(0.5)\nprint('whole')\n"
    )
    (tmp_path / "package.py").write_text("try:\n    import slow\nexcept BaseException:\n    print('lost')\n")
    (tmp_path / "program.py").write_text(
        "import signal, time\n"
        "from cpr_fast.runtime.interrupt import signals_raise\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "try:\n"
        "    with signals_raise():\n"
        "        import package\n"
        "        time.sleep(20)\n"
        "except KeyboardInterrupt as stopped:\n"
        "    print(type(stopped).__name__)\n"
    )
    path = os.pathsep.join([str(Path(cpr_fast.__file__).parents[1]), str(tmp_path)])
    done = subprocess.run(
        [sys.executable, "program.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.split() == ["whole", raised] and done.returncode == 0


@pytest.mark.parametrize(("number", "noted"), [(signal.SIGTERM, False), (signal.SIGINT, False), (signal.SIGINT, True)])
def test_a_command_that_does_not_end_at_once_says_that_it_is_stopping(monkeypatch, capsys, number, noted):
    """Also while the main thread computes in C, where no handler of Python runs."""
    monkeypatch.setattr(interrupt, "ANSWER_S", 0.05)

    def busy():
        timer = threading.Timer(0.05, os.kill, [os.getpid(), number])
        timer.start()
        while not capsys_err():
            hashlib.pbkdf2_hmac("sha256", b"x", b"y", 300_000)  # a call of C that no signal interrupts

    said = []

    def capsys_err():
        said.append(capsys.readouterr().err)
        return "".join(said)

    with signals_raise():
        if noted:
            with stop_requests() as request:
                busy()
                assert request.signum == number
        else:
            with pytest.raises(KeyboardInterrupt):
                try:
                    busy()
                finally:
                    time.sleep(0.3)  # removing unfinished files
    line = "Stopping after the current step, and saving its state" if noted else "Stopping as soon as"
    capsys_err()
    assert "".join(said).startswith(line) and "".join(said).count("\n") == 1
    assert "a second Ctrl-C ends the command at once" in "".join(said)


@pytest.mark.parametrize("where", ["the main thread computes in C", "a thread computes", "a run is stopped"])
def test_a_second_ctrl_c_ends_the_command_at_once(tmp_path, where):
    """Without cleaning up, and without the threads of pools, which Python waits for when it exits."""
    (tmp_path / "program.py").write_text(
        "import hashlib, signal, sys, threading\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from contextlib import nullcontext\n"
        "from cpr_fast.runtime.interrupt import signals_raise, stop_requests\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def compute():\n"
        "    threading.Timer(0.3, print, ['computing'], {'flush': True}).start()  # while the call below computes\n"
        "    hashlib.pbkdf2_hmac('sha256', b'x', b'y', 300_000_000)\n"
        "with signals_raise(), stop_requests() if 'run' in sys.argv[1] else nullcontext():\n"
        "    if 'thread computes' in sys.argv[1] and 'main' not in sys.argv[1]:\n"
        "        with ThreadPoolExecutor(1) as pool:\n"
        "            pool.submit(compute).result()\n"
        "    compute()\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(cpr_fast.__file__).parents[1])}
    with subprocess.Popen([sys.executable, "program.py", where], cwd=tmp_path, env=environment, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:  # fmt: skip
        assert process.stdout.readline() == "computing\n"
        process.send_signal(signal.SIGINT)
        assert "a second Ctrl-C ends the command at once" in process.stderr.readline()
        time.sleep(REPEAT_S)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) in (-signal.SIGINT, 128 + signal.SIGINT)  # the computation takes minutes


def test_a_command_that_ends_at_once_does_not_say_that_it_is_stopping(capsys):
    before = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(before)
    with pytest.raises(KeyboardInterrupt), signals_raise():
        os.kill(os.getpid(), signal.SIGTERM)
    assert capsys.readouterr().err == "" and signal.set_wakeup_fd(before) == before


def test_a_second_request_does_not_wait_for_an_import(clock):
    came = []
    handler = _WhenSafe(lambda signum, frame: came.append(signum))
    importing = SimpleNamespace(
        f_code=SimpleNamespace(co_filename="<frozen importlib._bootstrap>", co_name="_load"), f_back=None
    )
    inside = SimpleNamespace(f_code=SimpleNamespace(co_filename="numpy.py", co_name="<module>"), f_back=importing)
    handler._send = lambda signum: None  # nothing is sent again
    handler(signal.SIGTERM, inside)
    handler(signal.SIGTERM, inside)  # torchrun and SLURM both send it
    assert came == []
    clock[0] += REPEAT_S + 0.1
    handler(signal.SIGTERM, inside)
    handler(signal.SIGUSR1, None)
    assert came == [signal.SIGTERM, signal.SIGUSR1]


def test_a_request_that_was_answered_is_not_sent_again(clock):
    """The second Ctrl-C ends an import; the repetition of the first one came later, while files were removed."""
    came = []
    handler = _WhenSafe(lambda signum, frame: came.append(signum))
    sent = []
    handler._send = sent.append
    importing = SimpleNamespace(
        f_code=SimpleNamespace(co_filename="<frozen importlib._bootstrap>", co_name="_load"), f_back=None
    )
    handler(signal.SIGINT, importing)
    clock[0] += REPEAT_S + 0.1
    handler(signal.SIGINT, importing)
    handler._again.append(signal.SIGINT)  # what the timer does
    handler(signal.SIGINT, None)
    assert came == [signal.SIGINT]


def function_of(file, name):
    """Returns a function of this name, as if it were written in `file`, that calls its argument."""
    made = {}
    exec(compile(f"def {name}(call):\n    call()\n    return 'whole'\n", file, "exec"), made)
    return made[name]


def stop():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("file", "name"),
    [(threading.__file__, "__enter__"), (threading.__file__, "start"), (pools.__file__, "submit"),
     (weakref.__file__, "remove"), (__file__, "__del__")],
)  # fmt: skip
def test_a_request_waits_where_it_would_be_ignored_or_leave_a_lock_closed(file, name):
    done = []
    with pytest.raises(Stopped), signals_raise():
        done.append(function_of(file, name)(stop))
        time.sleep(20)
    assert done == ["whole"]


def test_locks_are_in_order_after_a_stop():
    """Condition takes its lock in a function of Python, where a signal handler may run with the lock in hand."""
    condition = threading.Condition(threading.Lock())
    for delay in np.random.default_rng(0).uniform(0, 0.004, 60):
        with pytest.raises(Stopped), signals_raise():
            threading.Timer(delay, stop).start()
            while True:
                with condition:
                    condition.notify()
                sum(range(500))  # a request that finds the lock held comes again 50 ms later
        assert condition.acquire(timeout=0)
        condition.release()


@pytest.mark.parametrize("wait", ["event", "thread", "future", "pool"])
def test_a_wait_for_another_thread_is_interrupted(wait):
    end = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(end.wait)
        thread = threading.Thread(target=end.wait)
        thread.start()
        waits = {"event": end.wait, "thread": thread.join, "future": future.result, "pool": pool.shutdown}
        try:
            with pytest.raises(Stopped), signals_raise():
                threading.Timer(0.05, stop).start()
                waits[wait]()
        finally:
            end.set()
            thread.join()


def test_a_request_that_waits_is_forgotten_when_the_command_has_ended():
    noted = []
    before = signal.signal(signal.SIGTERM, lambda *_: noted.append(True))
    try:
        with signals_raise():
            assert function_of(threading.__file__, "__enter__")(stop) == "whole"
        time.sleep(4 * interrupt.RETRY_S)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert noted == []
