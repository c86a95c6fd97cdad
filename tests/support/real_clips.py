"""The real clips that tests and benchmarks read from $CPR_FAST_SHARED/data (default ../shared/data)."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

ROOT = Path(os.environ.get("CPR_FAST_SHARED", Path(__file__).resolve().parents[3] / "shared")) / "data"


class Absent(RuntimeError):
    """Raised if there are not enough real clips; the message says what is missing."""


def spread_videos(count: int, name: str = "ucf101_100") -> list[Path]:
    """Returns `count` evenly spaced videos of a set, UCF101 if not told otherwise. Raises Absent."""
    paths = sorted((ROOT / name).glob("*/*.avi" if name == "ucf101_100" else "*/*.mp4"))
    if len(paths) < count:
        raise Absent(f"needs {count} videos in {ROOT / name} (set CPR_FAST_SHARED), found {len(paths)}")
    return paths[:: len(paths) // count][:count]


def read_gray(
    count: int, frames: int, size: tuple[int, int], name: str = "ucf101_100", first: int = 20
) -> torch.Tensor:
    """Returns uint8 [count, frames, H, W] of size (W, H), from frame `first` of evenly spaced videos. Raises Absent."""
    import cv2

    clips = []
    for path in spread_videos(count, name):
        video = cv2.VideoCapture(str(path))
        gray = [cv2.cvtColor(video.read()[1], cv2.COLOR_BGR2GRAY) for _ in range(first + frames)][first:]
        clips.append(np.stack([cv2.resize(image, size, interpolation=cv2.INTER_AREA) for image in gray]))
    return torch.from_numpy(np.stack(clips))
