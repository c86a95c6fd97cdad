"""Other decoders, and augmentations that can follow any of them, with which the loader is compared.

A decoder reads the frames of one clip, and an augmentation turns them into the input of a network, all in one thread.
The plan (frames, box, flip and colours) is that of this project, and the same for every form.

Letters: F frames of a video, T frames of a clip, H x W pixels, S side of the square output, M clips.
"""

from __future__ import annotations

import functools
import io
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType

import av
import cv2
import msgpack
import numpy as np
import simplejpeg
import torch
from av.video.reformatter import VideoReformatter
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from forms import Unavailable, peer

from cpr_fast.config import DataConfig
from cpr_fast.config.pixels import normalisation
from cpr_fast.data.clips.cut import cut_clips
from cpr_fast.data.clips.finish import finish_clip
from cpr_fast.data.clips.graph import ClipGraph
from cpr_fast.data.clips.reference import ReferenceGraph
from cpr_fast.data.clips.sampling import LUMA, NO_GRAY, ORDERS, Clips
from cpr_fast.data.index.index import Video
from cpr_fast.data.storage.media import is_record, read_frames
from cpr_fast.data.storage.records import open_records, split_record
from cpr_fast.data.video.pixels import Region

Decoder = Callable[[Video, np.ndarray], np.ndarray]  # increasing frame numbers [T] -> RGB, uint8 [T, H, W, 3]
Augmentation = Callable[[Clips, Iterable[np.ndarray], DataConfig], torch.Tensor]  # -> float32 [M, 3, T, S, S]


