"""Quality of the mined positives: PMR, mining R@1, CMR [paper, Eq. 3, 4], and how evenly entries are mined.

Everything runs on the device of its inputs without synchronising with the host, except `MiningQuality.summary`.

Letters: B queries, P positives mined per query, K memory slots, N videos of the index, C classes, U units.

Labels are class numbers, -1 where unknown. The mined entries never include the query's own video or its siblings,
because mining excludes them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

Unit = Literal["source", "video"]
HUB_SHARE = 0.01  # fraction of the videos that count as hubs: those mined most often
_SUMS = ("totals", "counts", "right", "right_of_class")  # tensors that are summed over an epoch


def gather_slots(values: Tensor, mined: Tensor) -> Tensor:
    """Returns `values` [K] int64 at the `mined` slots [B, P] int64, and -1 where a slot is padding (-1)."""
    return torch.where(mined >= 0, values[mined.clamp(min=0)], -1)  # [B, P]


def candidates(query_ids: Tensor, memory_ids: Tensor) -> Tensor:
    """Returns which slots a cascade may mine for a query, [B, K] bool: slots that are not empty (id -1)
    and whose source is not the query's.

    Args:
        query_ids, memory_ids: [B], [K] int64 source ids, as in `cascade_select`.
    """
    return (memory_ids != -1) & ((memory_ids != query_ids[:, None]) | (query_ids[:, None] == -1))


def judge(mined_labels: Tensor, query_labels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns which mined entries are true positives, and for which of them this is known.

    Args:
        mined_labels: [B, P] int64, -1 for padding or unknown.
        query_labels: [B] int64, -1 for unknown.
    Returns:
        true_positive [B, P] bool: the entry has the query's label.
        known [B, P] bool: an entry was mined and both labels are known; other entries are not counted.
    """
    if mined_labels.dim() != 2 or query_labels.shape != mined_labels.shape[:1]:
        raise ValueError(
            f"mined_labels, query_labels: expected [B, P] and [B], "
            f"got {list(mined_labels.shape)} and {list(query_labels.shape)}"
        )
    known = (mined_labels >= 0) & (query_labels >= 0)[:, None]
    return known & (mined_labels == query_labels[:, None]), known


def positive_mining_rate(true_positive: Tensor, known: Tensor) -> Tensor:
    """Returns PMR [paper, Eq. 3], ``|true positives| / |mined|`` of each query: [B] float32, NaN if unknown."""
    return true_positive.sum(1) / known.sum(1)


def mining_r1(true_positive: Tensor, known: Tensor) -> Tensor:
    """Returns 1 where the first mined entry is a true positive, else 0: [B] float32, NaN where it is not known."""
    return true_positive[:, 0] / known[:, 0]


def class_mining_rate(found: Tensor, unit_class: Tensor, num_classes: int) -> Tensor:
    """Returns CMR [paper, Eq. 4] of each class: [C] float32, NaN for a class without units.

    ``CMR(c) = |distinct true positives mined for the queries of c in an epoch| / |units of c|``

    Args:
        found: [U] bool, the unit was mined as a true positive at least once.
        unit_class: [U] int64, -1 where unknown.
    """
    bins = torch.where(unit_class >= 0, unit_class, num_classes)  # an additional bin for the unknown
    counts = torch.zeros(2, num_classes + 1, device=found.device)
    counts[0].index_add_(0, bins, found.float())
    counts[1].index_add_(0, bins, torch.ones_like(bins, dtype=torch.float32))
    return (counts[0] / counts[1])[:num_classes]


