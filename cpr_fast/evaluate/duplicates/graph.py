"""The graph of nearest neighbours of many clips, in a file from which a stopped command continues.

Letters: N clips, F feature width, k neighbours.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from cpr_fast.evaluate.features.recipe import Metric
from cpr_fast.ops import KnnGraph
from cpr_fast.runtime.files import replacing
from cpr_fast.runtime.progress import Forecast, track
from cpr_fast.weights.tensors import save_tensors, stored_tensors

SAVE_S = 60.0  # seconds between two states that are stored
_BLOCK = 2**16  # rows that are digested at once

log = logging.getLogger(__name__)


def unit_features(streams: Sequence[Tensor], metric: Metric) -> Tensor:
    """Returns features [N, F] whose dot product is the similarity of `retrieve`, divided by the number of views: the
    mean of the cosines of the views, each centred; with "plain_cosine" the cosine of all views, one after the other,
    which are not centred.

    Args:
        streams: [N, F_v] float32 of each view, which are changed in place.
    """
    parts = [torch.cat(list(streams), 1)] if metric == "plain_cosine" and len(streams) > 1 else list(streams)
    for part in parts:
        if metric != "plain_cosine":
            part -= _mean(part)
        torch.nn.functional.normalize(part, dim=1, out=part)
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts, 1).mul_(len(parts) ** -0.5)


def _mean(features: Tensor) -> Tensor:
    """Returns the mean of the rows [N, F], summed in float64 without a copy of all of them."""
    return (sum(part.double().sum(0) for part in features.split(_BLOCK)) / len(features)).float()


def stored_graph(features: Tensor, k: int, path: Path, *, progress: bool = False) -> tuple[Tensor, Tensor]:
    """Returns `knn_graph(features, k)`, and keeps it in a file.

    The file also holds the state of a graph that is not finished: every minute, and when the command is stopped. A call
    with the same features and k continues from it, and a finished graph is not computed again.
    """
    key = _digest(features, k)
    stored = stored_tensors(path, "the graph of neighbours is computed again")
    if stored is not None and _of(stored, key):
        graph = KnnGraph(features, k, best=stored["best"], done=int(stored["done"]))
        log.info("%s: %.0f %% of all pairs are compared already", path, 100 * graph.share)
    else:
        graph = KnnGraph(features, k)
    if graph.done == len(features):
        return graph.result()
    saved, forecast = time.monotonic(), Forecast(1 - graph.share)
    steps = range(-(-(len(features) - graph.done) // graph.rows))
    try:
        for _ in track(steps, "comparing clips", total=len(steps), unit="steps", progress=progress, left=forecast.text):
            before = graph.share
            graph.step()
            forecast.add(graph.share - before)
            if time.monotonic() - saved > SAVE_S:
                _save(graph, key, path)
                saved = time.monotonic()
    finally:
        _save(graph, key, path)
    return graph.result()


def _save(graph: KnnGraph, key: Tensor, path: Path) -> None:
    with replacing(path) as temporary:
        save_tensors({"best": graph.best, "done": torch.tensor(graph.done), "digest": key}, temporary)


def _of(stored: dict[str, Tensor], key: Tensor) -> bool:
    """Returns whether a file holds the graph of these features, or its state."""
    return set(stored) == {"best", "done", "digest"} and torch.equal(stored["digest"], key)


def _digest(features: Tensor, k: int) -> Tensor:
    """Returns a digest of the features, [32] uint8."""
    sha = hashlib.sha256(repr((list(features.shape), k)).encode())
    for part in features.split(_BLOCK):
        sha.update(part.numpy().tobytes())
    return torch.tensor(list(sha.digest()), dtype=torch.uint8)
