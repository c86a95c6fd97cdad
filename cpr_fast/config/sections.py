"""The sections of a config: frozen dataclasses that hold every default."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from cpr_fast.errors import InputError

QUARTERS = 4  # number of quarters of a clip; an intra-negative swaps two of them [IIC]

View = Literal["rgb", "flow", "residual"]
Mining = Literal["none", "label", "cascade"]
Precision = Literal["fp32", "bf16", "fp16"]

CONVOLUTIONAL = ("s3d", "s3dg", "s3d_milnce", "r3d", "r21d", "c3d")  # the backbones that model.width scales
STORED = "features"  # the network on a store of features
FACTORIES = {"vit": "cpr_fast.models.vit:VideoTransformer"}  # short names of factories, see `ModelConfig.factory`


def with_cycle(key: str, shown: str = "") -> str:
    """Returns the key of a setting as messages name it. That of a cycle counts from 0, as in the option
    --schedule.cycles.0.epochs, and is followed by the number that a run prints: "schedule.cycles[0].epochs (cycle 1)".
    `shown` is the key in another form, such as in quotes."""
    found = re.match(r"schedule\.cycles\[(\d+)\]", key)
    return (shown or key) + (f" (cycle {int(found[1]) + 1})" if found else "")


class ConfigError(InputError):
    """A setting is unknown, of the wrong type, or contradicts another one."""


@dataclass(frozen=True)
class DataConfig:
    """Which videos are read, and how clips are cut from them and augmented."""

    index: str = ""  # the index (CSV) that `cpr-fast index` wrote; relative to the config file
    split: str = "train"  # the split of the index to train on; "" takes all videos
    frames: int = 32  # T, number of frames of a clip
    stride: int = 1  # distance between two frames of a clip, in frames of the video, or of data.fps
    # Frames per second at which videos are sampled by presentation time, whatever their own rate; 0 takes every frame.
    # Starts, data.stride and the length of a video then count these samples; see docs/data.md.
    fps: float = 0.0
    # With data.fps, the frames per second of extracted frames and of LMDB records, which do not state it.
    pictures_fps: float = 0.0
    size: int = 128  # height and width of a clip, pixels
    # "coclr": random crop, flip, colour jitter, grayscale and blur; "iic": a random 112x112 crop of 128x171 frames
    augment: Literal["coclr", "iic", "none"] = "coclr"
    crop_area: float = 0.2  # smallest area of a random crop, as a fraction of the frame; the largest is the whole frame
    # Number of tries of the random crop in pretraining; if none fits into the frame, the whole frame is kept. With the
    # published single try this happens to 30 % of the clips of 320x240; with 10, as in torchvision's
    # RandomResizedCrop, to almost none.
    crop_attempts: int = 1
    # "channel": each frame of a gray clip shows one random colour channel [CoCLR]; "luma": its luma
    grayscale: Literal["channel", "luma"] = "channel"
    flow_colour: bool = True  # apply jitter, grayscale and blur to flow images too [CoCLR]; False: to RGB only
    # "drop": leave out videos of frames / 2 * stride + 1 frames or fewer, in training and evaluation [CoCLR]; "keep":
    # use every video. Videos shorter than a clip are padded with their first frame.
    short_videos: Literal["keep", "drop"] = "keep"
    batch_size: int = 16  # B, videos per process and step
    workers: int = 2  # decoding threads per process
    prefetch: int = 2  # batches that are prepared in advance
    # "stored": read the flow that `cpr-fast flow` wrote; "on_the_fly": compute TV-L1 for each clip, without
    # storage; "vectors": the motion vectors of H.264 or MPEG-4, added up over data.stride frames
    flow: Literal["stored", "on_the_fly", "vectors"] = "stored"
    exact: bool = False  # use PyAV and PIL instead of DALI: slower, but the same bits on every device
    # memory per process for decoded videos, GiB (CPU only); every clip is decoded again with 0, or if less than a tenth
    # of the videos fit
    cache_gib: float = 2.0
    disk_cache: str = ""  # folder for bytes from servers, which pretraining fetches ahead; no data.cache_gib then
    disk_cache_gib: float = 20.0  # size of the disk cache of each process, GiB
    # A store of features that `cpr-fast embed` wrote, in place of the index, which is then not read: the encoder is a
    # projection head on them, and the settings of clips are not used. Relative to the config file.
    features: str = ""
    window: int = 8192  # number of clips of a store that are shuffled among each other; more need more memory


@dataclass(frozen=True)
class InitConfig:
    """Checkpoints that the encoders start from, by view; "" starts from random weights.

    Files of `cpr-fast pretrain` or `cpr-fast import-checkpoint`; relative to the config file.
    """

    rgb: str = ""  # checkpoint of the RGB encoder
    flow: str = ""  # checkpoint of the optical-flow encoder
    residual: str = ""  # checkpoint of the encoder of frame differences


@dataclass(frozen=True)
class ModelConfig:
    """The encoder: a backbone followed by a head."""

    # The backbone. "s3d", "s3dg": S3D without and with gating [CoCLR]; "s3d_milnce": the S3D-G of MIL-NCE; "r3d",
    # "r21d", "c3d": R3D, R(2+1)D and C3D [IIC]; "vit": a video transformer; "package.module:factory" or
    # "file.py:factory" (relative to the config file): a network of your own, see docs/methods.md. With data.features it
    # is "features": the two linear layers of the head.
    arch: str = "s3d"
    width: float = 1.0  # factor on the number of channels of every layer of s3d ... c3d
    # Standard deviation of S3D's initial convolution weights [CoCLR]. Adam changes weights by about lr per step, so
    # lr / conv_std is the relative size of a step.
    conv_std: float = 0.01
    # Keyword arguments of "vit" or of your own network's factory; a `path` among them is relative to the config file.
    args: dict[str, Any] = field(default_factory=dict)
    # How the output of such a network becomes one feature per clip. "auto": features [N, D] as they are, tokens
    # [N, L, D] by their mean, maps [N, C, T, H, W] by their mean; "mean": only tokens or maps; "class_token": the first
    # of the tokens.
    pool: Literal["auto", "mean", "class_token"] = "auto"
    # Mean of red, green and blue, of pixels in 0..1, that such a network expects; empty: what it declares, or else that
    # of data.augment.
    mean: tuple[float, ...] = ()
    # Standard deviation of red, green and blue that such a network expects; empty: as with the mean.
    std: tuple[float, ...] = ()
    # "mlp": two linear layers, L2-normalised [CoCLR]; "unit": the pooled features, L2-normalised; "pooled": the pooled
    # features without normalisation [IIC]
    head: Literal["mlp", "unit", "pooled"] = "mlp"
    feature_dim: int = 128  # D, number of dimensions of a feature; 512 for the pooled features of r3d, r21d and c3d
    # Train one encoder on both views of a cycle, each learning from the other [IIC]; needs memory.kind = "bank".
    shared: bool = False
    recompute: bool = False  # activation checkpointing: less memory, more computation
    init: InitConfig = field(default_factory=InitConfig)

    @property
    def factory(self) -> tuple[str, str] | None:
        """The module, or the Python file, of the network's factory, and its name there; None for `CONVOLUTIONAL`
        and `STORED`."""
        module, _, name = FACTORIES.get(self.arch, self.arch).rpartition(":")
        return (module, name) if module else None

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that decide the tensors of an encoder. A file is named without its folder, so that a run may be
        moved to another place."""
        values = {key: getattr(self, key) for key in ("arch", "args", "pool", "width", "head", "feature_dim")}
        if self.factory and self.factory[0].endswith(".py"):
            values["arch"] = self.arch.rpartition("/")[2]
        return values


