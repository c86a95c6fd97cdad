"""Progress of long commands if stderr is not a terminal: few plain lines, which say how long it will take."""

import pytest

from cpr_fast.runtime import progress
from cpr_fast.runtime.progress import duration, track


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
        "decoding: 5/100 videos, 1.0 videos/s, 1 min 35 s left",
        "decoding: 35/100 videos, 1.0 videos/s, 1 min 05 s left",
        "decoding: 65/100 videos, 1.0 videos/s, 35 s left",
        "decoding: 95/100 videos, 1.0 videos/s, 5 s left",
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
        "decoding: 1/3 videos, 0.0 videos/s, 2 min 00 s left, loss a",
        "decoding: 2/3 videos, 0.0 videos/s, 1 min 00 s left, loss b",
        "decoding: 3/3 videos, 0.0 videos/s, done in 3 min 00 s, loss c",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0 s"), (0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (3599.7, "1 h 00 min"),
     (7500, "2 h 05 min"), (47.9 * 3600, "47 h 54 min"), (76 * 3600, "3 d 4 h")],
)  # fmt: skip
def test_durations_are_for_people(seconds, text):
    assert duration(seconds) == text
