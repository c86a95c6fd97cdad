"""The linear probe on stored features, one per video.

Letters: M videos, C channels, L classes.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from cpr_fast.config import ClassifierConfig
from cpr_fast.errors import InputError
from cpr_fast.evaluate.classify.classifier import ClassifierHead, make_optimizer, set_epoch
from cpr_fast.wording import counted

log = logging.getLogger(__name__)


def train_on_features(
    features: Tensor,
    labels: Tensor,
    classes: int,
    settings: ClassifierConfig,
    *,
    seed: int,
    select_on: tuple[Tensor, Tensor] | None = None,
) -> tuple[ClassifierHead, int]:
    """Trains a linear classifier of features [M, C] float32 with labels [M] int64, on their device.

    Every epoch uses every video once. The same seed gives the same weights.

    Args:
        select_on: Features and labels on which the best epoch is chosen by accuracy; None selects the last epoch.
    Returns:
        The head in eval mode, and the number (from 0) of the epoch that its weights are from.
    """
    if len(features) < 2:
        raise InputError(f"probe: expected at least 2 training videos with a label, got {len(features)}")
    _warn_of_few(len(features), settings)
    with torch.random.fork_rng([features.device] if features.is_cuda else []):
        torch.manual_seed(seed)
        head = ClassifierHead(features.shape[1], classes, settings).to(features.device)
        group = {"params": list(head.parameters()), "lr": settings.lr, "base_lr": settings.lr}
        optimizer = make_optimizer([group], settings)
        best, chosen = None, settings.epochs - 1
        for epoch in range(settings.epochs):
            set_epoch(optimizer, settings, epoch)
            head.train()
            for rows in _batches(len(features), settings.batch_size, features.device):
                loss = F.cross_entropy(head(features[rows]), labels[rows])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
            if select_on is not None:
                rate = (feature_probabilities(head, select_on[0]).argmax(1) == select_on[1].cpu()).double().mean()
                if best is None or rate > best[0]:
                    best, chosen = (rate, {n: v.clone() for n, v in head.state_dict().items()}), epoch
    if not torch.isfinite(head.linear.weight).all():
        after = counted(settings.epochs, "epoch")
        raise ArithmeticError(f"the probe's weights are NaN or infinite after {after}; lower its rate")
    if best is not None:
        head.load_state_dict(best[1])
    return head.eval(), chosen


@functools.cache  # warns once for all seeds and views
def _warn_of_few(videos: int, settings: ClassifierConfig) -> None:
    if 2 * videos < settings.batch_size:
        log.warning(
            "probe: %s give one step per epoch with a batch size of %d. The learning rate %g was published for "
            "9,537 videos; here results will vary much between seeds. --batch-size 32 --lr .1 is more stable",
            counted(videos, "video"), settings.batch_size, settings.lr,
        )  # fmt: skip


@torch.inference_mode()
def feature_probabilities(head: ClassifierHead, features: Tensor) -> Tensor:
    """Returns the class probabilities of features [M, C]: [M, L] float64 on the CPU. Sets the head to eval mode."""
    head.eval()
    return head(features).double().softmax(1).cpu()


def _batches(videos: int, batch_size: int, device: torch.device) -> Iterator[Tensor]:
    """Yields all positions 0..M-1 in random order, in batches of nearly equal size.

    No video is left out, and no batch is a single video, which BatchNorm cannot normalise.
    """
    count = min(math.ceil(videos / batch_size), videos // 2)
    return iter(torch.randperm(videos).to(device).tensor_split(max(count, 1)))
