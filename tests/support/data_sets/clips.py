"""Small videos with flow, and their expected clips, for the tests of `cpr_fast.data.clips`."""

from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from support.numbered_videos import write_video

from cpr_fast.config import DataConfig
from cpr_fast.config.pixels import IMAGENET_MEAN as MEAN
from cpr_fast.config.pixels import IMAGENET_STD as STD
from cpr_fast.data.clips.sampling import NO_GRAY, Clips
from cpr_fast.data.index.index import Index, Video
from cpr_fast.data.storage.record_writer import RecordWriter
from cpr_fast.data.storage.records import record_path, split_record

CPU = torch.device("cpu")
DATA = DataConfig(frames=4, size=32, batch_size=4, workers=2, prefetch=2)
SHAPES = [(48, 64), (60, 44), (72, 96), (50, 70)]  # height, width; several of them in one batch
LENGTHS = [12, 9, 17, 3, 11, 20, 14, 10, 8, 13]  # one is shorter than a clip


def texture(seed: int, height: int, width: int, num_frames: int) -> np.ndarray:
    """Returns a smooth coloured picture that slides by two pixels a frame: uint8 [F, H, W, 3]."""
    noise = np.random.default_rng(seed).random((height, width + 2 * num_frames, 3)).astype(np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), 3)
    smooth = (smooth - smooth.min()) / (smooth.max() - smooth.min())
    return np.stack([(235 * smooth[:, 2 * t : 2 * t + width] + 10).astype(np.uint8) for t in range(num_frames)])


def ten_videos(folder: Path) -> Index:
    """Writes ten videos of four sizes. The flow of each is its red channel (u) and its negative (v), one frame less."""
    videos = []
    for i, num_frames in enumerate(LENGTHS):
        height, width = SHAPES[i % len(SHAPES)]
        pictures = texture(i, height, width, num_frames)
        path = write_video(folder / f"v{i}", pictures, "mjpeg-avi" if i % 2 else "h264-bframes")
        red = pictures[:-1, ..., 0]
        flow = write_video(folder / f"v{i}_flow", np.concatenate([red, 255 - red], axis=1), "mjpeg-mkv")
        videos.append(Video(path, f"class{i % 3}", f"source{i // 2}", "train", num_frames, 25.0, width, height, flow))
    return Index(videos)


def other_route(folder: Path, kind: str, route: str) -> tuple[Video, Index]:
    """Writes a video of 30 frames and its flow, as files that DALI decodes on the CPU or as JPEG records."""
    pictures = texture(0, 48, 64, 30)
    red = pictures[:-1, ..., 0]
    if route == "packets":
        path = write_video(folder / "rgb", pictures, kind)
        flow = write_video(folder / "flow", np.concatenate([red, 255 - red], axis=1), "mjpeg-mkv")
    else:
        path, flow = record_path(folder / "rgb.lmdb", "a/b"), record_path(folder / "flow.lmdb", "a/b")
        bgr = np.stack([red, 255 - red, np.full_like(red, 128)], axis=-1)  # (u, v, 128)
        for target, frames in ((path, pictures[..., ::-1]), (flow, bgr)):
            with RecordWriter(split_record(target)[0]) as writer:
                writer.put(
                    "a/b", [cv2.imencode(".jpg", f, [cv2.IMWRITE_JPEG_QUALITY, 100])[1].tobytes() for f in frames]
                )
    video = Video(path, "a", "a", "train", 30, 25.0, 64, 48, flow)
    return video, Index([video])


def collect(loader, epoch=0, start_step=0):
    with_loader = list(loader.epoch(epoch, start_step))
    loader.close()
    return with_loader


def levels(clip: torch.Tensor) -> np.ndarray:
    """Returns a normalised clip [3, T, S, S] as 0..255 levels, float32 [T, S, S, 3]."""
    pixels = clip.permute(1, 2, 3, 0).numpy() * np.array(STD, np.float32) + np.array(MEAN, np.float32)
    return 255 * pixels


def resized(frames: np.ndarray, box: np.ndarray, flip: bool, size: int) -> np.ndarray:
    """PIL's crop and bicubic resize, uint8 [T, S, S, 3]."""
    top, left, bottom, right = (int(edge) for edge in box)
    out = []
    for frame in frames:
        picture = Image.fromarray(frame).crop((left, top, right, bottom)).resize((size, size), Image.BICUBIC)
        out.append(np.asarray(picture)[:, ::-1] if flip else np.asarray(picture))
    return np.stack(out)


def neutral(clips: Clips) -> np.ndarray:
    """Returns which clips are only cropped, resized and flipped, bool [M]."""
    return (clips.hue == 0) & (clips.gray == NO_GRAY).all(axis=1) & (clips.sigma == 0)


def assert_same_batches(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        for view in a.clips:
            assert torch.equal(a.clips[view], b.clips[view])
        for name in ("video", "source", "label", "start"):
            assert torch.equal(getattr(a, name), getattr(b, name))
