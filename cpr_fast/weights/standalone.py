"""Loads the encoder of an exported folder with torch alone.

`cpr-fast export --to hub` writes this module and the network's own into the folder's `modeling.py`: what this module
imports from nowhere but torch and Python stays as it is there.

Letters in shapes: N clips, T frames, H x W pixels, C pooled features, D feature width.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}  # fmt: skip
NETWORKS: dict[str, type[nn.Module]] = {}  # filled at the end of a folder's modeling.py


class BatchNorm3d(nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` [N, C, T, H, W] -> [N, C, T, H, W]; with `relu`, ReLU is applied to the result."""

    def forward(self, x: Tensor, relu: bool = False) -> Tensor:
        y = super().forward(x)
        return F.relu(y, inplace=True) if relu else y


class InputError(ValueError):
    """An argument is wrong."""


class VideoEncoder(nn.Module):
    """Encodes clips [N, 3, T, H, W] float32, normalised as in training.

    Args:
        about: the content of the folder's config.json.
    """

    def __init__(self, about: dict[str, Any]) -> None:
        super().__init__()
        network, head = about["network"], about["head"]
        self.clip, self.maps = about["clip"], network["maps"]
        self.backbone = NETWORKS[network["class"]](**network["arguments"])
        width = head["width"]
        layers = nn.Linear(width, width), nn.ReLU(inplace=True), nn.Linear(width, head["feature_dim"])
        self.head = nn.Sequential(*layers) if head["kind"] == "mlp" else nn.Identity()
        self.unit = head["kind"] != "pooled"

    def features(self, clips: Tensor) -> Tensor:
        """Returns the pooled features [N, C] float32 that retrieval compares."""
        if not self.maps:
            return self.backbone(clips.contiguous()).float()
        maps = self.backbone(clips.contiguous(memory_format=torch.channels_last_3d))
        return maps.mean((2, 3, 4), dtype=torch.float32)

    def forward(self, clips: Tensor) -> Tensor:
        """Returns the embedding of the loss [N, D] float32: unit vectors, unless it is the pooled features."""
        dtype = next((weight.dtype for weight in self.head.parameters()), torch.float32)
        embedding = self.head(self.features(clips).to(dtype)).float()
        return F.normalize(embedding, dim=1) if self.unit else embedding

    def prepare(self, frames: Tensor) -> Tensor:
        """Returns clips [N, 3, T, H, W] float32 from frames [N, T, H, W, 3] uint8 of the size of the clips."""
        mean, std = (torch.tensor(self.clip[name], device=frames.device) for name in ("mean", "std"))
        return ((frames.float() / 255 - mean) / std).movedim(4, 1)


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Returns the tensors of a safetensors file. Raises ValueError if it is not one, or is truncated."""
    data = bytearray(Path(path).read_bytes())
    size = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(bytes(data[8 : 8 + size]))
        tensors = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = (8 + size + offset for offset in entry["data_offsets"])
            dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
            if end > len(data) or end - begin != dtype.itemsize * torch.Size(shape).numel():
                raise ValueError(f"{name} ends outside of the file")
            flat = torch.frombuffer(data[begin:end], dtype=dtype) if end > begin else torch.empty(0, dtype=dtype)
            tensors[name] = flat.view(shape)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{str(path)!r}: expected a safetensors file, which is damaged or another one: {error}"
        ) from None
    return tensors


def read_view(path: str | Path, view: str) -> dict[str, Tensor]:
    """Returns the tensors of the encoder of a view, under their names in its `state_dict`. Raises as `read_tensors`."""
    tensors = read_tensors(path)
    return {name.removeprefix(f"{view}."): t for name, t in tensors.items() if name.startswith(f"{view}.")}


def from_pretrained(folder: str | Path, view: str | None = None) -> VideoEncoder:
    """Loads the encoder of a view, in eval mode on the CPU.

    Args:
        folder: holds config.json and model.safetensors.
        view: one of the `views` of config.json; by default its `view`.
    Raises:
        OSError: one of the two files is missing.
        ValueError: the folder has no such view, its tensors are not those of the network, or its config.json is not
            the one that was written with this module.
    """
    config = Path(folder) / "config.json"
    try:
        about = json.loads(config.read_text(encoding="utf-8"))
        views, view = about["views"], about["view"] if view is None else view
        with torch.random.fork_rng([]):  # a network draws initial weights, which are replaced
            encoder = VideoEncoder(about)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(config)!r}: expected the file that was exported with this module: {error!r}") from None
    if view not in views:
        raise ValueError(f"view: expected one of {', '.join(views)}, got {view!r}")
    if encoder.maps:
        encoder.to(memory_format=torch.channels_last_3d)
    state = read_view(Path(folder) / "model.safetensors", view)
    try:
        encoder.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{str(folder)!r}: {error}") from None
    return encoder.eval()
