"""The stream of a store's clips for training: shuffled, with two samples of each clip, in memory that a window bounds.

An epoch visits blocks of neighbouring clips in random order, a window of blocks at a time, and shuffles the clips
within a window. The order and the choice of the samples are pure functions of (seed, epoch): every number of processes
sees the same batches, and an epoch can begin at any step.

Letters: B clips of a batch, N clips of the index, M samples of a clip, W clips of a window, D width.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from cpr_fast._host import philox_uniform
from cpr_fast.config import DataConfig
from cpr_fast.data.clips.stream import Batch, run_ahead
from cpr_fast.data.features.index import StoredClips
from cpr_fast.errors import InputError
from cpr_fast.wording import counted

BLOCK = 64  # neighbouring clips that are read at once
_BLOCKS, _CLIPS, _SAMPLES = 6, 7, 8  # streams of random numbers; those of `cpr_fast.data.clips.sampling` are 0 to 5


def sample_pairs(clips: np.ndarray, samples: int, seed: int, epoch: int) -> np.ndarray:
    """Returns which two different samples of each clip are query and key, int64 [N, 2]; twice the same if M is 1.

    Args:
        clips: int64 [N], numbers of the clips in the store.
        samples: M.
    """
    draw = _draws(clips, seed, epoch, _SAMPLES)
    first = (draw[:, 0] * samples).astype(np.int64)
    further = 1 + (draw[:, 1] * (samples - 1)).astype(np.int64)
    return np.stack([first, (first + further) % samples], axis=1)


def epoch_windows(rows: np.ndarray, window: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Returns the positions 0..N-1 in the order of an epoch, divided into windows of about `window` positions or fewer.

    Args:
        rows: int64 [N], ascending numbers of the clips in the store; those with equal `row // BLOCK` are one block.
    """
    begins = np.flatnonzero(np.diff(rows // BLOCK, prepend=-1))
    blocks = np.split(np.arange(len(rows)), begins[1:])
    order = _permutation(np.arange(len(blocks)), seed, epoch, _BLOCKS)
    found = []
    for some in np.array_split(order, -(-len(order) // max(1, window // BLOCK))):  # no window is much smaller
        positions = np.concatenate([blocks[block] for block in np.sort(some)])
        found.append(positions[_permutation(rows[positions], seed, epoch, _CLIPS)])
    return found


class FeatureLoader:
    """Loads two samples of every clip, epoch by epoch, as `TrainLoader` loads two clips of every video.

    Batches hold `clips` {view: float32 [B, 2, D]}; `start` [B, 2] is the number of the sample. The clips that do not
    fill the last batch of all processes are left out; they differ by epoch. Reading and conversion run ahead in
    threads. Memory: four windows of 2 x W x D numbers of every view, in the dtype of the store: two that a batch takes
    clips from, one that is read already, and one that is being read.
    """

    skipped: Sequence[tuple[Path, str]] = ()

    def __init__(
        self,
        index: StoredClips,
        data: DataConfig,
        views: Sequence[str],
        *,
        seed: int,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
        plan: object = None,
    ) -> None:
        """`plan`, which says how many clips `TrainLoader` cuts from a video, is not used."""
        index.store.require_views("data.features", views)
        self._steps = len(index) // (data.batch_size * world_size)
        if self._steps == 0:
            raise InputError(
                f"data.batch_size: the store holds {counted(len(index), 'training clip')}, fewer than one batch of "
                f"{data.batch_size} x {counted(world_size, 'process', 'processes')}"
            )
        self._index, self._data, self._views, self._seed = index, data, tuple(views), seed
        self._device, self._rank, self._world_size = torch.device(device), rank, world_size
        self._labels, self._sources = torch.from_numpy(index.labels), torch.from_numpy(index.source_ids)

    def __len__(self) -> int:
        """Returns the number of steps of an epoch."""
        return self._steps

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Yields the batches of an epoch from `start_step` on; they do not depend on where it starts.

        Raises InputError that names a clip whose features are not finite.
        """
        return run_ahead(self._batches(epoch, start_step), depth=self._data.prefetch)

    def close(self) -> None:
        """Does nothing: the threads of an epoch end with its iterator."""

    def _batches(self, epoch: int, start_step: int) -> Generator[Batch, None, None]:
        of_step = self._data.batch_size * self._world_size
        windows = epoch_windows(self._index.rows, self._data.window, self._seed, epoch)
        ends = np.cumsum([len(window) for window in windows])
        first = int(np.searchsorted(ends, start_step * of_step, side="right"))
        begin = int(ends[first - 1]) if first else 0  # place of the first clip that is held, in the order of the epoch
        reading = run_ahead((self._read(window, epoch) for window in windows[first:]), depth=1)
        held: list[_Window] = []
        try:
            for step in range(start_step, self._steps):
                low = (step * self._world_size + self._rank) * self._data.batch_size
                while held and begin + len(held[0].positions) <= step * of_step:
                    begin += len(held.pop(0).positions)
                while begin + sum(len(window.positions) for window in held) < (step + 1) * of_step:
                    held.append(next(reading))
                yield self._batch(held, low - begin)
        finally:
            reading.close()

    def _read(self, positions: np.ndarray, epoch: int) -> _Window:
        """Reads a window: the two chosen samples of the clips at these positions, in this order."""
        store, rows = self._index.store, self._index.rows[positions]
        pairs = sample_pairs(rows, store.about.samples, self._seed, epoch)
        order = np.argsort(rows)  # to read each block once
        cuts = np.flatnonzero(np.diff(rows[order] // BLOCK)) + 1
        shape, dtype = (len(rows), 2, store.width), store.about.dtype
        features = {view: np.empty(shape, dtype) for view in self._views}
        for places in np.split(order, cuts):
            low, high = int(rows[places].min()), int(rows[places].max()) + 1
            for view, values in features.items():
                block = store.samples(view, low, high)
                values[places] = block[(rows[places] - low)[:, None], pairs[places]]
        return _Window(positions, pairs, features)

    def _batch(self, held: Sequence[_Window], begin: int) -> Batch:
        """Returns the B clips from place `begin` of the windows on."""
        parts, end = [], begin + self._data.batch_size
        for window in held:
            count = len(window.positions)
            if begin < count and end > 0:
                parts.append(window.part(slice(max(begin, 0), end)))
            begin, end = begin - count, end - count
        positions, pairs = (np.concatenate(columns) for columns in zip(*(part[:2] for part in parts), strict=True))
        clips = {}
        for view in self._views:
            # By NumPy: operators of torch in this thread would use a second pool of threads beside the training's.
            features = np.concatenate([part[2][view] for part in parts], dtype=np.float32)
            if not np.isfinite(features.sum()):
                self._index.store.require_finite(view, features, self._index.rows[positions])
            clips[view] = torch.from_numpy(features).to(self._device)
        video = torch.from_numpy(positions)
        samples = torch.from_numpy(pairs)
        count = self._index.store.about.samples
        plan = (video * count + samples[:, 0]) * count + samples[:, 1]  # one number for everything that is drawn
        return Batch(clips, video, self._sources[video], self._labels[video], samples, plan)


class _Window:
    """W clips in the order of an epoch: positions in the index [W], samples [W, 2], features [W, 2, D] by view."""

    def __init__(self, positions: np.ndarray, pairs: np.ndarray, features: dict[str, np.ndarray]) -> None:
        self.positions, self.pairs, self.features = positions, pairs, features

    def part(self, rows: slice) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """Returns positions, samples and features of some of the clips."""
        return self.positions[rows], self.pairs[rows], {view: values[rows] for view, values in self.features.items()}


def _draws(numbers: np.ndarray, seed: int, epoch: int, stream: int) -> np.ndarray:
    """Returns uniform draws in [0, 1) for each number, float64 [N, 4]."""
    streams = np.empty((len(numbers), 3), np.uint64)
    streams[:, 0], streams[:, 1], streams[:, 2] = epoch, numbers, stream
    return philox_uniform(seed % 2**64, streams, 1)


def _permutation(numbers: np.ndarray, seed: int, epoch: int, stream: int) -> np.ndarray:
    """Returns a random order of different numbers: a permutation of 0..N-1."""
    draw = _draws(numbers, seed, epoch, stream)
    return np.lexsort((draw[:, 1], draw[:, 0]))
