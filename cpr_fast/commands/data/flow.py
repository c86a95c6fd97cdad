"""`cpr-fast flow`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any, Literal

from cpr_fast.commands.inputs import (
    next_shard,
    other_shards,
    parse_shard,
    require_device,
    require_file,
    require_videos,
)
from cpr_fast.commands.options import IndexPath, Json
from cpr_fast.commands.output import show
from cpr_fast.config.recipes import init_command
from cpr_fast.wording import counted


def flow(
    index: IndexPath,
    *,
    out: Path,
    storage: Literal["video", "lmdb"] = "video",
    device: str = "cpu",
    shard: str = "0/1",
    json: Json = False,
) -> None:
    """Compute the TV-L1 optical flow of every video of an index, and fill the index's column flow_path.

    The expected time, core-hours and disk are printed first. The same command continues a run that was stopped, and
    computes the flow of videos that were added or changed. A video whose flow cannot be computed is reported and
    skipped; the next run tries it again.

    Args:
        index: The index (CSV) that `cpr-fast index` wrote.
        out: Folder for the flow files, or with --storage lmdb the LMDB file.
        storage: "video" writes one file per video; "lmdb" writes JPEG records of one LMDB file in CoCLR's format. With
            --shard, "lmdb" writes OUT.i-of-n.lmdb; a last run without --shard joins these files.
        device: Where the flow is computed: "cpu", "cuda" or "cuda:N". The CPU decodes and encodes in any case.
        shard: i/n computes the i-th of n shares of the videos, 0 <= i < n. Run the n commands on as many machines as
            you like, also at the same time.
    """
    require_file("INDEX", index)
    part = parse_shard(shard)
    require_device("--device", device)
    require_videos("INDEX", [index])
    from cpr_fast.data.flow.names import require_place
    from cpr_fast.runtime.progress import announce

    require_place(out, storage)
    announce(f"Loading PyTorch, and looking for the flow that is stored in {out}")
    from cpr_fast.data.flow.write import write_flow

    report = write_flow(index, out, storage=storage, device=device, shard=part, progress=True)
    waiting = report["without_flow"] - len(report["problems"])  # videos of other shards
    show(report, json, lines=_summary(report, index, storage, part, waiting),
         next_step="\n".join(_next_steps(index, out, storage, part, waiting)))  # fmt: skip


def _next_steps(index: Path, out: Path, storage: str, shard: tuple[int, int], waiting: int) -> list[str]:
    """Returns the commands to run next; `waiting` counts the videos without flow that belong to other shards."""
    again = ["cpr-fast", "flow", str(index), "--out", str(out), *(["--storage", "lmdb"] if storage == "lmdb" else [])]
    others = [[*again, *next_shard(shard)]] if waiting > 0 else []
    joins = [again] if shard[1] > 1 and storage == "lmdb" else []
    return [*map(shlex.join, [*others, *joins]), init_command(index)]


def _summary(report: dict[str, Any], index: Path, storage: str, shard: tuple[int, int], waiting: int) -> list[str]:
    """Returns a summary of the work done and of the videos without flow, with the reasons."""
    from cpr_fast.data.storage.unreadable import by_kind
    from cpr_fast.runtime.progress import duration

    problems = [(row["path"], row["reason"]) for row in report["problems"]]
    share = "" if shard[1] == 1 else f", shard {shard[0]}/{shard[1]}"
    lines = [
        f"flow of {index}{share}: {counted(report['written'], 'video')} computed, {report['kept']:,} "
        f"kept from earlier runs, "
        f"{len(problems):,} failed",
        f"  {report['pairs']:,} frame pairs in {duration(report['elapsed_s'])} ({report['pairs_per_s']:,} per second)",
        *(f"  no flow for {line}" for line in by_kind(problems)),
    ]
    if waiting > 0:
        others = f", because of other shards ({other_shards(shard)})" if shard[1] > 1 else ""
        lines.append(
            f"  {counted(waiting, 'other video')} of the index {'has' if waiting == 1 else 'have'} no flow yet{others}"
        )
    if shard[1] > 1 and storage == "lmdb":
        lines.append("  the last command without --shard joins the files of all shards")
    return lines
