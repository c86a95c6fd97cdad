"""What a run writes for others to look at: the memory, for `cpr-fast mine`, and a step that went wrong."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cpr_fast.pretrain.state.cycle import CycleState
from cpr_fast.weights.checkpoint import save_checkpoint, written_whole

if TYPE_CHECKING:
    from cpr_fast.pretrain.step.result import StepResult


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


def dump_step(folder: Path, state: CycleState, step: int, result: StepResult, paths: list[str]) -> Path:
    """Writes what is left of a step to `folder`/nonfinite-step-XXXXXXXX.pt, which `load_checkpoint` opens.

    Of the step: `step`, `loss` 0-d, `queries` [L, R*B, D], `keys` [V, R*B, D], `video` and `start` [R*B], `paths`. As
    the run stood when it noticed, up to `run.log_every` steps later: `config`, `encoders`, `view` (that learns),
    `cycle_state`.
    """
    payload = {
        "config": state.config.to_dict(),
        "encoders": state.trained(),
        "cycle_state": state.state_dict(),
        "view": state.cycle.view,
        "step": step,
        "paths": paths,
        **{name: getattr(result, name) for name in ("loss", "queries", "keys", "video", "start")},
    }
    return save_checkpoint(folder / f"nonfinite-step-{step:08d}.pt", payload)
