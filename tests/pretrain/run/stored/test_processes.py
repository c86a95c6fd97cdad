"""Pretraining on a store of features on two processes (gloo), with cascades that are chosen automatically."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.data_sets.small_stores import make_store
from support.small_runs import rows

from cpr_fast.config import Config
from cpr_fast.pretrain.ledger.chain import read_ledger
from cpr_fast.pretrain.run.loop import pretrain

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

WORKER = """
import json, sys, torch
from cpr_fast.config import Config
from cpr_fast.pretrain.run.loop import pretrain
from cpr_fast.runtime import distributed
torch.set_num_threads(1)
pretrain(Config.from_dict(json.loads(sys.argv[1])), progress=False)
distributed.finish()
"""


def test_two_processes_choose_and_mine_as_one_does(tmp_path):
    """Choices, mined entries and the memory of two processes of 16 clips are those of one of 32."""
    store = make_store(tmp_path / "store", count=400, noise=2.0)

    def config(name: str, batch_size: int) -> Config:
        return Config.from_dict({
            "data": {"features": str(store.folder), "batch_size": batch_size, "window": 128},
            "model": {"feature_dim": 8},
            "memory": {"size": 96},
            "mining": {"stages": "auto", "top_k": 5},
            "optim": {"name": "sgd", "lr": 0.01},
            "schedule": {"cycles": [{"view": "flow", "epochs": 1, "mining": "none"}, {"view": "rgb", "epochs": 2}]},
            "run": {"out": str(tmp_path / name), "device": "cpu"},
        })  # fmt: skip

    one, two = pretrain(config("one", 32), progress=False), tmp_path / "two"
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run(
        [*command, str(tmp_path / "worker.py"), json.dumps(config("two", 16).to_dict())],
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[4])},
        timeout=300,
    )
    choices = [[(row["step"], row["order"], row["keep"]) for row in rows(folder, "cascade")] for folder in (one, two)]
    assert choices[0] == choices[1] and len(choices[0]) == 2
    mined = [[row["mined"] for row in read_ledger(folder) if "plan" in row] for folder in (one, two)]
    assert mined[0] == mined[1] and len(set(mined[0])) > 10
    assert [row["pmr"] for row in rows(one, "step")] == [row["pmr"] for row in rows(two, "step")]