def class_units(labels: Tensor, sources: Tensor, unit: Unit) -> tuple[Tensor, Tensor]:
    """Returns the units that CMR counts: the unit of every video [N] int64, and the class of every unit [U] int64.

    For "source", a unit is a pair of class and source id, so a source that was cut into clips of two classes is a unit
    of each class. The rates printed in the paper are multiples of 1/18, and 18 is the number of source groups per class
    of UCF101; hence the unit of the paper is the source.
    """
    if unit not in ("source", "video"):
        raise ValueError(f"unit: expected 'source' or 'video', got {unit!r}")
    if labels.shape != sources.shape or labels.dim() != 1:
        raise ValueError(f"labels, sources: expected two [N], got {list(labels.shape)} and {list(sources.shape)}")
    if unit == "video":
        return torch.arange(len(labels), device=labels.device), labels
    pairs, unit_of_video = torch.unique(torch.stack([labels, sources], 1), dim=0, return_inverse=True)
    return unit_of_video, pairs[:, 0].contiguous()


def mined_counts(mined: Tensor, size: int) -> Tensor:
    """Returns how often each of `size` entries was mined, [size] int64; `mined` has any shape, -1 for padding."""
    counts = torch.zeros(size + 1, dtype=torch.int64, device=mined.device)  # an additional entry for the padding
    places = torch.where(mined >= 0, mined, size).flatten()
    return counts.index_add_(0, places, torch.ones_like(places))[:size]


def hubness(counts: Tensor) -> Tensor:
    """Returns the skewness of how often the entries were mined: 0-d float32, NaN if all are equal.

    A value near 0 means that all entries are mined about equally often. A value far above 1 means that a few entries
    (hubs) are mined for most queries.
    Source: Radovanovic et al., JMLR 2010.
    """
    spread = counts.double() - counts.double().mean()
    return (spread.pow(3).mean() / spread.square().mean().pow(1.5)).float()


def hub_share(counts: Tensor) -> Tensor:
    """Returns the share of all minings that select one of the 1 % (at least one) most often mined entries: 0-d
    float32."""
    hubs = max(1, round(HUB_SHARE * len(counts)))
    return counts.topk(hubs).values.sum() / counts.sum()


