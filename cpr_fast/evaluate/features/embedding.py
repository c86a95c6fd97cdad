"""One feature per video: the mean over the features of its windows [CoCLR's protocol].

Letters: N windows of a batch, M videos of an index, F feature width, T frames.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from cpr_fast.errors import InputError
from cpr_fast.evaluate.features.recipe import Metric, Recipe
from cpr_fast.models import Encoder, statistics_layers
from cpr_fast.runtime.progress import WHOLE, Part, track
from cpr_fast.wording import counted


@dataclass(frozen=True)
class Embedding:
    """A function from windows of one view to features.

    Attributes:
        view: "rgb" or "flow".
        function: Maps normalised clips [N, 3, T, H, W] float32 to features [N, F].
        metric: See `Recipe`; with "cosine", the features of windows are L2-normalised before they are averaged.
        key: Identifies the function and its weights in the cache; "" if the features must not be stored.
    """

    view: str
    function: Callable[[Tensor], Tensor]
    metric: Metric = "cosine"
    key: str = ""


def sum_features(
    embeddings: Mapping[str, Embedding],
    loader: Collection,
    videos: int,
    *,
    description: str = "features",
    progress: bool = False,
    on_stop: Callable[[dict[str, Tensor], Tensor], None] | None = None,
    work: Part = WHOLE,
) -> tuple[dict[str, Tensor], Tensor]:
    """Sums the features of each video's windows for every embedding, in one pass over the decoded windows.

    Args:
        loader: Has a length; its batches have `clips` {view: [N, 3, T, H, W]} and `video` [N] int64, 0..videos-1.
            The windows come video by video, in this order, if `on_stop` is given.
        videos: M.
        on_stop: Called with the sums and counts so far when the pass is stopped (KeyboardInterrupt), before that
            goes on; the count of a video whose windows were not all read is 0.
        work: What these windows are a part of.
    Returns:
        {name: [M, F] float32 on the clips' device}, empty if no window could be read, and the number of windows of
        every video, [M] int64.
    Raises:
        InputError: features are not finite.
    Memory: one batch of clips and M x F floats per embedding.
    """
    sums: dict[str, Tensor] = {}
    windows = torch.zeros(videos, dtype=torch.int64)
    complete = 0  # windows come in the order of the videos: of those before the last one seen, none is left
    try:
        with torch.inference_mode():
            batches = track(loader, description, total=len(loader), unit="batches", progress=progress, left=work.left)
            for batch in batches:
                for name, embedding in embeddings.items():
                    features = embedding.function(batch.clips[embedding.view]).flatten(1).float()  # [N, F]
                    if embedding.metric == "cosine":
                        features = F.normalize(features, dim=1)
                    if name not in sums:
                        sums[name] = features.new_zeros(videos, features.shape[1])
                    sums[name].index_add_(0, batch.video.to(features.device), features)
                seen = batch.video.cpu()
                windows += torch.bincount(seen, minlength=videos)
                complete = int(seen.max())
                work.add(len(seen))
    except KeyboardInterrupt:
        if on_stop is not None and complete:
            windows[complete:] = 0
            on_stop(sums, windows)
        raise
    for name, total in sums.items():
        if wrong := int((~torch.isfinite(total)).any(1).sum()):
            raise InputError(
                f"{name}: expected finite features, but those of {wrong} of {counted(videos, 'video')} are NaN or "
                "infinite: the network cannot encode them"
            )
    return sums, windows


def encoder_embeddings(
    name: str, encoders: Mapping[str, Encoder], recipe: Recipe, keys: Mapping[str, str]
) -> dict[str, Embedding]:
    """Returns {"name/view": embedding} for the backbone features (without projection head) of encoders in eval mode.

    Args:
        keys: A digest of the encoder's weights for every view, or "".
    """
    embeddings = {}
    for view, encoder in encoders.items():
        function = encoder.features if recipe.pool == "mean" else partial(spatial_max, encoder)
        embeddings[f"{name}/{view}"] = Embedding(view, function, recipe.metric, keys[view])
    return embeddings


def spatial_max(encoder: Encoder, clips: Tensor) -> Tensor:
    """Returns the last feature map, max-pooled 2 x 2 in space, as one vector [IIC]: [N, 3, T, H, W] -> [N, F].

    A network without feature maps gives its pooled features.

    An R3D on 16 x 112 x 112 gives [512, 2, 7, 7] -> [512, 2, 3, 3]: 9,216 numbers. A map with one row or
    column is not pooled.
    """
    maps = encoder.outputs(clips)
    if not isinstance(maps, Tensor) or maps.dim() != 5:
        return encoder.pooled(maps)
    kernel = (1, min(2, maps.shape[3]), min(2, maps.shape[4]))
    return F.max_pool3d(maps.float(), kernel).flatten(1)


def calibrate_batch_norm(encoders: Mapping[str, Encoder], loader: Iterable) -> None:
    """Computes the BatchNorm statistics of untrained encoders from data. Changes nothing else.

    With the initial statistics (mean 0, variance 1), the signal in a random S3D becomes smaller from layer to layer,
    down to 6e-13 (1e-18 at width 1/8), so that the ranking would depend on rounding errors. With statistics from data,
    the encoder differs from a trained one only in its weights.
    """
    norms = [layer for encoder in encoders.values() for layer in statistics_layers(encoder)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # use the plain average over the batches
        norm.train()
    with torch.no_grad():
        for batch in loader:
            for view, encoder in encoders.items():
                encoder.features(batch.clips[view])
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
