"""Small training runs on random clips, and how tests compare their folders."""

from __future__ import annotations

import contextlib
import subprocess
import time
from pathlib import Path

import torch
from support.stand_in_loader import RandomLoader, make_index

from cpr_fast.config import Config
from cpr_fast.pretrain.run.loop import pretrain
from cpr_fast.runtime.distributed import World
from cpr_fast.runtime.metrics import read_metrics
from cpr_fast.weights.checkpoint import load_checkpoint

ALONE = World(0, 1, torch.device("cpu"))


INDEX = make_index(videos=18)


TIMES = {"step_time_s", "data_wait_s", "clips_per_s", "epoch_time_s"}


def settings(out, **sections) -> Config:
    """Returns the settings of a tiny run: 3 steps per epoch of 6 videos, a memory that fills in 2, one CPR cycle after
    one of InfoNCE."""
    values = {
        "data": {"batch_size": 6, "frames": 8, "size": 16},
        "model": {"arch": "r3d", "width": 0.0625, "feature_dim": 8},  # a third of the time of S3D: fewer layers
        "memory": {"size": 10},
        "mining": {"stages": 3, "ratio": 0.6, "top_k": 2},
        "schedule": {
            "cycles": [{"view": "rgb", "epochs": 2, "mining": "none"}, {"view": "flow", "epochs": 2, "milestones": [1]}]
        },
        "run": {"out": str(out)},
    }
    for section, changes in sections.items():
        values[section] = values[section] | changes if section in values else changes
    return Config.from_dict(values)


# All schedules of the optimiser together. The cascade waits for its queue in the first 2 steps of its cycle; then its
# warm-up lasts to the first step of its second epoch.
MODERN = {
    "optim": {
        "name": "adamw", "schedule": "cosine", "final_lr": 1e-5, "warmup_epochs": 1.5, "weight_decay": 0.05,
        "final_weight_decay": 0.3, "decay_norms_and_biases": False, "clip_norm": 0.5, "betas": [0.9, 0.95],
    },
    "memory": {"size": 10, "final_ema_momentum": 1.0},
    "schedule": {
        "cycles": [
            {"view": "rgb", "epochs": 2, "mining": "none"},
            {"view": "flow", "epochs": 2, "lr": 5e-4, "warmup_epochs": 0.7, "ema_momentum": 0.9},
        ]
    },
}  # fmt: skip


def run(config: Config, loader=RandomLoader, **kwargs) -> Path:
    return pretrain(config, index=INDEX, make_loader=loader, progress=False, **kwargs)


def rows(folder: Path, kind: str) -> list[dict]:
    """Returns the rows of a kind, without measured times."""
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_metrics(folder) if row["kind"] == kind]


def assert_same(a, b, where="checkpoint"):
    """Asserts bitwise equality of nested dicts of tensors."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


class Killed(Exception):
    pass


def killed_at(epoch: int, step: int, loader=RandomLoader):
    """Returns a loader whose process dies when it fetches this batch."""

    class Dying(loader):
        def epoch(self, number, start_step=0):
            for i, batch in enumerate(super().epoch(number, start_step), start_step):
                if (number, i) == (epoch, step):
                    raise Killed
                yield batch

    return Dying


def stopped(out: Path, at: tuple[int, int] = (2, 1)) -> Path:
    """Returns a run that was killed at a step (epoch, step in it), with checkpoints at the ends of epochs."""
    with contextlib.suppress(Killed):
        run(settings(out), killed_at(*at))
    return out


def trained(folder: Path) -> dict:
    """Returns the training state in the newest checkpoint of a run."""
    payload = load_checkpoint(folder / "checkpoints" / "last.pt")
    return {key: payload[key] for key in ("encoders", "cycle_state", "step", "epoch", "step_in_epoch", "cycle")}


def everything(folder: Path) -> dict:
    """Returns the newest checkpoint of a run without config and environment, which differ between folders."""
    payload = load_checkpoint(folder / "checkpoints" / "last.pt")
    return {key: value for key, value in payload.items() if key not in ("config", "environment")}


def wait_for_step(folder: Path, step: int, process: subprocess.Popen) -> None:
    path = folder / "metrics.jsonl"
    while not (path.exists() and f'"step": {step},' in path.read_text()):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
