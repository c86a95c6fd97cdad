"""The feature cache: one file per encoder and recipe, one row per video, so that no video is embedded twice.

A row is identified by the video's path, size and modification time. Splits and indexes with the same videos therefore
share rows, a changed video is embedded again, and for an extended index only the new videos are embedded. The file's
name is a digest of the weights, the recipe and the clip settings.

Letters: M videos, F feature width.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cpr_fast.data.features.index import StoredClips
from cpr_fast.data.index.index import Index, Video
from cpr_fast.data.storage.media import resolved, state_of
from cpr_fast.data.storage.unreadable import not_read
from cpr_fast.errors import InputError
from cpr_fast.evaluate.features.embedding import Embedding, sum_features
from cpr_fast.evaluate.features.shares import shared_out
from cpr_fast.evaluate.features.windows import work_ahead
from cpr_fast.runtime import distributed
from cpr_fast.runtime.files import one_writer, replacing
from cpr_fast.runtime.progress import WHOLE, Part
from cpr_fast.weights.tensors import save_tensors, stored_tensors
from cpr_fast.wording import counted

if TYPE_CHECKING:
    from cpr_fast.data.clips.loader import WindowLoader

log = logging.getLogger(__name__)


class NothingReadError(InputError):
    """No window of any video of an index could be read."""


def digest(*parts: str | bytes) -> str:
    """Returns a digest of the parts: 32 hexadecimal digits."""
    sha = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        sha.update(len(data).to_bytes(8, "little"))
        sha.update(data)
    return sha.hexdigest()[:32]


def weights_digest(module: nn.Module) -> str:
    """Returns a digest of every parameter and buffer of a module, including their names, and of what else the features
    of an encoder depend on. Takes about 0.05 s for an S3D."""
    encoder = getattr(module, "encoder", module)  # of a classifier
    parts: list[str | bytes] = [encoder.identity] if getattr(encoder, "identity", "") else []
    for name, value in module.state_dict().items():
        value = value.detach().cpu().contiguous()
        parts += [name, str(value.dtype), value.flatten().view(torch.uint8).numpy().tobytes()]
    return digest(*parts)


def video_digest(video: Video, view: str, identity: str = "") -> str:
    """Returns a digest of the video's length and of the files that the view is read from (path, size, time).

    `identity` is the value of `Recipe.identity`: with `data.fps` the windows also depend on the listed frame rate.
    """
    files = [video.path] + ([video.flow_path] if view == "flow" and video.flow_path else [])
    stats = [(resolved(path), *state_of(path)) for path in files]
    rate = [video.fps] if '"fps": ' in identity else []
    return digest(json.dumps([stats, video.num_frames, video.flow_path is not None, *rate]))


def video_digests(part: Index, view: str, identity: str = "") -> list[str]:
    """Returns the `video_digest` of every video of an index; for clips of a store, digests of their features."""
    if isinstance(part, StoredClips):
        return [digest(part.store.about.digest, str(row)) for row in part.rows.tolist()]
    return [video_digest(video, view, identity) for video in part]


class FeatureCache:
    """Rows of features in a folder, by embedding and video.

    Args:
        folder: The folder of the files; it is created on the first write.
        identity: The value of `Recipe.identity`.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder, self.identity = folder, identity
        self._said: set[str] = set()  # why rows could not be stored

    def path(self, embedding: Embedding) -> Path:
        """Returns the file that holds the features of an embedding."""
        return self.folder / f"{embedding.view}-{digest(embedding.key, self.identity)}.safetensors"

    def load(self, embedding: Embedding) -> dict[str, tuple[Tensor, int]]:
        """Returns the stored rows, {video digest: (feature [F], windows)}; a damaged file is treated as missing."""
        stored = stored_tensors(self.path(embedding), "its features are computed again")
        if stored is None:
            return {}
        names = [bytes(row).hex() for row in stored["videos"].numpy()]
        return dict(zip(names, zip(stored["features"], stored["windows"].tolist(), strict=True), strict=True))

    def store(self, embedding: Embedding, rows: Mapping[str, tuple[Tensor, int]]) -> None:
        """Adds rows to the stored ones, also to those that another process has stored since they were loaded; logs a
        warning if the folder cannot be written."""
        path = self.path(embedding)
        try:
            with one_writer(path.with_name(f".{path.name}.lock"), None), replacing(path) as temporary:
                tensors = _as_tensors(self.load(embedding) | dict(rows))
                save_tensors(tensors, temporary, {"view": embedding.view, "identity": self.identity})
        except (InputError, OSError) as error:
            reason = getattr(error.__cause__ or error, "strerror", None) or str(error)
            if reason not in self._said:  # one line, not one for each encoder
                log.warning("features cannot be stored in %s: %s; this evaluation uses them, the next computes them "
                            "again", self.folder, reason)  # fmt: skip
            self._said.add(reason)


def _as_tensors(rows: Mapping[str, tuple[Tensor, int]]) -> dict[str, Tensor]:
    """Returns what a file of the cache holds: digests of videos [M, 16] uint8, features [M, F] and windows [M]."""
    return {
        "videos": torch.tensor([list(bytes.fromhex(name)) for name in rows], dtype=torch.uint8),
        "features": torch.stack([feature for feature, _ in rows.values()]),
        "windows": torch.tensor([windows for _, windows in rows.values()]),
    }


