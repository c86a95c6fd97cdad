"""Other programs that take part of the processor are noticed."""

import os
import time

import pytest

from cpr_fast.runtime import busy
from cpr_fast.runtime.busy import OtherPrograms

TICKS = os.sysconf("SC_CLK_TCK")


def write(stat, per_core_s):
    """Writes a /proc/stat in which every core has worked `per_core_s` seconds, and a core that is not ours far more."""
    cores = [*sorted(os.sched_getaffinity(0)), 9999]
    rows = [f"cpu{n} {int(per_core_s * TICKS) * (1000 if n == 9999 else 1)} 0 0 77777 8888 0 0 0 0 0" for n in cores]
    stat.write_text("\n".join(["cpu 1 2 3 4 5 6 7 8 9 10", *rows, "intr 5"]), encoding="ascii")


@pytest.mark.parametrize("used", [10.0, 8.0, 2.5])
def test_what_others_use_is_told(tmp_path, monkeypatch, used):
    clock, cores = {"wall": 100.0, "own": 7.0}, len(os.sched_getaffinity(0))
    monkeypatch.setattr(time, "monotonic", lambda: clock["wall"])
    monkeypatch.setattr(time, "process_time", lambda: clock["own"])
    stat = tmp_path / "stat"
    write(stat, 50)
    others = OtherPrograms(stat)
    clock["wall"] += 10
    clock["own"] += 2.5 * cores  # a quarter of ten seconds of every core
    write(stat, 50 + used)
    taken = (used - 2.5) / 10 * cores
    said = f"Other programs use {taken:.1f} of {cores} processor core{'s' * (cores > 1)}, so that this takes longer"
    assert others.sentence().startswith(said) if used > 2.5 else others.sentence() == ""
    monkeypatch.setenv("WORLD_SIZE", "2")  # the processes that torchrun started are no other programs
    assert others.sentence() == ""


@pytest.mark.parametrize("text", [None, "", "cpu 1 2 3", "cpu0 x y z 1 2 3 4"])
def test_of_a_system_that_does_not_tell_nothing_is_said(tmp_path, text):
    stat = tmp_path / "stat"
    if text is not None:
        stat.write_text(text)
    assert OtherPrograms(stat).sentence() == ""


def test_it_is_told_once(monkeypatch):
    monkeypatch.setattr(OtherPrograms, "sentence", lambda self: "Other programs use 1.0 of 2 processor cores")
    monkeypatch.setattr(busy, "_told", [False])
    assert OtherPrograms().news() == OtherPrograms.sentence(None) and OtherPrograms().news() == ""
