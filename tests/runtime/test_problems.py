"""Problems of many files: one line per kind, the most frequent first, with the first names."""

import os
from pathlib import Path

from cpr_fast.runtime.problems import Problems, problem_line


def test_each_kind_is_one_line():
    problems = Problems()
    assert len(problems) == 0 and problems.lines() == []
    problems.add("is empty", "x.mp4")
    for name in "abcde":
        problems.add("does not exist", Path(f"{name}.mp4"))
    problems.add("is empty", "y.mp4")
    assert len(problems) == 7
    assert problems.counts() == {"does not exist": 5, "is empty": 2}
    assert list(problems.counts()) == ["does not exist", "is empty"]
    assert problems.lines() == [
        "5 files: does not exist: a.mp4, b.mp4, c.mp4 and 2 more",
        "2 files: is empty: x.mp4, y.mp4",
    ]


def test_one_file_and_names_that_are_not_unicode():
    assert problem_line("is empty", ["a.mp4"]) == "1 file: is empty: a.mp4"
    line = problem_line("is empty", [os.fsdecode(b"\xff.mp4")])
    assert line.encode("utf-8") and line == r"1 file: is empty: \udcff.mp4"


def test_a_lost_mount_is_one_short_line():
    problems = Problems()
    for number in range(10_000):
        problems.add("cannot be read", f"/mnt/videos/{number}.mp4")
    (line,) = problems.lines()
    assert line.startswith("10000 files: cannot be read: /mnt/videos/0.mp4") and line.endswith(" and 9997 more")
