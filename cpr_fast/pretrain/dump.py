"""`pretrain --dump-memory`: the memory as a file for the mining lab, `cpr-fast mine`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..checkpoint import written_whole
from .cycle import CycleState


def dump_memory(folder: Path, state: CycleState, number: int) -> Path | None:
    """Writes the filled slots of a two-view memory to `folder`/memory/cycle-<number, from 1>.npz, over an earlier one.

    Arrays of N slots, oldest first: `rgb`, `flow` [N, D] float32 as the cascade compares them (`mine --raw` takes them
    so), `label`, `group` (source id), `video` (position in the index), `age` (steps since the newest) [N] int64.
    Returns the path, or None for an empty memory and a cycle of other views.
    """
    memory = state.memory
    if set(state.views) != {"rgb", "flow"} or not memory.count:
        return None
    written = np.roll(memory.enqueued_at.cpu().numpy(), -(memory.count % memory.size))  # a ring's oldest slot first
    order = np.argsort(written, kind="stable")[(written < 0).sum() :]
    slots = (order + memory.count) % memory.size  # [N], oldest first
    columns = {"label": memory.label, "group": memory.source, "video": memory.video}
    arrays = {name: column.cpu().numpy()[slots] for name, column in columns.items()}
    arrays |= {
        view: features.float().cpu().numpy()[slots] for view, features in zip(state.views, memory.features, strict=True)
    }
    written = memory.enqueued_at.cpu().numpy()[slots]
    path = folder / "memory" / f"cycle-{number + 1}.npz"
    with written_whole(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, age=written.max() - written, **arrays)
    return path
