"""The measures of every query of a retrieval evaluation, stored so that two networks can be compared query by query.

Letters: Q queries.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cpr_fast.data.files.names import is_remote, text_of
from cpr_fast.data.index.index import Index, Video
from cpr_fast.errors import InputError
from cpr_fast.evaluate.features.cache import digest
from cpr_fast.evaluate.retrieval.ranking import Ranking
from cpr_fast.runtime.files import replacing

NAMED = 3  # number of videos that a message names


@dataclass(frozen=True)
class QueryScores:
    """The queries of one or more splits, and the measures of each for every network and view.

    Attributes:
        paths, labels, sources: Q absolute paths, class names and names of source videos.
        splits: [Q] int64, the number of each query's index, from 1.
        galleries: A digest of the videos and classes of every split's gallery, which does not depend on the folder.
        average_precision: {"name/view": [Q] float64}, NaN where the gallery has no video of the query's class.
        first_hit: {"name/view": [Q] int64}, the rank (0 = nearest) of the nearest video of the query's class;
            `cpr_fast.evaluate.retrieval.ranking.NO_HIT` if there is none.
    """

    paths: list[str]
    labels: list[str]
    sources: list[str]
    splits: Tensor
    galleries: list[str]
    average_precision: dict[str, Tensor]
    first_hit: dict[str, Tensor]

    def source_ids(self) -> Tensor:
        """Returns the sources as numbers, [Q] int64."""
        return torch.from_numpy(np.unique(np.array(self.sources), return_inverse=True)[1].reshape(-1))

    def save(self, path: Path) -> None:
        """Writes an .npz file; the file is written completely or not at all."""
        names = list(self.average_precision)
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(
                file,
                paths=np.array(self.paths),
                labels=np.array(self.labels),
                sources=np.array(self.sources),
                splits=self.splits.numpy(),
                galleries=np.array(self.galleries),
                names=np.array(names),
                average_precision=torch.stack([self.average_precision[name] for name in names]).numpy(),
                first_hit=torch.stack([self.first_hit[name] for name in names]).numpy(),
            )

    @staticmethod
    def load(path: Path) -> QueryScores:
        """Reads a file of `save`. Raises InputError naming the file if it is missing or damaged."""
        try:
            with np.load(path) as stored:
                arrays = {name: stored[name] for name in stored.files}
            names = arrays["names"].tolist()
            measures = [
                dict(zip(names, torch.from_numpy(arrays[key]).unbind(), strict=True))
                for key in ("average_precision", "first_hit")
            ]
            lists = [arrays[key].tolist() for key in ("paths", "labels", "sources")]
            return QueryScores(*lists, torch.from_numpy(arrays["splits"]), arrays["galleries"].tolist(), *measures)
        except FileNotFoundError:
            raise InputError(
                f"{str(path)!r} does not exist; expected the file that `cpr-fast retrieve` wrote"
            ) from None
        except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise InputError(f"{str(path)!r} is damaged ({error}); run `cpr-fast retrieve` again") from None


def full_name(video: Video) -> str:
    """Returns the absolute path of a video, or its URL, as results name it."""
    return text_of(video.path) if is_remote(video.path) else str(video.path.absolute())


def query_scores(
    videos: Sequence[Video], gallery: Sequence[Video], counted: Tensor, rankings: Mapping[str, Ranking]
) -> QueryScores:
    """Returns the scores of the counted queries of one split.

    Args:
        videos, gallery: All queries, and the gallery.
        counted: Mask of the queries, [len(videos)] bool.
        rankings: The ranking of all queries for each "name/view".
    """
    queries = [videos[i] for i in counted.nonzero()[:, 0].tolist()]
    places = _inside([full_name(video) for video in gallery])
    named = sorted(zip(places, [video.label for video in gallery], strict=True))
    content = digest(*(text.encode("utf-8", "surrogateescape") for pair in named for text in pair))
    return QueryScores(
        [full_name(video) for video in queries],
        [video.label for video in queries],
        [video.source for video in queries],
        torch.ones(len(queries), dtype=torch.int64),
        [content],
        {name: ranking.average_precision[counted] for name, ranking in rankings.items()},
        {name: ranking.first_hit[counted] for name, ranking in rankings.items()},
    )


def have_copies(queries: Sequence[Video], gallery: Sequence[Video], other_sources: bool) -> list[bool]:
    """Returns for each query whether the gallery holds an exact copy of it; with `other_sources`, one of another
    source, since the gallery of a query then has no video of its own. Clips of a store, whose videos are not looked
    at, have none."""
    if not any(video.num_frames for video in queries):
        return [False] * len(queries)
    unique = {full_name(video): video for video in (*queries, *gallery)}  # no file is compared with itself
    original = dict(zip(unique, Index(unique.values()).originals(), strict=True))
    copies: dict[int, list[tuple[str, str]]] = {}
    for video in gallery:
        path = full_name(video)
        copies.setdefault(original[path], []).append((path, video.source))
    return [
        any(path != own and not (other_sources and source == video.source) for path, source in
            copies.get(original[own], ()))
        for video, own in ((video, full_name(video)) for video in queries)
    ]  # fmt: skip


def joined(splits: Sequence[QueryScores]) -> QueryScores:
    """Returns the scores of several splits as one; the splits are numbered from 1."""
    names = splits[0].average_precision
    return QueryScores(
        [path for scores in splits for path in scores.paths],
        [label for scores in splits for label in scores.labels],
        [source for scores in splits for source in scores.sources],
        torch.cat([torch.full_like(scores.splits, number) for number, scores in enumerate(splits, 1)]),
        [gallery for scores in splits for gallery in scores.galleries],
        {name: torch.cat([scores.average_precision[name] for scores in splits]) for name in names},
        {name: torch.cat([scores.first_hit[name] for scores in splits]) for name in names},
    )


def matched(first: QueryScores, second: QueryScores) -> QueryScores:
    """Returns `second` with its queries in the order of `first`.

    A query is known by its split and its path. If the paths differ, those relative to the folder that holds all queries
    decide, so that a data set may have moved between two evaluations.

    Raises:
        InputError: The queries, their classes or sources, or the galleries differ; the message states which.
    """
    ours, theirs = _keys(first, first.paths), _keys(second, second.paths)
    if set(ours) != set(theirs):
        inside = _keys(first, _inside(first.paths)), _keys(second, _inside(second.paths))
        if set(inside[0]) != set(inside[1]):
            only = [[path for _, path in sorted(set(a) - set(b))] for a, b in ((ours, theirs), (theirs, ours))]
            raise InputError(
                f"expected the same queries, got {len(ours)} and {len(theirs)}: {_listed(only[0], 'first')}, "
                f"{_listed(only[1], 'second')}"
            )
        ours, theirs = inside
    place = {key: i for i, key in enumerate(theirs)}
    order = [place[key] for key in ours]
    second = QueryScores(
        [second.paths[i] for i in order],
        [second.labels[i] for i in order],
        [second.sources[i] for i in order],
        second.splits[order],
        second.galleries,
        {name: values[order] for name, values in second.average_precision.items()},
        {name: values[order] for name, values in second.first_hit.items()},
    )
    for what in ("labels", "sources"):
        pairs = zip(first.paths, getattr(first, what), getattr(second, what), strict=True)
        changed = [(path, a, b) for path, a, b in pairs if a != b]
        if changed:
            path, a, b = changed[0]
            raise InputError(
                f"expected the same {what} of the queries, got {len(changed)} that differ, the first of {path}: "
                f"{a!r} and {b!r}"
            )
    if first.galleries != second.galleries:
        raise InputError("expected the same gallery, got galleries whose videos or classes differ")
    return second


def hits_at_1(first_hit: Tensor) -> Tensor:
    """Returns 1 where the nearest video is of the query's class, else 0: [Q] float64."""
    return (first_hit == 0).double()


def _keys(scores: QueryScores, paths: Sequence[str]) -> list[tuple[int, str]]:
    return list(zip(scores.splits.tolist(), paths, strict=True))


def _inside(paths: Sequence[str]) -> list[str]:
    """Returns the paths relative to the folder that holds all of them; a URL counts as a path in the working
    directory."""
    paths = [os.path.join(os.getcwd(), path) for path in paths]
    folder = os.path.commonpath([os.path.dirname(path) for path in paths])
    return [os.path.relpath(path, folder) for path in paths]


def _listed(paths: Sequence[str], which: str) -> str:
    """Returns how many queries only one evaluation has, with the names of some."""
    names = ", ".join(paths[:NAMED]) + (", …" if len(paths) > NAMED else "")
    return f"{len(paths)} only in the {which}" + (f" ({names})" if paths else "")
