"""`cpr-fast export`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import tyro

from cpr_fast.commands.inputs import require_file
from cpr_fast.commands.options import Json
from cpr_fast.commands.output import show


def export(
    checkpoint: tyro.conf.Positional[Path],
    *,
    out: Path,
    to: Literal["safetensors", "onnx", "coclr"] = "safetensors",
    view: Literal["rgb", "flow"] | None = None,
    json: Json = False,
) -> None:
    """Write a checkpoint's encoders for other programs.

    Args:
        checkpoint: A checkpoint of `pretrain` or `import-checkpoint`.
        out: The file to write.
        to: safetensors (every view), onnx (one view, any batch size), or a checkpoint that the code of CoCLR and CPR
            loads.
        view: The view whose encoder is written with onnx and coclr; by default the one that was trained last.
    """
    require_file("CHECKPOINT", checkpoint)
    from cpr_fast.weights.exporting import export as run

    show(run(checkpoint, out, to=to, view=view), json)