@dataclass(frozen=True)
class MemoryConfig:
    """The memory: the features that a query is compared with, and from which positives are mined."""

    # "queue": the most recent keys [MoCo]; "bank": one entry per training video [IIC]; "batch": the other clips of the
    # step [SimCLR]
    kind: Literal["queue", "bank", "batch"] = "queue"
    size: int = 2048  # K, number of entries of a queue; the sizes of a bank and of a batch follow from the data
    ema_momentum: float = 0.999  # momentum of the key encoder (queue and bank, unless model.shared)
    # The momentum goes from ema_momentum towards this on half a cosine over each cycle, to 1 as in BYOL and DINO; None:
    # it stays the same.
    final_ema_momentum: float | None = None
    bank_momentum: float = 0.5  # fraction of the old entry that an update of the bank keeps [IIC]
    # Number of groups of clips that have separate BatchNorm statistics; keys are shuffled among them. If it is set, the
    # results do not depend on the number of processes. None: one group per process, as published.
    shuffle_bn_groups: int | None = None
    # Divide the features of a queue among the processes, so that each holds 1/R of them; results are the same. At least
    # 1,024 entries for each process, and not with mining.stages = "auto". No effect on a run of one process.
    shard: bool = False


@dataclass(frozen=True)
class MiningConfig:
    """The cascade [paper, Algorithm 1], used by cycles with mining = "cascade"."""

    # n, number of stages; n = 1 is CoCLR. "auto": order of views, n, r and top-k are chosen anew in every epoch, from
    # the features in the memory and without labels; not with memory.kind = "batch".
    stages: int | Literal["auto"] = 7
    ratio: float = 0.5  # r, fraction of the entries that each stage but the last keeps; not used with stages = "auto"
    # P, number of positives that the last stage keeps; with stages = "auto" the largest number that may be chosen
    top_k: int = 5
    # The feature that memory entries are compared with: "key" is f_q+ [paper], "query" is f_q [published code]; None:
    # the one that loss.protocol implies.
    anchor: Literal["key", "query"] | None = None


