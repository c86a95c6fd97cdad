"""The sections of a config: frozen dataclasses that hold every default."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from cpr_fast.errors import InputError

QUARTERS = 4  # of a clip, two of which an intra-negative exchanges [IIC]

View = Literal["rgb", "flow", "residual"]
Mining = Literal["none", "label", "cascade"]
Precision = Literal["fp32", "bf16", "fp16"]


class ConfigError(InputError):
    """A setting is unknown, of the wrong type, or contradicts another one."""


@dataclass(frozen=True)
class DataConfig:
    """What is read and how a clip is cut and augmented."""

    index: str = ""  # INDEX.csv, as written by `cpr-fast index`
    split: str = "train"
    frames: int = 32  # T, frames of a clip
    stride: int = 1  # source frames from one clip frame to the next
    size: int = 128  # side of the square clip, pixels
    augment: Literal["coclr", "iic", "none"] = "coclr"  # "iic": a random crop of 112 from 128x171, nothing else
    crop_area: float = 0.2  # smallest share of the frame that a random crop covers; the largest is all of it
    batch_size: int = 16  # B, videos per rank and step
    workers: int = 2  # decoding workers per rank
    prefetch: int = 2  # batches prepared ahead
    # "stored": what `cpr-fast flow` wrote; "on_the_fly": TV-L1 of the frames of each clip, which needs no storage
    flow: Literal["stored", "on_the_fly"] = "stored"
    exact: bool = False  # PyAV and PIL in DALI's place: slower, the same bits on every device
    cache_gib: float = 2.0  # RAM per rank for decoded videos (CPU route); 0 decodes every clip anew


@dataclass(frozen=True)
class InitConfig:
    """Checkpoints whose encoder of a view this run starts from: of `pretrain` or `import-checkpoint`; "" is random."""

    rgb: str = ""
    flow: str = ""
    residual: str = ""


@dataclass(frozen=True)
class ModelConfig:
    """The encoder: backbone, then head."""

    arch: Literal["s3d", "s3dg", "s3d_milnce", "r3d", "r21d", "c3d"] = "s3d"
    width: float = 1.0  # multiplies every channel count of the backbone
    conv_std: float = 0.01  # of S3D's initial convolution weights [CoCLR]; lr / conv_std is the relative step of Adam
    # "mlp": two linear layers and L2 [CoCLR]; "unit": the pooled features, L2; "pooled": as they are [IIC]
    head: Literal["mlp", "unit", "pooled"] = "mlp"
    feature_dim: int = 128  # D, width of a feature; 512 for the pooled features of r3d, r21d and c3d
    shared: bool = False  # one encoder looks at both views of a cycle and learns from both [IIC]; memory.kind "bank"
    recompute: bool = False  # activation checkpointing: each block's activations are computed again for its gradient
    init: InitConfig = field(default_factory=InitConfig)


@dataclass(frozen=True)
class MemoryConfig:
    """Where the features come from that a query is compared with, and mined from."""

    # "queue": the newest keys [MoCo]; "bank": an entry per training video [IIC]; "batch": the step's clips [SimCLR]
    kind: Literal["queue", "bank", "batch"] = "queue"
    size: int = 2048  # K of the queue; a bank holds every training video, a batch both clips of every video of a step
    ema_momentum: float = 0.999  # of the key encoder; queue and bank, unless model.shared
    bank_momentum: float = 0.5  # share of the old entry that an update of the bank keeps [IIC]
    # Groups of clips whose BatchNorm statistics are apart, the keys shuffled among them; set, the results do not depend
    # on the number of processes. None: one per process, as published.
    shuffle_bn_groups: int | None = None


@dataclass(frozen=True)
class MiningConfig:
    """The cascade [paper, Algorithm 1]; used by cycles whose mining is "cascade"."""

    stages: int = 7  # n; n = 1 is CoCLR
    ratio: float = 0.5  # r, share of the memory that survives each stage before the last
    top_k: int = 5  # P, what the last stage keeps
    anchor: Literal["key", "query"] | None = None  # f_q+ [paper] or f_q [published code]; None: as loss.protocol has it


@dataclass(frozen=True)
class LossConfig:
    """MIL-NCE [paper, Eq. 2], and the `protocol`: as the paper says, or with the published code's deviations.

    "coclr": siblings in the memory are positives, q+ leaves the numerator in `self_positive_drop` of the iterations,
    the cascade's anchor is f_q, its last two stages share a view where n is even, and UberNCE averages the log-softmax
    over the positives in place of the MIL form.
    """

    temperature: float = 0.07
    protocol: Literal["paper", "coclr"] = "paper"
    self_positive_drop: float = 0.9  # share of iterations that drop q+ from the numerator (protocol "coclr" only)
    # A bank of clips without their motion as further negatives: one frame repeated, or two quarters exchanged [IIC].
    intra_negatives: Literal["none", "repeat", "shuffle"] = "none"


@dataclass(frozen=True)
class OptimConfig:
    """The optimiser of the query encoder."""

    name: Literal["adam", "sgd", "apex_lamb", "apex_novograd"] = "adam"  # apex_*: NVIDIA apex's, if it is installed
    lr: float = 1e-3
    weight_decay: float = 1e-5
    momentum: float = 0.9  # sgd only
    precision: Precision = "fp32"  # bf16 and fp16 are autocast; fp16 scales gradients
    accumulate: int = 1  # parts of a process's batch whose gradients are summed before a step: less memory, same batch


@dataclass(frozen=True)
class Cycle:
    """One co-training cycle: which view learns, how its positives are mined, for how long."""

    view: View
    epochs: int
    mining: Mining = "cascade"
    milestones: tuple[int, ...] = ()  # epochs of the cycle at which lr is multiplied by `schedule.gamma`
    top_k: int | None = None  # overrides mining.top_k (progressive training)
    lr: float | None = None  # overrides optim.lr
    other: View | None = None  # the second view; None: flow beside rgb, rgb beside flow and residual


@dataclass(frozen=True)
class ScheduleConfig:
    """The cycles, in order. A cycle starts from its view's latest weights with a new optimiser and memory."""

    cycles: tuple[Cycle, ...] = (
        Cycle("rgb", 300, "none", (250, 280)),
        Cycle("flow", 300, "none", (250, 280)),
        Cycle("rgb", 100, "cascade", (80,)),
        Cycle("flow", 100, "cascade", (80,)),
    )
    gamma: float = 0.1