# ---- video files ---------------------------------------------------------------------------------------------
def pyav(video: Video, frames: np.ndarray) -> np.ndarray:
    """Decodes from the first frame of the file, with one scaler; only the needed frames are converted."""
    out = np.empty((len(frames), video.height, video.width, 3), np.uint8)
    wanted, scaler = {int(number): place for place, number in enumerate(frames)}, VideoReformatter()
    with av.open(str(video.path)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        for number, frame in enumerate(container.decode(video=0)):
            if number in wanted:
                out[wanted.pop(number)] = scaler.reformat(frame, format="rgb24").to_ndarray()
                if not wanted:
                    return out
    raise ValueError(f"{video.path} ends before frame {min(wanted)}")


def pyav_seek(video: Video, frames: np.ndarray) -> np.ndarray:
    """Decodes from the previous key frame, which is found by time. Correct only if frames are evenly spaced in time."""
    out, scaler = np.empty((len(frames), video.height, video.width, 3), np.uint8), VideoReformatter()
    wanted = {int(number): place for place, number in enumerate(frames)}
    with av.open(str(video.path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        ticks, origin = 1 / (stream.average_rate * stream.time_base), stream.start_time or 0
        container.seek(origin + round(int(frames[0]) * ticks), stream=stream)
        for frame in container.decode(stream):
            place = wanted.pop(round((frame.pts - origin) / ticks), None)
            if place is not None:
                out[place] = scaler.reformat(frame, format="rgb24").to_ndarray()
                if not wanted:
                    return out
    raise ValueError(f"{video.path} ends before frame {min(wanted)}")


def torchcodec(seek_mode: str) -> Callable[[], Decoder]:
    def prepare() -> Decoder:
        decoders = peer("torchcodec.decoders", "torchcodec")

        def read(video: Video, frames: np.ndarray) -> np.ndarray:
            decoder = decoders.VideoDecoder(
                str(video.path), dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode=seek_mode
            )
            return decoder.get_frames_at(frames.tolist()).data.numpy()

        return read

    return prepare


def decord() -> Decoder:
    library = peer("decord", "decord")

    def read(video: Video, frames: np.ndarray) -> np.ndarray:
        return library.VideoReader(str(video.path), num_threads=1).get_batch(frames.tolist()).asnumpy()

    return read


def opencv(video: Video, frames: np.ndarray) -> np.ndarray:
    """Seeks with OpenCV's own function, then reads frame after frame."""
    capture = cv2.VideoCapture(str(video.path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    capture.set(cv2.CAP_PROP_POS_FRAMES, int(frames[0]))
    out = np.zeros((len(frames), video.height, video.width, 3), np.uint8)
    for place, gap in enumerate(np.diff(frames, prepend=frames[0] - 1)):
        for _ in range(gap - 1):
            capture.grab()
        read, picture = capture.read()
        if read:
            cv2.cvtColor(picture, cv2.COLOR_BGR2RGB, dst=out[place])
    return out


def own(video: Video, frames: np.ndarray) -> np.ndarray:
    """Does what the threads of the loader do for a clip, except for the cutting."""
    return read_frames(video.path, frames, "rgb", video.num_frames)


# ---- JPEG records ----------------------------------------------------------------------------------------------
def whole_record(video: Video) -> list[bytes]:
    """Returns every JPEG of a video, as the published code reads them from its LMDB file."""
    file, name = split_record(video.path)
    return msgpack.loads(open_records(file).record(name)[0], raw=True)


def pil_record(video: Video, frames: np.ndarray) -> np.ndarray:
    """Decodes as the published code does: the whole record is unpacked, and PIL decodes."""
    record = whole_record(video)
    return np.stack([np.asarray(Image.open(io.BytesIO(record[i])).convert("RGB")) for i in frames])


def opencv_record(video: Video, frames: np.ndarray) -> np.ndarray:
    record = whole_record(video)
    pictures = (cv2.imdecode(np.frombuffer(record[i], np.uint8), cv2.IMREAD_COLOR_RGB) for i in frames)
    return np.stack(list(pictures))


def simplejpeg_record(video: Video, frames: np.ndarray) -> np.ndarray:
    record = whole_record(video)
    return np.stack([simplejpeg.decode_jpeg(record[i], "RGB") for i in frames])


# name -> a function that gives the decoder, or raises Unavailable
VIDEO_DECODERS: dict[str, Callable[[], Decoder]] = {
    "cpr_fast": lambda: own,
    "PyAV": lambda: pyav,
    "PyAV, seek": lambda: pyav_seek,
    "torchcodec, exact": torchcodec("exact"),
    "torchcodec, approximate": torchcodec("approximate"),
    "decord": decord,
    "OpenCV": lambda: opencv,
}
RECORD_DECODERS: dict[str, Callable[[], Decoder]] = {
    "cpr_fast": lambda: own,
    "PIL": lambda: pil_record,
    "OpenCV": lambda: opencv_record,
    "simplejpeg": lambda: simplejpeg_record,
}


def decoders(video: Video) -> dict[str, Callable[[], Decoder]]:
    return RECORD_DECODERS if is_record(video.path) else VIDEO_DECODERS


def prepared(name: str, video: Video) -> Decoder:
    """Returns the decoder of that name, for videos like this one. Raises Unavailable."""
    if name == "PyAV, seek" and video.path.suffix == ".avi":
        raise Unavailable("AVI carries no presentation times")
    return decoders(video)[name]()


# ---- augmentations -----------------------------------------------------------------------------------------------
def published(clips: Clips, frames: Iterable[np.ndarray], data: DataConfig) -> torch.Tensor:
    """Augments as the published code does: PIL, frame by frame. This is the reference for the other forms."""
    return ReferenceGraph(data, ["rgb"]).run(clips, {"rgb": list(frames)})["rgb"]


def fast(clips: Clips, frames: Iterable[np.ndarray], data: DataConfig) -> torch.Tensor:
    """Augments in the fastest hand-written loop that was found: torch's vectorised bicubic resize of bytes, colours,
    blur and flip in OpenCV, normalisation in place in NumPy, all into one batch.
    """
    out = np.empty((len(clips), data.frames, data.size, data.size, 3), np.float32)
    for row, pixels in enumerate(frames):
        _fast_clip(clips[[row]], pixels, data, out[row])
    return torch.from_numpy(out).permute(0, 4, 1, 2, 3)


def _fast_clip(clip: Clips, frames: np.ndarray, data: DataConfig, out: np.ndarray) -> None:
    top, left, bottom, right = clip.box[0]
    size, cut = data.size, torch.from_numpy(frames[:, top:bottom, left:right]).permute(0, 3, 1, 2)
    small = torch.nn.functional.interpolate(cut, (size, size), mode="bicubic", antialias=True)
    pixels = small.permute(0, 2, 3, 1).contiguous().numpy()
    finish_clip(pixels, clip, "rgb", data)
    mean, std = (np.tile(np.float32(value), size) for value in normalisation(data.augment))
    flat = out.reshape(data.frames * size, 3 * size)
    np.multiply(pixels.reshape(flat.shape), 1 / (255 * std), out=flat, dtype=np.float32)
    np.subtract(flat, mean / std, out=flat)


@functools.cache
def _graph(data: DataConfig) -> ClipGraph:
    return ClipGraph(data, {"rgb": "frames"}, torch.device("cpu"), data.batch_size)


def same(clips: Clips, frames: Iterable[np.ndarray], data: DataConfig) -> torch.Tensor:
    """Augments as the loader does, which also cuts and colours every clip as soon as it is decoded."""
    cut = []
    for row, pixels in enumerate(frames):
        cut += cut_clips([pixels], clips[[row]], "rgb", data, Region.whole(*pixels.shape[1:3]), finish=True)
    return _graph(data).run(clips, {"rgb": cut})["rgb"]


@functools.cache
def _torchvision() -> ModuleType:
    """Imports torchvision.transforms.v2.functional without its compiled operators, which need one version of torch."""
    sys.modules.setdefault("torchvision._meta_registrations", ModuleType("of operators that are not loaded"))
    return peer("torchvision.transforms.v2.functional", "torchvision")


def torchvision(clips: Clips, frames: Iterable[np.ndarray], data: DataConfig) -> torch.Tensor:
    """Augments as the manual of torchvision recommends: tensors of bytes through transforms.v2, a clip at a time."""
    v2, size = _torchvision(), [data.size, data.size]
    mean, std = (list(value) for value in normalisation(data.augment))
    out = torch.empty(len(clips), data.frames, 3, data.size, data.size)
    for row, pixels in enumerate(frames):
        clip = clips[[row]]
        top, left, bottom, right = (int(edge) for edge in clip.box[0])
        x = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        x = v2.resized_crop(
            x, top, left, bottom - top, right - left, size, v2.InterpolationMode.BICUBIC, antialias=True
        )
        adjust = (v2.adjust_brightness, v2.adjust_contrast, v2.adjust_saturation, v2.adjust_hue)
        factors = (clip.brightness[0], clip.contrast[0], clip.saturation[0], clip.hue[0])
        for operation in ORDERS[clip.order[0]] if clip.hue[0] else ():
            x = adjust[operation](x, float(factors[operation]))
        if clip.gray[0, 0] == LUMA:
            x = v2.rgb_to_grayscale(x, 3)
        elif clip.gray[0, 0] != NO_GRAY:
            x = x[torch.arange(len(x)), torch.from_numpy(clip.gray[0]).long(), None].expand_as(x)
        if clip.sigma[0]:
            x = v2.gaussian_blur(x, [2 * int(np.ceil(3 * clip.sigma[0])) + 1] * 2, [float(clip.sigma[0])])
        if clip.flip[0]:
            x = v2.horizontal_flip(x)
        out[row] = v2.normalize(v2.to_dtype(x, torch.float32, scale=True), mean, std)
    return out.transpose(1, 2)


AUGMENTATIONS: dict[str, Augmentation] = {
    "the same": same,
    "torch and OpenCV": fast,
    "torchvision": torchvision,
    "PIL": published,
}
