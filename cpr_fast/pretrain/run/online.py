"""Retrieval while a run trains: R@1 among held-out videos, by which the best checkpoint is chosen.

Letters: M videos held out, R ranks, F feature width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cpr_fast.config import Config, View
from cpr_fast.data.index.index import Index
from cpr_fast.errors import InputError
from cpr_fast.evaluate.features.cache import embed_index
from cpr_fast.evaluate.features.embedding import Embedding
from cpr_fast.evaluate.features.recipe import make_recipe
from cpr_fast.evaluate.retrieval.ranking import NO_HIT, Comparison, prepare, recall
from cpr_fast.models import Encoder
from cpr_fast.runtime.distributed import World
from cpr_fast.runtime.watchdog import Watchdog

RECIPE = make_recipe("paper", clips_per_video=2)


class OnlineRetrieval:
    """Every held-out video queries the others but those of its own source; each rank embeds its share of them.

    It leaves the run as it found it: neither weights and statistics nor any generator that training draws from change.

    Args:
        videos: `health.online_videos` of them are taken, evenly spread.
        views: that the run trains.
        make_windows: called with an index and a view for a loader as `sum_features` takes it; by default the test
            windows of `data`.
    Raises:
        InputError: no query could be judged, or a video lacks the flow that a view needs.
    """

    def __init__(
        self,
        config: Config,
        videos: Index,
        views: Sequence[View],
        world: World,
        watch: Watchdog,
        make_windows: Callable[[Index, View], Any] | None = None,
    ) -> None:
        count = min(config.health.online_videos, len(videos))
        self.index = Index((videos[len(videos) * i // count] for i in range(count)), videos.classes)
        self.labels, self.sources = torch.from_numpy(self.index.labels), torch.from_numpy(self.index.source_ids)
        same_class = (self.labels[:, None] == self.labels) & (self.labels >= 0)
        if not (same_class & (self.sources[:, None] != self.sources)).any():
            raise InputError(
                f"health.online_split: expected a class with videos of two sources among the {count} videos of "
                f"{config.health.online_split!r}, got none; health.online_videos is {config.health.online_videos}"
            )
        bare = [video.path for video in self.index if video.flow_path is None]
        if make_windows is None and "flow" in views and config.data.flow == "stored" and bare:
            raise InputError(
                f"health.online_split: video {str(bare[0])!r} has no flow_path in the index; run `cpr-fast flow` first"
            )
        self.world, self.watch = world, watch
        self.make_windows = make_windows or self._open_windows
        self._data = replace(config.data, cache_gib=0)  # every window is read once

    def measure(self, encoder: Encoder, view: View) -> dict[str, Any]:
        """`r@1`, `r@5`, `chance_r@1` (of a random order) and the numbers of `queries` and `videos`, on every rank."""
        features, found = self._embed(encoder, view)
        labels, sources = self.labels[found], self.sources[found]
        comparison = Comparison(
            [prepare(features[found], features[found], RECIPE.metric)], RECIPE.metric, sources, sources
        )
        ranks = comparison.ranks(labels, labels)
        judged = (labels >= 0) & (ranks != NO_HIT)
        rates = recall(ranks[judged], sources[judged], len(labels))
        chance = comparison.chance_r1(labels, labels)[judged].mean().item()
        kept = {name: rates[name] for name in ("r@1", "r@5", "queries")}
        return {**kept, "chance_r@1": chance, "videos": len(labels)}

    def _embed(self, encoder: Encoder, view: View) -> tuple[Tensor, Tensor]:
        """Features of the held-out videos in eval mode, [M, F] float32 on the CPU, and which gave one, [M] bool."""

        def features(clips: Tensor) -> Tensor:
            self.watch.getting_on()
            return encoder.features(clips)

        device = self.world.device
        encoder.eval()
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                rows, windows = embed_index(
                    self.index,
                    {view: Embedding(view, features, RECIPE.metric)},
                    lambda part: self.make_windows(part, view),
                    description="online retrieval",
                )
        finally:
            encoder.train()
        return rows[view], windows > 0

    def _open_windows(self, part: Index, view: View) -> Any:
        from cpr_fast.evaluate.features.windows import open_windows

        return open_windows(part, self._data, [view], RECIPE, str(self.world.device))
