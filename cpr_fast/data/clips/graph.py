"""The graphs, which turn what was read into clips by one of three routes. DALI decodes, crops and resizes; torch does
the rest on a GPU (`colour.py`).

    frames    Frames are decoded and cut outside of DALI (PyAV, simplejpeg, torch). For training without a GPU, and for
              flow that is computed on the fly.
    packets   `fn.decoders.video`. A sample is the encoded packets that a video's clips need. NVDEC ("mixed"); with
              "cpu" DALI decodes VP9 and MJPEG only.
    jpegs     `fn.decoders.image`. A sample is a JPEG. nvJPEG ("mixed") or libjpeg-turbo ("cpu").

The graph of a route is the same on both devices; only the device of the decoder differs. Frames that enter by the route
"frames" already have their final size and, on the CPU, everything but the normalisation (`cut.py` says why), which is
DALI's.

Letters: M clips of a run = N groups (clips of one video) of G clips, T frames, S side of the square output, U distinct
frames of a group.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from cpr_fast.config import DataConfig
from cpr_fast.config.pixels import normalisation
from cpr_fast.data.clips.colour import finish_clips
from cpr_fast.data.clips.sampling import Clips

try:
    from nvidia.dali import fn, pipeline_def, types
except ImportError as error:
    raise ImportError(
        "loading clips needs NVIDIA DALI: pip install nvidia-dali-cuda130 (or nvidia-dali-cuda120); "
        "DALI also runs without a GPU"
    ) from error

Route = Literal["frames", "packets", "jpegs"]


def cut(frames, box, view: str, data: DataConfig):
    """Crops and resizes the frames of one planned clip, uint8, or one frame of it, to `box`, its row of `Clips.box`.

    PIL crops before it resizes; the result here differs from PIL's by one or two levels, and by more at the edges of
    the box. Flow (u, v) comes out in the published channel order (128, v, u), as PIL reads the published BGR files.
    """
    interpolation = types.INTERP_LINEAR if data.augment == "iic" else types.INTERP_CUBIC
    out = fn.resize(frames, roi_start=box[0:2], roi_end=box[2:4], size=[data.size] * 2, interp_type=interpolation)
    if view == "flow":
        u, v = _channel(out, 0), _channel(out, 1)
        out = fn.cat(u * np.uint8(0) + np.uint8(128), v, u, axis_name="C")
    return out


@pipeline_def(exec_dynamic=True, prefetch_queue_depth=1)
def normalised_graph(data: DataConfig):
    """Defines the graph of the route "frames" on the CPU. A sample is a finished clip: input "frames", uint8 [T, S, S,
    3]."""
    frames = fn.external_source(name="frames", device="cpu", layout="FHWC", no_copy=True)
    mean, std = ([255 * value for value in values] for values in normalisation(data.augment))
    return fn.crop_mirror_normalize(frames, mean=mean, std=std, output_layout="FHWC")


@pipeline_def(exec_dynamic=True, prefetch_queue_depth=1)
def packets_graph(view: str, data: DataConfig, group: int, decoder: str):
    """Defines the graph of the route "packets". A sample is a group: inputs "box" [G, 4], "packets" uint8 [L], "chosen"
    int32 [U], the frames to decode, and "order" int32 [G, T], the place in `chosen` of every clip's frames. G outputs.

    Each frame is requested once and in order, because the decoder starts again for a frame that is requested twice.
    """
    box = fn.external_source(name="box", device="cpu")
    packets = fn.external_source(name="packets", device="cpu")
    chosen = fn.external_source(name="chosen", device="cpu")
    order = fn.external_source(name="order", device="cpu")
    frames = fn.decoders.video(packets, device=decoder, frames=chosen)
    if view == "flow":  # u is above v in the luma plane; neutral chroma decodes to R = G = B = luma
        u = fn.slice(frames, rel_start=[0.0], rel_shape=[0.5], axis_names="H")
        v = fn.slice(frames, rel_start=[0.5], rel_shape=[0.5], axis_names="H")
        frames = fn.cat(_channel(u, 0), _channel(v, 0), axis_name="C")
    clips = [fn.sequence_rearrange(frames, new_order=order[c]) for c in range(group)]
    return tuple(cut(clip, box[c], view, data) for c, clip in enumerate(clips))


@pipeline_def(exec_dynamic=True, prefetch_queue_depth=1)
def jpegs_graph(view: str, data: DataConfig, cuts: int, decoder: str):
    """Defines the graph of the route "jpegs". A sample is a frame: inputs "box" [cuts, 4] and "jpegs" uint8 [L]. One
    output per cut."""
    box = fn.external_source(name="box", device="cpu")
    jpegs = fn.external_source(name="jpegs", device="cpu")
    frames = fn.decoders.image(jpegs, device=decoder, output_type=types.RGB)
    if view == "flow":  # (128, v, u)
        frames = fn.cat(_channel(frames, 2), _channel(frames, 1), axis_name="C")
    return tuple(cut(frames, box[c], view, data) for c in range(cuts))


def _channel(frames, number: int):
    return fn.slice(frames, start=number, shape=1, axis_names="C")


class ClipGraph:
    """The graphs of a loader, built once. A run takes up to `max_clips` planned clips and returns a tensor per view."""

    def __init__(
        self,
        data: DataConfig,
        routes: Mapping[str, Route],
        device: torch.device,
        max_clips: int,
        *,
        group: int = 1,
        same_frames: bool = False,
        clip_major: bool = False,
    ) -> None:
        """`group` = G consecutive clips are of one video; with `same_frames` they also have the same frames and differ
        only in how these are cut.

        With `clip_major` the rows of the output are the first clips of all groups, then all second clips, and so on.
        Otherwise they are in the order of the input.
        """
        self._views, self._data, self._lock = dict(routes), data, threading.Lock()
        self._group, self._clip_major, self._same_frames, self._frames = group, clip_major, same_frames, data.frames
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        gpu, decoder = (None, "cpu") if self._stream is None else (self._stream.device.index, "mixed")
        options: dict[str, Any] = {"num_threads": data.workers, "device_id": gpu}
        cuts = group if same_frames else 1
        self._pipelines = {}
        for view, route in routes.items():
            if route == "frames" and gpu is not None:
                continue  # the frames only need to be copied to the GPU
            if route == "frames":
                pipeline = normalised_graph(data, batch_size=max_clips, **options)
            elif route == "packets":
                pipeline = packets_graph(view, data, group, decoder, batch_size=max_clips // group, **options)
            else:
                frames = max_clips // cuts * data.frames
                pipeline = jpegs_graph(view, data, cuts, decoder, batch_size=frames, **options)
            pipeline.build()
            self._pipelines[view] = pipeline

    def rows(self, clips: int) -> np.ndarray:
        """Returns which input clip each row of the output is, int64 [M]."""
        rows = np.arange(clips).reshape(-1, self._group)
        return (rows.T if self._clip_major else rows).ravel()

    def run(self, clips: Clips, samples: dict[str, list]) -> dict[str, Tensor]:
        """Returns view -> float32 [M, 3, T, S, S], in channels_last_3d.

        `samples[view]` depends on the route. "frames": every clip as `cut_clips` returns it, uint8 [T, S, S, 3], on the
        CPU with its colours, blur and flip. "packets": (packets, chosen, order) of every group. "jpegs": the T JPEGs of
        every clip, uint8 [L] each.
        """
        with self._lock:  # two epochs of one loader may be iterated at the same time
            return {view: self._run_view(view, route, clips, samples[view]) for view, route in self._views.items()}

    def _run_view(self, view: str, route: Route, clips: Clips, samples: list) -> Tensor:
        """Returns the clips of one view, float32 [M, 3, T, S, S]."""
        rows = self.rows(len(clips))
        if route == "frames" and self._stream is None:
            self._pipelines[view].feed_input("frames", [samples[row] for row in rows])
            tensor = self._joined([torch.from_dlpack(self._pipelines[view].run()[0].as_tensor())])
        else:
            parts = None if route == "frames" else self._decoded(view, route, clips, samples)
            # Without a GPU the stream is None, and this has no effect. With one, DALI reuses a buffer once it is
            # released, without waiting for kernels in torch's streams that may still read it.
            with torch.cuda.stream(self._stream):
                if parts is None:
                    pixels = torch.from_numpy(np.stack([samples[row] for row in rows])).to(self._stream.device)
                else:
                    pixels = self._joined([torch.from_dlpack(part.as_tensor()) for part in parts])
                tensor = finish_clips(pixels.view(len(rows), self._frames, *pixels.shape[-3:]), clips[rows], view,
                                      self._data)  # fmt: skip
            if self._stream is not None:
                self._stream.synchronize()  # this blocks only the background thread
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
        return tensor.permute(0, 4, 1, 2, 3)

    def _decoded(self, view: str, route: Route, clips: Clips, samples: list) -> Sequence[Any]:
        """Returns DALI's outputs: cut clips uint8 [N, T, S, S, 3] or frames [N T, S, S, 3], one output per clip of a
        group."""
        pipeline, rows, box = self._pipelines[view], self.rows(len(clips)), clips.box.astype(np.float32)
        groups = box.reshape(-1, self._group, 4)
        if route == "packets":
            pipeline.feed_input("box", groups)
            for name, values in zip(("packets", "chosen", "order"), zip(*samples, strict=True), strict=True):
                pipeline.feed_input(name, list(values))
        elif self._same_frames:
            pipeline.feed_input("box", groups.repeat(self._frames, axis=0))
            pipeline.feed_input("jpegs", [jpeg for clip in samples[:: self._group] for jpeg in clip])
        else:
            pipeline.feed_input("box", box[rows, None].repeat(self._frames, axis=0))
            pipeline.feed_input("jpegs", [jpeg for row in rows for jpeg in samples[row]])
        return pipeline.run()

    def _joined(self, parts: list[Tensor]) -> Tensor:
        """Joins the outputs, one per clip of a group, as rows. A single output is not copied: it is DALI's buffer."""
        if len(parts) == 1:
            return parts[0]
        clips = [part.view(-1, self._frames, *part.shape[-3:]) for part in parts]  # G of [N, T, S, S, 3]
        return torch.cat(clips) if self._clip_major else torch.stack(clips, 1).flatten(0, 1)


def residual(clips: Tensor, data: DataConfig) -> Tensor:
    """Returns IIC's motion view of RGB clips [M, 3, T, S, S], in the same normalisation: ((x - roll(x, 1, T)) + 1) / 2
    for x in 0..1.

    As published, the first frame is compared with the last one.
    """
    mean, std = (clips.new_tensor(value).view(3, 1, 1, 1) for value in normalisation(data.augment))
    return torch.sub(clips, clips.roll(1, dims=2)).mul_(0.5).add_((0.5 - mean) / std)
