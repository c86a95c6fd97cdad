"""A classifier on a pretrained backbone: its head, learning rates by layer, and predictions for whole videos.

Letters: N clips, M videos, C channels of the pooled features, L classes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpr_fast.config import ClassifierConfig
from cpr_fast.config.pixels import Normalisation
from cpr_fast.models import Encoder, backbone_layers
from cpr_fast.ops import BatchNorm1d
from cpr_fast.runtime.progress import track

WEIGHT_STD = 0.01  # standard deviation of the linear layer's initial weights [CoCLR]
CROP_SETS = (1, 5, 10)  # the centre crop; centre and corners; these five and their mirror images


class ClassifierHead(nn.Module):
    """Maps pooled features [N, C] to logits [N, L]: L2 normalisation and BatchNorm, each only if the settings say so,
    dropout, and a linear layer [CoCLR]."""

    def __init__(self, channels: int, classes: int, settings: ClassifierConfig) -> None:
        super().__init__()
        self.normalize = settings.normalize
        self.norm = BatchNorm1d(channels) if settings.batch_norm else None
        self.dropout = nn.Dropout(settings.dropout)
        self.linear = nn.Linear(channels, classes)
        nn.init.normal_(self.linear.weight, std=WEIGHT_STD)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        if self.normalize:
            features = F.normalize(features.float(), dim=1)
        if self.norm is not None:
            features = self.norm(features.float())
        return self.linear(self.dropout(features))


class Classifier(nn.Module):
    """An encoder's backbone followed by a `ClassifierHead`. Maps clips [N, 3, T, H, W] to logits [N, L].

    A backbone with learning rate 0 is frozen: it gets no gradient, and its BatchNorm statistics stay those of
    pretraining. The encoder's own head is not used; it is kept so that the encoder can be saved and loaded as usual.

    Args:
        rescaled: None, or the normalisation of clips of frame residuals ((x - roll(x)) + 1) / 2, from which the
            backbone is to get x - roll(x), for x in 0..1.
    """

    def __init__(
        self, encoder: Encoder, classes: int, settings: ClassifierConfig, *, rescaled: Normalisation | None = None
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.rescaled = rescaled
        self.head = ClassifierHead(encoder.width, classes, settings)
        self.frozen = settings.backbone_lr == 0
        trained = [] if self.frozen else [p for p in encoder.backbone.parameters() if p.requires_grad]
        encoder.requires_grad_(False)
        for parameter in trained:  # a network may hold others, such as fixed positions
            parameter.requires_grad_(True)

    def features(self, clips: Tensor) -> Tensor:
        """Returns the pooled backbone features [N, C]."""
        if self.rescaled is not None:
            mean, std = (clips.new_tensor(values).view(3, 1, 1, 1) for values in self.rescaled)
            clips = clips * (2 * std) + (2 * mean - 1)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self.encoder.features(clips)

    def forward(self, clips: Tensor) -> Tensor:
        return self.head(self.features(clips))

    def train(self, mode: bool = True) -> Classifier:
        """Sets the mode as `nn.Module.train` does, except that a frozen backbone stays in eval mode."""
        super().train(mode)
        self.encoder.train(mode and not self.frozen)
        return self

    def parameter_groups(self, settings: ClassifierConfig) -> list[dict]:
        """Returns the optimiser's groups: the head, then the backbone's layers from last to first, with `base_lr`."""
        rates = [(settings.lr, list(self.head.parameters()))]
        if not self.frozen:
            for depth, parameters in enumerate(reversed(backbone_layers(self.encoder.backbone))):
                rates.append((settings.backbone_lr * settings.layer_decay**depth, parameters))
        return [{"params": parameters, "lr": lr, "base_lr": lr} for lr, parameters in rates]


def make_optimizer(groups: Iterable[dict], settings: ClassifierConfig) -> torch.optim.Optimizer:
    """Returns the optimiser of a classifier over `parameter_groups`."""
    if settings.optimizer == "adam":
        return torch.optim.Adam(groups, weight_decay=settings.weight_decay)
    return torch.optim.SGD(groups, momentum=settings.momentum, weight_decay=settings.weight_decay)


def set_epoch(optimizer: torch.optim.Optimizer, settings: ClassifierConfig, epoch: int) -> float:
    """Sets the learning rate of every group for an epoch (from 0): its `base_lr` times gamma for each milestone passed.
    With the schedule "plateau" the rates stay as the last validation left them.

    Returns the learning rate of the first group.
    """
    if settings.schedule == "plateau":
        return optimizer.param_groups[0]["lr"]
    factor = settings.gamma ** sum(epoch >= milestone for milestone in settings.milestones)
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    return optimizer.param_groups[0]["lr"]


@torch.inference_mode()
def video_probabilities(
    model: nn.Module,
    loader: Collection,
    videos: int,
    view: str,
    *,
    crops: int = 1,
    description: str = "testing",
    progress: bool = False,
    on_stop: Callable[[dict[int, Tensor], Tensor], None] | None = None,
) -> tuple[dict[int, Tensor], Tensor]:
    """Returns the class probabilities of every video: the mean softmax over windows and crops [CoCLR].

    Args:
        model: Maps clips [N, 3, T, H, W] to logits [N, L]; it is set to eval mode.
        loader: Has a length; its batches have `clips`, `video` [N] and `crop` [N], 0..crops-1 (see `WindowLoader`).
            The windows come video by video, in this order, if `on_stop` is given.
        videos: M.
        on_stop: Called with the result so far when the test is stopped (KeyboardInterrupt), before that goes on; a
            video whose windows were not all read has 0 windows.
    Returns:
        {number of crops: [M, L] float64 on the CPU} for every crop set up to `crops`, zero for a video without
        readable windows, and the number of windows of every video, [M] int64.
    """
    model.eval()
    sets = [n for n in CROP_SETS if n <= crops]
    sums: dict[int, Tensor] = {}
    counts = {n: torch.zeros(videos, dtype=torch.int64) for n in sets}
    complete = 0  # number of videos before the last one seen, of which no window is left

    def means() -> dict[int, Tensor]:
        return {n: total / counts[n].clamp(min=1)[:, None] for n, total in sums.items()}

    try:
        for batch in track(loader, description, total=len(loader), unit="batches", progress=progress):
            probabilities = model(batch.clips[view]).float().softmax(1).double().cpu()  # [N, L]
            video, crop = batch.video.cpu(), batch.crop.cpu()
            for n in sets:
                rows = crop < n
                if n not in sums:
                    sums[n] = probabilities.new_zeros(videos, probabilities.shape[1])
                sums[n].index_add_(0, video[rows], probabilities[rows])
                counts[n] += torch.bincount(video[rows], minlength=videos)
            complete = int(video.max())
    except KeyboardInterrupt:
        if on_stop is not None and complete:
            counts[1][complete:] = 0
            on_stop(means(), counts[1])
        raise
    return means(), counts[1]
