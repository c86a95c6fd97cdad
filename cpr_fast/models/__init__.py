"""Networks: a video backbone and its heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cpr_fast.config import ModelConfig
from cpr_fast.models.heads import ProjectionHead
from cpr_fast.models.s3d import S3D

__all__ = ["S3D", "Encoder", "ProjectionHead", "build_encoder"]


class Encoder(nn.Module):
    """A backbone and a projection head: clips [N, 3, T, H, W] float -> unit vectors [N, D] float32."""

    def __init__(self, backbone: S3D, feature_dim: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = ProjectionHead(backbone.out_channels, feature_dim)

    def features(self, clips: Tensor) -> Tensor:
        """Pooled backbone features [N, C] float32, C = `backbone.out_channels`: what retrieval compares."""
        # Channels last: 1.7-2x faster than contiguous on an AVX-512 CPU (forward and backward, width 0.25).
        clips = clips.contiguous(memory_format=torch.channels_last_3d)
        return self.backbone(clips).mean((2, 3, 4), dtype=torch.float32)

    def forward(self, clips: Tensor) -> Tensor:
        return self.head(self.features(clips))


def build_encoder(config: ModelConfig) -> Encoder:
    """The encoder of a config, randomly initialised from torch's global generator."""
    encoder = Encoder(S3D(config.width, config.conv_std), config.feature_dim)
    return encoder.to(memory_format=torch.channels_last_3d)
