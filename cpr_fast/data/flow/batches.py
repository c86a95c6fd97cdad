"""Frame pairs of many videos packed into batches of one size, solved, and joined into videos again.

A batch takes the frame pairs of as many videos of one size as are needed to fill it. This keeps a GPU busy with short
videos, too, and a long video does not exhaust the GPU's memory.

Letters: N frames of a video, n frame pairs of a segment, H x W pixels.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from cpr_fast.data.flow.levels import FlowSolver


@dataclass(frozen=True)
class Segment:
    """Consecutive frames of a video whose pairs are in one batch; a video is one segment or several."""

    position: int  # position of the video in the index
    gray: np.ndarray | Exception  # uint8 [n + 1, H, W], or why the video cannot be read
    last: bool  # whether this is the last segment of the video

    def pairs(self) -> np.ndarray:
        """Returns the frame pairs, uint8 [n, 2, H, W]."""
        return np.stack([self.gray[:-1], self.gray[1:]], axis=1)


def pack(videos: Iterable[tuple[int, np.ndarray | Exception]], pixels: int) -> Iterator[list[Segment]]:
    """Packs videos, given one after another as (position, gray uint8 [N, H, W]), into batches of frame pairs.

    The pairs of a batch have one size and together at most `pixels` pixels of one frame each, or are a single pair. A
    video that could not be read forms a separate batch.
    """
    batch: list[Segment] = []
    size, room = None, 0
    for position, gray in videos:
        if isinstance(gray, Exception):
            yield [Segment(position, gray, last=True)]
            continue
        if gray.shape[1:] != size or room == 0:
            if batch:
                yield batch
            size, batch = gray.shape[1:], []
            room = max(1, pixels // (size[0] * size[1]))
        first = 0
        while first < len(gray) - 1:
            if room == 0:
                yield batch
                batch, room = [], max(1, pixels // (size[0] * size[1]))
            end = min(first + room, len(gray) - 1)
            batch.append(Segment(position, gray[first : end + 1], last=end == len(gray) - 1))
            room -= end - first
            first = end
    if batch:
        yield batch


def solve(batch: list[Segment], solver: FlowSolver) -> list[tuple[Segment, np.ndarray | Exception]]:
    """Returns every segment with its levels, uint8 [n, 2, H, W], or with the error. The segments of a batch that fails
    are solved one by one, so that an error in one video does not affect the others."""
    if isinstance(batch[0].gray, Exception):
        return [(batch[0], batch[0].gray)]
    try:
        levels = solver.levels(np.concatenate([segment.pairs() for segment in batch]))
    except Exception as error:  # an error in one video must not stop the others
        return [(batch[0], error)] if len(batch) == 1 else [solve([segment], solver)[0] for segment in batch]
    ends = np.cumsum([len(segment.gray) - 1 for segment in batch])
    return list(zip(batch, np.split(levels, ends[:-1]), strict=True))


def join(
    solved: Iterable[list[tuple[Segment, np.ndarray | Exception]]],
) -> Iterator[tuple[int, np.ndarray | Exception]]:
    """Yields (position, levels uint8 [N - 1, 2, H, W] or the error) of every video, from its segments in order."""
    parts: dict[int, list] = defaultdict(list)
    for segment, levels in (item for batch in solved for item in batch):
        parts[segment.position].append(levels)
        if segment.last:
            video = parts.pop(segment.position)
            error = next((part for part in video if isinstance(part, Exception)), None)
            yield segment.position, np.concatenate(video) if error is None else error
