"""The DALI graphs: one augmentation behind three ways to get frames.

    frames    decoded and cut outside (PyAV, simplejpeg; torch): the route without a GPU, and of computed flow
    packets   `fn.decoders.video`, a video's needed packets a sample: NVDEC ("mixed"), or "cpu" for VP9 and MJPEG
    jpegs     `fn.decoders.image`, a JPEG a sample: nvJPEG ("mixed") or libjpeg-turbo ("cpu")

The graph of a route is the same on both devices; only the decoder's device differs. That of frames starts where they
have their size and, on the CPU, all but the normalisation (`cut.py` says why).

Letters: M clips of a run = N groups (clips of one video) of G, T frames, S side of the square output, U distinct frames
of a group.
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
        "cpr_fast.data.clips.loader needs NVIDIA DALI: pip install nvidia-dali-cuda130 (or nvidia-dali-cuda120); "
        "it also runs without a GPU"
    ) from error

Route = Literal["frames", "packets", "jpegs"]


def augment(frames, draw, view: str, data: DataConfig, layout: str = "FHWC"):
    """One planned clip, or a frame of it (`layout` "HWC"): uint8, draw float32 [11] of `draw_rows` -> float32.

    Against PIL, which crops first, the resize differs by a level or two, and more at the edges of the box.
    """
    interpolation = types.INTERP_LINEAR if data.augment == "iic" else types.INTERP_CUBIC
    out = fn.resize(frames, roi_start=draw[0:2], roi_end=draw[2:4], size=[data.size] * 2, interp_type=interpolation)
    if view == "flow":  # the published channel order (128, v, u): constant first, as PIL reads their BGR files
        u, v = _channel(out, 0), _channel(out, 1)
        out = fn.cat(u * np.uint8(0) + np.uint8(128), v, u, axis_name="C")
    return finish(out, draw, view, data, layout)


def finish(out, draw, view: str, data: DataConfig, layout: str = "FHWC"):
    """A clip that is cut: colour, blur, flip and normalisation.

    Parameters are per clip, so all its frames get the same; boxes and flips are shared by the views, colour and blur
    are for RGB. The two colour operators are skipped where they would change nothing: they are most of the cost.
    Against PIL: brightness, saturation and blur differ by at most two levels; contrast pivots on 128 instead of the
    frame's mean, and hue turns linearly in YIQ instead of in HSV.
    """
    if view != "flow":
        if draw[9] > 0:
            out = fn.color_twist(out, brightness=draw[5], contrast=draw[6], saturation=draw[7], hue=draw[8])
        if draw[10] > 0:
            out = fn.gaussian_blur(out, sigma=draw[10])
    return normalised(out, data, layout, mirror=fn.cast(draw[4], dtype=types.INT32))


def normalised(out, data: DataConfig, layout: str = "FHWC", **mirror):
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
    """A sample is a clip: input "frames", uint8 [T, S, S, 3], and for "gpu" also "draw" [11]. One output."""
    frames = fn.external_source(name="frames", device="cpu", layout="FHWC", no_copy=True)
    if device == "cpu":
        return normalised(frames, data)
    return finish(frames.gpu(), fn.external_source(name="draw", device="cpu"), view, data)


@pipeline_def(enable_conditionals=True, exec_dynamic=True, prefetch_queue_depth=1)
def packets_graph(view: str, data: DataConfig, group: int, decoder: str):
    """A sample is a group: inputs "draw" [G, 11], "packets" uint8 [L], "chosen" int32 [U], the frames to decode, and
    "order" int32 [G, T], the place in `chosen` of every clip's frames. G outputs.

    The decoder is given each frame once and in order: one that it is asked for twice costs it a new start.
    """
    draw = fn.external_source(name="draw", device="cpu")
    packets = fn.external_source(name="packets", device="cpu")
    chosen = fn.external_source(name="chosen", device="cpu")
    order = fn.external_source(name="order", device="cpu")
    frames = fn.decoders.video(packets, device=decoder, frames=chosen)
    if view == "flow":  # u over v in the luma; neutral chroma decodes to R = G = B = luma
        u = fn.slice(frames, rel_start=[0.0], rel_shape=[0.5], axis_names="H")
        v = fn.slice(frames, rel_start=[0.5], rel_shape=[0.5], axis_names="H")
        frames = fn.cat(_channel(u, 0), _channel(v, 0), axis_name="C")
    clips = [fn.sequence_rearrange(frames, new_order=order[c]) for c in range(group)]
    return tuple(augment(clip, draw[c], view, data) for c, clip in enumerate(clips))


@pipeline_def(enable_conditionals=True, exec_dynamic=True, prefetch_queue_depth=1)
def jpegs_graph(view: str, data: DataConfig, cuts: int, decoder: str):
    """A sample is a frame: inputs "draw" [cuts, 11] and "jpegs" uint8 [L]. As many outputs as there are cuts."""
    draw = fn.external_source(name="draw", device="cpu")
    jpegs = fn.external_source(name="jpegs", device="cpu")
    frames = fn.decoders.image(jpegs, device=decoder, output_type=types.RGB)
    if view == "flow":  # (128, v, u)
        frames = fn.cat(_channel(frames, 2), _channel(frames, 1), axis_name="C")
    return tuple(augment(frames, draw[c], view, data, "HWC") for c in range(cuts))


class ClipGraph:
    """The graphs of a loader, built once: up to `max_clips` planned clips in, one tensor per view out."""

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
        """Clips come in groups of G = `group` that are of one video; `same_frames`: they differ in their cut alone.

        With `clip_major` the rows of the output are all first clips, then all second ones; without, they are in the
        order of the input.
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
        """Which input clip each row of the output is, int64 [M]."""
        rows = np.arange(clips).reshape(-1, self._group)
        return (rows.T if self._clip_major else rows).ravel()

    def run(self, clips: Clips, samples: dict[str, list]) -> dict[str, Tensor]:
        """view -> float32 [M, 3, T, S, S], channels_last_3d.

        `samples[view]` is, by route: every clip as `cut_clips` leaves it, uint8 [T, S, S, 3], on the CPU finished;
        (packets, chosen, order) of every group; or the JPEGs of every clip, T uint8 [L] each.
        """
        with self._lock:  # two epochs of one loader may be read at the same time
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
        """DALI's outputs as one tensor that lives as long as it is referenced."""
        if self._stream is None:
            return self._joined([torch.from_dlpack(output.as_tensor()) for output in outputs])
        # DALI's pool does not know when the kernels of torch's streams have read a buffer that is given back to it.
        with torch.cuda.stream(self._stream):
            parts = [torch.from_dlpack(output.as_tensor()) for output in outputs]
            tensor = parts[0].clone() if len(parts) == 1 else self._joined(parts)
        self._stream.synchronize()  # in the background thread, and on the copies alone
        tensor.record_stream(torch.cuda.current_stream(tensor.device))
        return tensor

    def _joined(self, parts: list[Tensor]) -> Tensor:
        """One output per clip of a group, as rows; a single one is not copied: the tensor holds DALI's buffer."""
        if len(parts) == 1:
            return parts[0]
        clips = [part.view(-1, self._frames, *part.shape[-3:]) for part in parts]  # G of [N, T, S, S, 3]
        return torch.cat(clips) if self._clip_major else torch.stack(clips, 1).flatten(0, 1)


def residual(clips: Tensor, data: DataConfig) -> Tensor:
    """IIC's motion view of RGB clips [M, 3, T, S, S], same normalisation: ((x - roll(x, 1, T)) + 1) / 2 on x in 0..1.

    The first frame is compared with the last, as published.
    """
    mean, std = (clips.new_tensor(value).view(3, 1, 1, 1) for value in normalisation(data.augment))
    return torch.sub(clips, clips.roll(1, dims=2)).mul_(0.5).add_((0.5 - mean) / std)


def draw_rows(clips: Clips) -> np.ndarray:
    """float32 [M, 11]: box 4, flip, brightness, contrast, saturation, hue, any colour change, sigma."""
    colour = (clips.brightness, clips.contrast, clips.saturation, clips.hue)
    neutral = np.logical_and.reduce([value == rest for value, rest in zip(colour, (1, 1, 1, 0), strict=True)])
    return np.column_stack([clips.box, clips.flip, *colour, ~neutral, clips.sigma]).astype(np.float32)
