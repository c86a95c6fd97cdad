"""`cpr-fast import-checkpoint`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import tyro

from cpr_fast.commands.inputs import require_file
from cpr_fast.commands.options import Json
from cpr_fast.commands.output import show


def import_checkpoint(
    file: tyro.conf.Positional[Path],
    *,
    out: Path,
    view: Literal["rgb", "flow", "residual"] | None = None,
    json: Json = False,
) -> None:
    """Convert a published checkpoint of CoCLR, CPR, IIC or MIL-NCE's S3D.

    The output lists which tensors matched, which are missing and which were not used. The result can be given to
    `retrieve`, `probe` and `finetune`, which use the clips and the recipe of the published network, to `export`, and to
    `pretrain` with --model.init.rgb OUT.

    Args:
        file: The published checkpoint.
        out: The checkpoint to write.
        view: The view that the file's (query) encoder was trained on; by default rgb, and for IIC, whose one network
            serves both, rgb and residual.
    """
    require_file("FILE", file)
    from cpr_fast.runtime.progress import announce

    announce("Loading PyTorch")
    from cpr_fast.weights.importing import import_checkpoint as run

    show(run(file, out, view=view), json, next_step=f"cpr-fast retrieve {out} --index INDEX.csv")
