"""`cpr-fast embed`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from cpr_fast.commands.inputs import require_at_least, require_device, require_file
from cpr_fast.commands.options import Json
from cpr_fast.commands.output import show
from cpr_fast.errors import InputError
from cpr_fast.wording import counted

VIEWS = ("rgb", "flow", "residual")


def embed(
    index: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="INDEX")] = None,
    *,
    out: Path,
    encoder: Annotated[tuple[str, ...], tyro.conf.arg(help_behavior_hint="(default: none)")] = (),
    features: Annotated[tuple[str, ...], tyro.conf.arg(help_behavior_hint="(default: none)")] = (),
    samples: int | None = None,
    dtype: Literal["float16", "float32"] = "float16",
    device: str = "auto",
    seed: int = 0,
    json: Json = False,
) -> None:
    """Write a store of features, on which pretrain, mine, retrieve and probe work without videos.

    The features are computed from the videos of INDEX with --encoder, or read from the files of another program with
    --features. The same command continues a store that was stopped; finished shards are not computed again.

    Args:
        index: The index (CSV) of the videos. With --features, a table with the column path and any of label, source and
            split, such as an index, which selects and orders the clips; without it, the names of the features tell:
            [SPLIT/][CLASS/]NAME.
        out: The folder of the store.
        encoder: A checkpoint, FILE or one for each view (rgb=FILE flow=FILE); or a network of your own with the weights
            that it loads itself: MODULE:FACTORY, FILE.py:FACTORY, or a recipe, FILE.toml, whose [model] names it and
            whose [data] has the settings of the clips; with VIEW= before it if the view is not rgb.
        features: Features of another program, PATH or one for each view (rgb=PATH flow=PATH): a folder of .npy, .npz
            or .pt files, one per clip, or one .npy, .npz, .pt or .h5 of all clips.
        samples: Number of augmented samples per clip and view; 2 by default. With --features, this number of evenly
            spaced features of each clip; by default all of them.
        dtype: The type of the stored numbers.
        device: Where features are computed: "auto", "cpu", "cuda" or "cuda:N".
        seed: Seed of the augmentation.
    """
    require_file("INDEX", index)
    require_at_least("--samples", 1, samples)
    require_device("--device", device, "auto")
    if bool(encoder) == bool(features):
        raise InputError(f"--encoder, --features: expected one of the two, got {'both' if encoder else 'none'}")
    if features:
        report = _adopted(features, index, out, samples, dtype)
    elif index is None:
        raise InputError("INDEX: expected the index of the videos that --encoder is to embed, got none")
    else:
        report = _computed(index, encoder, out, samples or 2, dtype, device, seed)
    folder = shlex.quote(str(out))
    show(report, json, lines=_summary(report, out), next_step=f"cpr-fast pretrain RECIPE --data.features {folder}")


def _adopted(features: tuple[str, ...], table: Path | None, out: Path, samples: int | None, dtype: str) -> dict:
    from cpr_fast.data.features.adopt import adopt

    paths: dict[str, Path] = {}
    for text in features:
        view, equals, path = text.partition("=")
        view, path = (view, path) if equals and view in VIEWS else ("rgb", text)
        if view in paths:
            raise InputError(f"--features: expected each view once (rgb=PATH flow=PATH), got {view!r} again")
        paths[view] = Path(path)
    return adopt(paths, table, out, samples=samples, dtype=dtype, progress=True)


def _computed(
    index: Path, encoder: tuple[str, ...], out: Path, samples: int, dtype: str, device: str, seed: int
) -> dict[str, Any]:
    from cpr_fast.runtime.progress import announce

    announce("Loading PyTorch and NVIDIA DALI")
    from cpr_fast.data.index.index import Index
    from cpr_fast.evaluate.features.embed import embed_videos, load_networks
    from cpr_fast.runtime import distributed

    networks = load_networks(encoder)
    data = networks.data
    videos = Index.load(index, require_flow=data.flow == "stored").long_enough(data)
    place = str(distributed.init(device).device)
    return embed_videos(videos, networks, out, samples=samples, dtype=dtype, device=place, seed=seed, progress=True)


def _summary(report: dict[str, Any], out: Path) -> list[str]:
    kept = report["shards"] - report["computed"]
    lines = [
        f"{counted(report['clips'], 'clip')} in {counted(report['shards'], 'shard')}, {report['bytes'] / 2**20:,.1f} "
        f"MiB: {out}"
    ]
    if kept:
        lines.append(f"  {counted(kept, 'shard')} {'was' if kept == 1 else 'were'} there already")
    if report["left_out"]:
        lines.append(f"  {counted(report['left_out'], 'clip')} could not be read and "
                     f"{'is' if report['left_out'] == 1 else 'are'} left out")  # fmt: skip
    return lines
