"""Compares flow that is read from motion vectors with TV-L1: frames per second, and mining and retrieval on JHMDB.

    python bench/training/motion_views.py --index JHMDB/index.csv --runs FOLDER [--seeds 0 1 2]
    python bench/training/motion_views.py --speed
    python bench/training/motion_views.py --table

Finished runs are not repeated. The rows with TV-L1 are those of the study, bench/results/study.jsonl; --index is the
index of its JHMDB (bench/training/study.py). --speed reads UCF101's clips of $CPR_FAST_SHARED/data/ucf101_100. The
protocol and the results are in bench/results/motion_views.md; --table writes its section "Results" again.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from evidence.rows import read_rows
from evidence.runs import measure, mining_quality
from evidence.settings import CANDIDATES, config_of, replace
from evidence.tables import replace_results
from measure import RESULTS, world, write_result
from page import markdown_table
from support import real_clips

from cpr_fast.config import Config, Cycle, InitConfig
from cpr_fast.data.flow.levels import FlowSolver
from cpr_fast.data.flow.on_the_fly import VectorFlow
from cpr_fast.data.video import probe_video, read_frames
from cpr_fast.evaluate.features.pretrained import load_pretrained
from cpr_fast.pretrain.run.loop import pretrain

NAME = "motion_views"
BASE = CANDIDATES["jhmdb"][1]
SETTING, STUDY_ROWS = "cpr_n7", "cpr_n7_again"
ARMS = ("vectors", "residual")  # besides TV-L1
LAST = 4  # epochs of a cycle over which mining quality is averaged
CLIPS, PAIRS, ROUNDS = 10, 10, 3  # clips whose speed is measured, pairs of each by TV-L1, repetitions
GOAL_FPS, GOAL_PMR = 1000, 0.9


def arm_config(arm: str, setting: str, seed: int, index: Path, folder: Path) -> Config:
    """Returns the config of the study's start or of its cascade, with another motion view."""
    config = config_of(BASE, setting, seed, index, folder)
    if arm == "vectors":
        return replace(config, "data", flow="vectors")
    cycles = tuple(_residual(cycle) for cycle in config.schedule.cycles)
    config = replace(config, "schedule", cycles=cycles)
    init = config.model.init
    return replace(config, "model", init=InitConfig(rgb=init.rgb, residual=init.flow))


def _residual(cycle: Cycle) -> Cycle:
    view, other = ("rgb", "residual") if cycle.view == "rgb" else ("residual", "rgb")
    return dataclasses.replace(cycle, view=view, other=other)


def run(arm: str, seed: int, index: Path, runs: Path) -> dict[str, Any]:
    """Trains the start and the cascade of an arm and a seed, and returns its row."""
    folder = runs / f"{arm}-seed-{seed}"
    for setting in ("start", SETTING):
        config = arm_config(arm, setting, seed, index, folder)
        pretrain(config, resume="auto", progress=False)
    encoders = load_pretrained(Path(config.run.out) / "checkpoints" / "last.pt").encoders
    found, _ = measure(SETTING, config, encoders, index, seed, folder / "features")
    return {"arm": arm, "seed": seed, "views": found["views"], **mining_quality(Path(config.run.out)), **where()}


def where() -> dict[str, str]:
    """Returns the machine and the software that a result belongs to."""
    return {key: value for key, value in world("cpu").items() if key != "command"}


def pmr(row: dict[str, Any]) -> float:
    """Returns the mean over both views of the PMR of the last epochs of their cycles."""
    return float(np.mean([np.mean(found["pmr"][-LAST:]) for found in row["mining"].values()]))


def study_rows(seeds: list[int]) -> list[dict[str, Any]]:
    """Returns the study's rows with TV-L1, of these seeds."""
    rows = [row for row in read_rows(RESULTS / "study.jsonl") if (row["set"], row["setting"]) == ("jhmdb", STUDY_ROWS)]
    return [{"arm": "tvl1", **row} for row in rows if row["seed"] in seeds]


def speed() -> list[dict[str, Any]]:
    """Returns frames per second of one core, by codec and by what is computed: CPU time, the best of ROUNDS."""
    published = sorted((real_clips.ROOT / "ucf101_100").rglob("*.avi"))[:CLIPS]
    with tempfile.TemporaryDirectory() as folder:
        encoded = [_as_h264(path, Path(folder) / f"{path.stem}.mp4") for path in published]
        return [_speed("MPEG-4, as published", published, tvl1=True), _speed("H.264, x264 crf 23", encoded, tvl1=False)]