def embed_index(
    part: Index,
    embeddings: Mapping[str, Embedding],
    open_loader: Callable[[Index], WindowLoader],
    cache: FeatureCache | None = None,
    *,
    description: str = "features",
    progress: bool = False,
    work: Part = WHOLE,
) -> tuple[dict[str, Tensor], Tensor]:
    """Returns the features of the videos of `part` for every embedding. Features in the cache are reused.

    If it is stopped (KeyboardInterrupt), the features of the videos that are complete are stored, unless several
    processes share the videos, so that the same call continues from there.

    Under `torchrun` the processes share the videos, and the first one reads and writes the cache.

    `work`: what the windows of `part` are a part of; those of stored features are not read.

    Returns:
        {name: [M, F] float32 on the CPU}, the mean over a video's windows (zero for a video without windows, which
        is reported in the log), and the number of windows of every video, [M] int64.
    Raises:
        NothingReadError: No window of any video could be read.
    """
    main = distributed.is_main()
    cache = cache if main else None
    known: dict[str, dict[str, tuple[Tensor, int]]] = {name: {} for name in embeddings}
    keys: dict[str, list[str]] = {}  # digests of the videos, by view
    if cache is not None:
        for name, embedding in embeddings.items():
            if embedding.key:
                known[name] = cache.load(embedding)
        keys = {e.view: video_digests(part, e.view, cache.identity) for e in embeddings.values()}
    missing = distributed.from_main(lambda: _missing(len(part), embeddings, known, keys))
    todo = sorted({i for positions in missing.values() for i in positions})
    if progress and main and not todo:
        log.info("%s: the features of all %s are stored already", description, counted(len(part), "video"))
    computed = {name: embedding for name, embedding in embeddings.items() if missing[name]}
    if keys:
        work.expect(-_stored_windows(set(range(len(part))).difference(todo), embeddings, known, keys))

    def keep(sums: Mapping[str, Tensor], counts: Tensor) -> None:
        for name, total in sums.items():
            for row, (i, count) in enumerate(zip(todo, counts.tolist(), strict=True)):
                if count:
                    key = keys[embeddings[name].view][i] if keys else str(i)
                    known[name][key] = (total[row].cpu() / count, count)
            if cache is not None and embeddings[name].key:
                cache.store(embeddings[name], known[name])

    def embed(mine: Sequence[int]) -> tuple[dict[str, Tensor], Tensor]:
        on_stop = keep if cache is not None and len(mine) == len(todo) else None
        positions, stored = [todo[i] for i in mine], len(part) - len(todo)
        return _embed(part, positions, computed, open_loader, description, progress and main, stored, on_stop, work)

    keep(*shared_out(len(todo), embed))
    names = {name: keys.get(embedding.view) for name, embedding in embeddings.items()}
    return distributed.from_main(lambda: _collect(known, names, len(part), description))


def _missing(
    videos: int,
    embeddings: Mapping[str, Embedding],
    known: Mapping[str, Mapping[str, tuple[Tensor, int]]],
    keys: Mapping[str, list[str]],
) -> dict[str, list[int]]:
    """Returns the positions of the videos whose features are not stored, for every embedding."""
    return {
        name: [i for i in range(videos) if not keys or keys[embedding.view][i] not in known[name]]
        for name, embedding in embeddings.items()
    }


def _stored_windows(
    positions: Collection[int],
    embeddings: Mapping[str, Embedding],
    known: Mapping[str, Mapping[str, tuple[Tensor, int]]],
    keys: Mapping[str, list[str]],
) -> float:
    """Returns the number of windows of the videos at these positions, whose features are stored, for each process."""
    windows = (max(known[name][keys[e.view][i]][1] for name, e in embeddings.items()) for i in positions)
    return sum(windows) / distributed.size()


def _embed(
    part: Index,
    positions: Sequence[int],
    embeddings: Mapping[str, Embedding],
    open_loader: Callable[[Index], WindowLoader],
    description: str,
    progress: bool,
    stored: int,
    on_stop: Callable[[dict[str, Tensor], Tensor], None] | None,
    work: Part,
) -> tuple[dict[str, Tensor], Tensor]:
    """Returns sums over the windows of the videos at these positions, {name: [len(positions), F]}, and their counts."""
    chosen = part.chosen(positions)
    with closing(open_loader(chosen)) as loader:
        if progress:
            log.info(work_ahead(description, len(chosen), loader, stored=stored))
        sums, counts = sum_features(
            embeddings, loader, len(chosen), description=description, progress=progress, on_stop=on_stop, work=work
        )
        if loader.skipped:
            log.warning("%s: %s", description, not_read(loader.skipped, "left out"))
    return {name: total.cpu() for name, total in sums.items()}, counts


def _collect(
    known: Mapping[str, Mapping[str, tuple[Tensor, int]]],
    keys: Mapping[str, list[str] | None],
    videos: int,
    description: str,
) -> tuple[dict[str, Tensor], Tensor]:
    """Returns the rows in the order of the index; a video counts only if every embedding has it."""
    features, windows = {}, None
    for name, rows in known.items():
        names = keys[name] or [str(i) for i in range(videos)]
        found = [rows.get(key) for key in names]
        some = next((row for row in found if row is not None), None)
        if some is None:
            of = counted(videos, "video")
            raise NothingReadError(f"{description}: no window of any of the {of} of the index could be read")
        empty = (torch.zeros_like(some[0]), 0)
        features[name] = torch.stack([(row or empty)[0] for row in found])
        counts = torch.tensor([(row or empty)[1] for row in found])
        windows = counts if windows is None else torch.minimum(windows, counts)
    return features, windows