@dataclass(frozen=True)
class LossConfig:
    """The MIL-NCE loss [paper, Eq. 2], and whether details follow the paper or the published code.

    With protocol = "coclr", as in the published code: siblings in the memory are positives; q+ leaves the numerator in
    a fraction `self_positive_drop` of the iterations; the cascade's anchor is f_q; its last two stages use the same
    view where n is even; and UberNCE averages the log-softmax over the positives instead of the MIL form.
    """

    temperature: float = 0.07  # divisor of the similarities before the softmax
    protocol: Literal["paper", "coclr"] = "paper"  # details as in the paper, or as in the published code (see above)
    # Fraction of the iterations in which q+, the query's own key, is left out of the numerator; used only with
    # protocol = "coclr".
    self_positive_drop: float = 0.9
    # Additional negatives without motion, kept in a separate memory bank [IIC]: "repeat" repeats one frame,
    # "shuffle" exchanges two quarters of the clip.
    intra_negatives: Literal["none", "repeat", "shuffle"] = "none"


@dataclass(frozen=True)
class OptimConfig:
    """The optimiser of the query encoder.

    A warm-up and the cosines begin anew in every cycle, with its first step that learns.
    """

    # The optimiser; "apex_lamb" and "apex_novograd" are those of NVIDIA apex, which must be installed.
    name: Literal["adam", "adamw", "sgd", "apex_lamb", "apex_novograd"] = "adam"
    lr: float = 1e-3  # learning rate
    # How the learning rate falls within a cycle: "steps" at the milestones of the cycle, by schedule.gamma; "cosine" on
    # half a cosine, step by step from the end of the warm-up, towards final_lr at the end of the cycle.
    schedule: Literal["steps", "cosine"] = "steps"
    final_lr: float = 0.0  # what the learning rate falls to; used only with schedule = "cosine"
    # Number of epochs, or a fraction of one, in which the learning rate of each cycle rises in equal steps to lr.
    warmup_epochs: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)  # of "adam" and "adamw": how slowly their two moving averages change
    eps: float = 1e-8  # of "adam" and "adamw": added to the denominator of a step
    # Factor of the L2 penalty on the weights; with "adamw" the weights themselves shrink, by lr times this per step.
    weight_decay: float = 1e-5
    # weight_decay goes to this on half a cosine over each cycle; None: it stays the same.
    final_weight_decay: float | None = None
    # Apply weight_decay also to the parameters of normalisations, to biases and to others of one dimension.
    decay_norms_and_biases: bool = True
    # Largest L2 norm of the gradient of all weights together, to which longer gradients are scaled; the step rows hold
    # the norm before that as `grad_norm`. 0: no limit.
    clip_norm: float = 0.0
    momentum: float = 0.9  # momentum of SGD; the other optimisers do not use it
    precision: Precision = "fp32"  # "bf16" and "fp16" use autocast; "fp16" also scales the gradients
    # Number of parts of a batch whose gradients are summed before an optimiser step: less memory, the same batch.
    accumulate: int = 1


Replaceable = TypeVar("Replaceable", OptimConfig, MemoryConfig)


