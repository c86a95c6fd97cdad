"""Stored features: one file per encoder and recipe, one row per video, so that nothing is embedded twice.

A row is found by the video's path, size and modification time, so splits and indexes that share videos share rows, a
changed video is embedded anew, and a larger index embeds only what is new. The file's name is a digest of the weights,
the recipe and the clip settings. Letters: M videos, F feature width.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cpr_fast.data.index.index import Index, Video
from cpr_fast.errors import InputError
from cpr_fast.evaluate.features.embedding import Embedding, sum_features
from cpr_fast.evaluate.features.shares import shared_out
from cpr_fast.runtime import distributed

if TYPE_CHECKING:
    from cpr_fast.data.clips.loader import WindowLoader

log = logging.getLogger(__name__)


def digest(*parts: str | bytes) -> str:
    """32 hexadecimal digits that name these parts."""
    sha = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        sha.update(len(data).to_bytes(8, "little"))
        sha.update(data)
    return sha.hexdigest()[:32]


def weights_digest(module: nn.Module) -> str:
    """A digest of every parameter and buffer of a module, by name; about 0.05 s for an S3D."""
    parts: list[str | bytes] = []
    for name, value in module.state_dict().items():
        value = value.detach().cpu().contiguous()
        parts += [name, str(value.dtype), value.flatten().view(torch.uint8).numpy().tobytes()]
    return digest(*parts)


def video_digest(video: Video, view: str) -> str:
    """A digest of what a view of a video is read from: its files as the file system shows them, and its length."""
    files = [video.path] + ([video.flow_path] if view == "flow" and video.flow_path else [])
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return digest(json.dumps([stats, video.num_frames, video.flow_path is not None]))


class FeatureCache:
    """Rows of features in a folder, by embedding and video.

    Args:
        folder: where the files lie; made on the first write.
        identity: `Recipe.identity`.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder, self._identity = folder, identity

    def path(self, embedding: Embedding) -> Path:
        return self.folder / f"{embedding.view}-{digest(embedding.key, self._identity)}.safetensors"

    def load(self, embedding: Embedding) -> dict[str, tuple[Tensor, int]]:
        """{video digest: (feature [F], windows)} of what is stored; a damaged file counts as none."""
        path = self.path(embedding)
        if not path.exists():
            return {}
        try:
            stored = load_file(path)
        except (SafetensorError, OSError) as error:
            log.warning("%s cannot be read (%s): its features are computed anew", path, error)
            return {}
        names = [bytes(row).hex() for row in stored["videos"].numpy()]
        return dict(zip(names, zip(stored["features"], stored["windows"].tolist(), strict=True), strict=True))

    def store(self, embedding: Embedding, rows: Mapping[str, tuple[Tensor, int]]) -> None:
        """Replaces the stored rows by `rows`, whole or not at all; a folder that cannot be written costs a warning."""
        path = self.path(embedding)
        names = torch.tensor([list(bytes.fromhex(name)) for name in rows], dtype=torch.uint8)  # [M, 16]
        tensors = {
            "videos": names,
            "features": torch.stack([feature for feature, _ in rows.values()]),  # [M, F]
            "windows": torch.tensor([windows for _, windows in rows.values()]),  # [M]
        }
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                save_file(tensors, temporary, metadata={"view": embedding.view, "identity": self._identity})
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
        except (OSError, SafetensorError) as error:
            log.warning("features are not kept: %s", error)


def embed_index(
    part: Index,
    embeddings: Mapping[str, Embedding],
    open_loader: Callable[[Index], WindowLoader],
    cache: FeatureCache | None = None,
    *,
    description: str = "features",
    progress: bool = False,
) -> tuple[dict[str, Tensor], Tensor]:
    """Features of the videos of `part` by every embedding, read from the cache where they are there.

    Under `torchrun` the ranks share out the videos, and the first one reads and writes the cache.

    Returns:
        {name: [M, F] float32 on the CPU}, the mean over a video's windows (zero for a video that gave none, which is
        named in the log), and the number of windows of every video, [M] int64.
    Raises:
        InputError: no video gave a window.
    """
    main = distributed.is_main()
    cache = cache if main else None
    known: dict[str, dict[str, tuple[Tensor, int]]] = {name: {} for name in embeddings}
    keys: dict[str, list[str]] = {}  # of every view's videos
    if cache is not None:
        for name, embedding in embeddings.items():
            if embedding.key:
                known[name] = cache.load(embedding)
        keys = {e.view: [video_digest(video, e.view) for video in part] for e in embeddings.values()}
    missing = distributed.from_main(
        lambda: {
            name: [i for i in range(len(part)) if not keys or keys[embedding.view][i] not in known[name]]
            for name, embedding in embeddings.items()
        }
    )
    todo = sorted({i for positions in missing.values() for i in positions})
    computed = {name: embedding for name, embedding in embeddings.items() if missing[name]}
    sums, counts = shared_out(
        len(todo),
        lambda mine: _embed(part, [todo[i] for i in mine], computed, open_loader, description, progress and main),
    )
    for name, total in sums.items():
        for row, (i, count) in enumerate(zip(todo, counts.tolist(), strict=True)):
            if count:
                key = keys[embeddings[name].view][i] if keys else str(i)
                known[name][key] = (total[row] / count, count)
        if cache is not None and embeddings[name].key:
            cache.store(embeddings[name], known[name])
    names = {name: keys.get(embedding.view) for name, embedding in embeddings.items()}
    return distributed.from_main(lambda: _collect(known, names, len(part), description))


def _embed(
    part: Index,
    positions: Sequence[int],
    embeddings: Mapping[str, Embedding],
    open_loader: Callable[[Index], WindowLoader],
    description: str,
    progress: bool,
) -> tuple[dict[str, Tensor], Tensor]:
    """Sums over the windows of the videos at these positions, {name: [len(positions), F]}, and their numbers."""
    chosen = Index((part[i] for i in positions), part.classes)
    with closing(open_loader(chosen)) as loader:
        sums, counts = sum_features(embeddings, loader, len(chosen), description=description, progress=progress)
        for path, reason in loader.skipped:
            log.warning("%s: %s is left out: %s", description, path, reason)
    return {name: total.cpu() for name, total in sums.items()}, counts


def _collect(
    known: Mapping[str, Mapping[str, tuple[Tensor, int]]],
    keys: Mapping[str, list[str] | None],
    videos: int,
    description: str,
) -> tuple[dict[str, Tensor], Tensor]:
    """Rows in the order of the index; a video counts only where every embedding has it."""
    features, windows = {}, None
    for name, rows in known.items():
        names = keys[name] or [str(i) for i in range(videos)]
        found = [rows.get(key) for key in names]
        some = next((row for row in found if row is not None), None)
        if some is None:
            raise InputError(f"{description}: none of the {videos} videos of the index gave a window")
        empty = (torch.zeros_like(some[0]), 0)
        features[name] = torch.stack([(row or empty)[0] for row in found])
        counts = torch.tensor([(row or empty)[1] for row in found])
        windows = counts if windows is None else torch.minimum(windows, counts)
    return features, windows
