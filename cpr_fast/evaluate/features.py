"""One feature per video: every window embedded, then averaged [CoCLR protocol].

Letters: N windows of a batch, M videos of an index, F feature width, T frames.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from ..models import Encoder
from ..progress import track

Metric = Literal["cosine", "euclidean"]


@dataclass(frozen=True)
class Embedding:
    """A way to turn windows of one view into features.

    Attributes:
        view: "rgb" | "flow", the view it reads.
        function: normalised clips [N, 3, T, H, W] float32 -> features [N, F].
        metric: "cosine": windows are L2-normalised before they are averaged. "euclidean": averaged as they are,
            for the few-dimensional baselines whose length says something.
    """

    view: str
    function: Callable[[Tensor], Tensor]
    metric: Metric = "cosine"


def video_features(
    embeddings: Mapping[str, Embedding],
    loader: Collection,
    videos: int,
    *,
    description: str = "features",
    progress: bool = False,
) -> tuple[dict[str, Tensor], Tensor]:
    """Features of every video by every embedding, in one pass over the decoded windows.

    Args:
        loader: has a length; its batches have `clips` {view: [N, 3, T, H, W]} and `video` [N] int64, 0..videos-1.
        videos: M.
    Returns:
        {name: [M, F] float32 on the CPU}, the mean over a video's windows (zero for a video that gave none), and
        the number of windows of every video, [M] int64.
    Memory: one batch of clips and M x F floats per embedding on the clips' device.
    """
    sums: dict[str, Tensor] = {}
    windows = torch.zeros(videos, dtype=torch.int64)
    with torch.inference_mode():
        for batch in track(loader, description, total=len(loader), unit="batches", progress=progress):
            for name, embedding in embeddings.items():
                features = embedding.function(batch.clips[embedding.view]).flatten(1).float()  # [N, F]
                if embedding.metric == "cosine":
                    features = F.normalize(features, dim=1)
                if name not in sums:
                    sums[name] = features.new_zeros(videos, features.shape[1])
                sums[name].index_add_(0, batch.video.to(features.device), features)
            windows += torch.bincount(batch.video.cpu(), minlength=videos)
    if not sums:
        raise InputError(f"{description}: none of the {videos} videos of the index gave a window")
    counts = windows.clamp(min=1)[:, None]
    return {name: total.cpu() / counts for name, total in sums.items()}, windows


def encoder_embeddings(name: str, encoders: Mapping[str, Encoder]) -> dict[str, Embedding]:
    """{"name/view": embedding} of the backbone features (no projection head) of encoders in eval mode."""
    return {f"{name}/{view}": Embedding(view, encoder.features) for view, encoder in encoders.items()}


def calibrate_batch_norm(encoders: Mapping[str, Encoder], loader: Iterable) -> None:
    """Set the BatchNorm statistics of untrained encoders from data; nothing else changes.

    With the statistics of the initialisation (mean 0, variance 1) a random S3D shrinks its signal layer by layer, to
    6e-13 (1e-18 at width 1/8), and ranks rounding noise. "Untrained" shall mean untrained weights and no more.
    """
    norms = [m for e in encoders.values() for m in e.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over the batches
        norm.train()
    with torch.no_grad():
        for batch in loader:
            for view, encoder in encoders.items():
                encoder.features(batch.clips[view])
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
