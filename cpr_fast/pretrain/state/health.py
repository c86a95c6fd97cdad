"""Health of training: the spread of the query features, which detects a collapse, and the drift of the memory's keys.

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
from cpr_fast.mining.unlabelled import effective_rank
from cpr_fast.pretrain.state.memory import EMPTY, Memory
from cpr_fast.wording import counted

WINDOW = 1024  # W: enough to measure an effective rank of hundreds; at most a few dozen steps


def feature_std(features: Tensor) -> Tensor:
    """Returns the spread of N directions [N, D] on the sphere, 0-d: 1 if they are uniform, 0 if they are one point.

    It is the standard deviation of each coordinate of the unit vectors, averaged over the D coordinates and divided by
    1 / sqrt(D) [Chen and He 2021, Fig. 2].
    """
    units = F.normalize(features, dim=1)
    return units.std(0, correction=0).mean() * math.sqrt(features.shape[1])


class Health:
    """Keeps the newest W queries of a cycle and measures the drift of the memory. Only `summary` waits for the device.

    Args:
        views: the L views that learn. The first one is the view of `memory.features[0]`.
        memory: the memory of the cycle.
        videos: number of training videos.
        drifts: whether to measure the drift: True for a queue, whose keys do not change after they were computed.
    """

    def __init__(self, views: Sequence[str], memory: Memory, videos: int, *, drifts: bool) -> None:
        width, device = memory.features.shape[2], memory.features.device
        self.views, self.memory, self.videos, self.drifts = tuple(views), memory, videos, drifts
        self.queries = torch.zeros(len(self.views), WINDOW, width, device=device)  # a ring buffer
        self.count = 0  # number of queries so far
        # The number of the newest key of each video, counted over all keys enqueued; -1 = none.
        self.newest_key = torch.full((videos if drifts else 0,), -1, dtype=torch.int64, device=device)
        self.drift = torch.zeros(2, dtype=torch.float64, device=device)  # over the epoch: sum, number of keys compared
        self.alarmed: list[str] = []  # values that were out of bounds at the end of the last epoch

    @torch.no_grad()
    def update(self, queries: Tensor, keys: Tensor, video: Tensor) -> None:
        """Records the queries [L, B, D] of a step and its keys [B, D] of `video` [B], before the keys are enqueued."""
        newest = queries[:, -WINDOW:]
        rows = (self.count + torch.arange(newest.shape[1], device=newest.device)) % WINDOW
        self.queries.index_copy_(1, rows, newest.to(self.queries.dtype))
        self.count += newest.shape[1]
        if self.drifts:
            self._measure_drift(keys, video)

    def _measure_drift(self, keys: Tensor, video: Tensor) -> None:
        memory, number = self.memory, self.newest_key[video]  # [B]
        held = (number >= 0) & (number >= memory.count - memory.size)
        stored = memory.entries(0, number.clamp(min=0) % memory.size)  # [B, D]
        distance = 1 - F.cosine_similarity(stored, keys.to(stored.dtype), dim=1)
        self.drift += torch.stack([torch.where(held, distance, 0).sum(), held.sum()])
        numbers = memory.count + torch.arange(len(video), device=video.device)
        self.newest_key.scatter_reduce_(0, video, numbers, "amax")

    def summary(self, step: int) -> dict[str, Any]:
        """Returns the state after `step`, on the host. This is a sync point.

        `feature_std`, `effective_rank`: {view: value} of the window. `queries`: its number of different videos, at
        most. `memory_age_steps`: mean age of the entries.
        `memory_drift`: mean, over the epoch, of 1 - cosine between the new key of a video and its older key in the
        queue (computed from another clip); None if the queue held no older key, and for other kinds of memory.
        """
        features = self.queries[:, : self.count].double()
        written = self.memory.enqueued_at[self.memory.source != EMPTY]
        total, compared = self.drift.tolist()
        return {
            "feature_std": {view: feature_std(f).item() for view, f in zip(self.views, features, strict=True)},
            "effective_rank": {view: effective_rank(f).item() for view, f in zip(self.views, features, strict=True)},
            "queries": min(self.count, WINDOW, self.videos),
            "memory_age_steps": (step - written).double().mean().item(),
            "memory_drift": total / compared if compared else None,
        }

    def alarms(self, row: dict[str, Any], bounds: HealthConfig) -> list[str]:
        """Returns one sentence for each value of a `summary` that is out of bounds now and was not at the last call."""
        outside, limit = {}, bounds.rank_limit(row["queries"])
        for view in self.views:
            spread, rank = row["feature_std"][view], row["effective_rank"][view]
            if spread < bounds.min_feature_std:
                outside[f"feature_std {view}"] = (
                    f"the {view} queries are nearly one point: feature_std {spread:.3g} is below "
                    f"health.min_feature_std {bounds.min_feature_std}"
                )
            if rank < limit:
                few = limit < bounds.min_effective_rank
                outside[f"effective_rank {view}"] = (
                    f"the {view} queries use few dimensions: effective_rank {rank:.3g} is below "
                    + (f"{limit:.3g}, an eighth of the {counted(row['queries'], 'video')}" if few else
                       f"health.min_effective_rank {bounds.min_effective_rank}")
                )  # fmt: skip
        drift = row["memory_drift"]
        if drift is not None and drift > bounds.max_memory_drift:
            outside["memory_drift"] = (
                f"the keys in the queue are far from the encoder's present keys of the same videos: memory_drift "
                f"{drift:.3g} is above health.max_memory_drift {bounds.max_memory_drift}"
            )
        new = [text for name, text in outside.items() if name not in self.alarmed]
        self.alarmed = list(outside)
        return new

    def start_epoch(self) -> None:
        """Resets the drift."""
        self.drift.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Returns the window of queries, the drift and the raised alarms, which a checkpoint stores."""
        return {name: getattr(self, name) for name in ("queries", "count", "newest_key", "drift", "alarmed")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a `state_dict`."""
        for name in ("queries", "newest_key", "drift"):
            getattr(self, name).copy_(state[name])
        self.count, self.alarmed = state["count"], list(state["alarmed"])
