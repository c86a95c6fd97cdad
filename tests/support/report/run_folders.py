"""Run folders of the report's tests, written by hand, and the visible text of a page."""

from __future__ import annotations

import json
import re
from fractions import Fraction
from html.parser import HTMLParser
from pathlib import Path

import av
import numpy as np

from cpr_fast.config import Config

VIDEOS, FRAMES = 6, 24
LABELS = ["push<up>", "push<up>", "jump", "jump", "jump", "spin"]
SOURCES = ["s0", "s1", "s2", "s2", "s3", "s4"]


def write_video(path: Path, number: int) -> None:
    """Writes a video: frame f of video n is filled with grey level 8 f + 10 n; the size is odd on purpose."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(25))
        stream.width, stream.height, stream.pix_fmt, stream.options = 98, 54, "yuv420p", {"crf": "10"}
        for f in range(FRAMES):
            frame = av.VideoFrame.from_ndarray(np.full((54, 98, 3), 8 * f + 10 * number, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_index(folder: Path) -> Path:
    """Writes VIDEOS videos and folder/index.csv."""
    rows = ["path,label,source,split,num_frames,fps,width,height,flow_path"]
    for i, (label, source) in enumerate(zip(LABELS, SOURCES, strict=True)):
        write_video(folder / f"{i}.mp4", i)
        rows.append(f"{i}.mp4,{label},{source},train,{FRAMES},25.0,98,54,")
    (folder / "index.csv").write_text("\n".join(rows) + "\n")
    return folder / "index.csv"


def unlabelled_index(folder: Path, index: Path) -> Path:
    """Writes folder/index.csv, which lists the videos of an index by their absolute paths and without labels."""
    folder.mkdir()
    head, *rows = index.read_text().splitlines()
    fields = [row.split(",") for row in rows]
    rows = [",".join([str(index.parent / field[0]), "", *field[2:]]) for field in fields]
    (folder / "index.csv").write_text("\n".join([head, *rows]) + "\n")
    return folder / "index.csv"


def start_row(index: Path, stages: int = 3) -> dict:
    cycles = [{"view": "rgb", "epochs": 1, "mining": "none"}, {"view": "rgb", "epochs": 2}]  # of `training_rows`
    config = {"data": {"index": str(index), "frames": 8}, "mining": {"stages": stages}}
    config |= {"schedule": {"cycles": cycles}}
    config = Config.from_dict(config).to_dict()
    return {
        "kind": "run",
        "versions": {"torch": "2.13.0"},
        "device": "cpu (test)",
        "commit": "abc123",
        "date": "2026-03-01T12:00:00+00:00",
        "command": "cpr-fast pretrain c.toml",
        "config": config,
    }


def training_rows() -> list[dict]:
    rows, step = [], 0
    for epoch, (cycle, view, mining) in enumerate([(0, "rgb", "none"), (1, "rgb", "cascade"), (1, "rgb", "cascade")]):
        common = {"epoch": epoch, "cycle": cycle, "view": view, "mining": mining}
        mined = mining == "cascade"
        for _ in range(3):
            times = {"step_time_s": 0.3, "data_wait_s": 0.1, "clips_per_s": 40.0}
            rows.append({"kind": "step", "step": step, "loss": 4.0 - step / 10, "pmr": None, **common, **times})
            step += 1
        quality = {"pmr": 0.4 + epoch / 10, "mining_r1": 0.5, "cmr_median": 0.75, "cmr_per_class": [1.0, 0.5, None]}
        quality |= {"right_counts": [1, 2, epoch], "right_per_class": [2 + 2 * epoch, 0, 0], "pmr_chance": 0.2}
        quality |= {"survivor_precision_1": 0.3, "survivor_recall_1": 0.9, "view_agreement": 0.8, "hubness": 1.5}
        quality |= {"survivor_precision_2": 0.4, "survivor_recall_2": 0.5, "mutual_neighbours": 0.1}
        rows.append(
            {"kind": "epoch", "loss": 4.0 - epoch, "loss_chance": 4.5, "epoch_time_s": 61.0, "skipped": epoch, **common}
        )
        rows[-1] |= quality if mined else dict.fromkeys(quality)
        if mined:
            found = [{"video": 1, "start": 2, "correct": True}, {"video": 4, "start": 20, "correct": False}]
            rows.append({"kind": "mined", "query": {"video": 0, "start": 0}, "mined": found, **common})
    return rows


def retrieval_rows(index: Path) -> list[dict]:
    rows = []
    for name, view, r1 in [
        ("trained", "rgb", 0.4), ("trained", "flow", 0.5), ("trained", "two_stream", 0.625),
        ("untrained", "rgb", 0.2), ("single_frame", "rgb", 0.25), ("mean_flow", "flow", 0.3),
    ]:  # fmt: skip
        rates = {
            "r@1": r1,
            "r@5": r1 + 0.1,
            "r@10": r1 + 0.2,
            "r@20": 1.0,
            "r@50": None,
            "r@1_ci95": [r1 - 0.1, r1 + 0.1],
        }
        rows.append({"kind": "retrieval", "protocol": "train_test", "name": name, "view": view, **rates})
        rows[-1] |= {"gallery": 30, "queries": 16, "chance_r@1": 0.0625}
    show = [
        {"path": str(index.parent / f"{i}.mp4"), "label": LABELS[i], "source": SOURCES[i], "num_frames": FRAMES}
        for i in range(VIDEOS)
    ]
    rows.append({"kind": "retrieved", "view": "two_stream", "query": show[2], "nearest": [show[4], show[5]]})
    return rows


def classification_rows() -> list[dict]:
    common = {"kind": "classification", "recipe": "paper", "index": "a.csv", "split": 1, "crops": 10, "videos": 16}
    scores = {"accuracy_ci95": [0.5, 0.9], "mean_class_accuracy": 0.6, "best_epoch": 3}
    scores |= {"confusion": [[5, 3, 0], [1, 5, 0], [0, 0, 2]]}
    scores |= {"per_class": {"push<up>": 0.625, "jump": 0.8, "spin": 1.0}}
    return [
        common | scores | {"task": task, "view": view, "seed": seed, "accuracy": accuracy}
        for task, view, seed, accuracy in [
            ("probe", "rgb", 0, 0.5), ("probe", "two_stream", 0, 0.75),
            ("finetune", "rgb", 0, 0.8), ("finetune", "rgb", 1, 0.9),
        ]
    ]  # fmt: skip


def health_rows() -> list[dict]:
    rows = [
        {
            "kind": "health",
            "epoch": epoch,
            "step": 3 * epoch,
            "feature_std": {"rgb": 0.9},
            "effective_rank": {"rgb": 5.0},
        }
        for epoch in range(3)
    ]
    rows.append({"kind": "online", "epoch": 2, "step": 6, "view": "rgb", "r@1": 0.5})
    rows.append({"kind": "online", "epoch": 2, "step": 6, "view": "rgb", "score": 4.5})
    return [*rows, {"kind": "alarm", "epoch": 2, "step": 6, "text": "the rgb features may have collapsed"}]


def write_run(folder: Path, rows: list[dict], tail: str = "") -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return folder


class Text(HTMLParser):
    """Returns the visible text of a page, and checks that tags are nested."""

    VOID = {"meta", "br", "wbr", "img", "hr"}

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open, self.text, self.ids = [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.ids += [value for name, value in attributes if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)


def text_of(page: Path) -> str:
    return re.sub(r"\s+", " ", " ".join(Text(page.read_text(encoding="utf-8")).text))
