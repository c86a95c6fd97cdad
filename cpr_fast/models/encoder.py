"""The encoder: a video backbone with a head on top of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cpr_fast.config import DataConfig, ModelConfig
from cpr_fast.config.pixels import Normalisation, normalisation
from cpr_fast.config.sections import STORED
from cpr_fast.errors import InputError, out_of_memory
from cpr_fast.models.factory import CLIP, described, make_network, source_digest
from cpr_fast.models.heads import HostLinear, PooledHead, ProjectionHead
from cpr_fast.models.r3d import C3D, R3D, R2Plus1D
from cpr_fast.models.s3d import S3D
from cpr_fast.models.s3d_milnce import S3DMilNce
from cpr_fast.wording import counted

_BACKBONES: dict[str, Callable[[ModelConfig], nn.Module]] = {
    "s3d": lambda config: S3D(config.width, config.conv_std),
    "s3dg": lambda config: S3D(config.width, config.conv_std, gating=True),
    "s3d_milnce": lambda config: S3DMilNce(config.width, config.conv_std),
    "r3d": lambda config: R3D(config.width),
    "r21d": lambda config: R2Plus1D(config.width),
    "c3d": lambda config: C3D(config.width),
}
OUTPUTS = "features [N, D], tokens [N, L, D] or maps [N, C, T, H, W] of floating-point numbers"


class Encoder(nn.Module):
    """Encodes clips [N, 3, T, H, W] float as features [N, D] float32; unit vectors unless the head is "pooled".

    Args:
        backbone: maps clips to [N, C, T', H', W'] and has the attribute `out_channels` = C.
        head: maps features averaged over T', H' and W' [N, C] to [N, D].
    """

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    @property
    def width(self) -> int:
        """C, the number of pooled features."""
        return self.backbone.out_channels

    @property
    def identity(self) -> str:
        """Everything besides the tensors that the features depend on; "" if there is nothing else."""
        return ""

    def outputs(self, clips: Tensor) -> Tensor:
        """Returns the backbone's output before it is pooled."""
        # Channels last: 1.7-2x faster than contiguous on an AVX-512 CPU (forward and backward, width 0.25).
        return self.backbone(clips.contiguous(memory_format=torch.channels_last_3d))

    def pooled(self, outputs: Tensor) -> Tensor:
        """Returns the pooled features [N, C] float32 of `outputs`."""
        return outputs.mean((2, 3, 4), dtype=torch.float32)

    def features(self, clips: Tensor) -> Tensor:
        """Returns the pooled features [N, C] float32 that retrieval compares."""
        return self.pooled(self.outputs(clips))

    def forward(self, clips: Tensor) -> Tensor:
        return self.head(self.features(clips))


class FeatureEncoder(Encoder):
    """Projects the stored features of clips [N, C] to features [N, D] float32; unit vectors with the head.

    The two linear layers of the projection head take the place of the backbone, because they are all that is trained:
    what retrieval and probes compare is their output.
    """

    def __init__(self, width: int, feature_dim: int) -> None:
        layers = HostLinear(width, width), nn.ReLU(inplace=True), HostLinear(width, feature_dim)
        super().__init__(nn.Sequential(*layers), PooledHead(unit=True))
        self._width = feature_dim

    @property
    def width(self) -> int:
        return self._width

    def outputs(self, clips: Tensor) -> Tensor:
        return self.backbone(clips)

    def pooled(self, outputs: Tensor) -> Tensor:
        return outputs.float()


class FactoryEncoder(Encoder):
    """An encoder whose backbone is any network that returns features [N, D], tokens [N, L, D] or maps [N, C, T, H, W].

    Args:
        model: names the backbone's factory and how its output is pooled.
        given, expected: the normalisation of the clips that come, and the one that the backbone expects.
        identity: see `Encoder.identity`.
    """

    def __init__(
        self, backbone: nn.Module, model: ModelConfig, given: Normalisation, expected: Normalisation, identity: str
    ) -> None:
        super().__init__(backbone, nn.Identity())
        self.arch, self.pool, self._identity = model.arch, model.pool, identity
        self._width: int | None = None
        self._dims: int | None = None  # of the output for the first clip
        self.normalises = given != expected
        (mean, std), (new_mean, new_std) = (torch.tensor(values, dtype=torch.float64) for values in (given, expected))
        for name, values in (("scale", std / new_std), ("shift", (mean - new_mean) / new_std)):
            self.register_buffer(name, values.float().view(3, 1, 1, 1), persistent=False)

    @property
    def width(self) -> int:
        return self._width

    @property
    def identity(self) -> str:
        return self._identity

    def outputs(self, clips: Tensor) -> Tensor:
        # Contiguous: a network of others may call `view`.
        return self.backbone((clips * self.scale + self.shift if self.normalises else clips).contiguous())

    def pooled(self, outputs: Tensor) -> Tensor:
        if not isinstance(outputs, Tensor) or not outputs.is_floating_point() or outputs.dim() not in (2, 3, 5):
            raise InputError(f"model.arch {self.arch!r}: expected {OUTPUTS}, got {_kind(outputs)}")
        shape = list(outputs.shape)
        if self.pool == "class_token":
            if len(shape) != 3:
                raise InputError(f"model.pool: 'class_token' expects tokens [N, L, D], got {shape} of {self.arch!r}")
            outputs = outputs[:, 0]
        elif len(shape) == 2 and self.pool == "mean":
            raise InputError(
                f"model.pool: 'mean' expects tokens [N, L, D] or maps [N, C, T, H, W], got {shape} of {self.arch!r}"
            )
        elif len(shape) != 2:
            outputs = outputs.mean(1 if len(shape) == 3 else (2, 3, 4), dtype=torch.float32)
        if self._width is None:
            self._dims = len(shape)
        elif (len(shape), outputs.shape[1]) != (self._dims, self._width):
            raise InputError(
                f"model.arch {self.arch!r}: expected {self._width} features in an output of {self._dims} dimensions, "
                f"as for the first clip, got {shape}"
            )
        return outputs.float()

    def features(self, clips: Tensor) -> Tensor:
        features = super().features(clips)
        if features.shape[0] != clips.shape[0]:  # not `len`, which an export to ONNX takes for a constant
            raise InputError(
                f"model.arch {self.arch!r}: expected {OUTPUTS}, where N is the number of clips, "
                f"got {counted(features.shape[0], 'row')} for clips {list(clips.shape)}"
            )
        return features

    def forward(self, clips: Tensor) -> Tensor:
        features = self.features(clips)
        if self.training and torch.is_grad_enabled() and not features.requires_grad:
            raise InputError(
                f"model.arch {self.arch!r}: expected features with a gradient, so that the network can be trained, got "
                "features without one; none of its parameters has requires_grad, or it computes under torch.no_grad"
            )
        return self.head(features)

    @torch.no_grad()
    def measure(self, data: DataConfig) -> None:
        """Encodes a clip of zeros to learn the number of features, and whether the backbone takes such clips.

        Raises:
            InputError: the backbone refuses the clip, or returns something else than expected.
        """
        clips = torch.zeros(1, 3, data.frames, data.size, data.size)
        self.eval()
        try:
            self._width = self.features(clips).shape[1]
        except InputError:
            raise
        except Exception as error:  # of the user's code
            if out_of_memory(error):
                raise
            raise InputError(
                f"model.arch {self.arch!r}: the network does not take clips {list(clips.shape)} (data.frames, "
                f"data.size): {described(error)}"
            ) from error
        if not self._width:
            raise InputError(f"model.arch {self.arch!r}: expected {OUTPUTS}, got no feature")
        self.train()


def build_encoder(config: ModelConfig, data: DataConfig | None = None) -> Encoder:
    """Builds the encoder of a config, initialised from torch's global random generator.

    Args:
        data: the clips that it will encode, which only a network with a factory depends on.
    Raises:
        InputError: the head has no weights, and `model.feature_dim` is not the width of the pooled features; or the
            network that `model.arch` names cannot be built, or does not fit the clips.
    """
    if config.arch == STORED:
        return FeatureEncoder(config.args["width"], config.feature_dim)
    if config.factory is None:
        backbone = _BACKBONES[config.arch](config)
        return Encoder(backbone, _head(config, backbone.out_channels)).to(memory_format=torch.channels_last_3d)
    encoder = _factory_encoder(config, DataConfig() if data is None else data)
    encoder.head = _head(config, encoder.width)
    return encoder


def _head(config: ModelConfig, width: int) -> nn.Module:
    if config.head == "mlp":
        return ProjectionHead(width, config.feature_dim)
    if config.feature_dim != width:
        scaled = "" if config.factory else f" at model.width {config.width}"
        raise InputError(
            f"model.feature_dim: expected {width}, the width of the pooled features of {config.arch!r}{scaled}, "
            f"because model.head is {config.head!r}; got {config.feature_dim}"
        )
    return PooledHead(unit=config.head == "unit")


def _factory_encoder(config: ModelConfig, data: DataConfig) -> FactoryEncoder:
    network, factory = make_network(config, data)
    names = (*CLIP, "clip_mean", "clip_std")
    declared = {name: getattr(network, name, getattr(factory, name, None)) for name in names}
    for name in CLIP:
        key, wants = name.removeprefix("clip_"), declared[name]
        if wants is not None and wants != getattr(data, key):
            raise InputError(
                f"data.{key}: expected {wants}, which model.arch {config.arch!r} declares ({name}), got "
                f"{getattr(data, key)}"
            )
    given = normalisation(data.augment)
    mean, std = (_statistics(config, name, declared[f"clip_{name}"]) for name in ("mean", "std"))
    if (mean is None) != (std is None):
        raise InputError(
            f"model.arch {config.arch!r}: expected both clip_mean and clip_std or neither, got one of them"
        )
    expected = given if mean is None or std is None else (mean, std)
    identity = json.dumps([config.identity, expected, source_digest(factory)], sort_keys=True)
    encoder = FactoryEncoder(network, config, given, expected, identity)
    encoder.measure(data)
    return encoder


def _statistics(config: ModelConfig, name: str, declared: Any) -> tuple[float, float, float] | None:
    """Returns the mean or std of the channels that a network expects: from the config, or as it declares them."""
    is_set = getattr(config, name) or None
    if declared is None:
        return is_set
    try:
        values = tuple(map(float, declared))
    except (TypeError, ValueError):
        values = ()
    if len(values) != 3 or not all(abs(value) < float("inf") and (name == "mean" or value > 0) for value in values):
        raise InputError(f"model.arch {config.arch!r}: expected clip_{name} of three numbers, got {declared!r}")
    if is_set is not None and is_set != values:
        raise InputError(
            f"model.{name}: expected {list(values)}, which model.arch {config.arch!r} declares (clip_{name}), or no "
            f"value, got {list(is_set)}"
        )
    return values


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    size = f" of {len(value)}" if isinstance(value, tuple | list | dict) else ""
    return f"an object of the type {type(value).__name__}{size}"
