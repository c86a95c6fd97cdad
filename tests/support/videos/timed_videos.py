"""Numbered videos whose frames are shown at given times, and which frame a linear decode shows when."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from support.numbered_videos import HEIGHT, WIDTH, numbered_picture, numbers_shown

MS = Fraction(1, 1000)
# name -> (codec, suffix, options)
TIMED = {
    "h264-mp4": ("libx264", ".mp4", {"g": "9", "bf": "3", "sc_threshold": "0"}),
    "h264-mkv-open-gop": ("libx264", ".mkv", {"x264-params": "open-gop=1:keyint=10:bframes=3:scenecut=0"}),
    "h264-ts": ("libx264", ".ts", {"g": "9", "bf": "2", "sc_threshold": "0"}),
    "mpeg4-mp4": ("mpeg4", ".mp4", {"g": "7", "bf": "2"}),
    "vp9-webm": ("libvpx-vp9", ".webm", {"g": "10", "deadline": "realtime", "cpu-used": "8"}),
    "mjpeg-mkv": ("mjpeg", ".mkv", {}),
}


def mixed_times(count: int, seed: int = 0, start: int = 0) -> list[int]:
    """Returns presentation times in milliseconds, increasing: steps of 10 to 90 ms, and one of a second."""
    steps = np.random.default_rng(seed).integers(1, 10, count) * 10
    steps[0], steps[count // 2] = start, 1000
    return np.cumsum(steps).tolist()


def write_timed(path: Path, times: Sequence[int], kind: str = "h264-mp4", clock: Fraction = MS) -> Path:
    """Encodes one numbered picture per time, in units of `clock` seconds; the suffix of `path` is replaced."""
    codec, suffix, options = TIMED[kind]
    path = path.with_suffix(suffix)
    with av.open(str(path), "w") as output:
        output.metadata["title"] = str(path)
        stream = output.add_stream(codec, rate=30, options=options)
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.height, stream.width, stream.bit_rate = HEIGHT, WIDTH, 2_000_000
        stream.codec_context.time_base = clock
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(numbered_picture(number), format="gray")
            frame.pts, frame.time_base = time, clock
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return path


def with_edit_list(path: Path, out: Path, cut_s: float) -> Path:
    """Copies the packets of an mp4 file so that an edit list cuts off the first `cut_s` seconds."""
    with av.open(str(path)) as source, av.open(str(out), "w", options={"avoid_negative_ts": "disabled"}) as output:
        stream = source.streams.video[0]
        copy = output.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.size:
                shift = round(cut_s / stream.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copy
                output.mux(packet)
    return out


def shown_by_linear_decode(path: Path) -> tuple[list[int], list[Fraction]]:
    """Returns of each frame, in the order of a decode from the start, the number that it shows, and its time in seconds
    after the first one."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    numbers = numbers_shown(np.stack([frame.to_ndarray(format="rgb24") for frame in frames]))
    times = [Fraction(frame.pts) * Fraction(frame.time_base) for frame in frames]
    return numbers, [time - times[0] for time in times]


def places_at(times: Sequence[Fraction], fps: Fraction, samples: Sequence[int], late: Fraction) -> list[int]:
    """Returns the place of the last frame whose time is at most sample / fps + late, of each sample."""
    return [max(place for place, time in enumerate(times) if time <= sample / fps + late) for sample in samples]
