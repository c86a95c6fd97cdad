"""Other programs that take part of the processor are noticed, and only where they make this one wait."""

import os
import time

import pytest

from cpr_fast.runtime.busy import OtherPrograms

TICKS = os.sysconf("SC_CLK_TCK")


def write(stat, per_core_s):
    """Writes a /proc/stat in which every core has worked `per_core_s` seconds, and a core that is not ours far more."""
    cores = [*sorted(os.sched_getaffinity(0)), 9999]
    rows = [f"cpu{n} {int(per_core_s * TICKS) * (1000 if n == 9999 else 1)} 0 0 77777 8888 0 0 0 0 0" for n in cores]
    stat.write_text("\n".join(["cpu 1 2 3 4 5 6 7 8 9 10", *rows, "intr 5"]), encoding="ascii")


@pytest.mark.parametrize(("used", "expected"), [(10.0, 0.75), (8.0, 0.0), (2.5, 0.0)])
def test_the_share_of_others_counts_where_the_cores_are_full(tmp_path, monkeypatch, used, expected):
    clock, cores = {"wall": 100.0, "own": 7.0}, len(os.sched_getaffinity(0))
    monkeypatch.setattr(time, "monotonic", lambda: clock["wall"])
    monkeypatch.setattr(time, "process_time", lambda: clock["own"])
    stat = tmp_path / "stat"
    write(stat, 50)
    others = OtherPrograms(stat)
    clock["wall"] += 10
    clock["own"] += 2.5 * cores  # a quarter of ten seconds of every core
    write(stat, 50 + used)
    assert others.share() == pytest.approx(expected)
    taken = (used - 2.5) / 10 * cores
    said = f"Other programs use {taken:.1f} of {cores} processor core{'s' * (cores > 1)}, so that this takes longer"
    assert others.sentence().startswith(said) if used > 2.5 else others.sentence() == ""


@pytest.mark.parametrize("text", [None, "", "cpu 1 2 3", "cpu0 x y z 1 2 3 4"])
def test_a_system_that_does_not_tell_gives_no_share(tmp_path, text):
    stat = tmp_path / "stat"
    if text is not None:
        stat.write_text(text)
    assert OtherPrograms(stat).share() == 0.0 and OtherPrograms(stat).sentence() == ""


def test_a_process_alone_is_not_taken_for_others():
    others = OtherPrograms()
    sum(range(10**6))
    assert 0.0 <= others.share() <= 1.0
