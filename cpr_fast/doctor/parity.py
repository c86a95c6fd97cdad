"""Measures how exact decoding and augmentation are: frames of PyAV and DALI, clips of DALI and PIL, per codec.

Letters: F frames of a video, T frames of a clip, H x W pixels.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from nvidia.dali import fn, pipeline_def

from cpr_fast.config import DataConfig
from cpr_fast.config.pixels import normalisation
from cpr_fast.data.clips.graph import ClipGraph
from cpr_fast.data.clips.reader import fetch_cut, fetch_frames
from cpr_fast.data.clips.reference import ReferenceGraph
from cpr_fast.data.clips.sampling import NO_GRAY, Sources, plan_pairs
from cpr_fast.data.files.access import ffmpeg_input, storage_of
from cpr_fast.data.index.index import Index, Video
from cpr_fast.data.video.container import VideoError
from cpr_fast.data.video.decode import read_frames
from cpr_fast.data.video.packets import slice_packets
from cpr_fast.data.video.probe import ASSUMED_FPS, probe_video
from cpr_fast.wording import counted

# codec -> (encoders, of which the first one available is used; suffix; pixel format; options)
CODECS: dict[str, tuple[tuple[str, ...], str, str, dict[str, str]]] = {
    "h264": (("libx264",), ".mp4", "yuv420p", {"g": "12", "bf": "2"}),
    "hevc": (("libx265",), ".mp4", "yuv420p", {"x265-params": "keyint=12:bframes=2:log-level=none"}),
    "vp9": (("libvpx-vp9",), ".webm", "yuv420p", {"g": "12", "deadline": "realtime", "cpu-used": "8"}),
    "mpeg4": (("mpeg4",), ".avi", "yuv420p", {"g": "12", "bf": "2"}),  # like XviD: AVI with B-frames
    "mjpeg": (("mjpeg",), ".mkv", "yuvj420p", {}),
    "av1": (("libsvtav1", "libaom-av1"), ".mkv", "yuv420p", {"g": "12", "preset": "12"}),
}


def write_test_video(codec: str, folder: Path, *, frames: int = 48, height: int = 96, width: int = 128) -> Path | None:
    """Writes a video of a moving texture, whose frames all differ; returns None if FFmpeg has no such encoder.

    A thread of its own encodes it: for root, libsvtav1 gives the thread that opens it real-time priority, and keeps it.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_write_test_video, codec, folder, frames, height, width).result()


