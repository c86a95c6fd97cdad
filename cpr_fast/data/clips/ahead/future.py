"""Which clips a process will read in which step: the plan of an epoch is known before the epoch begins.

Steps are counted over all epochs: step t is step t % S of epoch t // S.

Letters: N videos, S steps of an epoch, B videos of a step, C clips of a video.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cpr_fast.config import DataConfig
from cpr_fast.data.clips.sampling import Clips, Sources, clip_frames, epoch_order, step_videos
from cpr_fast.data.files.names import is_frames, is_remote
from cpr_fast.data.index.index import Index
from cpr_fast.data.index.rows.columns import spread

LOOKED_AT = 10_000  # videos at most whose paths are looked at before anything is read
MOST_EPOCHS = 8  # that are looked ahead: 4 bytes per video each


class Read(NamedTuple):
    """A file that a step reads: the number of its video and view, and the frames, increasing."""

    item: int
    frames: np.ndarray


class Future:
    """The reads of one process from files on servers.

    Of w processes each reads a w-th of the videos in an epoch, so that a video returns after w epochs on average; w
    further epochs, or MOST_EPOCHS, are looked at.
    """

    def __init__(
        self,
        index: Index,
        sources: Sources,
        data: DataConfig,
        views: Sequence[str],
        plan: Callable[[Sources, np.ndarray, DataConfig, int, int], Clips],
        *,
        seed: int,
        rank: int,
        world_size: int,
    ) -> None:
        """`sources` are those of the index; `views` are those that are decoded, "rgb" and "flow"."""
        self._index, self._sources, self._data, self._plan, self._seed = index, sources, data, plan, seed
        self._rank, self._world_size = rank, world_size
        self._computed = data.flow != "stored" and "flow" in views  # from the file of RGB, one frame more than fields
        self.views = ("rgb",) if self._computed else tuple(views)
        self.steps = len(index) // (data.batch_size * world_size)  # S
        self.epochs = 1 + min(max(world_size, 1), MOST_EPOCHS)
        self._known: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # by epoch

    def __len__(self) -> int:
        """Returns the number of items."""
        return len(self._index) * len(self.views)

    def path(self, item: int) -> Path | None:
        """Returns the file of an item if it is on a server, else None. Pictures are read as they are needed."""
        video, view = divmod(item, len(self.views))
        row = self._index[video]
        path = row.path if self.views[view] == "rgb" else row.flow_path
        return path if path is not None and is_remote(path) and not is_frames(path) else None

    def on_servers(self) -> bool:
        """Returns whether some of the files are on servers; of a large index a sample is looked at."""
        places = spread(len(self._index), LOOKED_AT)
        return any(
            self.path(place * len(self.views) + view) is not None for place in places for view in range(len(self.views))
        )

    def reads(self, step: int) -> list[Read]:
        """Returns what a step reads, in the order of its videos."""
        epoch, place = divmod(step, self.steps)
        videos = self._epoch(epoch)[0][place]
        return [
            Read(int(video) * len(self.views) + view, frames)
            for video, frames in zip(videos, self._frames(epoch, videos), strict=True)
            for view in range(len(self.views))
        ]

    def uses(self, videos: np.ndarray, step: int) -> list[list[tuple[int, np.ndarray]]]:
        """Returns for each of some videos the reads from `step` on that are known, (step, frames), the next one first.
        All views of a video are read in the same steps."""
        found: list[list[tuple[int, np.ndarray]]] = [[] for _ in videos]
        first = step // self.steps
        for epoch in range(first, first + self.epochs):
            place = self._epoch(epoch)[1][videos]
            at = epoch * self.steps + place
            later = np.flatnonzero((place >= 0) & (at >= step))
            for row, frames in zip(later, self._frames(epoch, videos[later]), strict=True):
                found[row].append((int(at[row]), frames))
        return found

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the videos of each step, int64 [S, B], and the step of each video, or -1, int32 [N]."""
        if epoch not in self._known:
            order, size = epoch_order(len(self._index), self._seed, epoch), self._data.batch_size
            own = [step_videos(order, step, size, self._rank, self._world_size) for step in range(self.steps)]
            videos, at = np.stack(own), np.full(len(order), -1, np.int32)
            at[videos] = np.arange(self.steps, dtype=np.int32)[:, None]
            self._known = {e: known for e, known in self._known.items() if abs(e - epoch) <= self.epochs}
            self._known[epoch] = videos, at
        return self._known[epoch]

    def _frames(self, epoch: int, videos: np.ndarray) -> list[np.ndarray]:
        """Returns the frames that the clips of each video need in an epoch."""
        if not len(videos):
            return []
        starts = self._plan(self._sources, videos, self._data, self._seed, epoch).start.reshape(-1, len(videos))
        shown = [np.unique([clip_frames(int(start), self._data) for start in own]) for own in starts.T]
        return [np.union1d(frames, frames + 1) for frames in shown] if self._computed else shown
