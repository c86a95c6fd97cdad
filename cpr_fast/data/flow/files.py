"""Flow stored as videos: one H.264 file per video of an index, which DALI decodes like any other video.

Frame t of a flow file is the flow from frame t to frame t + 1 of its video, so a video of N frames has a flow file of
N - 1 frames. The picture is twice as high as the video. Its luma (brightness) plane, [2 H, W], holds u in the upper
half and v in the lower half, as levels (`levels.quantise`):

    +-------+
    |   u   |  H rows
    +-------+
    |   v   |  H rows
    +-------+
     W columns

The chroma (colour) planes hold the constant 128. The stream is H.264, 8 bits, 4:2:0, full range, with a constant
quantiser of 8. Hardware decoders accept this stream, but not x264's lossless profile. 4:2:0 needs an even width, so the
flow file of a video of odd width has one additional column; readers use the first W columns.

Letters: N frames of a video, H x W pixels.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorRange

from cpr_fast.data.files.local import local_file
from cpr_fast.data.files.relative import lexical
from cpr_fast.data.flow.names import SUFFIX, distinct_name, file_names, require_place
from cpr_fast.data.flow.origin import Origin, place_of
from cpr_fast.data.index.index import Index, Video
from cpr_fast.data.video.container import ANY_METADATA
from cpr_fast.runtime.files import one_writer, replacing

BYTES_PER_PIXEL = 0.124  # size of a flow field per pixel: 9.5 kB at 320x240 (bench/results/flow_storage.md)
KEPT = "complete flow is kept, so free some space and run the same command again"
LOOKING = 16  # number of threads that open stored files; on a network disk they mostly wait


class FlowFiles:
    """Stores flow in OUT/<path of the video relative to the index>.flow.mp4."""

    def __init__(self, index: Index, folder: Path, out: Path, shard: tuple[int, int]) -> None:
        """`folder` is the folder of the index. Raises InputError if `out` exists and is not a folder."""
        require_place(out, "video")
        self._index, self._out = index, out
        self._targets, self._current = zip(*_look(index, folder, out), strict=True)
        name = f"{shard[0]}-of-{shard[1]}"
        self._lock_file = out / distinct_name(".flow", "\n".join(map(str, self._targets)), f".{name}.lock")

    def holds(self, position: int) -> bool:
        """Returns whether complete flow, computed from the current version of the video, was stored when this object
        was created."""
        return self._current[position]

    def write(self, position: int, levels: np.ndarray) -> None:
        """Stores the levels of a video, uint8 [N - 1, 2, H, W]; safe to call from several threads."""
        encode_video(self._targets[position], levels, Origin.of(self._index[position].path))

    @staticmethod
    def found(index: Index, folder: Path, *, out: Path) -> list[tuple[set[Path], Path | None]]:
        """Returns for every video the paths that its flow may have in this store, and the one where it is, or None."""
        return [({target}, target if current else None) for target, current in _look(index, folder, out)]

    def __enter__(self) -> FlowFiles:
        """Raises InputError while another process computes the same shard of the same videos into OUT."""
        busy = f"--out: another process is computing the same videos into {str(self._out)!r}"
        self._lock = one_writer(self._lock_file, busy)
        self._lock.__enter__()
        return self

    def __exit__(self, *raised: object) -> None:
        self._lock.__exit__(*raised)


def encode_video(target: Path, levels: np.ndarray, origin: Origin | None = None) -> None:
    """Writes uint8 [N - 1, 2, H, W] as a flow file, which gets its name only when it is completely on the disk."""
    fields, _, height, width = levels.shape
    padded = width + width % 2
    image = np.full((3 * height, padded), 128, np.uint8)  # luma [2H, W], then both chroma planes [H, W]
    options = {"preset": "veryfast", "qp": "8", "g": "12", "bf": "0", "threads": "1"}
    with (
        replacing(target, KEPT, durable=True) as temporary,
        av.open(local_file(temporary), "w", format="mp4") as container,
    ):
        if origin is not None:
            container.metadata["comment"] = origin.dump()
        stream = container.add_stream("libx264", rate=25, options=options)
        stream.height, stream.width, stream.pix_fmt = 2 * height, padded, "yuv420p"
        stream.codec_context.color_range = ColorRange.JPEG
        for field in levels:
            image[: 2 * height, :width] = field.reshape(2 * height, width)
            image[: 2 * height, width:] = image[: 2 * height, width - 1 : width]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="yuv420p")))
        container.mux(stream.encode(None))


def _look(index: Index, folder: Path, out: Path) -> list[tuple[Path, bool]]:
    """Returns the flow file of every video, and whether it is complete and was computed from the current version of the
    video."""
    names, places = file_names(index, folder), {place_of(video.path) for video in index}
    with ThreadPoolExecutor(LOOKING) as pool:
        return list(pool.map(lambda video, name: _target(video, out / name, places), index, names))


def _target(video: Video, target: Path, places: set[str]) -> tuple[Path, bool]:
    shape, origin = _facts(target)
    if origin is not None and origin.is_foreign(video.path, places):
        # Two indexes share OUT, and the file belongs to a video of the other one: it is kept.
        target = target.with_name(distinct_name(video.path.name, lexical(video.path), SUFFIX))
        shape, origin = _facts(target)
    expected = (video.num_frames - 1, 2 * video.height, video.width + video.width % 2)
    return target, shape == expected and (origin is None or origin.describes(video.path))


def _facts(target: Path) -> tuple[tuple[int, int, int] | None, Origin | None]:
    """Returns (frames, height, width) of a flow file and its origin; None for either of them that cannot be read."""
    try:
        with av.open(local_file(target), **ANY_METADATA) as container:
            stream = container.streams.video[0]
            if stream.codec_context is None:  # the bytes that name the codec are damaged
                return None, None
            return (stream.frames, stream.height, stream.width), Origin.parse(container.metadata.get("comment"))
    except (OSError, av.FFmpegError, IndexError):
        return None, None
