"""The watchdog reports which rank a run waits for, and what that rank is doing."""

from __future__ import annotations

import json
import logging
import time

import pytest
import torch
from support.small_runs import INDEX, settings
from support.stand_in_loader import RandomLoader

from cpr_fast.pretrain.run.loop import pretrain
from cpr_fast.runtime.distributed import World
from cpr_fast.runtime.metrics import read_metrics
from cpr_fast.runtime.watchdog import Watchdog

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_watchdog_names_what_one_process_hangs_in(tmp_path, caplog):
    class Hanging(RandomLoader):
        def epoch(self, number, start_step=0):
            for i, batch in enumerate(super().epoch(number, start_step)):
                if (number, i) == (0, 2):
                    time.sleep(1.0)
                yield batch

    cycles = {"cycles": [{"view": "rgb", "epochs": 1, "mining": "none"}]}
    config = settings(tmp_path, schedule=cycles, run={"out": str(tmp_path), "stall_timeout_s": 0.5})
    pretrain(config, index=INDEX, make_loader=Hanging, progress=False)
    notes = [row["text"] for row in read_metrics(tmp_path) if row["kind"] == "note"]
    (note,) = (text for text in notes if "of step 3" in text)  # a busy machine may have stalled elsewhere, too
    assert note in caplog.text
    assert note.startswith("rank 0 has been waiting for the batch of step 3 (in test_watchdog.py:")
    assert ", epoch) for 0." in note


class FakeStore:
    """A store with the states that the ranks published."""

    def __init__(self, states):
        self.states = {str(rank): json.dumps(state) for rank, state in enumerate(states) if state}

    def set(self, key, value):
        self.states[key] = value

    def get(self, key):
        return self.states[key].encode()

    def check(self, keys):
        return keys[0] in self.states


def test_the_rank_that_is_behind_is_named_by_the_first_that_is_not(caplog):
    caplog.set_level(logging.WARNING)
    stuck = {"beat": 1, "begun": 7, "what": "computing step 3", "idle_s": 9.0, "where": "a.py:1, f"}
    behind = {"beat": 1, "begun": 6, "what": "waiting for the batch of step 3", "idle_s": 9.0, "where": "b.py:2, g"}
    named: list[str] = []
    for rank in range(3):
        watch = Watchdog(World(rank, 3, torch.device("cpu")), 5.0, named.append)
        watch._say([behind, stuck, stuck])
        watch._say([behind, stuck, stuck])  # once is enough
    assert named == [
        "rank 0 has been waiting for the batch of step 3 (in b.py:2, g) for 9.0 s, and the run waits for it"
    ]
    named.clear()
    watch = Watchdog(World(0, 3, torch.device("cpu")), 5.0, named.append)
    busy = {**stuck, "idle_s": 0.1}
    watch._say([busy, {**behind, "idle_s": 0.1}, {"left": True}])
    watch._heard[1] = (1, time.monotonic() - 6)  # rank 1's beats have stopped
    watch._say([{**busy, "beat": 2}, {**behind, "idle_s": 0.1}, {"left": True}])
    (text,) = named
    assert text.startswith("rank 1 has not reported for 6.0 s; it was waiting for the batch of step 3 (in")
    store = FakeStore([None, behind])
    states = Watchdog(World(0, 3, torch.device("cpu")), 5.0)._share(store, beat=4)
    assert (states[0]["beat"], states[0]["what"], states[1], states[2]) == (4, "starting", behind, {"beat": 0})
