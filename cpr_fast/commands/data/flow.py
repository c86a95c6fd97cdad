"""`cpr-fast flow`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import tyro

from cpr_fast.commands.inputs import parse_shard, require_file
from cpr_fast.commands.options import Json
from cpr_fast.commands.output import show


def flow(
    index: tyro.conf.Positional[Path],
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
    from cpr_fast.data.flow.write import write_flow

    report = write_flow(index, out, storage=storage, device=device, shard=part, progress=True)
    waiting = report["without_flow"] - len(report["problems"])  # videos of other shards
    next_step = "" if waiting > 0 else f"cpr-fast doctor {index}   (checks the data before training)"
    if part[1] > 1 and storage == "lmdb":
        next_step = f"cpr-fast flow {index} --out {out} --storage lmdb   (when all shards are done: joins their files)"
    show(report, json, lines=_summary(report, index, part, waiting), next_step=next_step)


def _summary(report: dict[str, Any], index: Path, shard: tuple[int, int], waiting: int) -> list[str]:
    """Returns a summary of the work done and of the videos without flow, with the reasons."""
    from cpr_fast.data.storage.unreadable import by_kind
    from cpr_fast.runtime.progress import duration

    problems = [(row["path"], row["reason"]) for row in report["problems"]]
    share = "" if shard[1] == 1 else f", shard {shard[0]}/{shard[1]}"
    lines = [
        f"flow of {index}{share}: {report['written']:,} videos computed, {report['kept']:,} kept from earlier runs, "
        f"{len(problems):,} failed",
        f"  {report['pairs']:,} frame pairs in {duration(report['elapsed_s'])} ({report['pairs_per_s']:,} per second)",
        *(f"  no flow for {line}" for line in by_kind(problems)),
    ]
    if waiting > 0:
        lines.append(f"  {waiting:,} other videos of the index have no flow yet; they belong to other shards")
    return lines
