"""Finds similar, duplicated and odd videos by their features, and estimates how reliable the result is. No labels are
used.

Letters: M videos, F feature width, k neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cpr_fast.data.index.index import Video
from cpr_fast.evaluate.features.recipe import Metric
from cpr_fast.evaluate.retrieval.names import VIEW_NAMES
from cpr_fast.evaluate.retrieval.ranking import Comparison, prepare_streams
from cpr_fast.report.figures.film_strip import STRIP_FRAMES, whole_strip
from cpr_fast.wording import counted

NEAREST = 5  # neighbours per video
DUPLICATE = 0.9  # similarity from which two videos of different sources are reported as possible duplicates
CROWDED = 0.15  # share of all pairs with such a similarity, above which the features hardly distinguish videos
CHUNK = 512  # number of videos whose similarities are held in memory at once
FAR = 3.0  # robust standard deviations from the median at which a video is odd
THUMBNAIL, BORDER = 16, 4  # pixels: side of a frame that is compared, and width of its border that is ignored


@dataclass(frozen=True)
class Neighbours:
    """The k nearest videos of other sources for each of M videos.

    Attributes:
        index: [M, k] int64, nearest first.
        similarity: [M, k] float32, -1..1, in the order of `retrieve`: the cosine of centred features, with two views
            the mean of both; with the metric "plain_cosine" the cosine of both views' features, one after the other.
        nearest_any: [M] int64, the nearest video of any source but itself.
    """

    index: Tensor
    similarity: Tensor
    nearest_any: Tensor


def find_neighbours(streams: Sequence[Tensor], metric: Metric, sources: Tensor, k: int = NEAREST) -> Neighbours:
    """Compares all videos with each other, CHUNK at a time. M >= 2.

    Args:
        streams: [M, F] of each view.
        sources: [M] int64; where all are one source, only a video itself is left out.
    """
    count = len(sources)
    comparison = _comparison(streams, metric)
    one_source = bool((sources == sources[0]).all())
    own = torch.arange(count)
    groups = own if one_source else sources
    k = min(k, count - 1)
    index, similarity, nearest = [], [], []
    for chunk in own.split(CHUNK):
        total = comparison.similarity(chunk) / len(comparison.streams)  # [chunk, M]
        total[torch.arange(len(chunk)), chunk] = -torch.inf
        nearest.append(total.argmax(1))
        best = total.masked_fill(groups[chunk, None] == groups, -torch.inf).topk(k, dim=1)
        similarity.append(best.values)
        index.append(best.indices)
    return Neighbours(torch.cat(index), torch.cat(similarity), torch.cat(nearest))


def duplicate_pairs(found: Neighbours, threshold: float = DUPLICATE) -> list[tuple[int, int, float]]:
    """Returns (video, video, similarity) of the pairs at or above the threshold, the most similar first.

    Only pairs in which one is among the k nearest of the other are found, which covers groups of k + 1 copies.
    """
    pairs = {}
    for video, (others, values) in enumerate(zip(found.index.tolist(), found.similarity.tolist(), strict=True)):
        for other, value in zip(others, values, strict=True):
            if value >= threshold:
                pairs[min(video, other), max(video, other)] = value
    return sorted(((a, b, value) for (a, b), value in pairs.items()), key=lambda pair: (-pair[2], pair[:2]))


def odd_videos(found: Neighbours) -> list[tuple[int, float, float]]:
    """Returns (video, mean similarity to its k nearest, robust standard deviations below the median), oddest first."""
    mean = found.similarity.masked_fill(found.similarity.isinf(), torch.nan).nanmean(1).double()
    known = mean[~mean.isnan()]
    if not len(known):
        return []
    middle = known.median()
    spread = 1.4826 * (known - middle).abs().median()
    distance = torch.where(spread > 1e-9, (middle - mean) / spread.clamp(min=1e-9), torch.zeros(()).double())
    order = [i for i in mean.argsort().tolist() if not mean[i].isnan()]
    return [(i, mean[i].item(), distance[i].item()) for i in order]


def pixel_agreement(a: Image.Image, b: Image.Image, frames: int) -> float:
    """Returns the mean correlation of the frames of two film strips, -1..1, as gray pictures of THUMBNAIL pixels.

    The border of each frame is ignored, because black bars would make any two videos agree.
    """
    pictures = []
    for strip in (a, b):
        side = THUMBNAIL + 2 * BORDER
        gray = strip.convert("L").resize((frames * side, side), Image.Resampling.BOX)
        levels = np.asarray(gray, np.float64).reshape(side, frames, side).transpose(1, 0, 2)
        levels = levels[:, BORDER:-BORDER, BORDER:-BORDER].reshape(frames, -1)
        pictures.append(levels - levels.mean(1, keepdims=True))
    first, second = pictures
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return float(np.mean((first * second).sum(1) / np.maximum(norms, 1e-9)))


def frames_agreement(first: Video, second: Video) -> float | None:
    """Returns the `pixel_agreement` of the film strips of two videos; None if one of them cannot be read."""
    strips = [whole_strip(video.path, video.num_frames) for video in (first, second)]
    return None if None in strips else pixel_agreement(*strips, STRIP_FRAMES)


def confidence(
    streams: dict[str, Tensor],
    metric: Metric,
    sources: Tensor,
    found: Neighbours,
    pixels: Tensor | None,
    doubts: Sequence[str] = (),
) -> tuple[str, list[str]]:
    """Returns how far the neighbours can be trusted, "high" | "moderate" | "low" | "unknown", and the reasons.

    Siblings (videos of one source) should be each other's nearest, and the views should agree. Both rates are compared
    with those of a random choice. With `doubts`, sentences that say why the run may not have learnt, it is "low".
    """
    count = len(sources)
    level, reasons = "unknown", list(doubts)
    crowded = _crowded(streams, metric)
    if crowded > CROWDED:
        reasons.append(
            f"{_share(crowded)} of all pairs of videos have a similarity of {DUPLICATE} or more: the network hardly "
            "tells these videos apart. Train it longer, or on more videos."
        )
    own = torch.bincount(sources)[sources] - 1
    siblings = own > 0
    if siblings.any() and not (sources == sources[0]).all():
        share = (sources[found.nearest_any] == sources)[siblings].double().mean().item()
        chance = (own[siblings].double() / (count - 1)).mean().item()
        level = _level(share, chance, high=0.8, moderate=0.4)
        reasons.append(
            f"{counted(int(siblings.sum()), 'video')} that share a source with another one: for {_share(share)} of "
            f"them the nearest video is of the same source (chance: {_share(chance)})."
        )
    if len(streams) > 1 and crowded <= CROWDED:  # equal similarities rank by position, so that both views would agree
        alone = [find_neighbours([features], metric, sources) for features in streams.values()]
        share = (alone[0].index[:, :1] == alone[1].index).any(1).double().mean().item()
        chance = alone[1].index.shape[1] / max(1, count - 1)
        agreed = _level(share, chance, high=0.6, moderate=0.3)
        level = agreed if level == "unknown" else level
        reasons.append(
            f"The views {' and '.join(VIEW_NAMES[view] for view in streams)} agree for {_share(share)} of the videos: "
            f"the nearest by one is among the {alone[1].index.shape[1]} nearest by the other (chance: "
            f"{_share(chance)})."
        )
    level = "low" if doubts or crowded > CROWDED else level
    if pixels is not None:
        thumbnails = find_neighbours([pixels], "cosine", sources)
        share = (thumbnails.index[:, 0] == found.index[:, 0]).double().mean().item()
        if share > 0.5:
            meaning = "Similar means similar colours and scenery rather than similar motion."
        elif level in ("high", "moderate"):
            meaning = "So similarity is about more than the picture's layout and brightness."
        else:
            meaning = f"This does not show what the network compares instead, because the confidence is {level}."
        reasons.append(
            f"For {_share(share)} of the videos a thumbnail of the middle frame finds the same nearest one. {meaning}"
        )
    if count < 100:
        reasons.append(
            f"With {counted(count, 'video')} every video has a nearest one, even if nothing is really similar to it."
        )
    return level, reasons


def _crowded(streams: dict[str, Tensor], metric: Metric) -> float:
    """Returns the share of pairs with a similarity of DUPLICATE or more, among at most CHUNK evenly spread videos."""
    count = len(next(iter(streams.values())))
    chosen = torch.linspace(0, count - 1, min(count, CHUNK)).long()
    some = [features[chosen] for features in streams.values()]
    comparison = _comparison(some, metric)
    total = comparison.similarity(torch.arange(len(chosen))) / len(comparison.streams)
    pairs = torch.ones_like(total, dtype=torch.bool).triu(1)
    return (total[pairs] >= DUPLICATE).double().mean().item()


def _comparison(streams: Sequence[Tensor], metric: Metric) -> Comparison:
    """Returns the comparison of all videos with each other, as `retrieve` makes it; "euclidean" is for baselines, which
    are not shown here."""
    metric = "cosine" if metric == "euclidean" else metric
    return Comparison(prepare_streams(streams, streams, metric), metric)


def _share(rate: float) -> str:
    return f"{rate:.0%}" if rate >= 0.01 or rate == 0 else f"{rate:.2%}"


def _level(share: float, chance: float, *, high: float, moderate: float) -> str:
    """Returns the level of confidence; "high" and "moderate" also require a share well above chance."""
    if share >= high and share >= 2 * chance:
        return "high"
    return "moderate" if share >= moderate and share >= 2 * chance else "low"
