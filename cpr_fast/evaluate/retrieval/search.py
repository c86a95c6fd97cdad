"""Search: the videos of an index that are most similar to a query video, which need not be in an index.

Letters: Q queries, G videos of the index, F feature width.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from cpr_fast.config import DataConfig
from cpr_fast.data.flow.write import write_flow
from cpr_fast.data.index.index import Index, Video
from cpr_fast.data.video.container import VideoError
from cpr_fast.data.video.probe import ASSUMED_FPS, probe_video
from cpr_fast.data.video.transcode import transcode_video
from cpr_fast.errors import InputError
from cpr_fast.evaluate.features.cache import FeatureCache, embed_index, weights_digest
from cpr_fast.evaluate.features.embedding import encoder_embeddings
from cpr_fast.evaluate.features.pretrained import load_pretrained
from cpr_fast.evaluate.features.recipe import RecipeName, recipe_for
from cpr_fast.evaluate.features.results import Checkpoints
from cpr_fast.evaluate.features.windows import open_windows
from cpr_fast.evaluate.retrieval.ranking import Comparison, encoders_together, prepare_streams
from cpr_fast.runtime.distributed import device_of
from cpr_fast.wording import counted, expected

log = logging.getLogger(__name__)

# Draws the result of a query: (a name that no other query has, the query, the rows found) -> path of the picture.
Draw = Callable[[str, Video, list[dict[str, Any]]], Path]


def search(
    queries: Sequence[str | Path],
    index_csv: str | Path,
    checkpoint: Checkpoints,
    *,
    top: int = 10,
    recipe: RecipeName | None = None,
    clips_per_video: int | None = None,
    pictures_fps: float | None = None,
    cache: bool = True,
    draw: Draw | None = None,
    device: str = "auto",
    progress: bool = False,
) -> dict[str, Any]:
    """Finds the videos of an index that are most similar to each query, reusing the features that `retrieve` stored.

    The similarity is the cosine, -1 to 1, of features centred by the index's mean; with both views it is the mean of
    the two, the order of two-stream retrieval. The flow of the queries is computed. Queries that are larger than every
    video of the index are scaled down to the largest, since flow is measured in pixels; rotated ones are turned.

    Args:
        queries, index_csv: Video files, and the index to search, with all its splits; labels are optional.
        checkpoint, pictures_fps: One file, or one per view, and the rate of pictures; see `load_pretrained`.
        top, recipe, clips_per_video: Videos listed for each query; windows per video (None: the number of the recipe).
        draw: Called for each query while its temporary files exist; returns the path of a picture.
    Returns:
        `checkpoint`, `index`, `recipe`, `views` (compared), `note` (what was left out, or None), `videos` (searched)
        and `queries`: {"path", "num_frames", "picture" (of `draw`, or None), "results"} with rows of `rank` (from 1),
        `path`, `label`, `source`, `num_frames` and `similarity`.
    Raises:
        InputError: A query is missing, is not a video, or is not longer than half a clip.
    """
    if not queries:
        raise InputError("QUERIES: expected at least one video, got none")
    if top < 1:
        raise InputError(f"--top: expected at least 1, got {top}")
    device = str(device_of(device))
    pretrained = load_pretrained(checkpoint, device=device, pictures_fps=pictures_fps).of_videos("search")
    how = recipe_for(pretrained.data, recipe, clips_per_video)
    stored = pretrained.data.flow == "stored"
    index = Index.load(index_csv, require_flow=False).long_enough(pretrained.data)
    encoders, note = encoders_together(pretrained.encoders, index, stored, "--index")
    open_loader = partial(open_windows, data=pretrained.data, views=list(encoders), recipe=how, device=device)
    keys = {view: weights_digest(encoder) if cache else "" for view, encoder in encoders.items()}
    embeddings = encoder_embeddings("net", encoders, how, keys)
    store = FeatureCache(pretrained.features, how.identity(pretrained.data, device)) if cache else None
    with TemporaryDirectory(prefix="cpr-fast-search-") as folder:
        opened = _open_queries([Path(path) for path in queries], Path(folder), index, pretrained.data)
        if "flow" in encoders and stored:
            opened = _with_flow(opened, Path(folder), device)
        features, windows = embed_index(opened, embeddings, open_loader, description="queries", progress=progress)
        _require_windows(queries, windows)
        gallery, counts = embed_index(index, embeddings, open_loader, store, description="index", progress=progress)
        videos = [video for video, windows_read in zip(index, counts.tolist(), strict=True) if windows_read]
        kept = (value[counts > 0] for value in gallery.values())
        pairs = prepare_streams(features.values(), kept, how.metric, centre="gallery")
        rows = _answers(Comparison(pairs, how.metric), queries, opened, videos, top, draw)
    return {"checkpoint": pretrained.name, "index": str(index_csv), "recipe": how.name, "views": list(encoders),
            "note": note, "videos": len(videos), "queries": rows}  # fmt: skip


def _require_windows(queries: Sequence[str | Path], windows: Tensor) -> None:
    """Raises InputError for a query without a readable clip; windows is [Q]."""
    if not windows.all():
        path = queries[int((windows == 0).nonzero()[0])]
        raise InputError(f"QUERIES: {str(path)!r}: expected a video that decodes, got none of its clips")


def _answers(
    comparison: Comparison,
    queries: Sequence[str | Path],
    opened: Index,
    videos: Sequence[Video],
    top: int,
    draw: Draw | None,
) -> list[dict[str, Any]]:
    """Returns a row for each query, see `search`. Draws the pictures while the queries' temporary files exist."""
    rows = []
    for number, (path, name) in enumerate(zip(queries, _names(queries), strict=True)):
        found = _nearest(comparison, number, videos, top)
        picture = draw(name, opened[number], found) if draw else None
        rows.append({"path": str(path), "num_frames": opened[number].num_frames,
                     "picture": str(picture) if picture else None, "results": found})  # fmt: skip
    return rows


