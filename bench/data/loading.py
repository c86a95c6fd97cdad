"""Compares how many clips per second the loader, other decoders and the published loader give, in one run.

    PYTHONPATH=PEERS python bench/data/loading.py [--videos 16] [--seconds 25] [--device cuda] [--root DIR] [--out DIR]

Random clips of T = 32 frames to 128x128 with the pretraining augmentation, one of each video; all forms of a table
are measured in turn. On the CPU rates are per core: process CPU time, with every form on one core. Reads UCF101 videos
from $CPR_FAST_SHARED/data (default ../shared) or class folders below --root: as they are, transcoded (`cpr-fast index
--transcode`), as JPEG records in an LMDB file, and their flow in files and in records (`loading_sources.py`). Writes
bench/results/loading.json and .md, or with a GPU loading_cuda.*, which adds NVDEC and nvJPEG by elapsed time, compared
with the fastest CPU peer on all cores.

Peers that are not installed are skipped: `pip install --target PEERS --no-deps torchcodec==0.12.0 decord
torchvision==0.28.0`. torchcodec also needs FFmpeg's shared libraries on the LD_LIBRARY_PATH. Links named
libavcodec.so.62 and so on to the libraries in PyAV's wheel (site-packages/av.libs) make both decode with the same code.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import av
import cv2
import numpy as np
import nvidia.dali
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from forms import Unavailable
from loading_forms import AUGMENTATIONS, decoders, own_channels, prepared
from loading_sources import EPOCH, SEED, Work, bytes_per_field, sources, truth_of
from measure import RESULTS, clip_rates, samples_s, world, write_result
from page import markdown_table

from cpr_fast.config import DataConfig
from cpr_fast.data.clips.loader import TrainLoader
from cpr_fast.data.clips.sampling import NO_GRAY, Clips, plan_first
from cpr_fast.data.storage.media import is_record

CLOSE = 0.2  # forms whose time differs from ours by less than this share are measured again, alone with ours
OWN, PUBLISHED = "cpr_fast", "PIL, PIL"  # the published method: PIL decodes whole records and augments
PEER_AUGMENTATIONS = ("torchvision", "the same", "torch and OpenCV")
BARS = {"decode": 0.9, "loader": 1.0, "published": 1.5, "device": 5.0}  # required ratio of our rate to that of a peer


# ---- forms: work -> call ---------------------------------------------------------------------------------------
def decoding(work: Work, name: str) -> Callable:
    decoder = prepared(name, work.file(0), work.view)

    def call() -> list[np.ndarray]:
        return [work.read(decoder, row) for row in range(len(work.clips))]

    return call


def loading(work: Work, name: str) -> Callable:
    """Returns the call of the form "DECODER, AUGMENTATION", which makes the batches with another decoder."""
    decoder, augmentation = name.rsplit(", ", 1)
    decoder, augment = prepared(decoder, work.file(0), work.view), AUGMENTATIONS[augmentation]

    def call() -> list[torch.Tensor]:
        batches = []
        for begin in range(0, len(work.clips), work.data.batch_size):
            rows = range(begin, min(begin + work.data.batch_size, len(work.clips)))
            frames = (work.read(decoder, row) for row in rows)  # decoded one by one, so that memory is used again
            batches.append(augment(work.clips[np.array(rows)], frames, work.view, work.data))
        return batches

    return call


class OwnLoader:
    """Returns the call that loads the same clips with the training loader."""

    def __init__(self, work: Work, data: DataConfig, device: str = "cpu") -> None:
        self._view = work.view
        self._loader = TrainLoader(work.index, data, [self._view], seed=SEED, plan=plan_first, device=device)

    def __call__(self) -> list[torch.Tensor]:
        return [batch.clips[self._view][:, 0] for batch in self._loader.epoch(EPOCH)]

    def close(self) -> None:
        self._loader.close()


def calls_of(prepare: Callable, work: Work, names: list[str]) -> tuple[dict[str, Callable], dict[str, str]]:
    """Runs every form once. Returns the calls of those that work, and the reasons why others do not."""
    calls, absent = {}, {}
    for name in names:
        try:
            call = prepare(work, name)
            call()
        except Unavailable as reason:
            absent[name] = str(reason)
        except Exception as error:  # a peer may fail on a codec in any way
            if name == OWN:
                raise
            absent[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            calls[name] = call
    return calls, absent


@contextmanager
def one_core() -> Iterator[None]:
    """Restricts this thread and those that it starts to one core, where threads that wait use no CPU time."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, [max(cores)])
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


