"""What a run prints: its summary, the time left, and what was learnt."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.small_runs import ALONE, INDEX, settings
from support.stand_in_loader import RandomLoader

from cpr_fast.pretrain.run import summary
from cpr_fast.pretrain.run.checks import plan_cycles
from cpr_fast.pretrain.run.log import StepLog
from cpr_fast.pretrain.run.loop import pretrain
from cpr_fast.pretrain.run.summary import Pace, start_lines

pytestmark = pytest.mark.usefixtures("one_thread")


def test_start_and_end_are_printed(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    out = tmp_path / "run"
    config = settings(out, data={"index": "set/index.csv", "batch_size": 6, "frames": 8, "size": 16})
    pretrain(config, index=INDEX, make_loader=RandomLoader, progress=True)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "Pretraining on 18 videos of 9 sources, 4 classes"
    assert lines[1] == "  3 steps per epoch (batch size 6), 12 steps in total, on cpu"
    assert lines[2] == (
        "  cycle 1 (rgb, mining none): 2 epochs, queue of 10 entries that starts with random vectors, full after 2 "
        "steps (33% of the cycle)"
    )
    assert lines[3] == (
        "  cycle 2 (flow, mining cascade): 2 epochs, queue of 10 entries, full after 2 steps (33% of the cycle); "
        "learning starts then"
    )
    assert lines[4] == f"  Run folder: {out}"
    assert Path(start_lines(config, INDEX, plan_cycles(config, len(INDEX), 1), Path("runs/x"), ALONE)[-1].split(": ")[1]
                ) == Path.cwd() / "runs" / "x"  # fmt: skip
    assert lines[-1].startswith("Finished after 12 steps. ") and "rgb (cycle 1) epoch loss " in lines[-1]


@pytest.mark.parametrize(
    ("memory", "none", "cascade"),
    [
        ({"size": 36}, "queue of 36 entries that starts with random vectors, full after 6 steps (100% of the cycle)",
         "queue of 36 entries, never full, so that nothing is learnt"),
        ({"size": 60}, "queue of 60 entries that starts with random vectors, never full",
         "queue of 60 entries, never full, so that nothing is learnt"),
        ({"kind": "bank"}, *["bank of one entry per video, full after 3 steps (50% of the cycle)"] * 2),
    ],
)  # fmt: skip
def test_the_memory_of_a_cycle_is_described(memory, none, cascade):
    config = settings("run", memory=memory)  # cycles of 6 steps
    lines = start_lines(config, INDEX, plan_cycles(config, len(INDEX), 1), Path("run"), ALONE)
    assert lines[2] == f"  cycle 1 (rgb, mining none): 2 epochs, {none}"
    assert lines[3] == f"  cycle 2 (flow, mining cascade): 2 epochs, {cascade}"


def test_without_progress_nothing_but_warnings_is_printed(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    pretrain(settings(tmp_path), index=INDEX, make_loader=RandomLoader, progress=False)
    assert all(record.levelno >= logging.WARNING for record in caplog.records)


def test_time_left_counts_both_kinds_of_steps():
    pace = Pace(filling=10, learning=20, later=8)
    assert pace.left_s() is None and pace.full_s() is None and pace.news() is None
    for _ in range(6):
        pace.step(1.0, learns=False)
    assert pace.left_s() is None  # the time of steps with learning is not known yet
    assert pace.full_s() == pytest.approx(4)  # not the queues of later cycles
    for _ in range(4):
        pace.step(1.0, learns=False)
    for _ in range(6):
        pace.step(3.0, learns=True)
    assert pace.left_s() == pytest.approx(14 * 3 + 8)


def test_slow_first_steps_make_no_expected_time(monkeypatch):
    """After --resume the first steps read videos that no cache held: "31 min left", and a few steps later 35 s."""
    pace, said = Pace(filling=0, learning=300), []
    for seconds in [9.0, 7.0, *[0.1] * 298]:
        pace.step(seconds, learns=True)
        said += [text for text in (pace.news(), pace.text()) if text]
    assert said[:2] == ["Expected time: about 30 s left (0.1 s per step, measured)", "about 30 s left in total"]
    times = {f"about {n} s left in total" for n in (30, 25, 20, 15, 10)}
    assert set(said[1:]) <= times | {"a few seconds left in total"}


def test_times_that_differ_much_are_measured_longer():
    """On a busy machine single steps took 0.2 to 6 s: five of them gave "9 min left" of 3 min."""
    pace, said = Pace(filling=0, learning=300), []
    for step in range(30):
        pace.step(6.0 if step % 5 == 4 else 0.5, learns=True)
        said.append(pace.news())
    assert said.index("Expected time: about 7 min left (1.6 s per step, measured)") == 19
    assert sum(text is not None for text in said) == 1


def test_the_expected_time_is_told_once(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(summary.time, "monotonic", lambda: now[0])
    pace = Pace(filling=200, learning=1000)
    told = []
    for step in range(220):
        now[0] += 1.0
        pace.step(1.0 if step < 200 else 3.0, learns=step >= 200)
        told.append(pace.news())
    told = [text for text in told if text]
    assert len(told) == 2
    assert told[0] == ("Expected time: about 2 min 20 s until the queue is full; then the time of the run is measured")
    assert summary.MEASURED == 5  # 3 s each of the other 995
    assert told[1] == "Expected time: about 50 min left (3 s per step, measured)"


def test_while_the_queue_fills_nothing_is_said_about_the_time_of_the_run(monkeypatch):
    """A lower bound from steps that only fill the queue, "at least 10 min left", was false: these had waited for videos
    that the later ones found in a cache."""
    now = [0.0]
    monkeypatch.setattr(summary.time, "monotonic", lambda: now[0])
    for filling, learning in ((300, 0), (300, 5)):
        pace = Pace(filling, learning)
        for _ in range(300):
            now[0] += 1.0
            pace.step(1.0, learns=False)
            assert pace.text().endswith("until the queue is full" if learning else "left in total") or not pace.text()
            assert pace.news() is None or learning
        assert pace.text() == ""


def test_the_progress_line_tells_the_time_left_of_the_whole_run():
    pace = Pace(filling=24, learning=100)
    assert pace.text() == ""
    for _ in range(6):
        pace.step(1.0, learns=False)
    assert pace.text() == "about 20 s until the queue is full"
    for _ in range(18):
        pace.step(1.0, learns=False)
    assert pace.text() == ""
    for _ in range(10):
        pace.step(2.0, learns=True)
    assert pace.text() == "about 3 min left in total"
    for _ in range(90):
        pace.step(2.0, learns=True)
    assert pace.text() == ""


def test_the_time_left_does_not_jump_at_the_end_of_an_epoch():
    """Every 30th step also saves a checkpoint for 30 s; the run takes 60 s per epoch from the first to the last."""
    pace, left = Pace(filling=0, learning=600, epoch_steps=30), []
    for step in range(600):
        pace.step(31.0 if step % 30 == 29 else 1.0, learns=True)
        if step >= 90:
            left.append((pace.left_s(), (599 - step) / 30 * 60))
    assert all(abs(told - true) < 0.3 * true + 60 for told, true in left)


def test_the_progress_line_says_that_a_loss_against_random_vectors_is_low(tmp_path, monkeypatch):
    """Otherwise "step loss 0.000 (chance 2.398)" after the first step would look as if the network had learnt."""
    seen = []
    told = StepLog.status

    def status_after(self, step, *rest):
        write(self, step, *rest)
        seen.append((step, told(self)))

    write = StepLog.step
    monkeypatch.setattr(StepLog, "step", status_after)
    pretrain(settings(tmp_path), index=INDEX, make_loader=RandomLoader, progress=False)  # full after 2 of 3 steps
    low = [step for step, text in seen if "(low while the queue holds random vectors)" in text]
    assert low == [0, 1]
    assert [step for step, text in seen if "(chance " in text] == [2, 3, 4, 5, 8, 9, 10, 11]
    assert all("step loss " in text for step, text in seen if step not in (6, 7))
    assert [step for step, text in seen if "loss" not in text] == [6, 7]  # a cascade waits for its queue


def test_no_loss_is_told_before_one_was_read(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(StepLog, "step", lambda self, *_: seen.append(self.status()))
    config = settings(tmp_path, schedule={"cycles": [{"view": "rgb", "epochs": 1, "mining": "none"}]})
    pretrain(config, index=INDEX, make_loader=RandomLoader, progress=False)
    assert seen == ["memory 60% full", "memory 100% full", "memory 100% full"]


def test_the_time_of_queued_steps_is_not_left_out_with_what_follows_them(monkeypatch):
    """On a stand-in for CUDA whose queue takes 5 seconds; the block itself takes 3."""
    now = [100.0]

    def pass_seconds(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr("cpr_fast.pretrain.run.log.time.perf_counter", lambda: now[0])
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.synchronize", lambda: pass_seconds(5.0))
    rows = SimpleNamespace(clock_began=90.0, epoch_began=40.0)
    with StepLog.untimed(rows):
        pass_seconds(3.0)
    assert (rows.clock_began, rows.epoch_began) == (93.0, 43.0)