def _write_test_video(codec: str, folder: Path, frames: int, height: int, width: int) -> Path | None:
    encoders, suffix, pixel_format, options = CODECS[codec]
    encoder = next((name for name in encoders if name in av.codecs_available and _can_encode(name)), None)
    if encoder is None:
        return None
    os.environ.setdefault("SVT_LOG", "1")  # libsvtav1 then prints errors only
    noise = np.random.default_rng(0).integers(16, 240, (height // 8 + 1, (width + 3 * frames) // 8 + 1, 3))
    texture = noise.astype(np.uint8).repeat(8, 0).repeat(8, 1)[:height]
    path = folder / f"{codec}{suffix}"
    with av.open(str(path), "w") as output:
        stream = output.add_stream(encoder, rate=25, options=options)
        stream.height, stream.width, stream.pix_fmt, stream.bit_rate = height, width, pixel_format, 2_000_000
        for i in range(frames):
            picture = np.ascontiguousarray(texture[:, 3 * i : 3 * i + width])
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        output.mux(stream.encode(None))
    return path


def decode_linearly(source: Path | np.ndarray) -> np.ndarray:
    """Returns every frame in presentation order, uint8 [F, H, W, 3], by a plain decode with FFmpeg: the reference."""
    with av.open(ffmpeg_input(source) if isinstance(source, Path) else io.BytesIO(source.tobytes())) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def seek_parity(path: Path, truth: np.ndarray, clip: int, starts: Sequence[int] | None = None) -> dict[str, Any]:
    """Compares clips of `clip` frames from every start (or from `starts`) with `truth`, the whole video.

    The clips are read by `read_frames` and, a second time, decoded by FFmpeg from the packets that a GPU would get.

    Returns:
        "seeks", "frames", "identical" (frames equal to the reference), "packets_identical" (the same from packets) and
        "packets_share" (mean size of the packets of a clip as a share of the file, 0..1).
    """
    starts = range(len(truth) - clip + 1) if starts is None else starts
    identical = sliced = size = 0
    whole = decode_linearly(path)  # where the packets are the whole file, they are the same for every clip
    for start in starts:
        frames = np.arange(start, start + clip)
        identical += int((read_frames(path, frames, "rgb", len(truth)) == truth[frames]).all(axis=(1, 2, 3)).sum())
        packets, places = slice_packets(path, frames, len(truth))
        decoded = whole if len(packets) == storage_of(path).size(path) else decode_linearly(packets)
        sliced += int((decoded[places] == truth[frames]).all(axis=(1, 2, 3)).sum())
        size += len(packets)
    return {
        "seeks": len(starts),
        "frames": len(starts) * clip,
        "identical": identical,
        "packets_identical": sliced,
        "packets_share": round(size / len(starts) / storage_of(path).size(path), 3),
    }


def dali_parity(
    path: Path, truth: np.ndarray, clip: int, starts: Sequence[int], device: torch.device
) -> dict[str, Any]:
    """Compares clips decoded by DALI on `device` with `truth`, the whole video.

    DALI interpolates chroma differently from FFmpeg, so its frames differ by a level on average. A frame therefore
    counts as identical if, of the five reference frames around it, the right one is the nearest.

    Returns:
        "decoder", "frames", "identical", "psnr_db" (mean) and "psnr_min_db"; or "decoder" and "refused" (the reason)
        if DALI does not decode this codec.
    """
    decoder = "mixed" if device.type == "cuda" else "cpu"
    pipeline = _decoder(
        decoder, batch_size=1, num_threads=1, device_id=device.index or 0 if decoder == "mixed" else None
    )
    pipeline.build()
    scores, right = [], 0
    for start in starts:
        frames = np.arange(start, start + clip)
        packets, places = slice_packets(path, frames, len(truth))
        pipeline.feed_input("packets", [packets])
        pipeline.feed_input("chosen", [places])
        try:
            got = np.asarray(pipeline.run()[0].as_cpu().as_array()[0])
        except RuntimeError as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            return {"decoder": decoder, "refused": next((x for x in lines if "codec" in x.lower()), lines[0])[:160]}
        for frame, pixels in zip(frames, got, strict=True):
            around = np.arange(max(frame - 2, 0), min(frame + 3, len(truth)))
            errors = [_mean_square(pixels, truth[other]) for other in around]
            right += int(around[int(np.argmin(errors))] == frame)
            scores.append(_psnr(_mean_square(pixels, truth[frame])))
    return {
        "decoder": decoder,
        "frames": len(starts) * clip,
        "identical": right,
        "psnr_db": round(float(np.mean(scores)), 2),
        "psnr_min_db": round(float(np.min(scores)), 2),
    }


def clip_parity(path: Path, data: DataConfig, *, epochs: int = 8, device: torch.device | None = None) -> dict[str, Any]:
    """Compares the loader's augmented clips with those of the published code, made by PIL, over the training clips of
    some epochs.

    Returns:
        PSNR in dB: "plain_db", "plain_min_db" of clips that are only cropped, resized and flipped, and "colour_db",
        "colour_min_db" of clips with jitter, grayscale or blur too; and their numbers "plain_clips", "colour_clips".
    """
    info = probe_video(path)
    video = Video(path, "", "", "", info.num_frames, info.fps or ASSUMED_FPS, info.width, info.height)
    sources = Sources.of(Index([video]))
    device = device or torch.device("cpu")
    graph = ClipGraph(data, {"rgb": "frames"}, device, 2)
    reference = ReferenceGraph(data, ["rgb"])
    scores: dict[str, list[float]] = {"plain": [], "colour": []}
    std = 255 * torch.tensor(normalisation(data.augment)[1]).view(3, 1, 1, 1)  # levels per unit
    for epoch in range(epochs):
        plan = plan_pairs(sources, np.array([0]), data, 0, epoch)
        got = graph.run(plan, {"rgb": fetch_cut(video, plan, "rgb", data, finish=device.type != "cuda")})["rgb"].cpu()
        expected = reference.run(plan, {"rgb": fetch_frames(video, plan, "rgb", data)})["rgb"]
        for c in range(2):
            changed = plan.hue[c] or plan.sigma[c] or (plan.gray[c] != NO_GRAY).any()
            error = float(((got[c] - expected[c]) * std).square().mean())
            scores["colour" if changed else "plain"].append(_psnr(error))
    out = {f"{kind}_clips": len(values) for kind, values in scores.items()}
    for kind, values in scores.items():
        if values:
            out |= {f"{kind}_db": round(float(np.mean(values)), 2), f"{kind}_min_db": round(min(values), 2)}
    return out


def check_codec(codec: str, folder: Path, device: torch.device) -> dict[str, Any]:
    """Decodes a test video of a codec. Returns "codec", and under "pyav" and "dali" either "exact" or a description of
    the problem."""
    path = write_test_video(codec, folder, frames=24)
    if path is None:
        return {"codec": codec, "pyav": "not tried: FFmpeg has no encoder to write a test video", "dali": "not tried"}
    try:
        truth = decode_linearly(path)
        seeks = seek_parity(path, truth, 4, range(0, 20, 5))
    except (VideoError, av.FFmpegError) as error:
        return {"codec": codec, "pyav": str(error), "dali": "not tried"}
    exact = seeks["identical"] == seeks["packets_identical"] == seeks["frames"]
    pyav = "exact" if exact else "wrong frames"
    if device.type != "cuda":  # and DALI would print a line on stderr for each codec that its CPU decoder lacks
        return {"codec": codec, "pyav": pyav, "dali": "not used on a CPU, PyAV decodes there"}
    row = dali_parity(path, truth, 4, range(0, 20, 5), device)
    if "refused" in row:
        dali = "not supported, PyAV is used"
    else:
        wrong = row["frames"] - row["identical"]
        dali = f"{wrong} of {counted(row['frames'], 'frame')} wrong" if wrong else "exact"
    return {"codec": codec, "pyav": pyav, "dali": f"{row['decoder']}: {dali}"}


@pipeline_def(exec_dynamic=True, prefetch_queue_depth=1)
def _decoder(device: str):
    packets, chosen = fn.external_source(name="packets"), fn.external_source(name="chosen")
    return fn.decoders.video(packets, device=device, frames=chosen)


def _can_encode(name: str) -> bool:
    try:
        return av.Codec(name, "w").is_encoder
    except av.codec.codec.UnknownCodecError:
        return False


def _mean_square(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.square(a.astype(np.float32) - b.astype(np.float32)).mean())


def _psnr(mean_square: float) -> float:
    """Returns the peak signal-to-noise ratio in dB, at most 99, the value of equal pictures."""
    return min(99.0, 10 * np.log10(255**2 / mean_square)) if mean_square else 99.0
