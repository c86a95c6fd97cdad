"""What is measured between epochs to choose the best checkpoint: R@1 among held-out videos or, without labels, the
score of `cpr_fast.mining.unlabelled` on some of the training videos.

Letters: M videos, B videos of a batch on one process, F feature width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
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
from cpr_fast.mining.unlabelled import unlabelled_score
from cpr_fast.models import Encoder
from cpr_fast.pretrain.run.videos import every_video
from cpr_fast.runtime import distributed
from cpr_fast.runtime.distributed import World
from cpr_fast.runtime.watchdog import Watchdog
from cpr_fast.wording import counted

RECIPE = make_recipe("paper", clips_per_video=2)


def open_online(
    config: Config,
    index: Index,
    held_out: Index | None,
    world: World,
    watch: Watchdog,
    make_loader: Callable[..., Any],
    make_windows: Callable[[Index, View], Any] | None,
) -> OnlineRetrieval | OnlineScore | None:
    """Returns what `health.online_measure` names, or None if `health.online_every` is 0.

    Args:
        index: the training videos.
        held_out: the videos of `OnlineRetrieval`; None: those of `health.online_split`.
        make_loader: called like `TrainLoader` of `cpr_fast.data.clips.loader`.
        make_windows: see `OnlineRetrieval`.
    Raises:
        InputError: nothing can be measured on these videos.
    """
    health = config.health
    if not health.online_every:
        return None
    no_labels = held_out is None and bool((index.labels < 0).all())
    if health.online_measure == "score" or (health.online_measure == "auto" and no_labels):
        return OnlineScore(config, index, world, watch, make_loader)
    if held_out is None:
        try:
            held_out = every_video(config.data).select(split=health.online_split).long_enough(config.data)
        except InputError as error:
            raise InputError(f"health.online_split: {error}") from None
    return OnlineRetrieval(config, held_out, [c.view for c in config.schedule.cycles], world, watch, make_windows)


@contextmanager
def _as_it_was(encoder: Encoder, device: torch.device) -> Iterator[None]:
    """Puts the encoder that learns into eval mode for a block, and keeps the state of the random generators."""
    encoder.eval()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        encoder.train()


class OnlineScore:
    """The score without labels, of two augmented clips of some training videos, which are the same clips every time.

    Each process encodes its share, and all return the same numbers. Measuring does not affect training: weights,
    running statistics and the state of random generators stay the same.

    Args:
        index: the training videos. `health.online_videos` of them are used, evenly spaced, and a few less where they do
            not fill the last batch.
        make_loader: called like `TrainLoader` of `cpr_fast.data.clips.loader`.
    Raises:
        InputError: these videos are of one source.
    """

    by = "score"

    def __init__(
        self, config: Config, index: Index, world: World, watch: Watchdog, make_loader: Callable[..., Any]
    ) -> None:
        count = min(config.health.online_videos, len(index))
        batch = max(1, min(config.data.batch_size, count // world.size))  # B
        count = max(1, count // (batch * world.size)) * batch * world.size
        self.index = index.chosen(len(index) * i // count for i in range(count))
        if self.index.source_count < 2:
            raise InputError(
                f"health.online_every: expected training videos of two sources or more, to compare them with each "
                f"other, got {counted(count, 'video')} of one source; health.online_videos is "
                f"{config.health.online_videos}"
            )
        self.world, self.watch, self.make_loader, self.seed = world, watch, make_loader, config.run.seed
        self._data = replace(config.data, batch_size=batch, cache_gib=0)  # every clip is read once

    def work_ahead(self) -> str:
        """Returns a sentence about the work of one measurement."""
        return f"the score without labels, of two clips of {counted(len(self.index), 'training video')}"

    def measure(self, encoder: Encoder, view: View) -> dict[str, Any]:
        """Returns, on every rank, the values of `unlabelled_score` and the number of `videos`.

        Raises:
            InputError: the features are not finite, or videos of one source only could be read.
        """
        features, video = self._embed(encoder, view)
        try:
            return {**unlabelled_score(features, torch.from_numpy(self.index.source_ids)[video]), "videos": len(video)}
        except ValueError as error:
            raise InputError(f"health.online_every: the {view} encoder cannot be scored: {error}") from error

    def _embed(self, encoder: Encoder, view: View) -> tuple[Tensor, Tensor]:
        """Returns the features of the videos that could be read, [M, 2, F] float32, and their numbers, [M] int64, in
        ascending order, both on the CPU."""
        world, parts = self.world, []
        loader = self.make_loader(
            self.index, self._data, [view], seed=self.seed, device=world.device, rank=world.rank,
            world_size=world.size,
        )  # fmt: skip
        with closing(loader), _as_it_was(encoder, world.device), torch.no_grad():
            for batch in loader.epoch(0):
                self.watch.getting_on()
                features = encoder.features(batch.clips[view].flatten(0, 1)).flatten(1).float()  # [2 * B, F]
                pairs = features.unflatten(0, (-1, 2))
                parts.append((distributed.all_gather(pairs), distributed.all_gather(batch.video.to(world.device))))
        features, video = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
        order = video.argsort(stable=True)
        first = torch.ones(len(order), dtype=torch.bool)  # a video that replaces an unreadable one comes twice
        first[1:] = video[order][1:] != video[order][:-1]
        return features[order[first]], video[order[first]]


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

    by = "r@1"

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

        with _as_it_was(encoder, self.world.device):
            rows, windows = embed_index(
                self.index,
                {view: Embedding(view, features, RECIPE.metric)},
                lambda part: self.make_windows(part, view),
                description="online retrieval",
            )
        return rows[view], windows > 0

    def _open_windows(self, part: Index, view: View) -> Any:
        from cpr_fast.evaluate.features.windows import open_windows

        return open_windows(part, self._data, [view], RECIPE, str(self.world.device))