def _open_queries(paths: list[Path], folder: Path, index: Index, data: DataConfig) -> Index:
    """Returns the queries as an index; rotated or scaled copies are written to `folder`."""
    largest = max(min(video.width, video.height) for video in index)
    half, rgb = data.frames // 2 * data.stride, replace(data, flow="stored")
    videos = []
    for number, path in enumerate(paths):
        if not path.is_file():
            raise InputError(f"QUERIES: {expected('a video file', path)}")
        try:
            info, file = probe_video(path), path
            if info.error:
                log.warning("query %s is damaged; its first %s are used (%s)", path,
                            counted(info.num_frames, "frame"), info.error)  # fmt: skip
            if info.rotation or min(info.width, info.height) > largest:
                file = folder / f"{number}.mp4"
                info = transcode_video(path, file, largest)
        except VideoError as error:
            raise InputError(f"QUERIES: {str(path)!r}: expected a video, got {error.reason}") from None
        fps = info.fps or ASSUMED_FPS
        video = Video(file.absolute(), "", str(path), "query", info.num_frames, fps, info.width, info.height)
        if (frames := video.shared_frames(rgb)) <= half + 1:
            sampled = f" at {data.fps:g} per second" if data.fps else ""
            raise InputError(  # the published code drops such videos
                f"QUERIES: {str(path)!r}: expected more than {counted(half + 1, 'frame')}{sampled}, half a "
                f"clip, got {frames}"
            )
        videos.append(video)
    return Index(videos)


def _with_flow(queries: Index, folder: Path, device: str) -> Index:
    """Returns the queries with flow files in `folder`. The flow of a file that is given twice is computed once."""
    log.info("computing the flow of %s", counted(len(queries), "query", "queries"))
    distinct = Index({video.path: video for video in queries}.values())
    links = []
    for number, video in enumerate(distinct):  # numbered names, because two files may differ in their suffix only
        link = folder / f"query-{number}{video.path.suffix}"
        link.symlink_to(video.path)
        links.append(replace(video, path=link))
    Index(links).save(folder / "index.csv")
    result = write_flow(folder / "index.csv", folder / "flow", device=device)
    if result["problems"]:
        problem = result["problems"][0]
        raise InputError(f"QUERIES: {problem['path']!r}: expected a video with flow, got {problem['reason']}")
    flow = {
        v.path: with_flow.flow_path for v, with_flow in zip(distinct, Index.load(folder / "index.csv"), strict=True)
    }
    return Index(replace(video, flow_path=flow[video.path]) for video in queries)


def _nearest(comparison: Comparison, query: int, videos: list[Video], top: int) -> list[dict[str, Any]]:
    similarity = comparison.similarity(torch.tensor([query]))[0] / len(comparison.streams)
    return [
        {"rank": rank, "path": str(videos[i].path), "label": videos[i].label, "source": videos[i].source,
         "num_frames": videos[i].num_frames, "similarity": similarity[i].item()}
        for rank, i in enumerate(comparison.nearest(query, top), 1)
    ]  # fmt: skip


def _names(queries: Sequence[str | Path]) -> list[str]:
    """Returns the files' names without suffix; repeated names are numbered."""
    stems = [Path(path).stem for path in queries]
    count = Counter(stems)
    return [stem if count[stem] == 1 else f"{stem}-{number}" for number, stem in enumerate(stems, 1)]
