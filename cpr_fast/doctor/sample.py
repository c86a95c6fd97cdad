"""Writes the clips of one training sample as a picture or a video, with the pixels that the network sees."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from cpr_fast.config import DataConfig
from cpr_fast.config.pixels import normalisation
from cpr_fast.data.clips.loader import TrainLoader
from cpr_fast.data.index.index import Index
from cpr_fast.errors import InputError
from cpr_fast.runtime.files import replacing

PER_ROW = 16  # frames of a clip side by side
LABEL_HEIGHT = 14  # pixels of the line of text above a clip


def show_sample(
    index: Index, data: DataConfig, *, seed: int, epoch: int, position: int, out: Path, views: Sequence[str]
) -> dict[str, Any]:
    """Writes the clips of video `position` in `epoch` to `out`.

    The suffix of `out` determines the format: .png (or another picture format) gives a sheet of all frames, with one
    strip per clip and view; .mp4, .mkv or .webm gives a video of all clips side by side, at the frame rate of the clip.
    The pixels are the network's input converted back to levels 0..255; flow is shown as (red, green, blue) = (128, v,
    u).

    Returns:
        "out", and of the video "path", "label", "source" and "starts", the first frame of each clip.
    Raises:
        InputError: the position, the video or the suffix is not usable.
    """
    if not 0 <= position < len(index):
        raise InputError(f"--index: expected a video in 0..{len(index) - 1}, got {position}")
    loader = TrainLoader(index, dataclasses.replace(data, batch_size=1, disk_cache=""), views, seed=seed)
    try:
        batch = loader.sample(epoch, position)
    finally:
        loader.close()
    clips = [(f"{view}, clip {c + 1}", _levels(tensor[0, c], data)) for view, tensor in batch.clips.items()
             for c in range(tensor.shape[1])]  # fmt: skip
    video = index[position]
    with replacing(out) as temporary:
        if out.suffix in (".mp4", ".mkv", ".webm"):
            _write_video(temporary, clips, batch.clips, fps=max(1, round((data.fps or video.fps) / data.stride)))
        elif out.suffix in Image.registered_extensions():
            _sheet(clips).save(temporary)
        else:
            raise InputError(
                f"--out: expected the name of a picture, or of an .mp4, .mkv or .webm file; got {str(out)!r}"
            )
    starts = batch.start[0].tolist()
    return {"out": str(out), "path": str(video.path), "label": video.label, "source": video.source, "starts": starts}


def _levels(clip: Tensor, data: DataConfig) -> np.ndarray:
    """Converts a normalised clip [3, T, S, S] to levels, uint8 [T, S, S, 3]."""
    mean, std = (np.array(value, np.float32) for value in normalisation(data.augment))
    levels = 255 * (clip.permute(1, 2, 3, 0).numpy() * std + mean)
    return np.clip(np.rint(levels), 0, 255).astype(np.uint8)


def _sheet(clips: list[tuple[str, np.ndarray]]) -> Image.Image:
    """Draws each clip under its label; a clip of more than PER_ROW frames takes several rows."""
    frames, side = clips[0][1].shape[:2]
    columns, rows = min(frames, PER_ROW), -(-frames // PER_ROW)
    height = LABEL_HEIGHT + rows * side
    sheet = Image.new("RGB", (columns * side, len(clips) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for strip, (name, clip) in enumerate(clips):
        draw.text((2, strip * height), name, fill="black")
        for t, frame in enumerate(clip):
            place = (t % PER_ROW * side, strip * height + LABEL_HEIGHT + t // PER_ROW * side)
            sheet.paste(Image.fromarray(frame), place)
    return sheet


def _write_video(path: Path, clips: list[tuple[str, np.ndarray]], views: dict[str, Tensor], fps: int) -> None:
    """Writes a nearly lossless video with one row per view, whose clips are side by side."""
    per_view = len(clips) // len(views)
    rows = [
        np.concatenate([clip for _, clip in clips[i : i + per_view]], axis=2) for i in range(0, len(clips), per_view)
    ]
    picture = np.concatenate(rows, axis=1)  # [T, rows * S, clips * S, 3]
    even = [(0, 0), (0, picture.shape[1] % 2), (0, picture.shape[2] % 2), (0, 0)]
    picture = np.pad(picture, even)  # the pixel format 4:2:0 needs even sides
    codec, options = ("libvpx-vp9", {"crf": "10"}) if path.suffix == ".webm" else ("libx264", {"crf": "8"})
    with av.open(str(path), "w") as output:
        stream = output.add_stream(codec, rate=fps, options=options)
        stream.height, stream.width, stream.pix_fmt = picture.shape[1], picture.shape[2], "yuv420p"
        for frame in picture:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        output.mux(stream.encode(None))
