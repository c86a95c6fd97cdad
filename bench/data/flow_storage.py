"""Measures the error of stored flow in pixels on real clips: the error of 8-bit levels alone, and that of the two
storages.

    python bench/data/flow_storage.py [--clips 8]

Reads UCF101 videos from $CPR_FAST_SHARED/data/ucf101_100 (default ../shared) at their own size, 320x240; writes
bench/results/flow_storage.json and .md. Errors are absolute errors of both components, relative to the flow clipped
to +-20 pixels.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import simplejpeg
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from measure import world, write_result
from support import real_clips

from cpr_fast.data.flow.files import encode_video
from cpr_fast.data.flow.levels import LIMIT, dequantise, quantise
from cpr_fast.data.flow.records import encode_jpegs
from cpr_fast.data.storage.media import read_frames
from cpr_fast.data.storage.record_writer import RecordWriter
from cpr_fast.data.storage.records import record_path
from cpr_fast.ops import tvl1_flow

SIZE, FIELDS = (320, 240), 16
STORAGES = ("8-bit levels", "video (H.264, qp 8)", "lmdb (JPEG 100, 4:4:4)", "as published (JPEG 100, 4:2:0)")


def published(levels: np.ndarray) -> list[bytes]:
    """Returns what `encode_jpegs` returns, but with chroma of half the resolution, as published."""
    constant = np.full_like(levels[:, :1], 128)
    pictures = np.ascontiguousarray(np.concatenate([levels, constant], 1).transpose(0, 2, 3, 1))
    return [simplejpeg.encode_jpeg(picture, 100, "BGR", "420") for picture in pictures]


def stored(levels: np.ndarray, storage: str, folder: Path) -> tuple[np.ndarray, int]:
    """Returns levels [N, 2, H, W] as the loader reads them back, and the bytes that they take."""
    if storage == STORAGES[0]:
        return levels, levels.nbytes
    numbers = np.arange(len(levels))
    if storage == STORAGES[1]:
        path = folder / "flow.mp4"
        encode_video(path, levels)
        size = path.stat().st_size
    else:
        jpegs = (encode_jpegs if storage == STORAGES[2] else published)(levels)
        size = sum(map(len, jpegs))
        with RecordWriter(folder / f"{STORAGES.index(storage)}.lmdb") as writer:
            writer.put("class/video", jpegs)
        path = record_path(folder / f"{STORAGES.index(storage)}.lmdb", "class/video")
    return read_frames(path, numbers, "flow", len(levels)).transpose(0, 3, 1, 2), size


def errors_px(flow: torch.Tensor, read: torch.Tensor) -> dict[str, float]:
    error = (dequantise(read) - flow.clamp(-LIMIT, LIMIT)).abs().numpy().ravel()
    return {
        "mean_px": round(float(error.mean()), 4),
        "p95_px": round(float(np.quantile(error, 0.95)), 4),
        "max_px": round(float(error.max()), 3),
        "rms_px": round(float(np.sqrt(np.square(error).mean())), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=8)
    options = parser.parse_args()
    about = world("cpu")
    flows = [tvl1_flow(clip) for clip in real_clips.read_gray(options.clips, FIELDS + 1, SIZE)]
    clipped = float(torch.cat(flows).abs().gt(LIMIT).float().mean())
    rows = []
    for storage in STORAGES:
        read, sizes = [], []
        for flow in flows:
            with tempfile.TemporaryDirectory() as folder:
                levels, size = stored(quantise(flow).numpy(), storage, Path(folder))
            read.append(torch.from_numpy(levels.copy()))
            sizes.append(size)
        flow, levels = torch.cat(flows), torch.cat(read)
        off = (levels.int() - quantise(flow).int()).abs()
        rows.append(
            {
                "storage": storage,
                **errors_px(flow, levels),
                "levels_exact": round(float((off == 0).float().mean()), 4),
                "levels_off_max": int(off.max()),
                "kb_per_field": round(sum(sizes) / len(levels) / 1e3, 1),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    result = about | {"clips": options.clips, "fields": len(flow), "size": "320x240", "clipped": clipped, "rows": rows}
    write_result("flow_storage.json", json.dumps(result, indent=1) + "\n")
    write_result("flow_storage.md", table(result))


def table(result: dict) -> str:
    lines = [
        "# What storing flow costs",
        "",
        f"`{result['command']}`: commit {result['commit']}; {result['clips']} UCF101 clips, {result['fields']} fields "
        f"of {result['size']}, {result['clipped']:.2e} of the values beyond 20 px.",
        "",
        "Absolute error of both components, pixels of flow. One level is .157 px. Zero motion is level 128, whose "
        "middle is .078 px: the mean is that of clips in which most pixels stand still. *Exact*: levels that come back "
        "as they went in; *off*: by how many levels at most.",
        "",
        "| storage | mean | 95 % | max | rms | exact | off | kB a field |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['storage']} | {row['mean_px']} | {row['p95_px']} | {row['max_px']} | {row['rms_px']} "
            f"| {row['levels_exact']:.1%} | {row['levels_off_max']} | {row['kb_per_field']} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
