"""Small training runs on two processes that torchrun starts (gloo), which tests kill, stop and replay."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from cpr_fast.config import Config

ROOT = Path(__file__).parents[3]
VIDEOS = 96  # three steps of 32

# The argument is a config. PLAN: {"die": step} kills the second worker once, at that step; {"sleep": step} lets it
# sleep for 3 s; {"pixel": step} changes a pixel there. {"verify": step} replays a finished run from that step on.
WORKER = f"""
import json, os, signal, sys, time
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import logging, torch
logging.basicConfig(level=logging.INFO, format="%(message)s")
from support.stand_in_loader import RandomLoader, make_index
from cpr_fast.runtime import distributed
from cpr_fast.config import Config
from cpr_fast.runtime.interrupt import Interrupted
from cpr_fast.pretrain.run.loop import pretrain
torch.set_num_threads(1)
plan, first = json.loads(os.environ["PLAN"]), os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
class Loader(RandomLoader):
    sleep_s = plan.get("each", 0.0)
    def epoch(self, number, start_step=0):
        for i, batch in enumerate(super().epoch(number, start_step), start_step):
            step = number * len(self) + i
            if self.rank == 1 and first and step == plan.get("die"):
                os.kill(os.getpid(), signal.SIGKILL)
            if self.rank == 1 and step == plan.get("sleep"):
                time.sleep(3)
            if self.rank == 1 and step == plan.get("pixel"):
                batch.clips[self.views[0]][3, 0, 0, 0, 0, 0] += 1
            yield batch
if "verify" in plan:
    from pathlib import Path
    from cpr_fast.experiments.replay import replay
    config = Config.from_dict(json.loads(sys.argv[1]))
    result = replay(Path(config.run.out), first=plan["verify"], videos=make_index({VIDEOS}), make_loader=Loader)
    if distributed.is_main():
        Path(sys.argv[0]).with_name("result.json").write_text(json.dumps(result))
    distributed.finish()
    sys.exit()
try:
    pretrain(Config.from_dict(json.loads(sys.argv[1])), index=make_index({VIDEOS}), make_loader=Loader, progress=False,
             resume="auto")
except Interrupted as stopped:
    sys.exit(str(stopped))
distributed.finish()
"""


def torchrun(folder: Path, config: Config, plan: dict) -> subprocess.Popen:
    """Starts the run of a config on two processes; after a worker has died, both are restarted, up to three times."""
    script = folder / "worker.py"
    script.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts"]
    return subprocess.Popen(
        [*command, "3", str(script), json.dumps(config.to_dict())],
        env=os.environ | {"PLAN": json.dumps(plan), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
