"""A run with mining.stages = "auto": when it chooses, from what, and that it resumes bit for bit."""

from __future__ import annotations

import contextlib
import math
from types import SimpleNamespace

import pytest
from support.small_runs import INDEX, Killed, assert_same, everything, killed_at, rows, run, settings
from support.stand_in_loader import NoisyLoader, RandomLoader

from cpr_fast.config import Config, ConfigError
from cpr_fast.mining.auto import choose
from cpr_fast.pretrain.run import log, loop
from cpr_fast.pretrain.run.loop import pretrain
from cpr_fast.pretrain.state import cycle
from cpr_fast.runtime.metrics import read_metrics
from cpr_fast.weights.checkpoint import load_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

# 3 steps per epoch of 6 videos; the queue of the cascade is full after 2, so that the third step of epoch 1 mines.
CYCLES = [{"view": "rgb", "epochs": 1, "mining": "none"}, {"view": "flow", "epochs": 3}]
AUTO = {
    "memory": {"size": 12},
    "mining": {"stages": "auto", "top_k": 3},
    "schedule": {"cycles": CYCLES},
}


def auto(out, **changes):
    sections = AUTO | {"run": {"out": str(out), "keep_checkpoints": 9}} | changes
    return settings(out, **sections)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return run(auto(tmp_path_factory.mktemp("auto") / "run"), NoisyLoader)


def test_it_chooses_before_the_first_step_that_mines_and_in_every_later_epoch(straight):
    chosen = rows(straight, "cascade")
    assert [(row["epoch"], row["step"], row["view"]) for row in chosen] == [
        (1, 5, "flow"),
        (2, 6, "flow"),
        (3, 9, "flow"),
    ]
    for row in chosen:
        assert len(row["order"]) == len(row["keep"]) and set(row["order"]) <= {"rgb", "flow"}
        assert row["keep"][-1] == row["top_k"] <= 3
        assert row["text"].startswith("-".join(row["order"]))
        assert row["judged"][0]["views"] == row["order"]
    steps = {row["step"]: row for row in rows(straight, "step")}
    assert [step for step, row in steps.items() if row["pmr"] is not None] == [5, 6, 7, 8, 9, 10, 11]


def test_a_choice_is_that_of_the_memory_of_the_checkpoint_before(straight):
    """The checkpoint at the end of an epoch holds all that the next choice is made from."""
    for row in rows(straight, "cascade")[1:]:
        payload = load_checkpoint(straight / "checkpoints" / f"step-{row['step']:08d}.pt")
        memory = payload["cycle_state"]["memory"]
        choice = choose(memory["features"][:2], memory["source"], 3)
        assert [("flow", "rgb")[view] for view in choice.views] == row["order"]  # view 0 is the query's
        assert list(choice.keep) == row["keep"]
        assert choice.criteria["score"] == row["criteria"]["score"]


def test_rates_and_the_loss_of_chance_are_those_of_the_chosen_cascade(straight):
    chosen = {row["epoch"]: row for row in rows(straight, "cascade")}
    for row in rows(straight, "epoch")[1:]:
        choice = chosen[row["epoch"]]
        measured = [s for s in range(1, 8) if row[f"survivor_precision_{s}"] is not None]
        assert measured == list(range(1, 1 + len(choice["order"])))
        assert row[f"survivor_precision_{len(measured)}"] == pytest.approx(row["pmr"])
        assert row["loss_chance"] == pytest.approx(math.log(13 / (1 + choice["top_k"])))
        assert sum(row["right_counts"][choice["top_k"] + 1 :]) == 0


@pytest.mark.parametrize(("at", "every"), [((1, 2), 1), ((2, 0), 1), ((2, 2), 1), ((3, 1), 0)])
def test_resuming_equals_straight_through(straight, tmp_path, at, every):
    """Killed before the first choice, at the start of an epoch and within one; the last time the checkpoint is older
    than the newest choice."""
    config = auto(tmp_path / "run", run={"out": str(tmp_path / "run"), "checkpoint_every": every})
    with contextlib.suppress(Killed):
        run(config, killed_at(*at, loader=NoisyLoader))
    run(config, NoisyLoader, resume=True)
    assert_same(everything(straight), everything(tmp_path / "run"))
    for kind in ("step", "epoch", "cascade", "mined", "health"):
        assert rows(straight, kind) == rows(tmp_path / "run", kind)


def test_the_checkpoint_holds_the_choice_of_the_epoch(straight):
    last = rows(straight, "cascade")[-1]
    state = load_checkpoint(straight / "checkpoints" / "last.pt")["cycle_state"]
    assert list(state["cascade"]["keep"]) == last["keep"]
    assert [("flow", "rgb")[view] for view in state["cascade"]["views"]] == last["order"]


