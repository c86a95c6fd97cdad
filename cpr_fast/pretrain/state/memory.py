"""The memory of features that queries are compared with and that positives are mined from [paper §3].

Each of its K slots holds one feature per view. `Memory` is a queue of the newest keys [MoCo, He et al. 2020]; if it has
as many slots as a step has keys, it holds exactly the batch [SimCLR, Chen et al. 2020]. `Bank` holds one entry per
training video [IIC, Tao et al. 2020].

Letters: V views, B keys enqueued at once, K slots, D feature width.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from cpr_fast.ops import Shard
from cpr_fast.pretrain.state.schedule import generator
from cpr_fast.runtime import distributed

EMPTY = -1  # source id of a slot without a key
RANDOM = -2  # id that the loss gets for a random vector: no clip has it, so that the vector is never a positive
QUEUE_STREAM = 4  # argument `stream` of `schedule.generator`

_DRAWN_AT_ONCE = 2**16  # random vectors that are drawn before those of other processes are dropped

_COLUMNS = ("source", "video", "label", "start", "enqueued_at")


class Memory:
    """A ring buffer of the newest K keys and the clips that they were computed from.

    Attributes:
        size: K, the number of slots.
        features: [V, K, D] float32; where no key was written yet, zero, or a random unit vector (see `seed`). With a
            shard [V, K_r, D], those of the slots of this process.
        source, video, label, start: [K] int64: source id (-1 = no key yet), position in the index, class (-1 =
            unknown) and first source frame of the key's clip.
        enqueued_at: [K] int64, the step that wrote the slot (-1 = none).
        count: Number of keys enqueued so far. It is kept on the host, so that checking whether the memory is full does
            not wait for the device.

    Args:
        seed: None: queries are not compared with slots that have no key yet. A number: such a slot holds a random unit
            vector drawn with this seed, which is a negative until a key overwrites it [MoCo]. It counts as no key:
            `count`, `full` and the columns are the same with and without it.
        shard: the slots whose features this process holds; None: all. The columns are those of all slots on every
            process: they take 40 bytes per slot, features of two views and 128 dimensions 1,024.
    """

    def __init__(
        self,
        views: int,
        size: int,
        feature_dim: int,
        *,
        seed: int | None = None,
        shard: Shard | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.starts_random, self.size, self.shard = seed is not None, size, shard
        self.held = slice(0, size) if shard is None else slice(shard.begin, shard.end)
        self.features = torch.zeros(views, self.held.stop - self.held.start, feature_dim, device=device)
        if seed is not None:
            self._draw(seed)
        empty = torch.full((size,), EMPTY, dtype=torch.int64, device=device)
        self.source, self.video, self.label, self.start = empty.clone(), empty.clone(), empty.clone(), empty.clone()
        self.enqueued_at = empty.clone()
        self.count = 0

    def _draw(self, seed: int) -> None:
        """Fills the slots with random unit vectors, the same for every number of processes."""
        draw = generator(seed, QUEUE_STREAM, 0)
        for view in self.features:
            for first in range(0, self.size, _DRAWN_AT_ONCE):
                count = min(_DRAWN_AT_ONCE, self.size - first)
                drawn = torch.from_numpy(draw.standard_normal((count, view.shape[1]), dtype="float32"))
                begin, end = max(first, self.held.start), min(first + count, self.held.stop)
                if begin < end:
                    units = F.normalize(drawn, dim=1)[begin - first : end - first]
                    view[begin - self.held.start : end - self.held.start] = units

    @property
    def full(self) -> bool:
        """Whether every slot holds a key."""
        return self.count >= self.size

    @property
    def compared(self) -> Tensor:
        """Which slots a query is compared with, [K] bool: those that hold a key or a random vector."""
        filled = self.source != EMPTY
        return torch.ones_like(filled) if self.starts_random else filled

    def ids(self, column: Literal["source", "label"]) -> Tensor:
        """Returns a column as the loss takes it, [K] int64: random vectors have the id of no clip, and -1 marks slots
        that are compared with nothing."""
        ids = getattr(self, column)
        return torch.where(self.source == EMPTY, RANDOM, ids) if self.starts_random else ids

    @torch.no_grad()
    def enqueue(self, keys: Tensor, *, source: Tensor, video: Tensor, label: Tensor, start: Tensor, step: int) -> None:
        """Writes `keys` [V, B, D] over the oldest entries; `source`, `video`, `label`, `start` are [B] int64.

        Raises:
            ValueError: there are more keys than slots, or the shape of `keys` is wrong.
        """
        (views, _, width), size = self.features.shape, self.size
        if keys.dim() != 3 or keys.shape[0] != views or keys.shape[2] != width:
            raise ValueError(f"keys: expected [{views}, B, {width}], got {list(keys.shape)}")
        batch = keys.shape[1]
        if batch > size:
            raise ValueError(f"keys: expected at most memory.size = {size} keys at once, got {batch}")
        slots, keys = self._place(keys.to(self.features.dtype), video)
        if self.shard is None:
            self.features.index_copy_(1, slots, keys)
        else:
            self._write_held(keys)
        for name, values in (("source", source), ("video", video), ("label", label), ("start", start)):
            getattr(self, name).index_copy_(0, slots, values)
        self.enqueued_at.index_fill_(0, slots, step)
        self.count += batch

    def _place(self, keys: Tensor, video: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the slots [B] to write, and the features [V, B, D] to write there."""
        return (self.count + torch.arange(len(video), device=keys.device)) % self.size, keys

    def _write_held(self, keys: Tensor) -> None:
        """Writes those of the keys [V, B, D] whose slots this process holds. The ring is written from `count` on, so
        that the bounds are known on the host."""
        first = self.count % self.size  # key i is written to slot first + i, or to first + i - K
        for turn in (0, self.size):
            begin, end = max(first, self.held.start + turn), min(first + keys.shape[1], self.held.stop + turn)
            if begin < end:
                offset = self.held.start + turn
                self.features[:, begin - offset : end - offset] = keys[:, begin - first : end - first]

    def entries(self, view: int, slots: Tensor) -> Tensor:
        """Returns the features of slots of any shape in one view, [..., D]. With a shard, all processes call it
        together, with the same slots."""
        if self.shard is None:
            return self.features[view, slots]
        places = self.shard.within(slots)
        found = torch.where((places >= 0)[..., None], self.features[view, places.clamp(min=0)], 0)
        return distributed.sum_(found)

    def state_dict(self) -> dict[str, Any]:
        """Returns the features, the columns and the count, which a checkpoint stores.

        With a shard, all processes call it together; the first one receives the features of all slots, on the CPU, and
        the others None in their place.
        """
        features = self.features if self.shard is None else distributed.joined_on_main(self.features, dim=1)
        return {"features": features, "count": self.count, **{name: getattr(self, name) for name in _COLUMNS}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a `state_dict` of all slots, of which a shard takes its own. Raises ValueError if its shape
        differs."""
        views, _, width = self.features.shape
        if list(state["features"].shape) != [views, self.size, width]:
            raise ValueError(
                f"memory features: expected {[views, self.size, width]}, got {list(state['features'].shape)}"
            )
        self.features.copy_(state["features"][:, self.held])
        for name in _COLUMNS:
            getattr(self, name).copy_(state[name])
        self.count = state["count"]


class Bank(Memory):
    """One entry per training video at its position in the index: a moving average of its keys, of unit length [IIC].

    The first key of a video becomes its entry, and a query is not compared with videos that have none yet. Published
    banks start from random vectors instead, which are negatives and keep half of their weight in the first update, and
    which mining could select: a deviation from the published code.

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
