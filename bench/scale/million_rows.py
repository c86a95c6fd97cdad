"""Measures how long opening an index of a million rows and the first batch take, and the memory of a rank.

    python bench/scale/million_rows.py [--rows 1000000] [--runs 3]

The rows of an index are different paths to a few real videos, in 400 classes. *files*: videos in folders. *all*:
members of tar files, with a source for every two rows and a path of flow. Each run is a process of its own that imports
the loader, opens the index, and loads the first batch of 8 videos, two clips of 16 frames to 112x112 each; an index of
1,000 rows shows what does not depend on the number of rows. Times are CPU time of the process, and elapsed time for the
whole; memory is the resident set (RSS) beyond that of a process that has only imported torch. Writes
bench/results/million_rows.json and .md. Needs pyarrow.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

FORMATS, CONTENTS = ("parquet", "csv"), ("files", "all")
COLUMNS = (
    "import_s",
    "open_s",
    "loader_s",
    "first_batch_s",
    "open_to_batch_s",
    "elapsed_s",
    "import_mib",
    "index_mib",
    "peak_mib",
)


def status_mib(name: str) -> float:
    """Returns an entry of /proc/self/status, in MiB."""
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) / 1024


def one_run(index_path: Path) -> dict[str, float]:
    """Opens an index in this process and loads the first batch; returns times in s and memory beyond torch in MiB."""
    import torch  # noqa: F401

    torch_mib = status_mib("VmRSS")
    clock = time.process_time
    began = clock()
    import pyarrow.parquet  # noqa: F401

    from cpr_fast.config import DataConfig
    from cpr_fast.data.clips.loader import TrainLoader
    from cpr_fast.data.index.index import Index

    started = time.perf_counter()
    imported, imported_mib = clock(), status_mib("VmRSS")
    index = Index.load(index_path)
    opened, index_mib = clock(), status_mib("VmRSS")
    loader = TrainLoader(index, DataConfig(frames=16, size=112, batch_size=8, workers=1, prefetch=1), ["rgb"], seed=0)
    built = clock()
    batch = next(iter(loader.epoch(0)))
    done, elapsed_s = clock(), time.perf_counter() - started
    assert batch.clips["rgb"].shape[0] == 8 and not loader.skipped
    return {
        "import_s": imported - began,
        "open_s": opened - imported,
        "loader_s": built - opened,
        "first_batch_s": done - built,
        "open_to_batch_s": done - imported,
        "elapsed_s": elapsed_s,
        "import_mib": imported_mib - torch_mib,
        "index_mib": index_mib - imported_mib,
        "peak_mib": status_mib("VmHWM") - torch_mib,
    }


def write_index(file: Path, rows: int, content: str) -> None:
    """Writes an index of different paths that lead to a few videos by links; `content` is "files" or "all"."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from support import real_clips
    from support.data_sets.tar_files import write_tar

    from cpr_fast.data.files.names import member_path
    from cpr_fast.data.files.tar import members
    from cpr_fast.data.index.rows.columns import schema
    from cpr_fast.data.index.rows.video import COLUMNS as NAMES
    from cpr_fast.data.index.tables import write_table
    from cpr_fast.data.video.probe import probe_video

    folder = file.parent
    clips = sorted((real_clips.ROOT / "ucf101_100").glob("*/*.avi"))[:100]
    facts = [probe_video(clip) for clip in clips]
    shard = write_tar(folder / "shard.tar", {f"{i:05}.avi": clip.read_bytes() for i, clip in enumerate(clips)})
    packed = [str(member_path(member._replace(file=Path("shards")))) for member in members(shard)]
    (folder / "real").mkdir()
    for number in range(1000):
        (folder / "real" / f"clip_{number:03}.avi").symlink_to(clips[number % len(clips)])
        (folder / f"folder_{number:03}").symlink_to("real")
    for number in range(-(-rows // len(clips))):
        (folder / f"train-{number:06}.tar").symlink_to("shard.tar")
    table = []
    for row in range(rows):
        fact, place = facts[row % len(clips)], f"folder_{row // 1000 % 1000:03}/clip_{row % 1000:03}.avi"
        in_shard = packed[row % len(clips)].replace("shards", f"train-{row // len(clips):06}.tar", 1)
        texts = (in_shard, f"source_{row // 2:07}", place) if content == "all" else (place, "", "")
        table.append((texts[0], f"class {row % 400}", texts[1], "train", fact.num_frames, fact.fps, fact.width,
                      fact.height, texts[2]))  # fmt: skip
    if file.suffix == ".csv":
        write_table(file, NAMES, table)
        return
    columns = dict(zip(NAMES, map(list, zip(*table, strict=True)), strict=True))
    pq.write_table(pa.table(columns, schema=schema(pa)), file, compression="zstd")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the indexes are written for the time of the run")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(one_run(options.one)))
        return
    from measure import world, write_result
    from page import markdown_table

    result = []
    for rows, suffix, content in [(1000, "parquet", "files"), *product([options.rows], FORMATS, CONTENTS)]:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            file = Path(folder) / f"index.{suffix}"
            write_index(file, rows, content)
            command = [sys.executable, __file__, "--one", str(file)]
            runs = []
            for _ in range(options.runs):
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                runs.append(json.loads(done.stdout.splitlines()[-1]))
            row = {name: round(statistics.median(run[name] for run in runs), 2) for name in COLUMNS}
            about = {"rows": rows, "format": suffix, "content": content}
            result.append(about | {"file_mib": round(file.stat().st_size / 2**20, 1)} | row)
            print(result[-1], flush=True)
    about = world("cpu") | {"runs": options.runs, "load": round(os.getloadavg()[0], 1)}
    write_result("million_rows.json", json.dumps(about | {"results": result}, indent=1) + "\n")
    header = ["rows", "format", "content", "file_mib", *COLUMNS]
    cells = [[str(row[name]) for name in header] for row in result]
    text = f"# Opening an index of {options.rows:,} rows\n\n{__doc__.split(chr(10) * 2)[2].strip()}\n\n"
    table = markdown_table(header, cells)
    text += f"`python bench/scale/million_rows.py --runs {options.runs}`, {about['device']}, torch {about['torch']}, "
    text += f"commit {about['commit']}; medians of the processes of each index. Load average of "
    text += f"the machine at the end: {about['load']}; CPU time changes little with other load.\n\n{table}\n"
    write_result("million_rows.md", text)


if __name__ == "__main__":
    main()