def test_a_fixed_cascade_stores_and_logs_no_choice(tmp_path):
    out = run(auto(tmp_path / "run", mining={"stages": 1, "top_k": 3}))
    assert rows(out, "cascade") == []
    assert "cascade" not in load_checkpoint(out / "checkpoints" / "last.pt")["cycle_state"]


def test_iic_mines_both_views_with_the_chosen_cascade(tmp_path):
    iic = {
        "memory": {"kind": "bank"},
        "model": {"shared": True},
        "loss": {"intra_negatives": "repeat"},
        "schedule": {"cycles": [{"view": "rgb", "other": "residual", "epochs": 3, "top_k": 2}]},
    }
    out = run(auto(tmp_path / "run", **iic))
    assert [(row["epoch"], row["step"]) for row in rows(out, "cascade")] == [(1, 3), (2, 6)]
    assert all(set(row["order"]) <= {"rgb", "residual"} and row["top_k"] <= 2 for row in rows(out, "cascade"))
    assert rows(out, "epoch")[2]["pmr"] is not None


def test_the_published_protocol_compares_the_query(tmp_path):
    out = run(auto(tmp_path / "run", loss={"protocol": "coclr"}))
    assert len(rows(out, "cascade")) == 3 and rows(out, "epoch")[3]["pmr"] is not None


def test_a_new_choice_is_printed_once(tmp_path, caplog):
    with caplog.at_level("INFO"):
        out = pretrain(auto(tmp_path / "run"), index=INDEX, make_loader=RandomLoader, progress=True)
    printed = [line for line in caplog.messages if "mining with" in line]
    chosen = rows(out, "cascade")
    new = [
        row
        for before, row in zip([None, *chosen], chosen, strict=False)
        if before is None or any(before[key] != row[key] for key in ("order", "ratio", "top_k"))
    ]
    assert printed == [f"epoch {row['epoch'] + 1}: mining with {row['text']}" for row in new]


@pytest.mark.parametrize("every", [1, 3])
def test_times_of_steps_leave_out_the_choice_and_keep_the_wait(tmp_path, monkeypatch, every):
    """By a clock of which a batch takes .8 s, a choice 5 s, and a step .25 s."""
    now = [0.0]

    def slow(seconds, function):
        def later(*args):
            now[0] += seconds
            return function(*args)

        return later

    class Slow(RandomLoader):
        def epoch(self, number, start_step=0):
            for batch in super().epoch(number, start_step):
                now[0] += 0.8
                yield batch

    clock = SimpleNamespace(perf_counter=lambda: now[0])
    for module in (log, loop):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(loop, "train_step", slow(0.25, loop.train_step))
    monkeypatch.setattr(cycle, "choose", slow(5.0, choose))
    out = run(auto(tmp_path / "run", run={"out": str(tmp_path / "run"), "log_every": every}), Slow)
    steps = [row for row in read_metrics(out) if row["kind"] == "step"]
    assert len(steps) == 12 // every and len(rows(out, "cascade")) == 3
    for row in steps:
        assert row["data_wait_s"] == pytest.approx(0.8)
        assert row["step_time_s"] == pytest.approx(0.25)
        assert row["clips_per_s"] == pytest.approx(12 / 1.05)
    epochs = [row for row in read_metrics(out) if row["kind"] == "epoch"]
    assert [row["epoch_time_s"] for row in epochs] == pytest.approx([3 * 1.05] * 4)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"mining": {"stages": "Auto"}}, "mining.stages: expected int or 'auto', got 'Auto'"),
        ({"mining": {"stages": True}}, "mining.stages: expected int or 'auto', got True"),
        ({"mining": {"stages": 2.5}}, "mining.stages: expected int or 'auto', got 2.5"),
        ({"mining": {"stages": 0}}, "mining.stages: expected a positive number, got 0"),
        ({"memory": {"kind": "batch"}}, "mining.stages: 'auto' expects memory.kind = 'queue' or 'bank'"),
        ({"mining": {"stages": "auto", "top_k": 13}}, "expected 1..memory.size = 12, got 13"),
    ],
)
def test_bad_settings_are_named(tmp_path, sections, message):
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        auto(tmp_path, **{"mining": AUTO["mining"]} | sections)


def test_settings_survive_json(tmp_path):
    config = auto(tmp_path)
    assert Config.from_dict(config.to_dict()) == config and config.mining.stages == "auto"
