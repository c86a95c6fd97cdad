"""The memory of features that queries are compared with and that positives are mined from [paper §3].

Each of its K slots holds one feature per view. `Memory` is a queue of the newest keys [MoCo, He et al. 2020]; if it has
as many slots as a step has keys, it holds exactly the batch [SimCLR, Chen et al. 2020]. `Bank` holds one entry per
training video [IIC, Tao et al. 2020].

Letters: V views, B keys enqueued at once, K slots, D feature width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

EMPTY = -1  # source id of an empty slot

_COLUMNS = ("source", "video", "label", "start", "enqueued_at")


class Memory:
    """A ring buffer of the newest K keys and the clips that they were computed from.

    features: [V, K, D] float32, zero where empty.
    source, video, label, start: [K] int64: source id (-1 = empty slot), position in the index, class (-1 = unknown) and
        first source frame of the key's clip.
    enqueued_at: [K] int64, the step that wrote the slot (-1 = none).
    count: keys enqueued so far. It is kept on the host, so that checking whether the memory is full needs no sync.
    """

    def __init__(self, views: int, size: int, feature_dim: int, *, device: torch.device | str = "cpu") -> None:
        self.features = torch.zeros(views, size, feature_dim, device=device)
        empty = torch.full((size,), EMPTY, dtype=torch.int64, device=device)
        self.source, self.video, self.label, self.start = empty.clone(), empty.clone(), empty.clone(), empty.clone()
        self.enqueued_at = empty.clone()
        self.count = 0

    @property
    def size(self) -> int:
        return self.features.shape[1]

    @property
    def full(self) -> bool:
        return self.count >= self.size

    @torch.no_grad()
    def enqueue(self, keys: Tensor, *, source: Tensor, video: Tensor, label: Tensor, start: Tensor, step: int) -> None:
        """Writes `keys` [V, B, D] over the oldest entries; `source`, `video`, `label`, `start` are [B] int64.

        Raises:
            ValueError: there are more keys than slots, or the shape of `keys` is wrong.
        """
        views, size, width = self.features.shape
        if keys.dim() != 3 or keys.shape[0] != views or keys.shape[2] != width:
            raise ValueError(f"keys: expected [{views}, B, {width}], got {list(keys.shape)}")
        batch = keys.shape[1]
        if batch > size:
            raise ValueError(f"keys: expected at most memory.size = {size} keys at once, got {batch}")
        slots, keys = self._place(keys.to(self.features.dtype), video)
        self.features.index_copy_(1, slots, keys)
        for name, values in (("source", source), ("video", video), ("label", label), ("start", start)):
            getattr(self, name).index_copy_(0, slots, values)
        self.enqueued_at.index_fill_(0, slots, step)
        self.count += batch

    def _place(self, keys: Tensor, video: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the slots [B] to write, and the features [V, B, D] to write there."""
        return (self.count + torch.arange(len(video), device=keys.device)) % self.size, keys

    def state_dict(self) -> dict[str, Any]:
        return {"features": self.features, "count": self.count, **{name: getattr(self, name) for name in _COLUMNS}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a `state_dict`. Raises ValueError if its shape differs."""
        if state["features"].shape != self.features.shape:
            raise ValueError(
                f"memory features: expected {list(self.features.shape)}, got {list(state['features'].shape)}"
            )
        for name in ("features", *_COLUMNS):
            getattr(self, name).copy_(state[name])
        self.count = state["count"]


class Bank(Memory):
    """One entry per training video at its position in the index: a moving average of its keys, of unit length [IIC].

    The first key of a video becomes its entry. Published banks start from random vectors instead, which mining could
    select.

    Args:
        momentum: weight of the old entry in an update.
    """

    def __init__(
        self, views: int, size: int, feature_dim: int, *, momentum: float, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(views, size, feature_dim, device=device)
        self.momentum = momentum

    def _place(self, keys: Tensor, video: Tensor) -> tuple[Tensor, Tensor]:
        mixed = torch.lerp(keys, self.features[:, video], self.momentum)
        visited = (self.source[video] != EMPTY)[:, None]  # [B, 1]
        return video, F.normalize(torch.where(visited, mixed, keys), dim=2)
