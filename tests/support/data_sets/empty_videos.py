"""Indexes of videos without content, and stores of features that another program computed for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cpr_fast.data.features.adopt import adopt
from cpr_fast.data.index.index import Index, Video


def write_empty_videos(folder: Path, rows: Sequence[tuple[str, str, str]]) -> Path:
    """Writes videos without content in `folder` and their index, index.csv; `rows` are names, labels and sources."""
    videos = []
    for name, label, source in rows:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
        videos.append(Video(path, label, source, "train", 9, 30.0, 8, 8))
    Index(videos).save(folder / "index.csv")
    return folder / "index.csv"


def adopted(folder: Path, names: Sequence[str], **features: np.ndarray) -> Path:
    """Writes `folder`/store with features [N, F] of clips of these names, by view."""
    files = {view: folder / f"{view}.npz" for view in features}
    for view, file in files.items():
        np.savez(file, features=features[view], names=np.array(names))
    adopt(files, None, folder / "store", dtype="float32")
    return folder / "store"
