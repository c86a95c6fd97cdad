"""Whether training is sound: how far the queries are spread, and how well the memory still speaks for the encoder.

Letters: L views that learn, B queries of a step on all ranks, W queries of the window, K memory slots, D feature width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cpr_fast.config import HealthConfig
from cpr_fast.pretrain.state.memory import EMPTY, Memory

WINDOW = 1024  # W: enough to tell a rank of hundreds, and a few dozen steps at most


def feature_std(features: Tensor) -> Tensor:
    """Spread of N directions [N, D] on the sphere, 0-d: 1 where they are uniform, 0 where they are one point.

    The standard deviation of each coordinate of the unit vectors, mean over D, as a share of 1 / sqrt(D)
    [Chen and He 2021, Fig. 2].
    """
    units = F.normalize(features, dim=1)
    return units.std(0, correction=0).mean() * math.sqrt(features.shape[1])


def effective_rank(features: Tensor) -> Tensor:
    """Dimensions that N directions [N, D] really use, 0-d in 1..min(N, D): exp of the entropy of the singular values of
    the unit vectors, normalised to sum 1 [Roy and Vetterli 2007; RankMe, Garrido et al. 2023]."""
    shares = torch.linalg.svdvals(F.normalize(features, dim=1))
    shares = shares / shares.sum()
    return torch.special.entr(shares).sum().exp()


class Health:
    """The newest W queries of a cycle, and what became of the memory's keys; only `summary` waits for the device.

    Args:
        views: that learn, L of them; the first is that of the memory's first features.
        memory: of the cycle.
        videos: of the training index.
        drifts: whether the memory keeps keys of earlier steps as they were (a queue): its drift is measured.
    """

    def __init__(self, views: Sequence[str], memory: Memory, videos: int, *, drifts: bool) -> None:
        width, device = memory.features.shape[2], memory.features.device
        self.views, self.memory, self.drifts = tuple(views), memory, drifts
        self.queries = torch.zeros(len(self.views), WINDOW, width, device=device)  # a ring
        self.count = 0  # of queries so far
        # The number of a video's newest key, counted over all keys enqueued; -1 = none.
        self.newest_key = torch.full((videos if drifts else 0,), -1, dtype=torch.int64, device=device)
        self.drift = torch.zeros(2, dtype=torch.float64, device=device)  # of the epoch: sum, keys compared
        self.alarmed: list[str] = []  # what was out of bounds at the end of the last epoch

    @torch.no_grad()
    def update(self, queries: Tensor, keys: Tensor, video: Tensor) -> None:
        """Takes a step's queries [L, B, D] and own keys [B, D] of `video` [B]; before they are enqueued."""
        newest = queries[:, -WINDOW:]
        rows = (self.count + torch.arange(newest.shape[1], device=newest.device)) % WINDOW
        self.queries.index_copy_(1, rows, newest.to(self.queries.dtype))
        self.count += newest.shape[1]
        if self.drifts:
            self._measure_drift(keys, video)

    def _measure_drift(self, keys: Tensor, video: Tensor) -> None:
        memory, number = self.memory, self.newest_key[video]  # [B]
        held = (number >= 0) & (number >= memory.count - memory.size)
        stored = memory.features[0, number.clamp(min=0) % memory.size]  # [B, D]
        distance = 1 - F.cosine_similarity(stored, keys.to(stored.dtype), dim=1)
        self.drift += torch.stack([torch.where(held, distance, 0).sum(), held.sum()])
        numbers = memory.count + torch.arange(len(video), device=video.device)
        self.newest_key.scatter_reduce_(0, video, numbers, "amax")

    def summary(self, step: int) -> dict[str, Any]:
        """The state after `step`, on the host (the one sync).

        `feature_std`, `effective_rank`: {view: value} of the window. `memory_age_steps`: mean age of the entries.
        `memory_drift`: mean of 1 - cosine between a video's key and the one that the queue still held of it, another
        clip of the same video, over the epoch; None where it held none, and for other memories.
        """
        features = self.queries[:, : self.count].double()
        written = self.memory.enqueued_at[self.memory.source != EMPTY]
        total, compared = self.drift.tolist()
        return {
            "feature_std": {view: feature_std(f).item() for view, f in zip(self.views, features, strict=True)},
            "effective_rank": {view: effective_rank(f).item() for view, f in zip(self.views, features, strict=True)},
            "memory_age_steps": (step - written).double().mean().item(),
            "memory_drift": total / compared if compared else None,
        }

    def alarms(self, row: dict[str, Any], bounds: HealthConfig) -> list[str]:
        """What a `summary` shows to have left its bounds since the last one, a sentence each."""
        outside = {}
        for view in self.views:
            spread, rank = row["feature_std"][view], row["effective_rank"][view]
            if spread < bounds.min_feature_std:
                outside[f"feature_std {view}"] = (
                    f"the {view} queries are nearly one point: feature_std {spread:.3g}, "
                    f"health.min_feature_std {bounds.min_feature_std}"
                )
            if rank < bounds.min_effective_rank:
                outside[f"effective_rank {view}"] = (
                    f"the {view} queries use few dimensions: effective_rank {rank:.3g}, "
                    f"health.min_effective_rank {bounds.min_effective_rank}"
                )
        drift = row["memory_drift"]
        if drift is not None and drift > bounds.max_memory_drift:
            outside["memory_drift"] = (
                f"the queue's keys are far from what the encoder makes of the same videos now: memory_drift "
                f"{drift:.3g}, health.max_memory_drift {bounds.max_memory_drift}"
            )
        new = [text for name, text in outside.items() if name not in self.alarmed]
        self.alarmed = list(outside)
        return new

    def start_epoch(self) -> None:
        """Forgets the drift of the last epoch."""
        self.drift.zero_()

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("queries", "count", "newest_key", "drift", "alarmed")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a `state_dict`."""
        for name in ("queries", "newest_key", "drift"):
            getattr(self, name).copy_(state[name])
        self.count, self.alarmed = state["count"], list(state["alarmed"])
