"""`cpr-fast dedup`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from cpr_fast.commands.inputs import (
    parse_shard,
    require_at_least,
    require_checkpoints,
    require_file,
    require_other_file,
    require_store,
    require_videos,
)
from cpr_fast.commands.options import IndexPath, Json, RecipeName
from cpr_fast.commands.output import show, table
from cpr_fast.errors import InputError
from cpr_fast.evaluate.retrieval.names import percent
from cpr_fast.wording import counted

if TYPE_CHECKING:
    from cpr_fast.evaluate.duplicates.find import Duplicates
    from cpr_fast.evaluate.duplicates.graph import Unfinished


def dedup(
    index: IndexPath,
    *,
    checkpoint: Annotated[tuple[str, ...], tyro.conf.arg(help_behavior_hint="(default: none)")] = (),
    features: Path | None = None,
    out: Path | None = None,
    duplicate: float = 0.95,
    sibling: float = 0.9,
    neighbours: int = 10,
    recipe: RecipeName | None = None,
    pictures_fps: float | None = None,
    shard: str = "0/1",
    json: Json = False,
) -> None:
    """Find near-duplicates and clips of one source, and write an index with these sources.

    Writes a new index, a table of the groups (OUT-groups.csv) and a page with pictures (OUT.html). INDEX is not
    changed. The same command continues one that was stopped; with other thresholds it uses what was computed.

    Args:
        index: The index (CSV or Parquet) of the videos.
        checkpoint: A checkpoint of `pretrain` or `import-checkpoint`, FILE or one for each view (rgb=FILE flow=FILE),
            whose features are compared.
        features: A store of features of these videos (see `cpr-fast embed`), which are compared instead.
        out: The new index; by default INDEX-dedup.csv beside INDEX.
        duplicate: The least mean similarity, a cosine, of the videos of a group of near-duplicates. What a similarity
            means depends on the network: choose by the table and the pictures of the page.
        sibling: The least mean similarity of the videos of a group that get one source, at most --duplicate.
        neighbours: How many nearest videos of each one are compared further; more than a video has near-duplicates.
        recipe: With --checkpoint, the recipe of `retrieve`, whose stored features are reused.
        pictures_fps: With --checkpoint, the frames per second of extracted frames and LMDB records, see `retrieve`.
        shard: With --features, i/n compares the i-th of n shares of the pairs, 0 <= i < n. Run the n commands on as
            many machines as you like, also at the same time; the last one to end writes the index, which equals that of
            one command.
    """
    part = _shard(shard, checkpoint)
    of_videos = {"--recipe": recipe, "--pictures-fps": pictures_fps}
    out = _checked(index, checkpoint, features, out, duplicate, sibling, neighbours, of_videos)
    from cpr_fast.runtime.progress import announce

    announce("Loading PyTorch and NVIDIA DALI")
    from cpr_fast.evaluate.duplicates.find import find_duplicates, of_checkpoint, of_store
    from cpr_fast.evaluate.duplicates.graph import Unfinished

    if features is None:
        compared = of_checkpoint(index, checkpoint, recipe=recipe, pictures_fps=pictures_fps, progress=True)
    else:
        compared = of_store(index, features)
    found = find_duplicates(
        compared, _beside(out, "graph.safetensors"), neighbours=neighbours, duplicate=duplicate, sibling=sibling,
        shard=part, progress=True,
    )  # fmt: skip
    if isinstance(found, Unfinished):
        options = {"--features": features, "--out": out, "--duplicate": duplicate, "--sibling": sibling,
                   "--neighbours": neighbours}  # fmt: skip
        _show_unfinished(found, index, options, part, json)
    else:
        _write(found, index, out, json)


def _write(found: Duplicates, index: Path, out: Path, json: bool) -> None:
    """Writes the new index, the table of the groups and the page, and prints the result."""
    from cpr_fast.evaluate.duplicates.output import write_groups, write_index
    from cpr_fast.report.duplicates import write_duplicates

    page, groups = out.with_suffix(".html"), _beside(out, "groups.csv")
    write_index(found, out)
    write_groups(found, groups)
    shares = write_duplicates(found, index, out, page)
    summary = found.summary()
    for row, share in zip(summary["thresholds"], shares, strict=True):
        row["frames_agree"] = share
    result = {"index": str(index), "out": str(out), "groups": str(groups), "page": str(page), **summary}
    show(
        result,
        json,
        lines=[*_lines(result), *(f"warning: {text}" for text in found.doubts())],
        next_step=f"open {shlex.quote(str(page))}",
    )


def _shard(text: str, checkpoint: tuple[str, ...]) -> tuple[int, int]:
    """Returns (i, n) of --shard. Raises InputError for a checkpoint, whose features every shard would compute."""
    part = parse_shard(text)
    if part[1] > 1 and checkpoint:
        raise InputError(
            f"--shard: expected --features, got --checkpoint and {text}; `cpr-fast embed INDEX --encoder CHECKPOINT "
            f"--out STORE --shard {text}` computes the features in shards, for --features STORE"
        )
    return part


def _show_unfinished(
    found: Unfinished, index: Path, options: dict[str, Any], shard: tuple[int, int], json: bool
) -> None:
    """Prints which shards have not ended, and the command of another one, which has the same `options`."""
    waiting = [f"{number}/{shard[1]}" for number in found.left]
    left = f"{counted(len(waiting), 'shard')} of {shard[1]:,} {'is' if len(waiting) == 1 else 'are'} left"
    line = f"shard {shard[0]}/{shard[1]}: its pairs are compared; {left}, the last of which writes {options['--out']}"
    words = ["cpr-fast", "dedup", index, *(word for pair in options.items() for word in pair), "--shard", waiting[0]]
    result = {"index": str(index), "out": str(options["--out"]), "waiting": waiting}
    show(result, json, lines=[line], next_step=shlex.join(map(str, words)))


def _checked(
    index: Path, checkpoint: tuple[str, ...], features: Path | None, out: Path | None, duplicate: float,
    sibling: float, neighbours: int, of_videos: dict[str, Any],
) -> Path:  # fmt: skip
    """Returns the path of the new index. Raises InputError that names the option, also one of `of_videos` that is given
    without --checkpoint."""
    require_file("INDEX", index)
    if bool(checkpoint) == (features is not None):
        got = "both" if checkpoint else "none"
        raise InputError(f"--checkpoint, --features: expected one of the two, got {got}")
    if checkpoint:
        require_checkpoints("--checkpoint", checkpoint)
    else:
        require_store("--features", str(features))
        for option, value in of_videos.items():
            if value is not None:
                raise InputError(f"{option}: expected it with --checkpoint alone, got {value!r} with --features")
    for option, value in (("--duplicate", duplicate), ("--sibling", sibling)):
        if not 0 < value <= 1:
            raise InputError(f"{option}: expected a similarity above 0 and at most 1, got {value}")
    if sibling > duplicate:
        raise InputError(f"--sibling: expected at most --duplicate, {duplicate}, got {sibling}")
    require_at_least("--neighbours", 1, neighbours)
    out = index.with_name(f"{index.stem}-dedup{index.suffix}") if out is None else out
    if out.suffix not in (".csv", ".parquet"):
        raise InputError(f"--out: expected the name of an index, with the suffix .csv or .parquet, got {str(out)!r}")
    if out.is_dir():
        raise InputError(f"--out: expected the name of an index, got the folder {str(out)!r}")
    from cpr_fast.data.index.index import previous_path
    from cpr_fast.data.index.rows.columns import require_parquet
    from cpr_fast.runtime.files import require_writable

    for written in (out, previous_path(out), _beside(out, "groups.csv")):
        require_other_file("--out", written, [index])
    require_videos("INDEX", [index])
    require_parquet("--out", out)
    require_writable("--out", out.parent, "Choose another folder")
    return out


def _beside(out: Path, ending: str) -> Path:
    return out.with_name(f"{out.stem}-{ending}")


def _lines(result: dict[str, Any]) -> list[str]:
    lines = [_threshold_table(result["thresholds"]), ""]
    for name in ("duplicate", "sibling"):
        part = result[name]
        what = "near-duplicates" if name == "duplicate" else "siblings"
        lines.append(f"{what} (--{name} {part['threshold']:g}): {counted(part['groups'], 'group')} of "
                     f"{counted(part['clips'], 'video')}, the largest of {part['largest']:,}")  # fmt: skip
    lines.append(
        f"{counted(result['sources_before'], 'source')} of the index became {result['sources']:,}: {result['out']}"
    )
    if known := result["known_sources"]:
        lines.append(f"compared with the sources of the index: precision {percent(known['precision'])} of "
                     f"{counted(known['pairs'], 'pair')}, recall {percent(known['recall'])} of "
                     f"{counted(known['known_pairs'], 'pair')}")  # fmt: skip
    return [*lines, f"groups: {result['groups']}"]


def _threshold_table(rows: list[dict[str, Any]]) -> str:
    known = "precision" in rows[0]
    header = ["similarity", "pairs", "groups", "videos", "largest", "frames agree", *["precision", "recall"] * known]
    cells = [
        [f"{row['threshold']:g}", *(f"{row[name]:,}" for name in ("pairs", "groups", "clips", "largest")),
         *(percent(row[name]) for name in ("frames_agree", *("precision", "recall") * known))]
        for row in rows
    ]  # fmt: skip
    return table(header, cells, title="groups by the least similarity:")