@dataclass(frozen=True)
class ClassifierConfig:
    """How a classifier is trained on top of a pretrained backbone; the defaults finetune all of it [paper, App. A]."""

    epochs: int = 500  # 100 in the ablations, Tables 1-5
    milestones: tuple[int, ...] = (400, 450)  # epochs at which every rate is multiplied by gamma
    gamma: float = 0.1
    optimizer: Literal["adam", "sgd"] = "adam"
    lr: float = 1e-3  # of the classifier
    backbone_lr: float = 1e-3  # 1e-4 [CoCLR]; 0 freezes the backbone, BatchNorm's statistics included
    layer_decay: float = 1.0  # each layer of the backbone learns at this share of the rate of the one above it
    momentum: float = 0.9  # sgd only
    weight_decay: float = 1e-3
    dropout: float = 0.9  # of the pooled features
    normalize: bool = False  # L2, then BatchNorm, before the linear layer
    batch_size: int = 16
    precision: Precision = "fp32"


@dataclass(frozen=True)
class ProbeConfig(ClassifierConfig):
    """The linear probe [CoCLR]: the same with a frozen backbone, features -> L2 -> BatchNorm -> linear."""

    inputs: Literal["features", "clips"] = "features"  # one stored feature per video, or augmented clips end to end
    epochs: int = 100
    milestones: tuple[int, ...] = (60, 80)
    optimizer: Literal["adam", "sgd"] = "sgd"
    lr: float = 1.0  # 0.1 where inputs = "clips"
    backbone_lr: float = 0.0
    dropout: float = 0.0
    normalize: bool = True
    batch_size: int = 1024  # 16 where inputs = "clips"


@dataclass(frozen=True)
class HealthConfig:
    """How a run watches itself: when it raises an alarm, and what tells its best checkpoint. Changes no training."""

    min_feature_std: float = 0.1  # spread of the queries: 1 = uniform on the sphere, 0 = one point
    min_effective_rank: float = 4.0  # dimensions the queries use, of model.feature_dim
    max_memory_drift: float = 0.8  # of a queue: mean 1 - cosine between a video's key and the one held of it
    online_every: int = 0  # epochs between measurements of R@1 among held-out videos; 0: never
    online_videos: int = 512  # how many of them
    online_split: str = "val"  # split of data.index that they are taken from: not one whose results are reported


@dataclass(frozen=True)
class RunConfig:
    """Where the run lives and what it writes."""

    out: str = "runs/default"
    seed: int = 0
    device: str = "auto"  # "auto" | "cpu" | "cuda"
    log_every: int = 1  # steps between rows of metrics.jsonl
    checkpoint_every: int = 0  # steps between checkpoints inside an epoch; one is written at the end of every epoch
    keep_checkpoints: int = 2  # the newest; the best one is kept beside them
    stall_timeout_s: float = 120.0  # without progress, before the rank that a run waits for is named; 0: never
    tensorboard: bool = False
    compile: Literal["none", "default", "cuda_graphs"] = "none"  # torch.compile of the encoders; CUDA graphs of them
    dump_memory: bool = False  # RUN/memory/cycle-N.npz after every epoch of two views, for `cpr-fast mine`
