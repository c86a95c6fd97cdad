"""`cpr-fast export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from cpr_fast.commands.inputs import require_file, require_other_file
from cpr_fast.commands.options import Json
from cpr_fast.commands.output import show

USES = {  # how the file of each format is used
    "safetensors": "load it in Python: safetensors.torch.load_file({out!r})",
    "onnx": "load it in Python: onnxruntime.InferenceSession({out!r})",
    "coclr": "pass it to the code of CoCLR: --pretrain {out}",
    "cpr": "pass it to the code of CPR: --pretrain {out}",
}


def export(
    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")],
    *,
    out: Path,
    to: Literal["safetensors", "onnx", "coclr", "cpr"] = "safetensors",
    view: Literal["rgb", "flow", "residual"] | None = None,
    json: Json = False,
) -> None:
    """Write a checkpoint's encoders for other programs.

    Args:
        checkpoint: A checkpoint of `pretrain` or `import-checkpoint`.
        out: The file to write.
        to: safetensors (every view), onnx (one view, any batch size), or a checkpoint that the code of CoCLR or of CPR
            loads strictly.
        view: The view whose encoder is written with onnx, coclr and cpr; by default the one that was trained last.
    """
    require_file("CHECKPOINT", checkpoint)
    require_other_file("--out", out, [checkpoint])
    from cpr_fast.runtime.progress import announce

    announce("Loading PyTorch")
    from cpr_fast.weights.exporting import export as run

    show(run(checkpoint, out, to=to, view=view), json, next_step=USES[to].format(out=str(out)))
