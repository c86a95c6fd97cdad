"""Nearest-neighbour retrieval: R@1, 5, 10, 20, 50 [paper, Table 6] and mean average precision (mAP).

The `protocol` decides which videos are compared:
    "train_test": the queries are the test split and the gallery is the train split, as published.
    "leave_source_out": every video is a query; its gallery is all videos of other sources. For data
        without a usable split.
        Only queries whose class occurs in another source are counted.
    "auto": "train_test" if every index has both splits, else "leave_source_out".
Without labels neither can be measured: the features and the neighbours of some queries are stored, and `same_video`
compares the network with the untrained one.
The `recipe` ("paper", "coclr" or "iic") decides how a video becomes a feature, see `cpr_fast.evaluate.features.recipe`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from cpr_fast.config import DataConfig
from cpr_fast.data.clips.loader import WindowLoader
from cpr_fast.data.index.index import Index, Video
from cpr_fast.errors import InputError
from cpr_fast.evaluate.features.cache import FeatureCache, digest, embed_index, video_digest, weights_digest
from cpr_fast.evaluate.features.embedding import Embedding, calibrate_batch_norm, encoder_embeddings
from cpr_fast.evaluate.features.pretrained import Pretrained, load_pretrained
from cpr_fast.evaluate.features.recipe import Recipe, RecipeName, recipe_for
from cpr_fast.evaluate.features.results import Checkpoints, results_folder, write_result
from cpr_fast.evaluate.features.windows import count_windows, open_windows
from cpr_fast.evaluate.retrieval.baselines import (
    BASELINES,
    CALIBRATION_WINDOWS,
    StoredStatistics,
    calibration_videos,
    on_stored_features,
    untrained_encoders,
)
from cpr_fast.evaluate.retrieval.queries import QueryScores, full_name, have_copies, joined, query_scores
from cpr_fast.evaluate.retrieval.ranking import NO_HIT, Comparison, Ranking, compared, prepare_streams, rates
from cpr_fast.evaluate.retrieval.same_video import same_video_rates, videos_with_two_clips
from cpr_fast.evaluate.retrieval.summary import no_rates, results, write_metrics
from cpr_fast.runtime import distributed
from cpr_fast.runtime.progress import Forecast, Part, track
from cpr_fast.wording import counted

Protocol = Literal["auto", "train_test", "leave_source_out"]
MANY_WINDOWS = 10  # windows per video from which fewer are suggested
EXAMPLES, NEAREST = 8, 5  # queries shown in the report, and neighbours of each

log = logging.getLogger(__name__)


def retrieve(
    checkpoint: Checkpoints,
    indexes: str | Path | Sequence[str | Path],
    *,
    protocol: Protocol = "train_test",
    recipe: RecipeName | None = None,
    run_dir: str | Path | None = None,
    untrained_seed: int = 0,
    clips_per_video: int | None = None,
    crops: int = 1,
    pictures_fps: float | None = None,
    cache: bool = True,
    device: str = "auto",
    progress: bool = False,
) -> dict[str, Any]:
    """Measures R@k and mAP of a checkpoint, of the same network untrained, and of the pixel baselines, on the same
    windows. Where less than half of the queries have a label, `same_video_rates` compares the networks, too.

    Under `torchrun` the processes share the videos.

    Args:
        checkpoint, indexes: One file or several, see `load_pretrained`; one index for each official split.
        run_dir, untrained_seed: Run folder whose metrics.jsonl receives a row per result. Seed of untrained weights.
        recipe, clips_per_video: None means the networks' own recipe (`recipe_for`), and its number of windows.
        crops, pictures_fps: 1, 5 or 10 crops of every window. See `load_pretrained`.
        cache: Store features in the folder `features` of the run, and reuse them.
    Returns:
        `protocol`, `recipe`, `view` (two_stream or merged if there are both views), its `r@1` to `r@50` and `map`,
        `summary` (a row per name and view: means over splits, standard deviations `r@1_std` etc., n - 1, and `splits`),
        and `results`: a row per index, name (trained, untrained, single_frame, mean_colour, mean_flow) and view with
        the entries of `rates` and `queries_with_copy`, see `have_copies`. Rates are fractions. The summary is also in
        the run's metrics. `queries_file`: see `QueryScores`, None without labels. `same_video`: see `_embeddings`.
    """
    if not (paths := [indexes] if isinstance(indexes, str | Path) else list(indexes)):
        raise InputError("--index: expected at least one index, got none")
    world = distributed.init(device)
    device = str(world.device)
    pretrained = load_pretrained(checkpoint, device=device, pictures_fps=pictures_fps)
    data, folder = pretrained.data, results_folder(pretrained.evaluations)
    how = recipe_for(data, recipe, clips_per_video, crops)
    splits = [pretrained.open("--index", path) for path in paths]
    protocol = _resolved(protocol, splits)
    open_loader = partial(open_windows, data=data, views=list(pretrained.encoders), recipe=how, device=device)
    work = Forecast(0)  # windows; one counts once for each network that reads it
    embeddings, same_video = _embeddings(
        pretrained, how, splits, protocol, open_loader, untrained_seed, device, work, cache=cache,
        progress=progress and world.is_main,
    )  # fmt: skip
    store = FeatureCache(pretrained.features, how.identity(data, device)) if cache and not data.features else None
    found = [
        evaluate(index, embeddings, open_loader, protocol=protocol, cache=store, progress=progress, work=work)
        for index in splits
    ]
    name = f"retrieval-{how.name}-{digest(json.dumps([pretrained.name, [*map(str, paths)], protocol, repr(how)]))[:8]}"
    result = results([each.rows for each in found], paths, {"protocol": protocol, "recipe": how.name})
    queries_file = _save_scores([each.scores for each in found], folder / f"{name}.npz")
    write_metrics(run_dir if world.is_main else None, result["summary"], found[0].examples, same_video, queries_file)
    result |= {"leakage": how.leakage, "checkpoint": pretrained.name, "same_video": same_video,
               "queries_file": queries_file and str(queries_file)}  # fmt: skip
    return result | {"file": str(write_result(folder, name, result))}


def _save_scores(scores: Sequence[QueryScores | None], path: Path) -> Path | None:
    """Writes the scores of all splits in the first process; returns the path, or None if a split has no labels."""
    known = [item for item in scores if item is not None]
    if len(known) < len(scores):
        return None
    if distributed.is_main():
        joined(known).save(path)
    return path


def _announce(
    splits: Sequence[Mapping[str, Index]],
    protocol: str,
    data: DataConfig,
    how: Recipe,
    labelled: bool,
    enough: bool,
    pairs: int,
) -> None:
    """Logs the number of videos and windows of every split, and the comparisons, before the work starts."""
    for parts in splits:
        windows = {name: count_windows(part, data, how) for name, part in parts.items()}
        said = " and ".join(
            f"{counted(len(part), 'video')} in {counted(windows[name], 'window')} ({name})"
            for name, part in parts.items()
        )
        log.info("retrieval, protocol %s: %s", protocol, said)
        if sum(windows.values()) > MANY_WINDOWS * sum(map(len, parts.values())):
            log.info("  every window is used, as published; `--clips 5` takes 5 of each video, which is faster")
    if labelled:
        log.info("  compared with the untrained network, whose BatchNorm is computed first, and with pixel baselines")
    if not enough:
        other = (f"how often the nearest clip is of the same video is compared with the untrained network, on "
                 f"{counted(pairs, 'video')}") if pairs > 1 else (
            "the network is not judged without labels, because fewer than two videos hold two clips")  # fmt: skip
        few = "too few queries have a label, or all have one class" if labelled else "no query has a label"
        log.info("  %s: R@k %s; %s", few, "says little" if labelled else "cannot be measured", other)


def _networks(embeddings: Iterable[str]) -> int:
    """Returns how many networks are among embeddings named "trained/view", "untrained/view" and those of pixels."""
    return len({name.partition("/")[0] for name in embeddings} & {"trained", "untrained"})


def _windows_to_read(
    splits: Sequence[Mapping[str, Index]], data: DataConfig, how: Recipe, networks: int, pairs: int
) -> int:
    """Returns the number of windows that are read, without those of the BatchNorm statistics; each counts once for each
    network that reads it.

    Args:
        networks: Number of networks that read all windows.
        pairs: Number of videos of which the trained and the untrained network read two windows.
    """
    windows = sum(count_windows(part, data, how) for parts in splits for part in parts.values())
    return networks * windows + 2 * 2 * pairs


def _embeddings(
    pretrained: Pretrained, how: Recipe, splits: Sequence[Index], protocol: Protocol,
    open_loader: Callable[..., WindowLoader], seed: int, device: str, work: Forecast, *, cache: bool, progress: bool,
) -> tuple[dict[str, Embedding], list[dict[str, Any]]]:  # fmt: skip
    """Returns the embeddings to compare: the trained encoders and, if any query has a label, the references. Where the
    queries are not mostly labelled, also returns the rows of `same_video_rates`, which compares these with the
    references."""
    if pretrained.data.features:
        return on_stored_features(pretrained, how, seed, device), []
    keys = {view: weights_digest(encoder) if cache else "" for view, encoder in pretrained.encoders.items()}
    trained = encoder_embeddings("trained", pretrained.encoders, how, keys)
    queries = [_split(index, protocol)[1] for index in splits]
    labelled = any((part.labels >= 0).any() for part in queries)
    enough = any(part.mostly_labelled for part in queries)
    pairs = videos_with_two_clips(splits[0], pretrained.data)
    parts, compares = [_parts(index, protocol) for index in splits], not enough and len(pairs.videos) > 1
    read_twice = len(pairs.videos) if compares else 0
    work.expect(_windows_to_read(parts, pretrained.data, how, 2 if labelled else 1, read_twice))
    if progress:
        _announce(parts, protocol, pretrained.data, how, labelled, enough, len(pairs.videos))
    if not labelled and len(pairs.videos) < 2:
        return trained, []
    # One gallery calibrates the untrained network for all splits, so that they can share its features.
    gallery = _split(splits[0], protocol)[0]
    references = _references(pretrained, how, gallery, open_loader, seed, device, work, cache=cache, progress=progress)
    both = trained | references
    if not compares:
        return both, []
    two = replace(how, clips_per_video=2, crops=1)
    store = FeatureCache(pretrained.features, two.identity(pretrained.data, device)) if cache else None
    part = Part(work, 2 * _networks(both) * distributed.size())  # of each video, this process reads its share
    same = same_video_rates(pairs, both, partial(open_loader, recipe=two), cache=store, progress=progress, work=part)
    return both if labelled else trained, same


def _references(
    pretrained: Pretrained, how: Recipe, gallery: Index, open_loader: Callable[..., WindowLoader], seed: int,
    device: str, work: Forecast, *, cache: bool, progress: bool,
) -> dict[str, Embedding]:  # fmt: skip
    """Returns what the trained encoders are compared with: the same encoders untrained, and the baselines."""
    spread, data, name = calibration_videos(gallery), pretrained.data, "untrained network"
    few = replace(how, clips_per_video=min(how.clips_per_video or CALIBRATION_WINDOWS, CALIBRATION_WINDOWS))
    used = few if count_windows(spread, data, how) > count_windows(spread, data, few) else how
    untrained, stored = untrained_encoders(pretrained.configs, seed, device), None
    if cache:
        identity = used.identity(data, device)
        videos = [video_digest(video, view, identity) for view in untrained for video in spread]
        stored = StoredStatistics(pretrained.features, untrained,
                                  json.dumps([identity, data.batch_size, videos]))  # fmt: skip
    if stored is not None and stored.load():
        log.log(logging.INFO if progress else logging.DEBUG, "%s: its BatchNorm statistics are stored already", name)
    else:
        with closing(open_loader(spread, recipe=used)) as loader:
            part = Part(work)
            part.expect(loader.windows)
            seen = track(loader, name, total=len(loader), unit="batches", progress=progress, left=part.left)
            calibrate_batch_norm(untrained, (part.done(batch, len(batch.video)) for batch in seen))
            whole = not loader.skipped
        if stored is not None and whole:  # statistics of fewer videos would be used again when all can be read
            stored.store()
    keys = {view: weights_digest(encoder) if cache else "" for view, encoder in untrained.items()}
    embeddings = encoder_embeddings("untrained", untrained, how, keys)
    return embeddings | {name: item for name, item in BASELINES.items() if item.view in pretrained.encoders}


def evaluate(
    index: Index,
    embeddings: Mapping[str, Embedding],
    open_loader: Callable[[Index], WindowLoader],
    *,
    protocol: Protocol = "train_test",
    cache: FeatureCache | None = None,
    progress: bool = False,
    work: Forecast | None = None,
) -> Evaluated:
    """Measures retrieval with every embedding "name/view", and with "name/two_stream" and "name/merged" if a name
    has both views, see `compared`."""
    gallery_index, query_index = _split(index, protocol)
    part = Part(work, _networks(embeddings) * distributed.size())  # of each window, this process reads its share
    gallery = queries = _embed(gallery_index, index, embeddings, open_loader, cache, "gallery", progress, part)
    if protocol == "train_test":
        queries = _embed(query_index, index, embeddings, open_loader, cache, "queries", progress, part)
        _warn_of_shared_sources(queries, gallery)
    copied = torch.tensor(have_copies(queries.videos, gallery.videos, protocol == "leave_source_out"))
    rows, examples, rankings = [], [], {}
    for name, streams in compared(embeddings).items():
        metric = embeddings[streams[0]].metric
        pairs = prepare_streams(*([part.features[s] for s in streams] for part in (queries, gallery)), metric)
        own_source = (queries.sources, gallery.sources) if protocol == "leave_source_out" else ()
        comparison = Comparison(pairs, metric, *own_source)
        ranking = rankings[name] = comparison.rank(queries.labels, gallery.labels)
        counted = _counted(queries.labels, ranking, protocol)
        model, view = name.split("/")
        if counted is not None:
            measured = rates(ranking, counted, queries.sources, len(gallery.labels))
            measured["queries_with_copy"] = int((copied & counted).sum())
        else:  # without labels, only the neighbours can be shown
            measured = no_rates(len(queries.labels), len(gallery.labels))
        rows.append({"name": model, "view": view, **measured})
        if model == rows[0]["name"]:
            shown = torch.ones_like(queries.labels, dtype=torch.bool) if counted is None else counted
            examples = _examples(view, comparison, queries.videos, gallery.videos, shown)
    scores = None if counted is None else query_scores(queries.videos, gallery.videos, counted, rankings)
    return Evaluated(rows, examples, scores)


class Evaluated(NamedTuple):
    """The evaluation of one index.

    Attributes:
        rows: The entries of `rates`, `name` and `view` of every embedding.
        examples: Neighbours found with the last view of the first name: rows of `view`, `query` and `nearest`, with
            videos as {"path", "label", "source", "num_frames"}.
        scores: The measures of every query; None without labels.
    """

    rows: list[dict[str, Any]]
    examples: list[dict[str, Any]]
    scores: QueryScores | None


def _counted(labels: Tensor, ranking: Ranking, protocol: Protocol) -> Tensor | None:
    """Returns which queries count, [Q] bool: those with a label and, if every video is a query, with a relevant video;
    None if there are no labels. Raises InputError if no query counts."""
    if (labels < 0).all():
        return None
    counted = labels >= 0
    if protocol == "leave_source_out":
        counted &= ranking.first_hit != NO_HIT
    if not counted.any():
        raise InputError(
            f"--protocol {protocol}: expected videos of one class from at least two sources, got none; R@k cannot "
            "be measured"
        )
    return counted


@dataclass(frozen=True)
class FeatureSet:
    """M videos with features {name: [M, F]}, labels [M] int64 (-1 unknown) and sources [M] int64."""

    videos: list[Video]
    features: dict[str, Tensor]
    labels: Tensor
    sources: Tensor


def _embed(
    part: Index,
    whole: Index,
    embeddings: Mapping[str, Embedding],
    open_loader: Callable[[Index], WindowLoader],
    cache: FeatureCache | None,
    description: str,
    progress: bool,
    work: Part,
) -> FeatureSet:
    """Returns features, labels and sources of the readable videos of `part`; source ids are those of `whole`."""
    features, windows = embed_index(
        part, embeddings, open_loader, cache, description=description, progress=progress, work=work
    )
    source_id = {video.source: i for video, i in zip(whole, whole.source_ids.tolist(), strict=True)}
    labels = torch.from_numpy(part.labels)  # a part has the class numbers of its index, but other source ids
    sources = torch.tensor([source_id[video.source] for video in part])
    kept = windows > 0
    videos = [video for video, found in zip(part, kept.tolist(), strict=True) if found]
    return FeatureSet(videos, {name: value[kept] for name, value in features.items()}, labels[kept], sources[kept])


def _split(index: Index, protocol: Protocol) -> tuple[Index, Index]:
    """Returns the gallery and the queries."""
    if protocol == "leave_source_out":
        return index, index
    if protocol != "train_test":
        raise InputError(f"--protocol: expected 'train_test' or 'leave_source_out', got {protocol!r}")
    return index.select(split="train"), index.select(split="test")


def _parts(index: Index, protocol: Protocol) -> dict[str, Index]:
    """Returns the videos that are read, by what they are."""
    if protocol == "leave_source_out":
        return {"gallery and queries": index}
    return dict(zip(("gallery", "queries"), _split(index, protocol), strict=True))


def _resolved(protocol: Protocol, splits: Sequence[Index]) -> Protocol:
    """Replaces "auto" by train_test if every index has both splits, else by leave_source_out."""
    if protocol != "auto":
        return protocol
    both = all({"train", "test"} <= {video.split for video in index} for index in splits)
    return "train_test" if both else "leave_source_out"


def _warn_of_shared_sources(queries: FeatureSet, gallery: FeatureSet) -> None:
    shared = len(set(queries.sources.tolist()) & set(gallery.sources.tolist()))
    if shared and distributed.is_main():
        said = counted(shared, "source is", "sources are")
        log.warning("%s in both splits: a query may find clips of its own source", said)


def _examples(
    view: str, comparison: Comparison, queries: list[Video], gallery: list[Video], counted: Tensor
) -> list[dict[str, Any]]:
    """Returns the neighbours of EXAMPLES queries, which are evenly spaced among the counted queries."""

    def show(video: Video) -> dict[str, Any]:
        return {"path": full_name(video), "label": video.label, "source": video.source, "num_frames": video.num_frames}

    positions = counted.nonzero()[:, 0]
    chosen = positions[torch.linspace(0, len(positions) - 1, min(EXAMPLES, len(positions))).long()]
    return [
        {"view": view, "query": show(queries[q]), "nearest": [show(gallery[i]) for i in comparison.nearest(q, NEAREST)]}
        for q in chosen.tolist()
    ]
