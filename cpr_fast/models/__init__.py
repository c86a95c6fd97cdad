"""Video networks: backbones, heads, and the encoder that joins them.

Imports only `config` and the BatchNorm of `ops`, so that the networks can be used without the rest of the package;
`weights`, `evaluate`, `pretrain` and `doctor` may import it.
"""

from cpr_fast.models.blocks import backbone_layers, named_blocks, running_statistics, statistics_layers
from cpr_fast.models.encoder import Encoder, FactoryEncoder, FeatureEncoder, build_encoder
from cpr_fast.models.heads import PooledHead, ProjectionHead
from cpr_fast.models.r3d import C3D, R3D, R2Plus1D
from cpr_fast.models.s3d import S3D
from cpr_fast.models.s3d_milnce import S3DMilNce

__all__ = [
    "C3D",
    "R3D",
    "S3D",
    "Encoder",
    "FactoryEncoder",
    "FeatureEncoder",
    "PooledHead",
    "ProjectionHead",
    "R2Plus1D",
    "S3DMilNce",
    "backbone_layers",
    "build_encoder",
    "named_blocks",
    "running_statistics",
    "statistics_layers",
]
