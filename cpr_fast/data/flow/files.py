"""Flow as videos: for every video of an index one file that holds its optical flow, which DALI decodes.

Frame t of a flow file is the flow from frame t to t + 1 of its video, so there are N - 1 of them. The luma plane holds
u stacked over v, [2 H, W], as levels (`flow_levels`); chroma is a constant 128. H.264, full range, 8 bit 4:2:0,
quantiser 8: a form that hardware decoders take too (they refuse x264's lossless profile). An odd width is padded by
one column (4:2:0 needs an even one): read the first W columns.

Letters: N frames of a video, H x W pixels.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorRange

from cpr_fast.data.index.index import Index, Video
from cpr_fast.data.video.container import location
from cpr_fast.errors import InputError


class FlowFiles:
    """OUT/<path of the video relative to the index>, with suffix .flow.mp4."""

    def __init__(self, index: Index, folder: Path, out: Path, shard: tuple[int, int]) -> None:
        """`folder` is that of the index. Raises InputError where two videos would share a file."""
        self._index, self._targets = index, _targets(index, folder, out)

    def holds(self, position: int) -> bool:
        """Whether the flow of a video is there, as many fields as the video wants."""
        return _is_whole(self._targets[position], self._index[position])

    def write(self, position: int, levels: np.ndarray) -> None:
        """Stores the levels of a video, uint8 [N - 1, 2, H, W]; safe to call from several threads."""
        encode_video(self._targets[position], levels)

    @staticmethod
    def paths(index: Index, folder: Path, *, out: Path) -> list[Path | None]:
        """Where the flow of every video of the index is, None where it is not there or not whole."""
        targets = _targets(index, folder, out)
        return [target if _is_whole(target, video) else None for target, video in zip(targets, index, strict=True)]

    def __enter__(self) -> FlowFiles:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def encode_video(target: Path, levels: np.ndarray) -> None:
    """Writes uint8 [N - 1, 2, H, W] as a flow file, under its name only once complete."""
    fields, _, height, width = levels.shape
    padded = width + width % 2
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(target.name + ".part")  # one writer a video: a resumed run overwrites it
    image = np.full((3 * height, padded), 128, np.uint8)  # luma [2H, W], then both chroma planes [H, W]
    options = {"preset": "veryfast", "qp": "8", "g": "12", "bf": "0", "threads": "1"}
    try:
        with av.open(location(temporary), "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=25, options=options)
            stream.height, stream.width, stream.pix_fmt = 2 * height, padded, "yuv420p"
            stream.codec_context.color_range = ColorRange.JPEG
            for field in levels:
                image[: 2 * height, :width] = field.reshape(2 * height, width)
                image[: 2 * height, width:] = image[: 2 * height, width - 1 : width]
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="yuv420p")))
            container.mux(stream.encode(None))
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _targets(index: Index, folder: Path, out: Path) -> list[Path]:
    """Returns the flow file of every video. Videos whose names differ in the suffix alone keep it: v.avi.flow.mp4."""
    relative = [relative_path(video, folder) for video in index]
    shared = Counter(path.with_suffix("") for path in relative)
    owner: dict[Path, Video] = {}
    for video, path in zip(index, relative, strict=True):
        name = f"{path.name if shared[path.with_suffix('')] > 1 else path.stem}.flow.mp4"
        target = out / path.with_name(name)
        if target in owner:
            raise InputError(f"out: {str(video.path)!r} and {str(owner[target].path)!r} would share {str(target)!r}")
        owner[target] = video
    return list(owner)


def relative_path(video: Video, folder: Path) -> Path:
    """Returns the path of a video below the folder of the index; of a video elsewhere, without leading `..`."""
    return Path(*(part for part in Path(os.path.relpath(video.path, folder)).parts if part != ".."))


def _is_whole(target: Path, video: Video) -> bool:
    try:
        with av.open(location(target)) as container:
            return container.streams.video[0].frames == video.num_frames - 1
    except (FileNotFoundError, av.FFmpegError, IndexError):
        return False