def _speed(name: str, paths: list[Path], *, tvl1: bool) -> dict[str, Any]:
    lengths = {path: probe_video(path).num_frames for path in paths}
    total = sum(lengths.values())
    vectors = VectorFlow(1)
    row = {"codec": name, "clips": len(paths), "frames": total}
    row["decode_fps"] = _rate(total, lambda: [read_frames(p, np.arange(n), "rgb", n) for p, n in lengths.items()])
    row["vectors_fps"] = _rate(total - len(paths), lambda: [list(vectors(p, np.arange(n - 1), "flow", n - 1))
                                                            for p, n in lengths.items()])  # fmt: skip
    if tvl1:
        solver = FlowSolver(torch.device("cpu"))
        gray = [read_frames(p, np.arange(PAIRS + 1), "gray", n) for p, n in lengths.items()]
        pairs = np.concatenate([np.stack([frames[:-1], frames[1:]], axis=1) for frames in gray])
        row["tvl1_fps"] = _rate(len(pairs), lambda: solver.levels(pairs))
    return row


def _rate(count: int, work: Callable[[], Any]) -> float:
    spent = []
    for _ in range(ROUNDS):
        began = time.process_time()
        work()
        spent.append(time.process_time() - began)
    return round(count / min(spent), 1)


def _as_h264(path: Path, out: Path) -> Path:
    with av.open(str(path)) as source, av.open(str(out), "w") as output:
        stream = source.streams.video[0]
        copy = output.add_stream("libx264", rate=stream.average_rate, options={"crf": "23"})
        copy.width, copy.height, copy.pix_fmt = stream.width, stream.height, "yuv420p"
        for frame in source.decode(stream):
            plain = av.VideoFrame.from_ndarray(frame.to_ndarray(format="yuv420p"), format="yuv420p")
            output.mux(copy.encode(plain))
        output.mux(copy.encode(None))
    return out


def tables(stored: dict[str, Any]) -> list[str]:
    """Returns the lines of the section "Results"."""
    lines = []
    if speeds := stored.get("speed"):
        head = ["clips of 320x240", "frames", "decoding to RGB", "motion vectors", "TV-L1"]
        cells = [[row["codec"], str(row["frames"]), *(f"{row[key]:,.0f}" if key in row else "" for key in
                  ("decode_fps", "vectors_fps", "tvl1_fps"))] for row in speeds]  # fmt: skip
        lines += ["Frames per second of one core (CPU time):", "", markdown_table(head, cells)]
    rows = stored.get("rows", [])
    seeds = sorted({row["seed"] for row in rows})
    rows = study_rows(seeds) + rows
    head = ["motion view", "seed", "PMR", "PMR rgb", "PMR motion", "two-view R@1", "two-view mAP", "motion R@1"]
    cells = []
    for row in sorted(rows, key=lambda row: (("tvl1", *ARMS).index(row["arm"]), row["seed"])):
        motion = "residual" if row["arm"] == "residual" else "flow"
        both = row["views"]["merged" if motion == "residual" else "two_stream"]
        parts = [float(np.mean(row["mining"][view]["pmr"][-LAST:])) for view in ("rgb", motion)]
        values = (pmr(row), *parts, both["r@1"], both["map"], row["views"][motion]["r@1"])
        cells.append([row["arm"], str(row["seed"]), *(f"{value:.3f}" for value in values)])
    lines.append(markdown_table(head, cells))
    means = {arm: [pmr(row) for row in rows if row["arm"] == arm] for arm in ("tvl1", *ARMS)}
    for arm in ARMS:
        if means[arm] and len(means[arm]) == len(means["tvl1"]):
            ratio = np.mean(means[arm]) / np.mean(means["tvl1"])
            each = ", ".join(f"{a / b:.2f}" for a, b in zip(means[arm], means["tvl1"], strict=True))
            lines.append(f"- {arm}: {ratio:.3f} of TV-L1's mean PMR (by seed {each}); the goal is {GOAL_PMR}.")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", type=Path)
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    path = RESULTS / f"{NAME}.json"
    stored = json.loads(path.read_text()) if path.exists() else {"rows": []}
    if options.speed:
        stored = stored | {"speed": speed(), "speed_world": where()}
        _store(stored)
    if options.runs:
        torch.set_num_threads(1)
        for arm in options.arms:
            for seed in options.seeds:
                if not any((row["arm"], row["seed"]) == (arm, seed) for row in stored["rows"]):
                    stored["rows"].append(run(arm, seed, options.index, options.runs))
                    _store(stored)
    if options.table:
        page = (RESULTS / f"{NAME}.md").read_text()
        write_result(f"{NAME}.md", replace_results(page, "\n".join(tables(stored)), f"{NAME}.py"))


def _store(stored: dict[str, Any]) -> None:
    write_result(f"{NAME}.json", json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
