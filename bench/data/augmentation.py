"""CPU time of the loader per clip with and without augmentation, for RGB and flow.

    python bench/data/augmentation.py [--videos 16] [--rounds 7]

Random clips of T = 32 frames to 128x128, the first clip of each pair, from UCF101 videos of $CPR_FAST_SHARED/data
(default ../shared). Flow is stored as `cpr-fast flow` stores it, here the difference of two frames in place of u and v.
It measures the process CPU time of all threads on one core, with the forms in turn, so that other load affects all of
them. Writes bench/results/augmentation.json and .md; rows of other commits are kept, to compare with.
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from measure import RESULTS, world, write_result
from support import real_clips
from support.numbered_videos import decode_linearly, write_video

from cpr_fast.config import DataConfig
from cpr_fast.data.clips.loader import TrainLoader
from cpr_fast.data.clips.sampling import plan_first
from cpr_fast.data.index.index import Index, Video

NAME = "augmentation"


def videos(folder: Path, count: int) -> Index:
    rows = []
    for path in real_clips.spread_videos(count):
        frames = decode_linearly(path)
        moved = np.clip(128 + np.diff(frames[..., 1].astype(int), axis=0) // 2, 0, 255).astype(np.uint8)
        flow = write_video(folder / path.stem, np.concatenate([moved, 255 - moved], axis=1), "mjpeg-mkv")
        rows.append(Video(path, path.parent.name, path.stem, "train", *frames.shape[:1], 25.0, *frames.shape[2:0:-1],
                          flow))  # fmt: skip
    return Index(rows)


def measure(index: Index, rounds: int) -> dict[str, list[float]]:
    """Returns CPU milliseconds per clip by form, one value for each round (an epoch)."""
    data = DataConfig(workers=1, cache_gib=0, batch_size=8)
    forms = {f"{view}, {augment}": (view, dataclasses.replace(data, augment=augment))
             for view in ("rgb", "flow") for augment in ("coclr", "none")}  # fmt: skip
    loaders = {name: TrainLoader(index, d, [view], seed=0, plan=plan_first) for name, (view, d) in forms.items()}
    times: dict[str, list[float]] = {name: [] for name in forms}
    for epoch in range(rounds + 1):
        for name, loader in loaders.items():
            began = time.process_time()
            clips = sum(len(batch.video) for batch in loader.epoch(epoch))
            if epoch:  # the first one warms up
                times[name].append(1e3 * (time.process_time() - began) / clips)
    for loader in loaders.values():
        loader.close()
    return times


def page(rows: list[dict]) -> str:
    lines = [
        "# CPU time of the loader's augmentation",
        "",
        "`python bench/data/augmentation.py`: process CPU time per clip of 32 frames to 128x128, milliseconds, mean "
        "over the epochs (least and largest epoch); one thread on one core. *none* cuts the centre; *coclr* adds "
        "random crops, colours, blur and flips.",
        "",
        "| commit | form | ms per clip | device |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {r['commit']} | {r['form']} | {r['cpu_ms']} ({r['least']} to {r['largest']}) | {r['device']} |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    os.sched_setaffinity(0, [max(os.sched_getaffinity(0))])
    torch.set_num_threads(1)  # several threads on one core would wait for each other actively
    cv2.setNumThreads(1)
    about = world("cpu")
    with tempfile.TemporaryDirectory() as folder:
        times = measure(videos(Path(folder), options.videos), options.rounds)
    rows = [
        about
        | {"form": form, "cpu_ms": round(statistics.mean(values), 2), "least": round(min(values), 2)}
        | {"largest": round(max(values), 2), "videos": options.videos, "rounds": options.rounds}
        for form, values in times.items()
    ]
    file = RESULTS / f"{NAME}.json"
    kept = json.loads(file.read_text())["rows"] if file.exists() else []
    rows = [row for row in kept if row["commit"] != about["commit"]] + rows
    write_result(f"{NAME}.json", json.dumps({"rows": rows}, indent=1) + "\n")
    write_result(f"{NAME}.md", page(rows))


if __name__ == "__main__":
    main()
