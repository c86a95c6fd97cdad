"""`cpr-fast import-checkpoint`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import tyro

from cpr_fast.commands.options import Json
from cpr_fast.commands.output import show


def import_checkpoint(
    file: tyro.conf.Positional[Path], *, out: Path, view: Literal["rgb", "flow"] = "rgb", json: Json = False
) -> None:
    """Read a checkpoint of CoCLR, CPR, IIC or MIL-NCE's S3D; reports what matched, what is missing and what is unused.

    The result serves `retrieve`, `probe`, `finetune`, `export`, and `pretrain --model.init.rgb OUT`.

    Args:
        file: The published checkpoint.
        out: The checkpoint to write.
        view: What the file's (query) encoder looks at.
    """
    from cpr_fast.weights.importing import import_checkpoint as run

    show(run(file, out, view=view), json)
