"""Online retrieval: R@1 among held-out videos during training. It is used to choose the best checkpoint.

Letters: M held-out videos, R ranks, F feature width.
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
from cpr_fast.evaluate.features.windows import count_windows
from cpr_fast.evaluate.retrieval.names import with_copies
from cpr_fast.evaluate.retrieval.queries import have_copies
from cpr_fast.evaluate.retrieval.ranking import NO_HIT, Comparison, prepare, rates
from cpr_fast.models import Encoder
from cpr_fast.runtime.distributed import World
from cpr_fast.runtime.watchdog import Watchdog
from cpr_fast.wording import counted

RECIPE = make_recipe("paper", clips_per_video=2)


class OnlineRetrieval:
    """For every held-out video, ranks the held-out videos of other sources. Each rank embeds its share of the videos.

    Measuring does not affect training: weights, running statistics and the state of random generators stay the same.

    Args:
        videos: `health.online_videos` of them are used, evenly spaced.
        views: the views that the run trains.
        make_windows: called with an index and a view, returns a loader of evaluation windows for `embed_index`; by
            default the test windows of `data`.
    Raises:
        InputError: no class has videos of two sources, or a video has no flow although a view needs it.
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
        self.index = videos.chosen(len(videos) * i // count for i in range(count))
        self.labels, self.sources = torch.from_numpy(self.index.labels), torch.from_numpy(self.index.source_ids)
        same_class = (self.labels[:, None] == self.labels) & (self.labels >= 0)
        if not (same_class & (self.sources[:, None] != self.sources)).any():
            raise InputError(
                f"health.online_split: expected a class with videos of two sources among the "
                f"{counted(count, 'video')} of "
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

    def work_ahead(self) -> str:
        """Returns a sentence about the work of one measurement."""
        windows = count_windows(self.index, self._data, RECIPE)
        said = f"retrieval among {counted(len(self.index), 'held-out video')} in {counted(windows, 'window')}"
        copied = with_copies(sum(have_copies(self.index, self.index, other_sources=True)))
        return f"{said}. {copied}" if copied else said

    def measure(self, encoder: Encoder, view: View) -> dict[str, Any]:
        """Returns, on every rank, `r@1`, `r@5`, `map`, `chance_r@1` and `chance_map` (the expected values for a
        random ranking), and the numbers of `queries` and `videos`. Rates are fractions."""
        features, found = self._embed(encoder, view)
        labels, sources = self.labels[found], self.sources[found]
        comparison = Comparison(
            [prepare(features[found], features[found], RECIPE.metric)], RECIPE.metric, sources, sources
        )
        ranking = comparison.rank(labels, labels)
        judged = (labels >= 0) & (ranking.first_hit != NO_HIT)
        measured = rates(ranking, judged, sources, len(labels))
        kept = {name: measured[name] for name in ("r@1", "r@5", "map", "queries", "chance_r@1", "chance_map")}
        return {**kept, "videos": len(labels)}

    def _embed(self, encoder: Encoder, view: View) -> tuple[Tensor, Tensor]:
        """Returns the features of the held-out videos in eval mode, [M, F] float32 on the CPU, and a mask [M] bool of
        the videos that could be read."""

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
