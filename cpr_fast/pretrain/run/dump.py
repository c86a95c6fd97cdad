"""Files for inspection: the memory of a cycle, for `cpr-fast mine`, and a step whose features or loss were NaN."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cpr_fast.pretrain.state.cycle import CycleState
from cpr_fast.runtime.files import replacing
from cpr_fast.weights.checkpoint import save_checkpoint

if TYPE_CHECKING:
    from cpr_fast.pretrain.step.result import StepResult


def dump_memory(folder: Path, state: CycleState, number: int) -> Path | None:
    """Writes the filled slots of a memory of RGB and flow features to `folder`/memory/cycle-N.npz.

    The file holds arrays of N slots, oldest first: `rgb`, `flow` [N, D] float32, the features that the cascade compares
    (read them with `cpr-fast mine --raw`); `label`, `group` (source id), `video` (position in the index) and `age`
    (steps since the newest entry), [N] int64 each.

    Args:
        folder: the run folder; a file of an earlier epoch is replaced.
        number: number of the cycle, from 0. The number in the file name starts at 1.
    Returns:
        The path, or None if the memory is empty or holds other views.
    """
    memory = state.memory
    if set(state.views) != {"rgb", "flow"} or not memory.count:
        return None
    written = np.roll(
        memory.enqueued_at.cpu().numpy(), -(memory.count % memory.size)
    )  # starts at the oldest slot of the ring
    order = np.argsort(written, kind="stable")[(written < 0).sum() :]
    slots = (order + memory.count) % memory.size  # [N], oldest first
    columns = {"label": memory.label, "group": memory.source, "video": memory.video}
    arrays = {name: column.cpu().numpy()[slots] for name, column in columns.items()}
    arrays |= {
        view: features.float().cpu().numpy()[slots] for view, features in zip(state.views, memory.features, strict=True)
    }
    written = memory.enqueued_at.cpu().numpy()[slots]
    path = folder / "memory" / f"cycle-{number + 1}.npz"
    with replacing(path, durable=True) as temporary, open(temporary, "wb") as file:
        np.savez(file, age=written.max() - written, **arrays)
    return path


def dump_step(
    folder: Path, state: CycleState, held: dict[str, Any], step: int, result: StepResult, paths: list[str]
) -> Path:
    """Writes a step whose features or loss are NaN or infinite to `folder`/nonfinite-step-XXXXXXXX.pt.

    `load_checkpoint` reads the file. Of the step itself it holds `step`, `loss` 0-d, `queries` [L, R*B, D], `keys`
    [V, R*B, D], `video` and `start` [R*B], `paths`. It also holds the state of the run when the step was noticed, up
    to `run.log_every` steps later: `config`, `encoders`, `view` (the one that learns), `cycle_state`.

    Args:
        held: `encoders` and `cycle_state`, which the processes gather together.
    Returns:
        The path.
    """
    payload = {
        "config": state.config.to_dict(),
        **held,
        "view": state.cycle.view,
        "step": step,
        "paths": paths,
        **{name: getattr(result, name) for name in ("loss", "queries", "keys", "video", "start")},
    }
    return save_checkpoint(folder / f"nonfinite-step-{step:08d}.pt", payload)
