"""Misleading files: a cover picture, several video streams, damaged frames, a frame size that changes."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import av
import numpy as np
from PIL import Image


def pictures(count: int, height: int = 48, width: int = 64, seed: int = 0) -> list[np.ndarray]:
    """Returns moving noise, uint8 [H, W, 3] each: no two frames are equal."""
    noise = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3)).astype(np.uint8)
    return [np.roll(noise, step, axis=1).repeat(4, 0).repeat(4, 1) for step in range(count)]


def write_streams(path: Path, *streams: list[np.ndarray], default: int | None = None, fmt: str | None = None) -> Path:
    """Writes one video stream per list of pictures; `default` is marked as the default stream."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(f"file:{path}", "w", format=fmt) as output:
        output.metadata["title"] = str(path)  # files of equal bytes would be reported
        opened = []
        for number, frames in enumerate(streams):
            stream = output.add_stream("libx264", rate=25, options={"g": "12", "bf": "0"})
            stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "yuv420p"
            if default is not None:
                stream.disposition = av.stream.Disposition.default if number == default else 0
            opened.append(stream)
        for stream, frames in zip(opened, streams, strict=True):
            for frame in frames:
                output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            output.mux(stream.encode(None))
    return path


def write_plain(path: Path, count: int = 20, **options) -> Path:
    return write_streams(path, pictures(count, **options))


def place(video: Path, *targets: Path) -> None:
    """Copies an MP4 so that no two copies hold equal bytes, which would be reported: a box of free space is added."""
    for target in targets:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(video.read_bytes() + _box(b"free", str(target).encode()))


def with_cover(path: Path) -> Path:
    """Puts a cover picture of 200x200 into an MP4 as taggers do: moov/udta/meta/ilst/covr, before the tracks."""
    picture = io.BytesIO()
    Image.fromarray(np.zeros((200, 200, 3), np.uint8)).save(picture, "JPEG")
    data = _box(b"data", struct.pack(">II", 13, 0), picture.getvalue())
    handler = _box(b"hdlr", bytes(8) + b"mdirappl" + bytes(9))
    tags = _box(b"udta", _box(b"meta", bytes(4), handler, _box(b"ilst", _box(b"covr", data))))
    raw = path.read_bytes()
    start = raw.rindex(b"moov") - 4  # the last box: no offset of a frame changes
    children = raw[start + 8 :]
    head = struct.unpack(">I", children[:4])[0]  # mvhd
    path.write_bytes(raw[:start] + _box(b"moov", children[:head], tags, children[head:]))
    return path


def _box(kind: bytes, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return struct.pack(">I4s", 8 + len(body), kind) + body


def write_sound(path: Path) -> Path:
    """Writes a second of silence."""
    with av.open(str(path), "w") as output:
        stream = output.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 8000
        output.mux([*stream.encode(sound), *stream.encode()])
    return path


def damage(path: Path, place: int) -> Path:
    """Overwrites a few bytes of one packet, which FFmpeg repairs without an error."""
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        start, size = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size][place]
    data[start + size // 2 : start + size // 2 + 8] = b"\xff" * 8
    path.write_bytes(data)
    return path


def write_size_change(path: Path, before: int = 20) -> Path:
    """Writes `before` frames of 64x48, then frames of 96x80, in one MPEG transport stream."""
    parts = [
        write_streams(path.with_name(f"{number}.part"), frames, fmt="mpegts")
        for number, frames in enumerate((pictures(before), pictures(20, 80, 96)))
    ]
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    for part in parts:
        part.unlink()
    return path
