"""The DALI graphs: the same augmentation behind three routes, which differ in the kind of input that the graph
receives.

    frames    Frames are decoded and cut outside of DALI (PyAV, simplejpeg, torch). For training without a GPU, and for
              flow that is computed on the fly.
    packets   `fn.decoders.video`. A sample is the encoded packets that a video's clips need. NVDEC ("mixed"); with
              "cpu" DALI decodes VP9 and MJPEG only.
    jpegs     `fn.decoders.image`. A sample is a JPEG. nvJPEG ("mixed") or libjpeg-turbo ("cpu").

The graph of a route is the same on both devices; only the device of the decoder differs. Frames that enter by the route
"frames" already have their final size and, on the CPU, everything but the normalisation (`cut.py` says why).

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
from cpr_fast.data.clips.sampling import Clips

try:
    from nvidia.dali import fn, pipeline_def, types
except ImportError as error:
    raise ImportError(
        "loading clips needs NVIDIA DALI: pip install nvidia-dali-cuda130 (or nvidia-dali-cuda120); "
        "DALI also runs without a GPU"
    ) from error

Route = Literal["frames", "packets", "jpegs"]


def augment(frames, draw, view: str, data: DataConfig, layout: str = "FHWC"):
    """Augments one planned clip, uint8, or a frame of it (`layout` "HWC"). `draw` is its row of `draw_rows`, float32
    [11]; the result is normalised float32.

    PIL crops before it resizes; the result here differs from PIL's by one or two levels, and by more at the edges of
    the box.
    """
    interpolation = types.INTERP_LINEAR if data.augment == "iic" else types.INTERP_CUBIC
    out = fn.resize(frames, roi_start=draw[0:2], roi_end=draw[2:4], size=[data.size] * 2, interp_type=interpolation)
    if view == "flow":  # the published channel order (128, v, u), as PIL reads the published BGR files
        u, v = _channel(out, 0), _channel(out, 1)
        out = fn.cat(u * np.uint8(0) + np.uint8(128), v, u, axis_name="C")
    return finish(out, draw, view, data, layout)


def finish(out, draw, view: str, data: DataConfig, layout: str = "FHWC"):
    """Applies colour, blur, flip and normalisation to a clip that has been cut.

    Parameters are per clip, so all frames of a clip get the same change. Boxes and flips are shared by the views;
    colour and blur apply to RGB only. The two colour operators are skipped where they would change nothing, because
    they are most of the cost. Compared with PIL, brightness, saturation and blur differ by at most two levels; contrast
    pivots on 128 instead of the frame's mean, and hue is a rotation in YIQ instead of a shift in HSV.
    """
    if view != "flow":
        if draw[9] > 0:
            out = fn.color_twist(out, brightness=draw[5], contrast=draw[6], saturation=draw[7], hue=draw[8])
        if draw[10] > 0:
            out = fn.gaussian_blur(out, sigma=draw[10])
    return normalised(out, data, layout, mirror=fn.cast(draw[4], dtype=types.INT32))


def normalised(out, data: DataConfig, layout: str = "FHWC", **mirror):
    """Normalises by the mean and standard deviation of `data.augment`; with `mirror` also flips."""
    mean, std = normalisation(data.augment)
    return fn.crop_mirror_normalize(
        out,
        **mirror,
        mean=[255 * m for m in mean],
        std=[255 * s for s in std],
        output_layout=layout,
    )


def _channel(frames, number: int):
    return fn.slice(frames, start=number, shape=1, axis_names="C")


@pipeline_def(enable_conditionals=True, exec_dynamic=True, prefetch_queue_depth=1)
def frames_graph(view: str, data: DataConfig, device: str):
    """The graph of the route "frames". A sample is a clip: input "frames", uint8 [T, S, S, 3], and on "gpu" also "draw"
    [11]. One output."""
    frames = fn.external_source(name="frames", device="cpu", layout="FHWC", no_copy=True)
    if device == "cpu":
        return normalised(frames, data)
    return finish(frames.gpu(), fn.external_source(name="draw", device="cpu"), view, data)


@pipeline_def(enable_conditionals=True, exec_dynamic=True, prefetch_queue_depth=1)
def packets_graph(view: str, data: DataConfig, group: int, decoder: str):
    """The graph of the route "packets". A sample is a group: inputs "draw" [G, 11], "packets" uint8 [L], "chosen" int32
    [U], the frames to decode, and "order" int32 [G, T], the place in `chosen` of every clip's frames. G outputs.

    Each frame is requested once and in order, because the decoder starts again for a frame that is requested twice.
    """
    draw = fn.external_source(name="draw", device="cpu")
    packets = fn.external_source(name="packets", device="cpu")
    chosen = fn.external_source(name="chosen", device="cpu")
    order = fn.external_source(name="order", device="cpu")
    frames = fn.decoders.video(packets, device=decoder, frames=chosen)
    if view == "flow":  # u is above v in the luma plane; neutral chroma decodes to R = G = B = luma
        u = fn.slice(frames, rel_start=[0.0], rel_shape=[0.5], axis_names="H")
        v = fn.slice(frames, rel_start=[0.5], rel_shape=[0.5], axis_names="H")
        frames = fn.cat(_channel(u, 0), _channel(v, 0), axis_name="C")
    clips = [fn.sequence_rearrange(frames, new_order=order[c]) for c in range(group)]
    return tuple(augment(clip, draw[c], view, data) for c, clip in enumerate(clips))


@pipeline_def(enable_conditionals=True, exec_dynamic=True, prefetch_queue_depth=1)
def jpegs_graph(view: str, data: DataConfig, cuts: int, decoder: str):
    """The graph of the route "jpegs". A sample is a frame: inputs "draw" [cuts, 11] and "jpegs" uint8 [L]. One output
    per cut.
    """
    draw = fn.external_source(name="draw", device="cpu")
    jpegs = fn.external_source(name="jpegs", device="cpu")
    frames = fn.decoders.image(jpegs, device=decoder, output_type=types.RGB)
    if view == "flow":  # (128, v, u)
        frames = fn.cat(_channel(frames, 2), _channel(frames, 1), axis_name="C")
    return tuple(augment(frames, draw[c], view, data, "HWC") for c in range(cuts))


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
        self._views, self._group, self._clip_major, self._lock = dict(routes), group, clip_major, threading.Lock()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._same_frames, self._frames = same_frames, data.frames
        gpu, decoder = (None, "cpu") if self._stream is None else (self._stream.device.index, "mixed")
        options: dict[str, Any] = {"num_threads": data.workers, "device_id": gpu}
        cuts = group if same_frames else 1
        self._pipelines = {}
        for view, route in routes.items():
            if route == "frames":
                pipeline = frames_graph(view, data, "cpu" if gpu is None else "gpu", batch_size=max_clips, **options)
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
        pipeline, rows, draw = self._pipelines[view], self.rows(len(clips)), draw_rows(clips)
        if route == "frames":
            if self._stream is not None:
                pipeline.feed_input("draw", draw[rows])
            pipeline.feed_input("frames", [samples[row] for row in rows])
        elif route == "packets":
            pipeline.feed_input("draw", draw.reshape(-1, self._group, draw.shape[1]))
            for name, values in zip(("packets", "chosen", "order"), zip(*samples, strict=True), strict=True):
                pipeline.feed_input(name, list(values))
        elif self._same_frames:
            pipeline.feed_input("draw", draw.reshape(-1, self._group, draw.shape[1]).repeat(self._frames, axis=0))
            pipeline.feed_input("jpegs", [jpeg for clip in samples[:: self._group] for jpeg in clip])
        else:
            pipeline.feed_input("draw", draw[rows, None].repeat(self._frames, axis=0))
            pipeline.feed_input("jpegs", [jpeg for row in rows for jpeg in samples[row]])
        tensor = self._owned(pipeline.run())  # [M, T, S, S, 3] or, of single frames, [M * T, S, S, 3]
        return tensor.view(len(draw), self._frames, *tensor.shape[-3:]).permute(0, 4, 1, 2, 3)

    def _owned(self, outputs: Sequence[Any]) -> Tensor:
        """Returns DALI's outputs as one tensor, whose memory stays valid as long as the tensor is referenced."""
        if self._stream is None:
            return self._joined([torch.from_dlpack(output.as_tensor()) for output in outputs])
        # DALI reuses a buffer once it is released, without waiting for kernels in torch's streams that may still read
        # it.
        with torch.cuda.stream(self._stream):
            parts = [torch.from_dlpack(output.as_tensor()) for output in outputs]
            tensor = parts[0].clone() if len(parts) == 1 else self._joined(parts)
        self._stream.synchronize()  # this blocks only the background thread, and only until the copies are finished
        tensor.record_stream(torch.cuda.current_stream(tensor.device))
        return tensor

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


def draw_rows(clips: Clips) -> np.ndarray:
    """Returns the plan as rows for the graphs, float32 [M, 11]: box (4 values), flip, brightness, contrast, saturation,
    hue, whether any colour changes, sigma."""
    colour = (clips.brightness, clips.contrast, clips.saturation, clips.hue)
    neutral = np.logical_and.reduce([value == rest for value, rest in zip(colour, (1, 1, 1, 0), strict=True)])
    return np.column_stack([clips.box, clips.flip, *colour, ~neutral, clips.sigma]).astype(np.float32)
