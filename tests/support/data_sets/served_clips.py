"""Videos on a local server, and loaders that read them with a disk cache and without."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from support.data_sets.clips import DATA
from support.machine.http_server import Served

from cpr_fast.data.clips.loader import TrainLoader
from cpr_fast.data.index.index import Index


def on_server(index: Index, served: Served) -> Index:
    """Returns the index of the same videos on the server, which gets their files."""
    videos = []
    for video in index:
        near = {"path": video.path, "flow_path": video.flow_path}
        far = {name: Path(f"{served.url}/{path.name}") for name, path in near.items() if path is not None}
        served.files |= {f"/{path.name}": path.read_bytes() for path in near.values() if path is not None}
        videos.append(dataclasses.replace(video, **far))
    return Index(videos)


def open_loader(
    index: Index, folder: Path | str = "", mib: float = 64, views=("rgb", "flow"), **changes
) -> TrainLoader:
    """Opens a loader with a disk cache of `mib`; `changes` are rank, world_size and settings of the data."""
    placement = {"rank": changes.pop("rank", 0), "world_size": changes.pop("world_size", 1)}
    data = dataclasses.replace(DATA, disk_cache=str(folder), disk_cache_gib=mib / 1024, cache_gib=0, **changes)
    return TrainLoader(index, data, views, seed=5, **placement)
