"""`cpr-fast embed`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from cpr_fast.commands.inputs import (
    next_shard,
    other_shards,
    parse_shard,
    require_at_least,
    require_device,
    require_file,
)
from cpr_fast.commands.options import Json, PicturesFps
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
    pictures_fps: PicturesFps = None,
    samples: int | None = None,
    dtype: Literal["float16", "float32"] = "float16",
    device: str = "auto",
    seed: int = 0,
    shard: str = "0/1",
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
        shard: i/n computes the i-th of n shares of the store, 0 <= i < n, in parts of 256 videos. Run the n commands on
            as many machines or GPUs as you like, also at the same time; the last one to end finishes the store, which
            equals that of one command. Not with --features.
    """
    require_file("INDEX", index)
    require_at_least("--samples", 1, samples)
    part = parse_shard(shard)
    require_device("--device", device, "auto")
    _require_source(encoder, features, pictures_fps, shard)
    if features:
        report = _adopted(features, index, out, samples, dtype)
    elif index is None:
        raise InputError("INDEX: expected the index of the videos that --encoder is to embed, got none")
    else:
        report = _computed(index, encoder, pictures_fps, out, samples or 2, dtype, device, seed, part)
    options = {"--pictures-fps": (pictures_fps, None), "--samples": (samples, None), "--dtype": (dtype, "float16"),
               "--device": (device, "auto"), "--seed": (seed, 0)}  # fmt: skip
    show(report, json, lines=_summary(report, out, part),
         next_step=_next_step(report["waiting"], index, encoder, out, options, part))  # fmt: skip


def _require_source(
    encoder: tuple[str, ...], features: tuple[str, ...], pictures_fps: float | None, shard: str
) -> None:
    """Raises InputError unless one of --encoder and --features is given, with its own options."""
    if bool(encoder) == bool(features):
        raise InputError(f"--encoder, --features: expected one of the two, got {'both' if encoder else 'none'}")
    if features and parse_shard(shard)[1] > 1:
        raise InputError(
            f"--shard: expected --encoder, whose features take long to compute, got --features and {shard}"
        )
    if features and pictures_fps is not None:
        raise InputError(
            f"--pictures-fps: expected --encoder, which encodes pictures, got --features and {pictures_fps:g}"
        )


def _next_step(
    waiting: int,
    index: Path | None,
    encoder: tuple[str, ...],
    out: Path,
    options: dict[str, tuple[Any, Any]],
    shard: tuple[int, int],
) -> str:
    """Returns the command of another share while shards are `waiting`, then that of a training.

    Args:
        options: the value and the default of the options that the commands of all shares must have.
    """
    if not waiting:
        return f"cpr-fast pretrain RECIPE --data.features {shlex.quote(str(out))}"
    given = [str(word) for name, (value, usual) in options.items() if value != usual for word in (name, value)]
    words = ["cpr-fast", "embed", str(index), "--encoder", *encoder, "--out", str(out), *given, *next_shard(shard)]
    return shlex.join(words)


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
    index: Path, encoder: tuple[str, ...], pictures_fps: float | None, out: Path, samples: int, dtype: str,
    device: str, seed: int, shard: tuple[int, int],
) -> dict[str, Any]:  # fmt: skip
    from cpr_fast.runtime.progress import announce

    announce("Loading PyTorch and NVIDIA DALI")
    from cpr_fast.data.index.index import Index
    from cpr_fast.evaluate.features.embed import embed_videos, load_networks
    from cpr_fast.runtime import distributed

    networks = load_networks(encoder, pictures_fps)
    data = networks.data
    videos = Index.load(index, require_flow=data.flow == "stored").long_enough(data)
    place = str(distributed.init(device).device)
    return embed_videos(videos, networks, out, samples=samples, dtype=dtype, device=place, seed=seed, share=shard,
                        progress=True)  # fmt: skip


def _summary(report: dict[str, Any], out: Path, shard: tuple[int, int]) -> list[str]:
    there = report["shards"] - report["waiting"]
    kept = there - report["computed"]
    lines = [
        f"{counted(report['clips'], 'clip')} in {counted(there, 'shard')}, {report['bytes'] / 2**20:,.1f} MiB: {out}"
    ]
    if kept:
        lines.append(f"  {counted(kept, 'shard')} {'was' if kept == 1 else 'were'} there already")
    if report["waiting"]:
        lines.append(f"  {counted(report['waiting'], 'shard')} of {report['shards']:,} left for the other commands "
                     f"({other_shards(shard)}); the store is not finished")  # fmt: skip
    if report["left_out"]:
        lines.append(f"  {counted(report['left_out'], 'clip')} could not be read and "
                     f"{'is' if report['left_out'] == 1 else 'are'} left out")  # fmt: skip
    return lines