@dataclass(frozen=True)
class Cycle:
    """One training cycle: which view's encoder learns, how its positives are chosen, and the number of epochs.

    The settings from lr on that are not None replace those of the same names in `optim` and `memory` in this cycle.
    """

    view: View  # the view whose encoder is trained
    epochs: int  # number of epochs of this cycle
    mining: Mining = "cascade"  # "none": InfoNCE; "label": UberNCE; "cascade": CoCLR and CPR
    # After how many epochs of the cycle the learning rate is multiplied by schedule.gamma; used only with
    # optim.schedule = "steps".
    milestones: tuple[int, ...] = ()
    top_k: int | None = None  # replaces mining.top_k in this cycle (progressive training)
    lr: float | None = None  # replaces optim.lr in this cycle
    other: View | None = None  # the second view; None: flow for rgb, and rgb for flow and residual
    schedule: Literal["steps", "cosine"] | None = None  # replaces optim.schedule in this cycle
    final_lr: float | None = None  # replaces optim.final_lr in this cycle
    warmup_epochs: float | None = None  # replaces optim.warmup_epochs in this cycle
    weight_decay: float | None = None  # replaces optim.weight_decay in this cycle
    final_weight_decay: float | None = None  # replaces optim.final_weight_decay in this cycle
    momentum: float | None = None  # replaces optim.momentum, that of SGD, in this cycle
    ema_momentum: float | None = None  # replaces memory.ema_momentum in this cycle
    final_ema_momentum: float | None = None  # replaces memory.final_ema_momentum in this cycle

    def applied_to(self, section: Replaceable) -> Replaceable:
        """Returns `optim` or `memory` as this cycle uses it, with the settings that the cycle replaces."""
        names = {field.name for field in dataclasses.fields(section)}
        own = {name: value for name, value in vars(self).items() if name in names and value is not None}
        return dataclasses.replace(section, **own)

    def views(self, *, shared: bool) -> tuple[View, ...]:
        """Returns the views that the cycle reads, the view that it trains first. Only a cascade or a shared encoder
        (model.shared) needs a second one."""
        if self.mining != "cascade" and not shared:
            return (self.view,)
        return (self.view, self.other or ("rgb" if self.view == "flow" else "flow"))

    def waits_for_queue(self, memory: MemoryConfig) -> bool:
        """Returns whether the cycle takes no optimiser step until its memory is full.

        A cascade on a queue waits [CoCLR, CPR]. InfoNCE and UberNCE on a queue learn from the first step, because the
        queue starts with random vectors as negatives [MoCo]. A bank and a batch never wait.
        """
        return memory.kind == "queue" and self.mining == "cascade"


@dataclass(frozen=True)
class ScheduleConfig:
    """The cycles, in order. Each one starts from its view's latest weights with a new optimiser and a memory
    without keys."""

    cycles: tuple[Cycle, ...] = (
        Cycle("rgb", 300, "none", (250, 280)),
        Cycle("flow", 300, "none", (250, 280)),
        Cycle("rgb", 100, "cascade", (80,)),
        Cycle("flow", 100, "cascade", (80,)),
    )
    gamma: float = 0.1  # factor on the learning rate at every milestone


@dataclass(frozen=True)
class ClassifierConfig:
    """Training of a classifier on top of a pretrained backbone. The defaults finetune all layers [paper, App. A]."""

    epochs: int = 500  # number of epochs; 100 in the ablations of the paper, Tables 1 to 5
    # When every learning rate is multiplied by gamma: "steps" at the milestones; "plateau" after more than `patience`
    # epochs in a row without a lower loss on the validation part, down to min_lr (torch's ReduceLROnPlateau) [IIC].
    schedule: Literal["steps", "plateau"] = "steps"
    # After how many epochs every learning rate is multiplied by gamma; used only with schedule = "steps".
    milestones: tuple[int, ...] = (400, 450)
    gamma: float = 0.1  # factor on every learning rate when it falls
    # Number of epochs in a row without a lower validation loss before the rates fall; only with schedule = "plateau".
    patience: int = 50
    min_lr: float = 1e-5  # the learning rates do not fall below this; used only with schedule = "plateau"
    # Fraction of the training videos, drawn at random, that is not trained on: the validation part. "plateau" watches
    # its loss after every epoch, and the weights of the epoch with the lowest one are tested [IIC].
    validation: float = 0.0
    optimizer: Literal["adam", "sgd"] = "adam"  # the optimiser of the classifier and the backbone
    lr: float = 1e-3  # learning rate of the classifier
    # Learning rate of the backbone; 1e-4 in CoCLR's code. 0 freezes the backbone, including its BatchNorm statistics.
    backbone_lr: float = 1e-3
    layer_decay: float = 1.0  # each layer's learning rate is this fraction of that of the layer above it
    momentum: float = 0.9  # momentum of SGD; Adam does not use it
    weight_decay: float = 1e-3  # factor of the L2 penalty on the weights
    dropout: float = 0.9  # probability of dropout on the pooled features
    normalize: bool = False  # L2-normalise the pooled features
    batch_norm: bool = False  # apply BatchNorm before the linear layer, after the L2 normalisation if there is one
    # What the network receives for the view "residual", for frames x in 0..1: "rescaled" gives ((x - roll(x)) + 1) / 2,
    # as in pretraining; "difference" gives x - roll(x), as in the finetuning of IIC.
    residual: Literal["rescaled", "difference"] = "rescaled"
    batch_size: int = 16  # number of clips per process and step
    precision: Precision = "fp32"  # "bf16" and "fp16" use autocast; "fp16" also scales the gradients


