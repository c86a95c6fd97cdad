"""Measures how many files per second `cpr-fast index` probes by their packets, and decodes completely.

    python bench/data/index_rate.py [--files 20000] [--decoded 200]

A Kinetics-like set: links to the UCF101 clips of $CPR_FAST_SHARED/data as they are (XviD) and transcoded (H.264), and
their JPEG records in an LMDB file. Everything is in the page cache, so the times do not include a disk.
Writes bench/results/index_rate.json: the rates, the seconds of everything but the probing, and the peak memory.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import simplejpeg

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from measure import RESULTS, world, write_result
from support import real_clips

from cpr_fast.data.index.build import IndexOptions, write_index
from cpr_fast.data.index.index import Index
from cpr_fast.data.storage.media import read_frames
from cpr_fast.data.storage.record_writer import RecordWriter


def link(root: Path, clips: list[Path], count: int) -> Path:
    """Makes `count` links to the clips, each named like a separate video, 1,000 per folder."""
    for number in range(count):
        clip = clips[number % len(clips)]
        folder = root / f"class{number // 1000:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:07d}{clip.suffix}").symlink_to(clip)
    return root


def pack(clips: list[Path], file: Path, count: int) -> Path:
    """Writes an LMDB file of `count` records of 60 frames each."""
    records = []
    for clip in clips[:8]:
        frames = read_frames(clip, range(60), "rgb", 10**6)
        records.append([simplejpeg.encode_jpeg(frame, 90) for frame in frames])
    with RecordWriter(file) as writer:
        for number in range(count):
            writer.put(f"class/{number:07d}", records[number % len(records)])
    return file


def measure(kind: str, root: Path, folder: Path, **options) -> dict:
    began = time.perf_counter()
    report = write_index(root, folder / f"{kind}.csv", IndexOptions(**options), progress=True)
    seconds = time.perf_counter() - began
    row = {
        "kind": kind,
        "probe": "decode" if report["verified"] else "packets",
        "files": report["probed"],
        "files_per_s": report["files_per_s"],
        "probe_s": round(report["probed"] / report["files_per_s"], 2),
        "rest_s": round(seconds - report["probed"] / report["files_per_s"], 2),
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--decoded", type=int, default=200, help="files where each is decoded whole")
    options = parser.parse_args()
    clips = [path.resolve() for path in real_clips.spread_videos(100)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole = IndexOptions(transcode=folder / "h264")
        write_index(link(folder / "originals", clips, len(clips)), folder / "h264.csv", whole, progress=True)
        h264 = [video.path.resolve() for video in Index.load(folder / "h264.csv")]
        rows = []
        for codec, source in (("xvid", clips), ("h264", h264)):
            many = link(folder / f"{codec}-many", source, options.files)
            few = link(folder / f"{codec}-few", source, options.decoded)
            rows.append(measure(f"{codec}-packets", many, folder, verify=False))
            rows.append(measure(f"{codec}-decoded", few, folder, verify=True))
        records = pack(clips, folder / "records.lmdb", options.decoded)
        for verify in (False, True):
            kind = f"lmdb-{'decoded' if verify else 'headers'}"
            rows.append(measure(kind, records, folder, layout="lmdb", verify=verify))
    write_result("index_rate.json", json.dumps(world("cpu") | {"rows": rows}, indent=1) + "\n")
    print(f"wrote {RESULTS / 'index_rate.json'}")


if __name__ == "__main__":
    main()