class MiningQuality:
    """Accumulates the mining quality of an epoch on the device: PMR, mining R@1, CMR, hubness and further rates.

    Args:
        labels: [N] int64 class of every video of the training index, -1 where unknown.
        sources: [N] int64 source id of every video.
        top_k: Largest number of entries mined for a query.
        extra: Names of further rates per query that `update` will be given.

    Processes combine their results by summing `totals`, `counts`, `right` and `right_of_class` and by taking the
    maximum of each tensor in `found`.
    """

    def __init__(
        self,
        labels: Tensor,
        sources: Tensor,
        *,
        top_k: int = 5,
        extra: Sequence[str] = (),
        device: torch.device | str = "cpu",
    ) -> None:
        self.labels = torch.as_tensor(labels, dtype=torch.int64).to(device)
        sources = torch.as_tensor(sources, dtype=torch.int64).to(device)
        self.num_classes = int(self.labels.max()) + 1 if len(self.labels) else 0
        self.top_k = top_k
        self.names = ("pmr", "mining_r1", *extra)
        self._units = {unit: class_units(self.labels, sources, unit) for unit in ("source", "video")}
        classes = self._units["source"][1]  # of every pair of class and source
        self._one_source = torch.bincount(classes[classes >= 0], minlength=self.num_classes) == 1
        self.reset()

    def reset(self) -> None:
        """Resets the accumulated values for a new epoch."""
        device = self.labels.device
        # The sum of each rate, and the number of queries it was counted for; float64 is exact for epochs of any length.
        self.totals = torch.zeros(2, len(self.names), dtype=torch.float64, device=device)
        self.counts = torch.zeros(len(self.labels), dtype=torch.int64, device=device)  # how often a video was mined
        self.right = torch.zeros(self.top_k + 1, dtype=torch.int64, device=device)  # queries with 0..P true positives
        self.right_of_class = torch.zeros(self.num_classes, dtype=torch.int64, device=device)  # true positives
        self.found = {
            unit: torch.zeros(len(unit_class), dtype=torch.int8, device=device)
            for unit, (_, unit_class) in self._units.items()
        }

    def update(
        self, mined_videos: Tensor, query_videos: Tensor, extra: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Adds a batch, and returns its mean PMR, mining R@1 and extra rates as 0-d float32 (NaN if nothing is known).

        Args:
            mined_videos: [B, P] int64 videos of the mined slots, -1 for padding, best first.
            query_videos: [B] int64.
            extra: {name: [B] float32} for names given to the constructor, NaN where a query has no value; a rate that
                is not given has no value for the whole batch.
        """
        if mined_videos.shape[1] > self.top_k:
            raise ValueError(f"mined_videos: expected [B, P] with P <= {self.top_k}, got {list(mined_videos.shape)}")
        query_labels = self.labels[query_videos]
        true_positive, known = judge(gather_slots(self.labels, mined_videos), query_labels)
        rates = {"pmr": positive_mining_rate(true_positive, known), "mining_r1": mining_r1(true_positive, known)}
        rates |= extra or {}
        unknown = torch.full_like(rates["pmr"], torch.nan)
        values = torch.stack([rates.get(name, unknown) for name in self.names])  # [M, B]
        self.totals += torch.stack([values.nan_to_num(0).sum(1), (~values.isnan()).sum(1)])
        self.counts += mined_counts(mined_videos, len(self.counts))
        right = true_positive.sum(1)  # [B]
        self.right.index_add_(0, right, known.any(1).long())
        if self.num_classes:
            self.right_of_class.index_add_(0, query_labels.clamp(min=0), right)  # 0 where the label is unknown
        for unit, (unit_of_video, _) in self._units.items():
            # amax over int8 instead of boolean indexing, which would wait for a count on the host.
            slots = unit_of_video[mined_videos.clamp(min=0)].flatten()
            self.found[unit].scatter_reduce_(0, slots, true_positive.flatten().to(torch.int8), "amax")
        return dict(zip(self.names, values.nanmean(1).unbind(), strict=True))

    def class_rates(self, unit: Unit = "source") -> Tensor:
        """Returns CMR of every class so far: [C] float32 on the device; NaN for a class without videos, and for one
        whose videos are all of one source: siblings are never mined, so its rate would be 0 whatever the network does.
        """
        rates = class_mining_rate(self.found[unit].bool(), self._units[unit][1], self.num_classes)
        return rates.masked_fill(self._one_source, torch.nan)

    def summary(self) -> dict[str, float | None]:
        """Returns the results of the epoch on the host (one synchronisation); None where unknown, for example without
        labels.

        `pmr`, `mining_r1` and the extra rates: means over queries. `cmr_median`, `cmr_mean` (unit source) and
        `cmr_median_video`: over classes. `hubness`: over videos. `hub_share`: the share of the minings that select one
        of the 1 % most often mined videos. `mined_share`: the share of the videos that were mined at least once.
        """
        source, video = self.class_rates("source"), self.class_rates("video")
        means = self.totals[0] / self.totals[1]
        cmr = torch.stack([_median(source), source.nanmean(), _median(video)]).masked_fill(means[0].isnan(), torch.nan)
        spread = torch.stack([hubness(self.counts), hub_share(self.counts), (self.counts > 0).float().mean()])
        spread = spread.masked_fill(self.counts.sum() == 0, torch.nan)
        names = (*self.names, "cmr_median", "cmr_mean", "cmr_median_video", "hubness", "hub_share", "mined_share")
        values = torch.cat([means, cmr, spread]).tolist()
        return {name: None if math.isnan(value) else value for name, value in zip(names, values, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """Returns the values accumulated in the epoch so far."""
        return {name: getattr(self, name) for name in (*_SUMS, "found")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the values of a `state_dict`."""
        for name in _SUMS:
            getattr(self, name).copy_(state[name])
        for unit, found in state["found"].items():
            self.found[unit].copy_(found)


def _median(rates: Tensor) -> Tensor:
    """Returns the median over classes with units (mean of the middle two for an even number), NaN if there are none."""
    return torch.nanquantile(rates, 0.5) if len(rates) else torch.tensor(float("nan"), device=rates.device)
