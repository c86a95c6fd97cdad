"""`cpr-fast import-checkpoint`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from cpr_fast.commands.inputs import require_file, require_other_file
from cpr_fast.commands.options import Json
from cpr_fast.commands.output import show
from cpr_fast.wording import counted, listed


def import_checkpoint(
    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")],
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
    require_other_file("--out", out, [file])
    from cpr_fast.runtime.progress import announce

    announce("Loading PyTorch")
    from cpr_fast.weights.importing import import_checkpoint as run

    result = run(file, out, view=view)
    show(result, json, lines=lines_of(result), next_step=f"cpr-fast retrieve {shlex.quote(str(out))} --index INDEX.csv")


def lines_of(result: dict[str, Any]) -> list[str]:
    """Returns what was read from the file: a line for each encoder, and one for the tensors that were not used."""
    lines = [f"{result['checkpoint']}: {result['arch']} from a checkpoint of {result['source']}"]
    for name, encoder in result["encoders"].items():
        missing = f"; missing, so as in a new encoder: {listed(encoder['missing'])}" if encoder["missing"] else ""
        matched = counted(encoder["matched"], "tensor")
        lines.append(f"{name}: {matched} of the encoder of {listed(encoder['views'])}{missing}")
    return [*lines, f"not used: {listed(result['unused']) or 'none'}"]