# ---- rows --------------------------------------------------------------------------------------------------------
def in_turn(calls: dict[str, Callable], budget_s: float) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Returns the CPU times of every form, and how many times as long as ours it takes: the median over rounds, because
    a processor is not equally fast in all of them. Forms that take about as long as ours get rounds of their own."""
    times = samples_s(calls, "cpu", budget_s)
    ratios = over_ours(times)
    close = {name: call for name, call in calls.items() if abs(ratios[name] - 1) < CLOSE}
    if len(close) > 1:
        again = samples_s(close, "cpu", budget_s)
        times, ratios = times | again, ratios | over_ours(again)
    return times, ratios


def over_ours(times: dict[str, list[float]]) -> dict[str, float]:
    pairs = {name: zip(values, times[OWN], strict=True) for name, values in times.items()}
    return {name: statistics.median(theirs / ours for theirs, ours in pair) for name, pair in pairs.items()}


def with_bars(rows: list[dict], ratios: dict[str, float], bar_of: Callable[[dict], float | None]) -> list[dict]:
    for row in rows:
        if "clips_per_s" in row and row["form"] != OWN:
            row["ours_over_it"] = ratios[row["form"]]
            bar = bar_of(row)
            if bar is not None:
                row |= {"bar": bar, "verdict": "met" if row["ours_over_it"] >= bar else "MISSED"}
    return rows


def decode_rows(work: Work, truth: list[np.ndarray], budget_s: float) -> list[dict]:
    names = list(decoders(work.file(0)))
    calls, absent = calls_of(decoding, work, names)
    times, ratios = in_turn(calls, budget_s)
    rows = []
    for name in names:
        row = {"table": "decode", "source": work.source, "form": name}
        if name in absent:
            rows.append(row | {"skipped": absent[name]})
            continue
        pairs = zip(calls[name](), truth, strict=True)
        same = [np.all(own_channels(a, work.view) == own_channels(b, work.view), axis=(1, 2, 3)) for a, b in pairs]
        rows.append(row | clip_rates(len(work.clips), times[name]) | {"identical": float(np.mean(same))})
    return with_bars(rows, ratios, lambda row: BARS["decode"] if row["form"].startswith("PyAV") else None)


def loader_rows(work: Work, truth: torch.Tensor, budget_s: float) -> list[dict]:
    records = is_record(work.file(0).path)
    others = [name for name in decoders(work.file(0)) if name != OWN]
    names = [OWN, *(f"{name}, {augmentation}" for augmentation in PEER_AUGMENTATIONS for name in others)]
    names.append(PUBLISHED if records else "PyAV, PIL")
    own = OwnLoader(work, work.data)
    calls, absent = calls_of(lambda work, name: own if name == OWN else loading(work, name), work, names)
    times, ratios = in_turn(calls, budget_s)
    rows = []
    for name in names:
        row = {"table": "records" if records else "loader", "source": work.source, "form": name}
        if name in absent:
            rows.append(row | {"skipped": absent[name]})
        else:
            rows.append(
                row | clip_rates(len(work.clips), times[name]) | psnr(work.clips, torch.cat(calls[name]()), truth)
            )
    own.close()

    return with_bars(rows, ratios, lambda row: BARS["published" if row["form"] == PUBLISHED else "loader"])


def psnr(clips: Clips, got: torch.Tensor, truth: torch.Tensor) -> dict[str, float]:
    """Returns the mean PSNR in dB relative to the reference, of clips with and without a change of colours or blur."""
    std = 255 * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1, 1)
    error = ((got.cpu() - truth) * std).square().mean(dim=(1, 2, 3, 4)).clamp_min(1e-4)
    scores = (10 * (255**2 / error).log10()).numpy()
    plain = (clips.hue == 0) & (clips.gray == NO_GRAY).all(axis=1) & (clips.sigma == 0)
    kinds = {"plain_db": scores[plain], "colour_db": scores[~plain]}
    return {name: round(float(values.mean()), 1) for name, values in kinds.items() if len(values)}


def device_rows(work: Work, truth: torch.Tensor, budget_s: float, peers: list[dict]) -> list[dict]:
    """Measures the loader with the hardware decoder by elapsed time, and the fastest CPU peer on all cores."""
    loader = OwnLoader(work, replace(work.data, workers=os.cpu_count()), "cuda")

    def call():
        batches = loader()
        torch.cuda.synchronize()
        return batches

    times = samples_s({OWN: call}, "cpu", budget_s, clock=time.perf_counter)[OWN]
    records = is_record(work.file(0).path)
    own = {"table": "device", "source": work.source, "form": OWN, "decoder": "nvJPEG" if records else "NVDEC"}
    own |= clip_rates(len(work.clips), times) | psnr(work.clips, torch.cat(call()), truth)
    loader.close()
    best = max((row for row in peers if "clips_per_s" in row and row["form"] != OWN), key=lambda r: r["clips_per_s"])
    cores = {"table": "device", "source": work.source, "form": f"{best['form']}, times {os.cpu_count()} cores"}
    cores |= {"clips_per_s": best["clips_per_s"] * os.cpu_count()}
    ratio = own["clips_per_s"] / cores["clips_per_s"]
    return with_bars([own, cores], {cores["form"]: ratio}, lambda _: BARS["device"])


# ---- page --------------------------------------------------------------------------------------------------------
TITLES = {
    "decode": "Decoding alone: frames of a clip in memory, clips per CPU second of one core",
    "loader": "Decoding, augmentation and batch, clips per CPU second of one core",
    "records": "JPEG records (LMDB), augmentation and batch, clips per CPU second of one core",
    "device": "On the GPU, clips a second",
}
HEADER = ["form", "clips/s", "cpr_fast is", "bar", "frames identical", "PSNR plain, colour"]


def cells(row: dict) -> list[str]:
    if "skipped" in row:
        return [row["form"], "-", "-", row["skipped"], "", ""]
    spread = f" ({row['low']:.1f} to {row['high']:.1f})" if "low" in row else ""
    ratio = f"{row['ours_over_it']:.2f}x" if "ours_over_it" in row else ""
    verdict = f"{row['verdict']} (>= {row['bar']:g})" if "bar" in row else ""
    same = f"{100 * row['identical']:.1f} %" if "identical" in row else ""
    close = ", ".join(f"{row[name]} dB" for name in ("plain_db", "colour_db") if name in row)
    return [row["form"], f"{row['clips_per_s']:.1f}{spread}", ratio, verdict, same, close]


def page(report: dict) -> str:
    about = report["world"]
    text = [
        "# Loading clips beside other decoders and the published way\n",
        f"`{about['command']}` at {about['commit']}, torch {about['torch']}, DALI {about['dali']}, PyAV "
        f"{about['pyav']}, OpenCV {about['opencv']}, on {about['device']}.\n",
        f"Clips of {report['frames']} frames to {report['size']}x{report['size']}, one of each of {report['videos']} "
        "videos; medians (quartiles) of passes over all of them, the forms of a table in turn, each source in a "
        "process of its own, which has one core; a rate counts the CPU time of all its threads; `cpr_fast is`: our "
        "rate over the form's, the median of the rounds, with rounds of their own for forms about as fast as ours. "
        "*torchvision*: the same augmentation by transforms.v2. *the same*: another decoder in front of the loader's "
        "own augmentation (its own resize, OpenCV's colours and blur, DALI's normalisation). *torch and OpenCV*: the "
        "same operations in a loop of one's own, without threads, substitutes for bad files or DALI. *PIL* is the "
        "published augmentation, and the truth of PSNR, for clips without and with a change of colours or blur. "
        "*identical*: frames equal to those of a linear decode, bit for bit.\n",
        "All forms augment a clip by the same plan, the published one: one try of the crop, jitter in a random order, "
        "one random channel for each frame of a gray clip, blur and flip, also of flow, as a picture (128, v, u).\n",
        "*files*: as they are; *transcoded*: H.264 with a key frame every 12 frames (`cpr-fast index --transcode`); "
        "*records*: JPEG of quality 100, 4:2:0, in an LMDB file; the published code unpacks the whole video; *flow "
        f"files* and *flow records*: as `cpr-fast flow` stores it, {report['flow_bytes']:,} bytes a field in files.\n",
    ]
    for table, title in TITLES.items():
        rows = [row for row in report["rows"] if row["table"] == table]
        for source in dict.fromkeys(row["source"] for row in rows):
            text += [f"## {title}: {source}\n"]
            run = next(row for row in rows if row["source"] == source)
            if run["commit"] != about["commit"]:
                text += [f"Measured alone, `{run['command']}` at {run['commit']}.\n"]
            text += [markdown_table(HEADER, [cells(row) for row in rows if row["source"] == source])]
    return "\n".join(text)


def with_other_sources(report: dict, earlier: dict) -> dict:
    """Returns the earlier report with the rows of the sources of this one replaced."""
    measured = {row["source"] for row in report["rows"]}
    return earlier | {"rows": report["rows"] + [row for row in earlier["rows"] if row["source"] not in measured]}


def rows_of(work: Work, budget_s: float, device: str) -> list[dict]:
    """Measures and prints the rows of a source."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    frames = truth_of(work)
    augmented = (AUGMENTATIONS["PIL"](work.clips[[i]], [clip], work.view, work.data) for i, clip in enumerate(frames))
    truth = torch.cat(list(augmented))
    with one_core():
        rows = decode_rows(work, frames, budget_s)
        loaders = loader_rows(work, truth, budget_s)
    rows += loaders
    if device == "cuda":
        rows += device_rows(work, truth, budget_s, loaders)
    for row in rows:
        print(json.dumps(row), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=16, help="how many; whole batches of 8 are used")
    parser.add_argument("--seconds", type=float, default=25, help="for all forms of one table")
    parser.add_argument("--frames", type=int, default=32, help="T, of a clip")
    parser.add_argument("--size", type=int, default=128, help="side of the output, pixels")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--root", type=Path, help="class folders of videos in the place of UCF101")
    parser.add_argument(
        "--files-only", action="store_true", help="only the videos as they are; other rows of --out are kept"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    data = DataConfig(frames=options.frames, size=options.size, batch_size=8, workers=1, cache_gib=0)
    about = world(options.device) | {
        "dali": nvidia.dali.__version__, "pyav": av.__version__, "opencv": cv2.__version__,
    }  # fmt: skip
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        works = sources(options.root, options.videos, data, Path(folder), files_only=options.files_only)
        flow_bytes = None if options.files_only else bytes_per_field(works)
        for work in works:
            # In a process of its own: what another source left in memory would change the times.
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                rows += process.submit(rows_of, work, options.seconds, options.device).result()
    report = {"world": about, "videos": len(work.clips), "frames": data.frames, "size": data.size}
    report["flow_bytes"] = flow_bytes
    report["rows"] = [row | about for row in rows]
    name = "loading" if options.device == "cpu" else "loading_cuda"
    if options.files_only:
        report = with_other_sources(report, json.loads((options.out / f"{name}.json").read_text()))
    write_result(f"{name}.json", json.dumps(report, indent=1) + "\n", options.out)
    write_result(f"{name}.md", page(report), options.out)


if __name__ == "__main__":
    main()
