"""The graph of nearest neighbours of many clips, in a file from which a stopped command continues, or in one for each
shard of it, which several machines may compute.

Letters: N clips, F feature width, k neighbours.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cpr_fast.errors import InputError
from cpr_fast.evaluate.features.recipe import Metric
from cpr_fast.ops import KnnGraph
from cpr_fast.runtime.files import one_writer, replacing
from cpr_fast.runtime.progress import Forecast, track
from cpr_fast.weights.tensors import save_tensors, stored_tensors
from cpr_fast.wording import listed

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


def relative_spread(features: Tensor) -> float:
    """Returns the largest distance of features [N, F] from their mean, as a part of the length of the mean; 0 if all
    are equal."""
    mean = _mean(features)
    largest = max(float((part - mean).norm(dim=1).max()) for part in features.split(_BLOCK))
    return largest / max(float(mean.norm()), torch.finfo(torch.float32).tiny) if largest else 0.0


def _mean(features: Tensor) -> Tensor:
    """Returns the mean of the rows [N, F], summed in float64 without a copy of all of them."""
    return (sum(part.double().sum(0) for part in features.split(_BLOCK)) / len(features)).float()


@dataclass(frozen=True)
class Unfinished:
    """A graph of which other shards have yet to compute their parts; `left`: their numbers."""

    left: list[int]


def stored_graph(
    features: Tensor, k: int, path: Path, *, shard: tuple[int, int] = (0, 1), progress: bool = False
) -> tuple[Tensor, Tensor] | Unfinished:
    """Returns `knn_graph(features, k)`, and keeps it in a file.

    The file also holds the state of a graph that is not finished: every minute, and when the command is stopped. A call
    with the same features and k continues from it, and a finished graph is not computed again.

    Args:
        shard: (i, n) compares the i-th of n ranges of rows with all rows after them, which are about equally many
            pairs, and keeps these neighbours in a part, `path` with .i-of-n before its suffix. The call that finds all
            parts finished merges them into `path` and removes them. So does one of (0, 1), which first computes the
            parts that are missing, if any part is there.
    Returns:
        What `knn_graph` does, with the same bits; or `Unfinished` where other shards have not ended.
    Raises:
        InputError: another process computes this part, or a part holds neighbours of other features or of another k.
    """
    key = _digest(features, k)
    whole = _Part(path, key, range(len(features)))
    wanted, count = [shard[0]], shard[1]
    if whole.is_finished():
        count = 1
    elif count == 1 and (found := _parts_there(path)):
        count, wanted = found, list(range(found))
    if count == 1:
        return whole.compute(features, k, progress).result()
    parts = [_Part.of(path, key, len(features), (number, count)) for number in range(count)]
    for part in parts:
        part.require_own()
    for number in wanted:
        if not parts[number].is_finished():
            parts[number].compute(features, k, progress)
    with one_writer(path.with_name(f".{path.stem}.merge.lock"), None):
        if not whole.is_finished():  # no other shard has merged the parts meanwhile
            if left := [number for number, part in enumerate(parts) if not part.is_finished()]:
                return Unfinished(left)
            _merge(parts, whole, features, k)
        for part in parts:
            part.path.unlink(missing_ok=True)
    return whole.compute(features, k, progress).result()


def shard_rows(size: int, shard: tuple[int, int]) -> range:
    """Returns the rows of a shard (i, n) of a graph: about 1/n of all pairs of a row and a later one."""
    number, count = shard

    def begin(number: int) -> int:
        pairs = size * (size - 1) * (count - number) // count  # twice those of the rows that are left
        return size - (1 + math.isqrt(1 + 4 * pairs)) // 2 if number < count else size

    return range(begin(number), begin(number + 1))


def part_path(path: Path, shard: tuple[int, int]) -> Path:
    """Returns the file of the part of a graph that a shard (i, n) computes."""
    return path.with_name(f"{path.stem}.{shard[0]}-of-{shard[1]}{path.suffix}")


def _parts_there(path: Path) -> int:
    """Returns how many parts the graph has of which some are there, 0 if none is. Raises InputError if there are parts
    of different numbers of shards."""
    name = re.compile(rf"{re.escape(path.stem)}\.\d+-of-(\d+){re.escape(path.suffix)}")
    found = {entry.name: int(match[1]) for entry in path.parent.glob("*") if (match := name.fullmatch(entry.name))}
    if len(counts := set(found.values())) > 1:
        first = [next(name for name in sorted(found) if found[name] == count) for count in sorted(counts)]
        raise InputError(
            f"--shard: expected parts of one number of shards in {str(path.parent)!r}, got {listed(first)}; "
            "remove those of the number that is not to be continued"
        )
    return counts.pop() if counts else 0


class _Part:
    """The neighbours that are found by comparing a range of rows with all rows after them, in a file: `best` of
    `KnnGraph` without the rows before the range, which have none; `done`, the first row that is not compared yet; and
    the digest `key`."""

    def __init__(self, path: Path, key: Tensor, rows: range) -> None:
        self.path, self._key, self._rows = path, key, rows

    @classmethod
    def of(cls, path: Path, key: Tensor, size: int, shard: tuple[int, int]) -> _Part:
        """Returns the part of a shard (i, n) of the graph `path` of `size` rows, whose digest is `key`."""
        own = hashlib.sha256(key.numpy().tobytes() + repr(shard).encode()).digest()
        return cls(part_path(path, shard), torch.tensor(list(own), dtype=torch.uint8), shard_rows(size, shard))

    def require_own(self) -> None:
        """Raises InputError if the file is whole, but not this part of this graph."""
        state = self._state()
        if state is not None and not self._owns(state):
            raise InputError(
                f"--out: {str(self.path)!r} holds neighbours of other features or of another --neighbours than this "
                "command compares; remove it and run its --shard again, or choose another --out"
            )

    def is_finished(self) -> bool:
        state = self._state()
        return state is not None and self._owns(state) and int(state["done"]) == self._rows.stop

    def load(self, features: Tensor, k: int) -> KnnGraph | None:
        """Returns what the file holds; None if there is no such file, or it is of another graph or damaged."""
        stored = stored_tensors(self.path, "the graph of neighbours is computed again")
        if stored is None or not self._owns(stored) or "best" not in stored:
            return None
        graph = KnnGraph(features, k, done=int(stored["done"]), end=self._rows.stop)
        graph.merge(stored["best"])
        return graph

    def compute(self, features: Tensor, k: int, progress: bool) -> KnnGraph:
        """Returns the finished part, and computes what the file lacks of it. Raises InputError if another process
        does so."""
        if self.is_finished() and (graph := self.load(features, k)) is not None:
            log.info("%s: 100 %% of its pairs are compared already", self.path)
            return graph
        busy = f"--out: another process is computing {str(self.path)!r}"
        with one_writer(self.path.with_name(f".{self.path.stem}.lock"), busy):
            graph, size = self.load(features, k), len(features)
            if graph is None:
                graph = KnnGraph(features, k, done=self._rows.start, end=self._rows.stop)
            else:
                share = _pairs(size, range(self._rows.start, graph.done)) / max(1, _pairs(size, self._rows))
                log.info("%s: %.0f %% of its pairs are compared already", self.path, 100 * share)
            saved, forecast = time.monotonic(), Forecast(_pairs(size, range(graph.done, graph.end)))
            steps = range(-(-(graph.end - graph.done) // graph.rows))
            try:
                for _ in track(steps, "comparing clips", total=len(steps), unit="steps", progress=progress,
                               left=forecast.text):  # fmt: skip
                    before = graph.done
                    graph.step()
                    forecast.add(_pairs(size, range(before, graph.done)))
                    if time.monotonic() - saved > SAVE_S:
                        self.save(graph)
                        saved = time.monotonic()
            finally:
                self.save(graph)
        return graph

    def save(self, graph: KnnGraph) -> None:
        tensors = {"best": graph.best[self._rows.start :], "done": torch.tensor(graph.done), "digest": self._key}
        with replacing(self.path) as temporary:
            save_tensors(tensors, temporary)

    def _state(self) -> dict[str, Tensor] | None:
        """Returns `done` and `digest` of the file, if it has them; None if there is no file, or it is damaged."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, "pt") as file:
                return {name: file.get_tensor(name) for name in {"done", "digest"}.intersection(file.keys())}
        except (SafetensorError, OSError):
            return None

    def _owns(self, stored: dict[str, Tensor]) -> bool:
        return "done" in stored and "digest" in stored and torch.equal(stored["digest"], self._key)


def _merge(parts: Sequence[_Part], whole: _Part, features: Tensor, k: int) -> None:
    """Writes the graph of finished parts that hold all of its pairs."""
    graph = KnnGraph(features, k, done=len(features))
    for part in parts:
        found = part.load(features, k)
        if found is None:
            raise InputError(f"--out: {str(part.path)!r} was removed or damaged; the same command computes it again")
        graph.merge(found.best)
    whole.save(graph)


def _pairs(size: int, rows: range) -> int:
    """Returns the number of pairs of one of some rows of a graph of `size` rows and a later row."""
    return len(rows) * (2 * size - 1 - rows.start - rows.stop) // 2


def _digest(features: Tensor, k: int) -> Tensor:
    """Returns a digest of the features, [32] uint8."""
    sha = hashlib.sha256(repr((list(features.shape), k)).encode())
    for part in features.split(_BLOCK):
        sha.update(part.numpy().tobytes())
    return torch.tensor(list(sha.digest()), dtype=torch.uint8)
