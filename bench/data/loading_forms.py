"""Other decoders, and augmentations that can follow any of them, with which the loader is compared.

A decoder reads the frames of one clip, and an augmentation turns them into the input of a network, all in one thread.
The plan (frames, box, flip and colours) is that of this project, and the same for every form.

A decoder of files is made for a view. Flow files hold u above v in luma, and every decoder here gives them as (u, v);
only PyAV can give luma without a conversion to RGB. Records of flow are JPEGs, which PIL and the others decode as the
published code does, to (128, v, u).

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

# increasing frame numbers [T] -> uint8 [T, H, W, 3], or (u, v) as [T, H, W, 2]; reads the file of `Video.path`
Decoder = Callable[[Video, np.ndarray], np.ndarray]
# clips, their frames, view, data -> float32 [M, 3, T, S, S]
Augmentation = Callable[[Clips, Iterable[np.ndarray], str, DataConfig], torch.Tensor]


# ---- video files ---------------------------------------------------------------------------------------------
def pyav(view: str) -> Decoder:
    """Decodes from the first frame of the file, with one scaler; only the needed frames are converted."""

    def read(video: Video, frames: np.ndarray) -> np.ndarray:
        put, out = _converter(video, len(frames), view)
        wanted = {int(number): place for place, number in enumerate(frames)}
        with av.open(str(video.path)) as container:
            container.streams.video[0].codec_context.thread_count = 1
            for number, frame in enumerate(container.decode(video=0)):
                if number in wanted:
                    put(frame, wanted.pop(number))
                    if not wanted:
                        return out
        raise ValueError(f"{video.path} ends before frame {min(wanted)}")

    return read


def pyav_seek(view: str) -> Decoder:
    """Decodes from the previous key frame, which is found by time. Correct only if frames are evenly spaced in time."""

    def read(video: Video, frames: np.ndarray) -> np.ndarray:
        put, out = _converter(video, len(frames), view)
        wanted = {int(number): place for place, number in enumerate(frames)}
        with av.open(str(video.path)) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            ticks, origin = 1 / (stream.average_rate * stream.time_base), stream.start_time or 0
            container.seek(origin + round(int(frames[0]) * ticks), stream=stream)
            for frame in container.decode(stream):
                place = wanted.pop(round((frame.pts - origin) / ticks), None)
                if place is not None:
                    put(frame, place)
                    if not wanted:
                        return out
        raise ValueError(f"{video.path} ends before frame {min(wanted)}")

    return read


def _converter(video: Video, count: int, view: str) -> tuple[Callable[[av.VideoFrame, int], None], np.ndarray]:
    """Returns a function that puts a decoded frame in its place, and the array that it fills."""
    scaler, out = VideoReformatter(), np.empty((count, video.height, video.width, 2 if view == "flow" else 3), np.uint8)

    def rgb(frame: av.VideoFrame, place: int) -> None:
        out[place] = scaler.reformat(frame, format="rgb24").to_ndarray()

    def flow(frame: av.VideoFrame, place: int) -> None:
        luma = np.frombuffer(frame.planes[0], np.uint8).reshape(-1, frame.planes[0].line_size)[:, : video.width]
        cv2.merge([luma[: video.height], luma[video.height : 2 * video.height]], dst=out[place])

    return (flow if view == "flow" else rgb), out


def torchcodec(seek_mode: str) -> Callable[[str], Decoder]:
    def prepare(view: str) -> Decoder:
        decoders = peer("torchcodec.decoders", "torchcodec")

        def read(video: Video, frames: np.ndarray) -> np.ndarray:
            decoder = decoders.VideoDecoder(
                str(video.path), dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode=seek_mode
            )
            return _of_view(decoder.get_frames_at(frames.tolist()).data.numpy(), view, video)

        return read

    return prepare


def decord(view: str) -> Decoder:
    library = peer("decord", "decord")

    def read(video: Video, frames: np.ndarray) -> np.ndarray:
        reader = library.VideoReader(str(video.path), num_threads=1)
        return _of_view(reader.get_batch(frames.tolist()).asnumpy(), view, video)

    return read


def opencv(view: str) -> Decoder:
    """Seeks with OpenCV's own function, then reads frame after frame."""

    def read(video: Video, frames: np.ndarray) -> np.ndarray:
        capture = cv2.VideoCapture(str(video.path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
        capture.set(cv2.CAP_PROP_POS_FRAMES, int(frames[0]))
        out = np.zeros((len(frames), video.height, video.width, 2 if view == "flow" else 3), np.uint8)
        for place, gap in enumerate(np.diff(frames, prepend=frames[0] - 1)):
            for _ in range(gap - 1):
                capture.grab()
            found, picture = capture.read()
            if found and view == "flow":
                out[place] = _of_view(picture[None], view, video)[0]
            elif found:
                cv2.cvtColor(picture, cv2.COLOR_BGR2RGB, dst=out[place])
        return out

    return read


def _of_view(pictures: np.ndarray, view: str, video: Video) -> np.ndarray:
    """Returns the pictures of a file in the channels of a view; those of flow are gray, u above v."""
    if view != "flow":
        return pictures
    out = np.empty((len(pictures), video.height, video.width, 2), np.uint8)
    for place, picture in enumerate(pictures):
        luma = cv2.extractChannel(picture, 0)[:, : video.width]
        cv2.merge([luma[: video.height], luma[video.height :]], dst=out[place])
    return out


def own(view: str) -> Decoder:
    """Does what the threads of the loader do for a clip, except for the cutting."""
    return lambda video, frames: read_frames(video.path, frames, view, video.num_frames)


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


# name -> a function that gives the decoder of a view, or raises Unavailable
VIDEO_DECODERS: dict[str, Callable[[str], Decoder]] = {
    "cpr_fast": own,
    "PyAV": pyav,
    "PyAV, seek": pyav_seek,
    "torchcodec, exact": torchcodec("exact"),
    "torchcodec, approximate": torchcodec("approximate"),
    "decord": decord,
    "OpenCV": opencv,
}
RECORD_DECODERS: dict[str, Callable[[str], Decoder]] = {
    "cpr_fast": own,
    "PIL": lambda view: pil_record,
    "OpenCV": lambda view: opencv_record,
    "simplejpeg": lambda view: simplejpeg_record,
}


def decoders(video: Video) -> dict[str, Callable[[str], Decoder]]:
    return RECORD_DECODERS if is_record(video.path) else VIDEO_DECODERS


def prepared(name: str, video: Video, view: str) -> Decoder:
    """Returns the decoder of that name, for videos like this one. Raises Unavailable."""
    if name == "PyAV, seek" and video.path.suffix == ".avi":
        raise Unavailable("AVI carries no presentation times")
    return decoders(video)[name](view)


# ---- augmentations -----------------------------------------------------------------------------------------------
def published(clips: Clips, frames: Iterable[np.ndarray], view: str, data: DataConfig) -> torch.Tensor:
    """Augments as the published code does: PIL, frame by frame. This is the reference for the other forms."""
    return ReferenceGraph(data, [view]).run(clips, {view: [own_channels(pixels, view) for pixels in frames]})[view]


def own_channels(pixels: np.ndarray, view: str) -> np.ndarray:
    """Returns frames in the channels that the loader reads: RGB, or (u, v) of a picture (128, v, u)."""
    return pixels[..., 2:0:-1] if view == "flow" and pixels.shape[-1] == 3 else pixels


def _own_memory(pixels: np.ndarray, view: str) -> np.ndarray:
    """Returns what `own_channels` does as the loader reads it, with the channels of a pixel adjacent in memory."""
    if view != "flow" or pixels.shape[-1] != 3:
        return pixels
    out = np.empty((*pixels.shape[:3], 2), np.uint8)
    for picture, frame in zip(pixels, out, strict=True):
        cv2.mixChannels([picture], [frame], [2, 0, 1, 1])
    return out


def _pictures(pixels: np.ndarray) -> np.ndarray:
    """Returns frames as the pictures that are augmented, uint8 [T, H, W, 3]: RGB, or (128, v, u) of (u, v)."""
    if pixels.shape[-1] == 3:
        return pixels
    out = np.full((*pixels.shape[:3], 3), 128, np.uint8)
    for frame, picture in zip(pixels, out, strict=True):
        cv2.mixChannels([frame], [picture], [0, 2, 1, 1])
    return out


def fast(clips: Clips, frames: Iterable[np.ndarray], view: str, data: DataConfig) -> torch.Tensor:
    """Augments in the fastest hand-written loop that was found: torch's vectorised bicubic resize of bytes, colours,
    blur and flip in OpenCV, normalisation in place in NumPy, all into one batch.
    """
    out = np.empty((len(clips), data.frames, data.size, data.size, 3), np.float32)
    for row, pixels in enumerate(frames):
        _fast_clip(clips[[row]], pixels, view, data, out[row])
    return torch.from_numpy(out).permute(0, 4, 1, 2, 3)


def _fast_clip(clip: Clips, frames: np.ndarray, view: str, data: DataConfig, out: np.ndarray) -> None:
    top, left, bottom, right = clip.box[0]
    size, cut = data.size, torch.from_numpy(_pictures(frames[:, top:bottom, left:right])).permute(0, 3, 1, 2)
    small = torch.nn.functional.interpolate(cut, (size, size), mode="bicubic", antialias=True)
    pixels = small.permute(0, 2, 3, 1).contiguous().numpy()
    finish_clip(pixels, clip, view, data)
    mean, std = (np.tile(np.float32(value), size) for value in normalisation(data.augment))
    flat = out.reshape(data.frames * size, 3 * size)
    np.multiply(pixels.reshape(flat.shape), 1 / (255 * std), out=flat, dtype=np.float32)
    np.subtract(flat, mean / std, out=flat)


@functools.cache
def _graph(data: DataConfig, view: str) -> ClipGraph:
    return ClipGraph(data, {view: "frames"}, torch.device("cpu"), data.batch_size)


def same(clips: Clips, frames: Iterable[np.ndarray], view: str, data: DataConfig) -> torch.Tensor:
    """Augments as the loader does, which also cuts and colours every clip as soon as it is decoded."""
    cut = []
    for row, pixels in enumerate(frames):
        pixels, whole = _own_memory(pixels, view), Region.whole(*pixels.shape[1:3])
        cut += cut_clips([pixels], clips[[row]], view, data, whole, finish=True)
    return _graph(data, view).run(clips, {view: cut})[view]


@functools.cache
def _torchvision() -> ModuleType:
    """Imports torchvision.transforms.v2.functional without its compiled operators, which need one version of torch."""
    sys.modules.setdefault("torchvision._meta_registrations", ModuleType("of operators that are not loaded"))
    return peer("torchvision.transforms.v2.functional", "torchvision")


def torchvision(clips: Clips, frames: Iterable[np.ndarray], view: str, data: DataConfig) -> torch.Tensor:
    """Augments as the manual of torchvision recommends: tensors of bytes through transforms.v2, a clip at a time."""
    v2, size = _torchvision(), [data.size, data.size]
    mean, std = (list(value) for value in normalisation(data.augment))
    out = torch.empty(len(clips), data.frames, 3, data.size, data.size)
    for row, pixels in enumerate(frames):
        clip = clips[[row]]
        top, left, bottom, right = (int(edge) for edge in clip.box[0])
        x = torch.from_numpy(_pictures(pixels)).permute(0, 3, 1, 2)
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
