"""A network without weights, and a loader that counts the videos it reads, for tests of embedding."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch

from cpr_fast.data.index.index import Index, Video
from cpr_fast.evaluate.features.embedding import Embedding


class CountingLoader:
    """Two windows per video whose values are the bytes of its file; counts the videos it opened."""

    opened: list[str] = []

    def __init__(self, index: Index, broken: str = "") -> None:
        self.videos = [video for video in index if video.path.stem != broken]
        self.positions = [i for i, video in enumerate(index) if video.path.stem != broken]
        self.skipped = [(video.path, "does not decode") for video in index if video.path.stem == broken]

    def __len__(self):
        return 2

    def close(self):
        pass

    def __iter__(self):
        for window in range(2):
            values = []
            for video in self.videos:
                CountingLoader.opened.append(video.path.stem)
                content = torch.tensor(list(video.path.read_bytes()), dtype=torch.float32)
                values.append(content.view(3, 2, 1, 1) + window)
            if values:
                yield SimpleNamespace(clips={"rgb": torch.stack(values)}, video=torch.tensor(self.positions))


def write_videos(folder: Path, names: str) -> Index:
    for i, name in enumerate(names):
        (folder / f"{name}.mp4").write_bytes(bytes(range(i, i + 6)))
    return Index(Video(folder / f"{name}.mp4", "a", name, "train", 9, 25.0, 8, 8) for name in names)


NET = {"net/rgb": Embedding("rgb", lambda clips: clips.flatten(1), "euclidean", "net")}