@dataclass(frozen=True)
class ProbeConfig(ClassifierConfig):
    """Training of a linear probe [CoCLR]: a frozen backbone, then BatchNorm and a linear layer.

    The published probe on stored features does not L2-normalise them again: the windows of a video are L2-normalised
    before they are averaged. The published probe on clips normalises each clip's feature.
    """

    # What the classifier is trained on: "features", one stored feature per video; "clips", augmented clips.
    inputs: Literal["features", "clips"] = "features"
    epochs: int = 100  # number of epochs
    # After how many epochs the learning rate is multiplied by gamma; used only with schedule = "steps".
    milestones: tuple[int, ...] = (60, 80)
    optimizer: Literal["adam", "sgd"] = "sgd"  # the optimiser of the classifier
    lr: float = 1.0  # learning rate of the classifier; use 0.1 with inputs = "clips"
    backbone_lr: float = 0.0  # learning rate of the backbone; 0 freezes it, as a linear probe requires
    dropout: float = 0.0  # probability of dropout on the pooled features
    normalize: bool = False  # L2-normalise the pooled features; use true with inputs = "clips"
    batch_norm: bool = True  # apply BatchNorm before the linear layer
    # Number of stored features per step, or of clips per process and step; use 16 with inputs = "clips".
    batch_size: int = 1024


@dataclass(frozen=True)
class HealthConfig:
    """Monitoring of a run: when it warns, and how its best checkpoint is chosen. It does not change the training."""

    # Warn if the spread of the queries falls below this: 1 is uniform on the sphere, 0 is a single point.
    min_feature_std: float = 0.1
    # Warn if the queries use fewer than this many of the model.feature_dim dimensions, see `rank_limit`.
    min_effective_rank: float = 4.0
    # Warn if the mean cosine distance between a video's new key and its entry in the queue exceeds this.
    max_memory_drift: float = 0.8
    # Number of queries of each step and process whose mined positives are measured by stage, agreement and mutual
    # neighbours; PMR and mining R@1 are measured on all. None: all, and with data.features 64, because this
    # measurement would take most of a step.
    mining_queries: int | None = None
    online_every: int = 0  # epochs between the measurements that choose best.pt; 0: never
    # What is measured. "r@1": retrieval among held-out videos, which needs labels; "score": the score without labels,
    # on training videos; "auto": R@1, and the score if no training video has a label.
    online_measure: Literal["auto", "r@1", "score"] = "auto"
    online_videos: int = 512  # number of videos that are measured
    online_split: str = "val"  # split of the held-out videos; do not use a split whose results you report

    def rank_limit(self, queries: int) -> float:
        """Returns the effective rank below which a run warns: `min_effective_rank`, but at most an eighth of the number
        of queries of different videos, because N queries span at most N dimensions."""
        return min(self.min_effective_rank, queries / 8)


@dataclass(frozen=True)
class RunConfig:
    """The run folder, what is written into it, and the device."""

    out: str = "runs/default"  # the run folder; relative to the working directory
    seed: int = 0  # seed of the initial weights and of all random draws
    device: str = "auto"  # "auto" (CUDA if it is available), "cpu", "cuda" or "cuda:N"
    log_every: int = 1  # steps between two rows of metrics.jsonl
    # Steps between two checkpoints within an epoch, 0 for none. One is always written after every epoch.
    checkpoint_every: int = 0
    keep_checkpoints: int = 2  # number of recent checkpoints to keep, besides the best one
    # Seconds without progress after which the process that the others wait for is reported; 0: never.
    stall_timeout_s: float = 120.0
    tensorboard: bool = False  # also write TensorBoard event files
    wandb: bool = False  # also log to Weights & Biases; a resumed run continues the same run there
    trackio: bool = False  # also log to trackio; a resumed run continues the same run there
    # Whether torch.compile compiles the encoders: "default" with its default mode, "cuda_graphs" with CUDA graphs.
    compile: Literal["none", "default", "cuda_graphs"] = "none"
    # Divide weights, gradients and optimiser states among the processes (FSDP2), for networks without BatchNorm that do
    # not fit on one device. It has no effect on a run of one process.
    shard: bool = False
    # Write the memory of a cycle of two views to RUN/memory/cycle-N.npz after every epoch, for `cpr-fast mine`.
    dump_memory: bool = False
