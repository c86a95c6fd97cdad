"""How good the features of an encoder are, judged without labels: the score that selects the best checkpoint of a run
whose videos have none.

Every video gives two clips that were cut and augmented independently. Three signs say how near something is to a clip
that ought to be near, among the second clips of all videos:

- `same_video`: the other clip of the same video;
- `siblings`: the other clip of a video of the same source;
- `neighbours`: the other clips of the videos whose first clips are nearest, of other sources.

Each is the mean of the nearness ``-ln(rank / candidates) - 1``, which is 0 at chance, as in `auto`. A fourth sign says
how many dimensions the features use: the `effective_rank`. The score is the mean of the first three, times the
logarithm of the fourth. It is about 0 for features of noise, because none of them is near to another, and for features
on a line, because their effective rank is 1. A mean below 0 is the score itself, whatever the rank: otherwise equal
features, whose mean is ln 2 - 1 = -.31 and whose rank is 1, would score 0, above noise that is slightly below chance.
Nothing in it is fitted. Measured in `bench/results/checkpoint_choice.md`.

Letters: N videos, F feature width, B queries, P entries wanted per query.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from cpr_fast.mining.auto import PAIRS, siblings_of
from cpr_fast.mining.quality import candidates

NEIGHBOURS = 5  # number of nearest videos that are compared between the first and the second clips
SIGNS = ("same_video", "siblings", "neighbours", "effective_rank")
ROWS = 1024  # number of queries that are compared with all entries at once
TIE = 2.0**-40  # similarities of unit vectors that differ by at most this are equal: more than float64 rounds off


def effective_rank(features: Tensor) -> Tensor:
    """Returns the effective rank of N directions [N, F], 0-d in 1..min(N, F): the number of dimensions that they use.

    It is exp(entropy) of the singular values of the unit vectors, normalised to sum 1 [Roy and Vetterli 2007; RankMe,
    Garrido et al. 2023].
    """
    shares = torch.linalg.svdvals(F.normalize(features, dim=1))
    shares = shares / shares.sum()
    return torch.special.entr(shares).sum().exp()


def unlabelled_score(features: Tensor, ids: Tensor) -> dict[str, float | None]:
    """Returns the `score` of the features and the four signs that it consists of, see the docstring of the module.

    Args:
        features: [N, 2, F] floating-point features of two clips of each video.
        ids: [N] int64 source ids, 0 or more.
    Returns:
        `score` and `SIGNS`. `siblings` is None, and not part of the mean, if fewer than `PAIRS` videos have a sibling.
    Raises:
        ValueError: a shape is wrong, a feature is not finite, an id is below 0, or all videos have one source.
    """
    if features.dim() != 3 or features.shape[1] != 2 or ids.shape != features.shape[:1]:
        raise ValueError(f"features, ids: expected [N, 2, F] and [N], got {list(features.shape)} and {list(ids.shape)}")
    if not torch.isfinite(features).all():
        raise ValueError("features: expected finite numbers, got NaN or infinite ones")
    if len(ids) and ids.min() < 0:
        raise ValueError(f"ids: expected source ids of 0 or more, got {ids.min().item()}")
    if len(ids.unique()) < 2:
        raise ValueError("ids: expected videos of two sources or more, got one source")
    first, second = F.normalize(features.double(), dim=2).unbind(1)
    own, sibling = torch.arange(len(ids), device=ids.device), siblings_of(ids)
    paired = (sibling >= 0).nonzero().flatten()
    signs = {
        "same_video": _nearness(first, second, own[:, None], ids, ids),
        "siblings": None,
        "neighbours": _nearness(second, second, _nearest(first, ids), ids, ids),
    }
    if len(paired) >= PAIRS:
        signs["siblings"] = _nearness(first[paired], second, sibling[paired, None], ids[paired], ids)
    known = [value for value in signs.values() if value is not None]
    both = torch.cat([first, second])
    rank = effective_rank(both).item() if both.any() else 1.0
    mean = sum(known) / len(known)
    return {"score": mean * math.log(max(rank, 1.0)) if mean > 0 else mean, **signs, "effective_rank": rank}


def _nearness(queries: Tensor, entries: Tensor, wanted: Tensor, query_ids: Tensor, ids: Tensor) -> float:
    """Returns the mean of ``-ln(rank / candidates) - 1`` over wanted entries.

    The candidates of a wanted entry are itself and the entries of other sources than the query's. Entries that are as
    similar to the query as the wanted one share their ranks with it, so that equal features are not near.

    Args:
        queries, entries: [B, F], [N, F] float64 unit vectors.
        wanted: [B, P] int64, entries.
        query_ids, ids: [B], [N] int64 source ids.
    """
    total = 0.0
    for part, of_part, its_ids in zip(queries.split(ROWS), wanted.split(ROWS), query_ids.split(ROWS), strict=True):
        others = candidates(its_ids, ids)  # [b, N]
        scores = part @ entries.T
        for slots in of_part.unbind(1):
            allowed = others.scatter(1, slots[:, None], False)
            own = scores.gather(1, slots[:, None])
            above = scores - own
            before = ((above > TIE) & allowed).sum(1) + ((above.abs() <= TIE) & allowed).sum(1) / 2
            total -= ((1 + before) / (1 + allowed.sum(1))).double().log().sum().item()
    return total / wanted.numel() - 1


def _nearest(features: Tensor, ids: Tensor) -> Tensor:
    """Returns the entries of other sources that are nearest to each entry: [N, P] int64, P at most `NEIGHBOURS`."""
    count = min(NEIGHBOURS, int(candidates(ids, ids).sum(1).min()))
    parts = []
    for part, its_ids in zip(features.split(ROWS), ids.split(ROWS), strict=True):
        scores = (part @ features.T).masked_fill(~candidates(its_ids, ids), -torch.inf)
        parts.append(scores.topk(count, dim=1).indices)
    return torch.cat(parts)
