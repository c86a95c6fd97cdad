"""Measures whether the memory of the training loader stays flat over epochs, for every route.

    python bench/data/loader_memory.py [--epochs 20] [--videos 40]

Clips of $CPR_FAST_SHARED/data/ucf101_100 as they are, and packed as CoCLR's LMDB; clips of 32 frames to 128x128. Writes
bench/results/loader_memory.json: anonymous resident memory (MiB) after every epoch, and its growth per epoch from the
third on (least squares). Mapped files are not counted, because the kernel can drop their pages at any time.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import simplejpeg

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from measure import world, write_result
from support import real_clips

from cpr_fast.config import DataConfig
from cpr_fast.data.clips.loader import TrainLoader
from cpr_fast.data.index.build import IndexOptions, write_index
from cpr_fast.data.index.index import Index
from cpr_fast.data.storage.media import read_frames
from cpr_fast.data.storage.record_writer import RecordWriter


def anonymous_mib() -> float:
    status = Path("/proc/self/status").read_text()
    return round(int(status.split("RssAnon:")[1].split()[0]) / 1024, 1)


def link_videos(folder: Path, count: int) -> None:
    """Makes links FOLDER/<class>/<video> to some clips."""
    for clip in sorted((real_clips.ROOT / "ucf101_100").glob("*/*.avi"))[:count]:
        (folder / clip.parent.name).mkdir(parents=True, exist_ok=True)
        (folder / clip.parent.name / clip.name).symlink_to(clip)


def pack(index: Index, file: Path) -> None:
    with RecordWriter(file) as writer:
        for video in index:
            frames = read_frames(video.path, range(video.num_frames), "rgb", video.num_frames)
            writer.put(f"{video.label}/{video.path.stem}", [simplejpeg.encode_jpeg(frame, 95) for frame in frames])


def curve(index: Index, cache_gib: float, epochs: int) -> list[float]:
    """Returns the memory in MiB after every epoch."""
    loader = TrainLoader(index, DataConfig(batch_size=8, cache_gib=cache_gib), ["rgb"], seed=0)
    memory = []
    for epoch in range(epochs):
        for batch in loader.epoch(epoch):
            del batch
        memory.append(anonymous_mib())
        print(f"epoch {epoch}: {memory[-1]} MiB", file=sys.stderr, flush=True)
    loader.close()
    return memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--videos", type=int, default=40)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        link_videos(root / "set", options.videos)
        write_index(root / "set", root / "files.csv", IndexOptions())
        files = Index.load(root / "files.csv")
        pack(files, root / "frames.lmdb")
        write_index(root / "frames.lmdb", root / "lmdb.csv", IndexOptions(layout="lmdb", verify=False))
        for route, index, cache_gib in (("files", files, 0.0), ("files, cached", files, 0.5),
                                        ("lmdb", Index.load(root / "lmdb.csv"), 0.0)):  # fmt: skip
            memory = curve(index, cache_gib, options.epochs)
            late = memory[2:]
            slope = float(np.polyfit(range(len(late)), late, 1)[0]) if len(late) > 1 else None
            rows.append({"route": route, "memory_mib": memory, "growth_mib_per_epoch": slope and round(slope, 3)})
            print(json.dumps(rows[-1]), flush=True)
    about = world("cpu") | {"videos": options.videos, "clips_per_epoch": 2 * (options.videos // 8 * 8)}
    write_result("loader_memory.json", json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
