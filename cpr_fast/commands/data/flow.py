"""`cpr-fast flow`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import tyro

from cpr_fast.commands.options import Json, parse_shard
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
    """TV-L1 flow of every video of an index; resumable. Fills the index's flow_path column.

    A video that gives no flow is named and left out; the next run tries it again.

    Args:
        index: The index (CSV).
        out: Folder of the flow videos, or the LMDB file.
        storage: A video for each video, or JPEG records in one LMDB file in CoCLR's format. A shard of the latter has a
            file of its own, OUT.i-of-n.lmdb; a run without --shard then makes one file of them all.
        device: Where the flow is computed: cpu, cuda or cuda:N. Decoding and encoding stay on the CPU.
        shard: i/n: this process does the i-th of n shares of the videos, 0 <= i < n.
    """
    from cpr_fast.data.flow.write import write_flow

    report = write_flow(index, out, storage=storage, device=device, shard=parse_shard(shard), progress=True)
    if not json:  # all of them are in the log
        report |= {"problems": report["problems"][:20]}
    show(report, json)
