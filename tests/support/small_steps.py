"""The index and the settings for tests of single training steps."""

from __future__ import annotations

import torch
from support.stand_in_loader import make_index

from cpr_fast.config import Config
from cpr_fast.runtime.distributed import World

INDEX = make_index(videos=18)


ALONE = World(0, 1, torch.device("cpu"))


def settings(**sections) -> Config:
    values = {
        "data": {"batch_size": 6, "frames": 5, "size": 20},
        "model": {"width": 0.125, "feature_dim": 8, "conv_std": 0.15},
        "memory": {"size": 10},
        "mining": {"stages": 3, "top_k": 2},
        "optim": {"name": "sgd", "lr": 0.01},
    }
    for name, changes in sections.items():
        values[name] = values.get(name, {}) | changes
    return Config.from_dict(values)
