"""Encoded videos whose frames show their own number, and clips of the shared data, for the tests of `cpr_fast.data`."""

from pathlib import Path

import av
import numpy as np
import pytest
from support import real_clips

from cpr_fast.data.clips.sampling import NO_GRAY, Clips
from cpr_fast.data.index.index import Video

HEIGHT, WIDTH = 48, 64  # a grid of 2 x 4 blocks: the bits of the frame number, black or white

# name -> (codec, suffix, pixel format, options)
KINDS = {
    "h264-bframes": ("libx264", ".mp4", "yuv420p", {"g": "12", "bf": "3", "sc_threshold": "0"}),
    "h264-open-gop": ("libx264", ".mkv", "yuv420p", {"x264-params": "open-gop=1:keyint=10:bframes=3:scenecut=0"}),
    "mpeg4-avi": ("mpeg4", ".avi", "yuv420p", {"g": "12", "bf": "2"}),
    "mpeg4-mp4": ("mpeg4", ".mp4", "yuv420p", {"g": "12", "bf": "2"}),
    "vp9": (
        "libvpx-vp9",
        ".webm",
        "yuv420p",
        {"g": "10", "deadline": "realtime", "cpu-used": "8", "lag-in-frames": "8"},
    ),
    "mjpeg-avi": ("mjpeg", ".avi", "yuvj420p", {}),
    "mjpeg-mkv": ("mjpeg", ".mkv", "yuvj420p", {}),
}


def numbered_picture(number: int) -> np.ndarray:
    """Returns uint8 [48, 64]: bit i of `number` is white in block (i // 4, i % 4)."""
    bits = (number >> np.arange(8)) & 1
    return np.kron(bits.reshape(2, 4), np.ones((24, 16))).astype(np.uint8) * 215 + 20


def numbers_shown(pixels: np.ndarray) -> list[int]:
    """Returns the frame numbers in uint8 [F, 48, 64, 3]."""
    blocks = pixels[..., 0].reshape(len(pixels), 2, 24, 4, 16).astype(float).mean(axis=(2, 4)).reshape(-1, 8)
    return ((blocks > 128) * 2 ** np.arange(8)).sum(axis=1).tolist()


def write_video(path: Path, pictures, kind: str = "h264-bframes") -> Path:
    """Encodes uint8 pictures, [H, W] gray or [H, W, 3] RGB each, in the format of `kind`; the suffix of `path` is
    replaced.
    """
    codec, suffix, pixel_format, options = KINDS[kind]
    path = path.with_suffix(suffix)
    with av.open(str(path), "w") as output:
        output.metadata["title"] = str(path)  # files of equal bytes would be reported
        stream = output.add_stream(codec, rate=25, options=options)
        stream.pix_fmt = pixel_format
        stream.bit_rate = 2_000_000
        pictures = list(pictures)
        stream.height, stream.width = pictures[0].shape[:2]
        for picture in pictures:
            frame = av.VideoFrame.from_ndarray(picture, format="gray" if picture.ndim == 2 else "rgb24")
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return path


def write_numbered(path: Path, num_frames: int, kind: str = "h264-bframes") -> Path:
    return write_video(path, (numbered_picture(i) for i in range(num_frames)), kind)


def decode_linearly(path: Path) -> np.ndarray:
    """Returns every frame in presentation order, uint8 [F, H, W, 3]: the independent reference."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def shared_data(*parts: str) -> Path:
    """Returns a path below the shared data, or skips the test."""
    path = real_clips.ROOT.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"needs {path} (set CPR_FAST_SHARED)")
    return path


def clips_at(video: Video, starts, **draw) -> Clips:
    """Returns clips of whole frames with the given starts and neutral colours, except for the values in `draw`."""
    count = len(starts)
    neutral = {
        "flip": False,
        "brightness": 1,
        "contrast": 1,
        "saturation": 1,
        "hue": 0,
        "order": 0,
        "sigma": 0,
        "crop": 0,
    }
    box = np.tile(draw.pop("box", [0, 0, video.height, video.width]), (count, 1))
    gray = np.tile(draw.pop("gray", [NO_GRAY]), (count, 1))  # [M, 1] is enough for clips that are not gray
    rest = {name: np.full(count, value) for name, value in (neutral | draw).items()}
    return Clips(np.zeros(count, int), np.array(starts), box, gray=gray, **rest)
