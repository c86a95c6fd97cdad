"""A loader of random clips for tests of the training loop: the contract of TrainLoader, without any video."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import torch

from cpr_fast.data.index.index import Index, Video

VIEWS = ("rgb", "flow", "residual")


def make_index(videos: int = 24, classes: int = 4) -> Index:
    """Returns an index of `videos` videos: two clips per source, classes in turn."""
    return Index(
        Video(Path(f"/v{i}.mp4"), f"class{i // 2 % classes}", f"source{i // 2}", "train", 60, 25.0, 64, 64)
        for i in range(videos)
    )


class RandomLoader:
    """Clips [B, 2, 3, 8, 32, 32] that are a pure function of (seed, epoch, video, view), noise around the class."""

    skipped = ()
    sleep_s = 0.0
    spoil = None  # (epoch, step): a NaN pixel in that batch

    def __init__(self, index, data, views, *, seed, device="cpu", rank=0, world_size=1, plan=None):
        self.clips = slice(None) if plan is None else slice(1)  # `plan_first` gives only the first clip
        self.index, self.data, self.views, self.seed = index, data, views, seed
        self.rank, self.world_size = rank, world_size
        self.closed = False

    def __len__(self):
        return len(self.index) // (self.data.batch_size * self.world_size)

    def _clip(self, epoch: int, video: int, view: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(hash((self.seed, epoch, video, VIEWS.index(view))))
        shape = (2, 3, self.data.frames, self.data.size, self.data.size)
        pattern = torch.Generator().manual_seed(int(self.index.labels[video]))
        return torch.randn(shape[1:], generator=pattern) + torch.randn(shape, generator=generator)

    def _order(self, epoch: int) -> torch.Tensor:
        return torch.randperm(len(self.index), generator=torch.Generator().manual_seed(hash((self.seed, epoch))))

    def epoch(self, epoch, start_step=0):
        order = self._order(epoch)
        size = self.data.batch_size
        for step in range(start_step, len(self)):
            time.sleep(self.sleep_s)
            first = (step * self.world_size + self.rank) * size
            video = order[first : first + size]
            clips = {
                view: torch.stack([self._clip(epoch, int(v), view) for v in video])[:, self.clips]
                for view in self.views
            }
            if self.spoil == (epoch, step):
                clips[self.views[0]][1, 0, 0, 0, 0, 0] = float("nan")
            source = torch.from_numpy(self.index.source_ids)[video]
            label = torch.from_numpy(self.index.labels)[video]
            start = torch.stack([video, video + 1], dim=1)[:, self.clips]
            plan = video * 1_000_003 + epoch
            yield SimpleNamespace(clips=clips, video=video, source=source, label=label, start=start, plan=plan)

    def close(self):
        self.closed = True


class NoisyLoader(RandomLoader):
    """Adds noise from torch's global generator: resuming has to restore it, too."""

    def epoch(self, number, start_step=0):
        for batch in super().epoch(number, start_step):
            for clips in batch.clips.values():
                clips += 0.1 * torch.randn(clips.shape)
            yield batch
