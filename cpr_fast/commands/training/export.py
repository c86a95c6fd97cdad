"""`cpr-fast export`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Literal

import tyro

from cpr_fast.commands.inputs import KNOWN_SUFFIXES, require_file, require_other_file
from cpr_fast.commands.options import Json
from cpr_fast.commands.output import show
from cpr_fast.errors import InputError

USES = {  # how the file of each format is used
    "safetensors": "load it in Python: safetensors.torch.load_file({out!r})",
    "onnx": "load it in Python: onnxruntime.InferenceSession({out!r})",
    "coclr": "pass it to the code of CoCLR: --pretrain {quoted}",
    "cpr": "pass it to the code of CPR: --pretrain {quoted}",
    "hub": "load it in Python: cpr_fast.from_pretrained({out!r}); to publish it, complete README.md, then: "
    "hf upload USER/NAME {quoted}",
}
SUFFIXES = {  # the formats of files with these suffixes; other suffixes are left to the user
    ".safetensors": ("safetensors",),
    ".onnx": ("onnx",),
    ".pth": ("coclr", "cpr"),
    ".pt": ("coclr", "cpr"),
    ".tar": ("coclr", "cpr"),
}


def export(
    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")],
    *,
    out: Path,
    to: Literal["safetensors", "onnx", "coclr", "cpr", "hub"] | None = None,
    view: Literal["rgb", "flow", "residual"] | None = None,
    json: Json = False,
) -> None:
    """Write a checkpoint's encoders for other programs.

    Args:
        checkpoint: A checkpoint of `pretrain` or `import-checkpoint`.
        out: The file to write; with hub the folder.
        to: safetensors (every view), onnx (one view, any batch size), a checkpoint that the code of CoCLR or of CPR
            loads strictly (coclr, cpr), or a folder for a hub, with a model card and code that loads it with torch
            alone (hub, every view); by default onnx if OUT ends in .onnx, otherwise safetensors.
        view: The view whose encoder is written with onnx, coclr and cpr, and that is loaded by default with hub; by
            default the one that was trained last.
    """
    require_file("CHECKPOINT", checkpoint)
    if to == "hub":
        _export_folder(checkpoint, out, view, json)
        return
    require_other_file("--out", out, [checkpoint])
    to = _format(out, to)
    from cpr_fast.runtime.progress import announce

    announce("Loading PyTorch")
    from cpr_fast.weights.exporting import export as run

    show(run(checkpoint, out, to=to, view=view), json, next_step=_use(to, out))


def _export_folder(checkpoint: Path, out: Path, view: str | None, json: bool) -> None:
    if out.suffix.lower() in (*SUFFIXES, *KNOWN_SUFFIXES):
        raise InputError(f"--out: expected the name of a folder for the format hub, got {str(out)!r}")
    from cpr_fast.runtime.progress import announce

    announce("Loading PyTorch")
    from functools import partial

    from cpr_fast.report.card import model_card
    from cpr_fast.weights.hub import export_folder

    written = export_folder(
        checkpoint, out, view=view, card=partial(model_card, checkpoint=checkpoint, name=out.resolve().name)
    )
    show(written, json, next_step=_use("hub", out))


def _use(to: str, out: Path) -> str:
    return USES[to].format(out=str(out), quoted=shlex.quote(str(out)))


def _format(out: Path, to: Literal["safetensors", "onnx", "coclr", "cpr"] | None) -> str:
    """Returns the format to write. Raises InputError if the suffix of the file is that of another format."""
    suffix = out.suffix.lower()
    formats = SUFFIXES.get(suffix, ())
    if to is None and len(formats) > 1:
        raise InputError(f"--to: expected {' or '.join(formats)} for the name {str(out)!r}, got none")
    to = to or (formats[0] if formats else "safetensors")
    if formats and to not in formats or not formats and suffix in KNOWN_SUFFIXES:
        wanted = " or ".join(name for name, of in SUFFIXES.items() if to in of)
        raise InputError(f"--out: expected a name that ends in {wanted} for the format {to}, got {str(out)!r}")
    return to
