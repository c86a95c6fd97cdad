"""Builds the index of a data set on disk: lists its videos, probes or transcodes them, and reports problems."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from cpr_fast.data.files.names import text_of
from cpr_fast.data.files.relative import lexical
from cpr_fast.data.index.assemble import IndexOptions, assemble, transcoded
from cpr_fast.data.index.catalogue import Problem
from cpr_fast.data.index.index import Index, changing, kind_of
from cpr_fast.data.index.layouts import FORMATS, LAYOUTS, list_videos
from cpr_fast.data.index.probing import Journal, Probe, probe, probe_all
from cpr_fast.data.index.rows.columns import require_parquet
from cpr_fast.data.index.summary import report_path
from cpr_fast.data.video.probe import VideoInfo
from cpr_fast.data.video.transcode import transcode_video
from cpr_fast.errors import InputError
from cpr_fast.runtime.files import one_writer, replacing

VERIFY_BELOW = 10_000  # videos: below this number each is decoded completely, unless the user decides otherwise

REMARKS = ("short", "variable_rate", "no_rate", "several_streams", "empty_folder", "hidden", "same_content")


def build_index(
    root: str | Path,
    layout: str = "folders",
    splits: str | Path | None = None,
    split: int = 1,
    out: str | Path | None = None,
    *,
    progress: bool = False,
) -> tuple[Index, list[Problem]]:
    """Runs `write_index` in one process with the usual options; returns the index and the problems that cost frames."""
    options = IndexOptions(layout, None if splits is None else Path(splits), split)
    index, problems, _ = _build(Path(root), None if out is None else Path(out), options, progress)
    return index, [problem for problem in problems if problem.kind not in REMARKS]


def write_index(root: Path, out: Path, options: IndexOptions, *, progress: bool = False) -> dict[str, Any]:
    """Lists the videos of a data set, probes each, and writes the index `out` and the report <name>.report.json.

    A run that was stopped continues from its journal <name>.probe*.jsonl. Shards may run at the same time. The last
    one to finish writes the index; the others return {"index": None, "left": videos without a result}.

    Returns:
        The report: {"index", "layout", "root", "options" (see `IndexOptions.given`), "videos", "classes", "sources",
        "splits" (videos of each), "unlabelled", "without_flow", "training" ({"split", "videos", "sources"} that
        pretraining reads), "levels" (how the levels of folders were interpreted), "other_files" (by suffix),
        "verified", "probed", "files_per_s", "counts" (problems by kind), "problems": [{"path", "kind", "reason"}]}. The
        kinds are those of `cpr_fast.data.index.summary.KINDS`.
    Raises:
        InputError: no video is left, or many could not be read, as when a mount is lost.
    """
    with _only_index(out, options):
        return _write_index(root, out, options, progress)


@contextmanager
def _only_index(out: Path, options: IndexOptions) -> Iterator[None]:
    """Refuses a second command that writes the same index, or the same transcoded videos, at the same time."""
    number, count = options.shard
    part = "" if count == 1 else f"-{number}-of-{count}"
    with ExitStack() as stack:
        for option, folder, name in (("--out", out.parent, out.stem), ("--transcode", options.transcode, "transcode")):
            if folder is not None:
                named = str(out if option == "--out" else folder)
                busy = f"{option}: another `cpr-fast index` is writing {named!r}"
                stack.enter_context(one_writer(folder / f".{name}{part}.index.lock", busy))
        yield


def _write_index(root: Path, out: Path, options: IndexOptions, progress: bool) -> dict[str, Any]:
    index, problems, facts = _build(root, out, options, progress)
    if index is None:
        return {"index": None, **facts}
    report = {
        "index": str(out),
        "layout": options.layout,
        "root": lexical(root),
        "options": options.given(),
        "videos": len(index),
        "classes": len(index.classes),
        "sources": index.source_count,
        "splits": dict(Counter(video.split for video in index)),
        "unlabelled": int((index.labels < 0).sum()),
        "without_flow": int((~index.has_flow).sum()),
        "training": _training(index),
        **facts,
        "counts": dict(Counter(problem.kind for problem in problems)),
        "problems": [{"path": text_of(p.path), "kind": p.kind, "reason": p.reason} for p in problems],
    }
    with replacing(report_path(out)) as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def _training(index: Index) -> dict[str, Any]:
    split, videos = index.training()
    return {"split": split, "videos": len(videos), "sources": videos.source_count}


def _build(
    root: Path, out: Path | None, options: IndexOptions, progress: bool
) -> tuple[Index | None, list[Problem], dict[str, Any]]:
    """Returns (index, problems, facts about listing and probing); the index is None if other shards are not done."""
    _check(root, options)
    if out is not None and out.is_dir():
        raise InputError(f"--out: expected the name of a CSV file, got the folder {str(out)!r}")
    if out is not None and (kind := kind_of(out)):
        raise InputError(f"--out: expected the name of a CSV file, got {str(out)!r}, which exists and is {kind}")
    if out is not None:
        require_parquet("--out", out)
    listing = list_videos(
        options.layout, root, options.splits, options.split,
        class_order=options.class_order, flow_lmdb=options.flow_lmdb, exclude=options.transcode,
        classes=options.classes,
    )  # fmt: skip
    verify = len(listing.videos) < VERIFY_BELOW if options.verify is None else options.verify
    journal, files = _journal(out, options, verify)
    number, count = options.shard
    share = [item.path for item in listing.videos[number::count]]
    began = time.perf_counter()
    if options.transcode is None:
        run: Probe = partial(probe, verify=verify)
        what = "decoding" if verify else "probing"
        todo = [path for path in share if journal.wants(path)]
    else:
        targets = {path: transcoded(path, root, options.transcode) for path in share}
        run, what = partial(_transcode, targets, options.short_side), "transcoding"
        todo = [path for path, target in targets.items() if journal.wants(path) or not target.exists()]
    probe_all(todo, run, journal, total=len(share), description=what, progress=progress)
    journal.read(files())  # results of shards that ran meanwhile; the last shard to finish has all results
    rate = len(todo) / (time.perf_counter() - began)
    facts = {"levels": listing.levels, "other_files": listing.others, "verified": verify or bool(options.transcode),
             "probed": len(todo), "files_per_s": round(rate, 1)}  # fmt: skip
    results = {item.path: journal.get(item.path) for item in listing.videos}
    if left := sum(result is None for result in results.values()):
        return None, [], facts | {"left": left}
    none_usable = not any(isinstance(result, VideoInfo) for result in results.values())
    if count == 1 and none_usable:  # the command is refused, and the journal would spare no work
        _remove(files())
    if out is None:
        return *assemble(root, out, listing, results, options), facts
    with changing(out):  # `cpr-fast flow` may fill the previous index meanwhile, whose flow is kept
        index, problems = assemble(root, out, listing, results, options)
        index.save(out)
    if count == 1:  # with several shards, another one may still need the journals
        _remove(files())
    return index, problems, facts


def _transcode(targets: dict[Path, Path], short_side: int, path: Path) -> VideoInfo:
    return transcode_video(path, targets[path], short_side)


def _remove(files: list[Path]) -> None:
    for file in files:
        file.unlink(missing_ok=True)


def _check(root: Path, options: IndexOptions) -> None:
    number, count = options.shard
    if options.layout not in (*FORMATS, *LAYOUTS):
        raise InputError(f"--layout: expected one of {', '.join((*FORMATS, *LAYOUTS))}, got {options.layout!r}")
    if not 0 <= number < count:
        raise InputError(f"--shard: expected i/n with 0 <= i < n, got {number}/{count}")
    if options.short_side < 16:
        raise InputError(f"--short-side: expected at least 16 pixels, got {options.short_side}")
    if options.transcode is not None and options.layout == "lmdb":
        raise InputError("--transcode: layout 'lmdb' has nothing to transcode, an LMDB file is read as it is")
    if options.transcode is not None and options.layout in FORMATS:
        raise InputError(f"--transcode: expected videos that are files below a folder, got layout {options.layout!r}")


def _journal(out: Path | None, options: IndexOptions, verify: bool) -> tuple[Journal, Any]:
    """Returns the journal of this shard, which holds the results of all, and a function that lists the files of all."""
    task = f"transcode {options.short_side}" if options.transcode else "decode" if verify else "packets"
    if out is None:
        return Journal(None, task), list
    number, count = options.shard  # the folder was created by `_only_index`
    name = f"{out.stem}.probe.jsonl" if count == 1 else f"{out.stem}.probe-{number}-of-{count}.jsonl"
    files = lambda: sorted(out.parent.glob(f"{out.stem}.probe*.jsonl"))  # noqa: E731
    journal = Journal(out.with_name(name), task)
    journal.read(files())
    return journal, files
