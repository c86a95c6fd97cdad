"""Small videos and a stand-in for TV-L1, for the tests of `cpr_fast.data.flow`."""

from pathlib import Path

import av
import numpy as np
import torch

LEVEL = 40 / 255  # pixels
LONG = 35  # frames of the longest video of a set, more than two batches hold


def smooth_flow(pairs: torch.Tensor) -> torch.Tensor:
    """Stands in for TV-L1 by a field that depends on both frames of the pair. [P, 2, H, W] -> [P, 2, H, W]."""
    assert pairs.dtype == torch.uint8 and pairs.shape[1] == 2
    first, second = pairs[:, 0].float(), pairs[:, 1].float()
    rows = torch.linspace(0, 3, pairs.shape[2])[:, None].expand_as(first)
    return torch.stack([second.mean((1, 2), keepdim=True) / 10 - rows, 5 - first / 20], dim=1)


def in_pairs(gray: torch.Tensor) -> torch.Tensor:
    """Converts frames [N, H, W] to pairs [N - 1, 2, H, W]."""
    return torch.stack([gray[:-1], gray[1:]], dim=1)


def write_video(path: Path, frames: int, width: int = 48, height: int = 32) -> Path:
    """Writes a lossless video in which each frame is a ramp of a different brightness."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ramp = np.linspace(0, 90, width).astype(np.uint8)[None, :]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = width, height, "gray"
        for i in range(frames):
            image = np.repeat(ramp + np.uint8(7 * i % 120), height, axis=0)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="gray")))
        container.mux(stream.encode(None))
    return path


def gray_frames(path: Path) -> torch.Tensor:
    with av.open(str(path)) as container:
        return torch.from_numpy(np.stack([frame.to_ndarray(format="gray") for frame in container.decode(video=0)]))


def read_levels(path: Path, width: int) -> np.ndarray:
    """Reads a flow file with FFmpeg only: uint8 [N - 1, 2, H, W]."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    planes = [np.frombuffer(f.planes[0], np.uint8).reshape(f.height, -1)[:, : f.width] for f in frames]
    return np.stack(planes).reshape(len(frames), 2, frames[0].height // 2, -1)[..., :width]
