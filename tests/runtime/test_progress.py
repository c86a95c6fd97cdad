"""Progress of long commands: where stderr is not a terminal, few plain lines that say how long it will take."""

import contextlib
import io
import os
import pty
import re
import subprocess
import sys
import threading
from time import sleep

import pytest

from cpr_fast.runtime import busy, progress
from cpr_fast.runtime.progress import WHOLE, Forecast, Part, about, as_finished, duration, rounded, track


@pytest.fixture
def clock(monkeypatch):
    """The time that the progress lines use; the test sets it."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def run(clock, capsys, count, seconds, **options):
    """Goes through `count` items that take `seconds` each, and returns the lines on stderr."""
    seen = []
    for item in track(range(count), "decoding", total=count, unit="videos", **options):
        seen.append(item)
        clock[0] += seconds
    assert seen == list(range(count))
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()


def test_the_first_line_comes_soon_and_the_others_each_half_minute(clock, capsys):
    lines = run(clock, capsys, 100, 1.0)
    assert lines == [
        "decoding: 5/100 videos, 1.0 videos/s, about 1 min 40 s left",
        "decoding: 35/100 videos, 1.0 videos/s, about 1 min left",
        "decoding: 65/100 videos, 1.0 videos/s, about 35 s left",
        "decoding: 95/100 videos, 1.0 videos/s, a few seconds left",
        "decoding: 100/100 videos, 1.0 videos/s, done in 1 min 40 s",
    ]


def test_short_work_is_one_line_and_silent_work_none(clock, capsys):
    assert run(clock, capsys, 8, 0.5) == ["decoding: 8/8 videos, 2.0 videos/s, done in 4 s"]
    assert run(clock, capsys, 100, 1.0, progress=False) == []
    assert run(clock, capsys, 0, 1.0) == ["decoding: 0/0 videos, done in 0 s"]


def test_slow_items_and_the_status(clock, capsys):
    loss = iter("abc")
    lines = run(clock, capsys, 3, 60.0, status=lambda: f"loss {next(loss)}")
    assert lines == [
        "decoding: 1/3 videos, 1.0 videos/min, about 2 min left, loss a",
        "decoding: 2/3 videos, 1.0 videos/min, about 1 min left, loss b",
        "decoding: 3/3 videos, 1.0 videos/min, done in 3 min 00 s, loss c",
    ]


def test_a_long_item_is_not_silent(clock, capsys, monkeypatch):
    """The first video of a flow run was silent for three minutes."""
    monkeypatch.setattr(progress, "BEAT_S", 0.01)

    def printed():
        for _ in range(500):
            if new := capsys.readouterr().err:
                return new
            sleep(0.01)
        return ""

    for item in track(range(2), "decoding", total=2, unit="videos"):
        if item == 0:
            clock[0] = 1006.0
            assert printed() == "decoding: 0/2 videos\n"
            clock[0] = 1045.0
            assert printed() == "decoding: 0/2 videos\n"
            clock[0] = 1050.0
        else:
            assert capsys.readouterr().err == "decoding: 1/2 videos, 1.2 videos/min, about 50 s left\n"
            clock[0] = 1090.0
            assert printed() == "decoding: 1/2 videos, 40.0 videos/h, about 50 s left\n"
            clock[0] = 1100.0
    assert capsys.readouterr().err == "decoding: 2/2 videos, 1.2 videos/min, done in 1 min 40 s\n"


def test_a_single_item_is_not_yet_a_pace(clock, capsys):
    """The first line waits for the third item: 20 s a video are not said from one video, which took 20 s to set up."""
    lines = run(clock, capsys, 4, 8.0)
    assert lines[0] == "decoding: 3/4 videos, 7.5 videos/min, a few seconds left"


def test_the_setup_in_the_first_item_is_not_counted_for_the_others(clock):
    forecast = Forecast(10)
    assert forecast.left_s() is None and forecast.text() == ""
    for number in range(5):
        clock[0] += 60 if number == 0 else 2
        forecast.add()
        assert forecast.left_s() == (9 * 60 if number == 0 else 2 * (9 - number))
    forecast.add(5)
    assert forecast.left_s() == 0 and forecast.text() == ""


def test_unequal_items_are_counted_by_their_work(clock, capsys):
    """Small videos come first: by their number the time left would grow from 20 s to 40 s."""
    work = [1, 1, 1, 1, 1, 1, 5, 5, 5, 5]
    forecast, left = Forecast(sum(work)), []
    for amount in work[:-1]:
        clock[0] += 2 * amount
        forecast.add(amount)
        left.append(forecast.left_s())
    assert left == sorted(left, reverse=True) and left[0] == 2 * 25


def test_parts_of_different_weight_make_one_time_left(clock):
    whole = Forecast(0)
    light, heavy = Part(whole), Part(whole, 2)
    light.expect(3)
    heavy.expect(5)
    heavy.expect(-1)  # this one need not be done
    assert light.left() == "" and WHOLE.left is None
    for _ in range(3):
        clock[0] += 2
        light.add(1)
    assert whole.left_s() == 8 * 2 and light.left() == heavy.left() == "about 15 s left in all"
    clock[0] += 4
    assert heavy.done("item", 1) == "item" and whole.left_s() == 6 * 2


def test_the_time_left_may_be_that_of_a_larger_whole(clock, capsys):
    lines = run(clock, capsys, 2, 6.0, left=lambda: "about 3 h left in total")
    assert lines == [
        "decoding: 1/2 videos, 10.0 videos/min, about 3 h left in total",
        "decoding: 2/2 videos, 10.0 videos/min, done in 12 s, about 3 h left in total",
    ]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_items_that_threads_have_finished_are_counted_before_they_are_yielded(clock, capsys, monkeypatch):
    """A flow run of 36 videos showed 0/36 for most of its time: files that were stored waited for those before them."""
    monkeypatch.setattr(progress, "BEAT_S", 0.01)
    finished, said = [], ""
    for item in track(range(2), "flow", total=9, unit="videos", left=lambda: "some time left", done=finished.__len__):
        finished += range(4)
        clock[0] += 6.0 if item == 0 else 40.0
        for _ in range(500 if item == 0 else 0):
            if said := said + capsys.readouterr().err:
                break
            sleep(0.01)
    assert said == "flow: 4/9 videos, 40.0 videos/min, some time left\n"
    assert "flow: 8/9 videos, " in capsys.readouterr().err


def test_a_terminal_counts_items_that_threads_have_finished(monkeypatch):
    monkeypatch.setattr(progress.sys, "stderr", Terminal())
    shown, finished = progress.sys.stderr, []
    for _ in track(range(1), "flow", total=9, unit="videos", left=lambda: "", done=finished.__len__):
        finished += range(7)
        for _ in range(100):
            if "7/9" in shown.getvalue():
                break
            sleep(0.05)
        assert "7/9" in shown.getvalue()


def test_a_slow_item_does_not_delay_the_results_of_others():
    others = threading.Event()

    def work(item):
        return item if item or others.wait(30) else None

    seen = []
    for item in as_finished(work, range(5), 2):
        seen.append(item)
        if len(seen) == 4:
            others.set()
    assert sorted(seen[:4]) == [1, 2, 3, 4] and seen[4] == 0


def test_items_that_have_not_begun_are_left_out_after_a_stop():
    begun = []

    def work(item):
        begun.append(item)
        sleep(0.01)

    with contextlib.closing(as_finished(work, range(10_000), 1)) as results:
        next(results)
    assert len(begun) < 10_000  # they would take minutes


def test_other_programs_are_told_once_beside_the_time_left(clock, capsys, monkeypatch):
    monkeypatch.setattr(busy.OtherPrograms, "sentence", lambda self: "Other programs use 1.0 of 2 processor cores")
    monkeypatch.setattr(busy, "_told", [False])
    assert run(clock, capsys, 3, 0.5) == ["decoding: 3/3 videos, 2.0 videos/s, done in 2 s"]
    lines = run(clock, capsys, 100, 1.0) + run(clock, capsys, 100, 1.0)
    assert lines[0].endswith("about 1 min 40 s left") and lines[1] == "Other programs use 1.0 of 2 processor cores"
    assert lines.count(lines[1]) == 1
    monkeypatch.setattr(busy, "_told", [False])
    monkeypatch.setattr(progress.sys, "stderr", Terminal())
    shown = progress.sys.stderr
    for _ in track(range(10), "decoding", total=10, unit="videos"):
        clock[0] += 1.0
    assert shown.getvalue().count("Other programs use 1.0 of 2 processor cores") == 1


def test_a_terminal_shows_the_same_time_left(clock, monkeypatch):
    monkeypatch.setattr(progress.sys, "stderr", Terminal())
    monkeypatch.setenv("COLUMNS", "200")
    shown = progress.sys.stderr
    for item in track(range(5), "decoding", total=5, unit="videos"):
        clock[0] += 60
        for _ in range(100 if item == 4 else 0):  # rich draws from a thread, ten times a second
            if "about 1 min left" in shown.getvalue():
                break
            sleep(0.05)
    assert "about 1 min left" in shown.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "a few seconds"), (9.9, "a few seconds"), (12, "about 10 s"), (58, "about 1 min"), (97, "about 1 min 40 s"),
     (297, "about 5 min"), (301, "about 5 min"), (3590, "about 1 h"), (4100, "about 1 h 10 min"),
     (10 * 3600, "about 10 h"), (47.6 * 3600, "about 2 d"), (100 * 86_400, "about 100 d")],
)  # fmt: skip
def test_estimates_are_rounded_as_people_say_them(seconds, text):
    assert about(seconds) == text


def test_a_rounded_estimate_is_near_and_never_falls():
    spoken = [rounded(seconds) for seconds in range(10, 200_000, 7)]
    assert len(set(spoken)) < 250
    values = [spoken_seconds(text) for text in spoken]
    assert values == sorted(values)
    assert all(abs(value / seconds - 1) < 0.26 for value, seconds in zip(values, range(10, 200_000, 7), strict=True))


def spoken_seconds(text):
    units = {"s": 1, "min": 60, "h": 3600, "d": 86_400}
    words = text.split()
    return sum(int(number) * units[unit] for number, unit in zip(words[::2], words[1::2], strict=True))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0 s"), (0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (3599.7, "1 h 00 min"),
     (7500, "2 h 05 min"), (47.9 * 3600, "47 h 54 min"), (76 * 3600, "3 d 4 h")],
)  # fmt: skip
def test_durations_are_for_people(seconds, text):
    assert duration(seconds) == text


def test_what_is_logged_while_a_bar_is_drawn_does_not_run_into_the_bar():
    """A terminal of 80 columns: every text begins on a line of its own."""
    code = """
import logging, time
from cpr_fast.runtime.progress import CurrentStderr, announce, track
logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[CurrentStderr()])
for item in track(range(6), "training", total=6, unit="steps", status=lambda: "loss 3.6"):
    time.sleep(0.15)
    if item == 2:
        logging.getLogger("x").info("logged here")
        announce("announced here", end="")
"""
    here, there = pty.openpty()
    with os.fdopen(here, "rb", buffering=0) as reader:
        environment = os.environ | {"TERM": "xterm", "COLUMNS": "80"}
        with subprocess.Popen([sys.executable, "-c", code], stderr=there, env=environment) as process:
            os.close(there)
            shown = b""
            with contextlib.suppress(OSError):  # the terminal is closed
                while part := reader.read(4096):
                    shown += part
        assert process.returncode == 0
    assert b"training" in shown
    for text in (b"logged here", b"announced here"):
        before = shown[: shown.index(text)]
        assert re.search(rb"(\r\n|\x1b\[2K|\r)$", before), before[-60:]
