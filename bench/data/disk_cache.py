"""Measures the disk cache: fetches against LRU and the optimum, bytes against those that clips need, and loading rates.

    PYTHONPATH=PEERS python bench/data/disk_cache.py [--videos 100] [--epochs 4] [--latency 0.1] [--rounds 3]

Videos of $CPR_FAST_SHARED/data (UCF101), each under several URLs of an HTTP server in a process of its own, whose
answers begin after a latency; the cache holds 20 % of their bytes. *short*: the files as they are (XviD in AVI), a pair
of clips of each; *long*: MP4s of 20 s with a key frame a second, one clip of each. What every read needs is recorded,
and LRU and Belady's optimum without fetching ahead are simulated on the same sequence. Rates: the loader reads all
videos of an epoch from a disk, a tar file, HTTP and S3 (moto), with the cache and without, in turn in every round.
Writes bench/results/disk_cache.json and .md. S3 needs `pip install --target PEERS s3fs 'moto[server]'`.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import av

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

import numpy as np
from measure import RESULTS, clip_rates, world, write_result
from page import markdown_table
from support import real_clips
from support.data_sets.tar_files import write_tar
from support.machine.http_server import serving
from support.machine.new_process import as_a_new_process

from cpr_fast.config import DataConfig
from cpr_fast.data.clips import loader as loaders
from cpr_fast.data.clips.ahead.prefetch import Prefetch
from cpr_fast.data.clips.sampling import plan_first, plan_pairs
from cpr_fast.data.files.cached.cache import BlockCache
from cpr_fast.data.files.cached.recent import RecentRanges
from cpr_fast.data.files.cached.store import BLOCK
from cpr_fast.data.files.names import member_path
from cpr_fast.data.files.remote import REMOTE
from cpr_fast.data.files.tar import members
from cpr_fast.data.index.index import Index, Video
from cpr_fast.data.video.probe import probe_video

SHARE = 0.2  # of the data, that the cache holds
Trace = list[tuple[int, tuple[int, ...]]]  # (video, blocks) of every read


# ---- videos on servers -------------------------------------------------------------------------------------------
def _serve(files: dict[str, Path], latency_s: float, pipe) -> None:
    with serving({name: path.read_bytes() for name, path in files.items()}) as served:
        served.latency_s = latency_s
        pipe.send(served.url)
        pipe.recv()


def _serve_s3(pipe) -> None:
    import logging

    import moto.server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)

    server = moto.server.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    pipe.send("http://{}:{}".format(*server.get_host_and_port()))
    pipe.recv()
    server.stop()


@contextmanager
def in_a_process(target: Callable, *arguments) -> Iterator[str]:
    """Yields the address of a server in another process, whose work does not count as the loader's."""
    here, there = get_context("spawn").Pipe()
    process = get_context("spawn").Process(target=target, args=(*arguments, there), daemon=True)
    process.start()
    try:
        yield here.recv()
    finally:
        here.send("stop")
        process.join()


def row_of(path: Path, name: str) -> Video:
    about = probe_video(path, decode=False)
    return Video(path, "", name, "train", about.num_frames, 25.0, about.width, about.height, None)


def long_video(path: Path, clips: list[Path]) -> Path:
    """Writes frames of 160x120 of several clips as one MP4 of 20 s."""
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=25, options={"g": "25", "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt, count = 160, 120, "yuv420p", 0
        for clip in clips:
            with av.open(str(clip)) as source:
                for frame in source.decode(video=0):
                    if count < 500:
                        picture = frame.reformat(160, 120, "yuv420p").to_ndarray()
                        output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="yuv420p")))
                    count += 1
        assert count >= 500
        output.mux(stream.encode(None))
    return path


def under_urls(videos: list[Video], count: int, url: str) -> Index:
    """Returns `count` videos on the server, the given ones in turn."""
    chosen = ((i, videos[i % len(videos)]) for i in range(count))
    return Index([replace(v, path=Path(f"{url}/{i}{v.path.suffix}"), source=str(i)) for i, v in chosen])


# ---- fetches ------------------------------------------------------------------------------------------------------
def lru(trace: Trace, slots: int) -> tuple[int, int]:
    """Returns the blocks that are fetched, and the reads that have to wait for one, with the least recently used one
    leaving."""
    held, blocks, reads = OrderedDict(), 0, 0
    for video, needed in trace:
        before = blocks
        for block in needed:
            blocks += (video, block) not in held
            held[video, block] = None
            held.move_to_end((video, block))
            if len(held) > slots:
                held.popitem(last=False)
        reads += blocks > before
    return blocks, reads


def optimum(trace: Trace, slots: int) -> tuple[int, int]:
    """Returns the same for Belady's choice among all later reads, one block after the other, without fetching ahead."""
    pages = [(video, block) for video, needed in trace for block in needed]
    following, later = [0] * len(pages), {}
    for place in range(len(pages) - 1, -1, -1):
        following[place] = later.get(pages[place], len(pages) + place)
        later[pages[place]] = place
    held, heap, place, blocks, reads = {}, [], 0, 0, 0
    for _, needed in trace:
        before = blocks
        for _ in needed:
            page = pages[place]
            if page not in held:
                blocks += 1
                while len(held) >= slots:
                    use, leaving = heapq.heappop(heap)
                    if held.get(leaving) == -use:
                        del held[leaving]
            held[page] = following[place]
            heapq.heappush(heap, (-following[place], page))
            place += 1
        reads += blocks > before
    return blocks, reads


class Recorded(Prefetch):
    """Keeps what every read needs."""

    trace: Trace = []

    def _take(self, read, path, located):
        needed = np.flatnonzero(self._needed(path, read.frames, located.blocks))
        Recorded.trace.append((read.item, tuple(needed.tolist())))
        return super()._take(read, path, located)


class Watched:
    """Notes which bytes FFmpeg asks for, and which videos had to wait for some of them, by (epoch, path)."""

    def __init__(self) -> None:
        self.asked, self.late, self.epoch = defaultdict(list), set(), 0
        plain = BlockCache.read

        def read(cache: BlockCache, path: str, start: int, length: int) -> bytes | None:
            key, before = (self.epoch, str(path)), cache.counts["waited"] + cache.counts["missed"]
            data = plain(cache, path, start, length)
            self.asked[key].append((start, start + length))
            if data is None or cache.counts["waited"] + cache.counts["missed"] > before:
                self.late.add(key)  # with several threads, perhaps because of another video: too many, not too few
            return data

        BlockCache.read = read

    def needed(self) -> int:
        """Returns the number of different bytes of each read, summed over reads."""
        total = 0
        for ranges in self.asked.values():
            end = 0
            for begin, stop in sorted(ranges):
                total += max(0, stop - max(begin, end))
                end = max(end, stop)
        return total


def fetch_row(name: str, index: Index, size: int, plan: Callable, epochs: int, folder: Path, step_s: float) -> dict:
    """Loads some epochs with a cache of SHARE of `size` bytes, in steps that take `step_s` at least."""
    slots, Recorded.trace = int(SHARE * size) // BLOCK, []
    data = DataConfig(frames=16, size=32, batch_size=1, workers=1, prefetch=2, cache_gib=0,
                      disk_cache=str(folder), disk_cache_gib=slots * BLOCK / 2**30)  # fmt: skip
    loaders.Prefetch, watched = Recorded, Watched()
    loader = loaders.TrainLoader(index, data, ["rgb"], seed=0, plan=plan)
    began = time.perf_counter()
    for watched.epoch in range(epochs):
        for _ in loader.epoch(watched.epoch):
            time.sleep(step_s)
    seconds = time.perf_counter() - began
    loader.close()
    counts, reads = loader._ahead.cache.counts, epochs * len(index)
    trace = Recorded.trace[:reads]  # what was fetched ahead beyond the last step is in the counts, not in the trace
    needed = sum(len(blocks) for _, blocks in trace)
    (lru_blocks, lru_reads), (least, least_reads) = lru(trace, slots), optimum(trace, slots)
    fetched = counts["fetched"] + counts["fetched_unplanned"]
    return {
        "set": name, "videos": len(index), "mib": size / 2**20, "epochs": epochs, "reads": reads, "slots": slots,
        "step_ms": 1e3 * step_s, "seconds": seconds, "blocks_needed": needed, "lru_blocks": lru_blocks,
        "optimum_blocks": least, "fetched_blocks": fetched / BLOCK, "lru_misses": lru_reads,
        "optimum_misses": least_reads, "misses": len(watched.late), "bytes_needed": watched.needed(),
        "bytes_fetched": fetched, "counts": dict(counts),
    }  # fmt: skip


# ---- rates --------------------------------------------------------------------------------------------------------
def rate_forms(near: Index, shard: Path, url: str, s3: str, folder: Path) -> dict[str, tuple[Index, str]]:
    """Returns by form an index and the folder of the disk cache, "" for none."""
    far = [replace(v, path=Path(f"{url}/{i}{v.path.suffix}")) for i, v in enumerate(near)]
    found = {Path(member.name).stem: member for member in members(shard)}
    in_tar = [replace(v, path=member_path(found[str(i)])) for i, v in enumerate(near)]
    far_tar = [replace(v, path=Path(str(v.path).replace(str(shard), f"{url}/s.tar"))) for v in in_tar]
    forms = {"local files": (near, ""), "local tar": (Index(in_tar), "")}
    places = {"HTTP": Index(far), "tar over HTTP": Index(far_tar)}
    import s3fs

    os.environ |= {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_REGION": "us-east-1",
                   "AWS_ENDPOINT_URL": s3}  # fmt: skip
    system = s3fs.S3FileSystem()
    system.mkdir("clips")
    for i, video in enumerate(near):
        system.pipe(f"clips/{i}{video.path.suffix}", video.path.read_bytes())
    places["S3"] = Index([replace(v, path=Path(f"s3://clips/{i}{v.path.suffix}")) for i, v in enumerate(near)])
    for place, index in places.items():
        forms |= {place: (index, ""), f"{place}, disk cache": (index, str(folder / place.replace(" ", "-")))}
    return forms


def rate_rows(forms: dict[str, tuple[Index, str]], size: int, rounds: int) -> list[dict]:
    """Reads an epoch in every form in turn, each with a loader of its own and an empty cache with room for all. Nothing
    of earlier reads is in the memory of the process, as in an epoch of more videos than that memory holds."""
    times, cpu = defaultdict(list), defaultdict(list)
    for round_ in range(rounds + 1):
        for name, (index, cache) in forms.items():
            data = DataConfig(frames=32, size=128, batch_size=4, workers=2, cache_gib=0, disk_cache=cache,
                              disk_cache_gib=2 * size / 2**30)  # fmt: skip
            shutil.rmtree(cache or "none", ignore_errors=True)
            REMOTE._recent = RecentRanges()  # its memory would hold all of these few videos
            loader = loaders.TrainLoader(index, data, ["rgb"], seed=0, plan=plan_first)
            began, used = time.perf_counter(), time.process_time()
            for _ in loader.epoch(round_):
                pass
            if round_:  # the first one learns the layouts of the files
                times[name].append(time.perf_counter() - began)
                cpu[name].append(time.process_time() - used)
            loader.close()
    rows = []
    for name, (index, _) in forms.items():
        clips = len(index) // 4 * 4
        cpu_ms = 1e3 * statistics.median(cpu[name]) / clips
        rows.append({"form": name, **clip_rates(clips, times[name]), "cpu_ms_per_clip": cpu_ms, "videos": clips})
    return rows


# ---- page ---------------------------------------------------------------------------------------------------------
def page(report: dict) -> str:
    about, text = report["world"], ["# The disk cache\n"]
    text += [f"`{about['command']}` at {about['commit']}, torch {about['torch']}, on {about['device']}.\n"]
    if rows := report.get("fetches"):
        text += [
            f"## Fetches with a cache of {SHARE:.0%} of the data\n",
            f"The server's answers begin after {1e3 * report['latency_s']:g} ms. A *read* is one video in a step of "
            f"one video, {rows[0]['step_ms']:g} ms long besides loading; a *block* is {BLOCK:,} bytes. *LRU* and "
            "*optimum* (Belady) are simulated on the recorded reads; both fetch a block when it is needed, so every "
            "read that lacks one waits. *here*: reads that found a byte missing or still on its way. *needed*: the "
            "different bytes that FFmpeg asked for, read by read, as if nothing were kept; *in blocks*: the same, "
            "rounded to the blocks that were planned. *short*: UCF101's files; *long*: 160x120, 20 s, a key frame a "
            "second: the first read takes all of a file and later ones take a clip. How many reads wait here depends "
            f"on what else the machine does: its load average was {report['fetches_load']} at the end, on "
            f"{report['cores']} cores.\n",
            markdown_table(FETCH_HEADER, [fetch_cells(row) for row in rows]),
        ]
    if rows := report.get("rates"):
        text += [
            "## Rates\n",
            f"Clips of 32 frames to 128x128, one of each of {rows[0]['videos']} videos, two reading threads: elapsed "
            f"time, medians (quartiles) of {rows[0]['rounds']} epochs, the forms in turn; a cache is empty "
            f"when its epoch begins. HTTP answers after {1e3 * report['rate_latency_s']:g} ms, S3 (moto) at once. CPU "
            "time is that of the loader's process, without the servers, which shared its two cores with other work.\n",
            markdown_table(["form", "clips/s", "CPU ms a clip"], [rate_cells(row) for row in rows]),
        ]
    return "\n".join(text)


FETCH_HEADER = ["set", "videos", "reads", "blocks needed", "fetched by LRU", "by the optimum", "here",
                "reads that wait: LRU", "optimum", "here", "bytes fetched / needed", "in blocks / needed"]  # fmt: skip


def fetch_cells(row: dict) -> list[str]:
    counts = ("reads", "blocks_needed", "lru_blocks", "optimum_blocks", "fetched_blocks", "lru_misses",
              "optimum_misses", "misses")  # fmt: skip
    shares = (row["bytes_fetched"], row["blocks_needed"] * BLOCK)
    return [row["set"], f"{row['videos']}, {row['mib']:.0f} MiB", *(f"{row[name]:,.0f}" for name in counts),
            *(f"{share / row['bytes_needed']:.2f}" for share in shares)]  # fmt: skip


def rate_cells(row: dict) -> list[str]:
    return [row["form"], f"{row['clips_per_s']:.1f} ({row['low']:.1f} to {row['high']:.1f})",
            f"{row['cpu_ms_per_clip']:.1f}"]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=100, help="URLs of each set")
    parser.add_argument("--epochs", type=int, default=4, help="0 keeps the fetches of an earlier run")
    parser.add_argument("--latency", type=float, default=0.1, help="of the HTTP server, s")
    parser.add_argument("--rounds", type=int, default=3, help="0 keeps the rates of an earlier run")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    clips = [path.resolve() for path in real_clips.spread_videos(16)]
    earlier = options.out / "disk_cache.json"
    report = json.loads(earlier.read_text()) if earlier.exists() else {}
    with tempfile.TemporaryDirectory() as name:
        if options.epochs:
            report |= {"fetches": measure_fetches(clips, options, Path(name)), "latency_s": options.latency}
            report["fetches_load"] = round(os.getloadavg()[0], 1)
        if options.rounds:
            report |= {"rates": measure_rates(clips, options, Path(name)), "rate_latency_s": options.latency}
    report |= {"world": world("cpu"), "cores": os.cpu_count()}
    write_result("disk_cache.json", json.dumps(report, indent=1) + "\n", options.out)
    write_result("disk_cache.md", page(report), options.out)


def measure_fetches(clips: list[Path], options: argparse.Namespace, folder: Path) -> list[dict]:
    rows = []
    sets = {
        "short": ([row_of(path, path.stem) for path in clips], plan_pairs),
        "long": ([row_of(long_video(folder / f"{i}.mp4", clips[4 * i : 4 * i + 5]), "") for i in range(3)], plan_first),
    }  # fmt: skip
    for kind, (videos, plan) in sets.items():
        files = {f"/{i}{(v := videos[i % len(videos)]).path.suffix}": v.path for i in range(options.videos)}
        with in_a_process(_serve, files, options.latency) as url:
            index = under_urls(videos, options.videos, url)
            size = sum(path.stat().st_size for path in files.values())
            rows.append(fetch_row(kind, index, size, plan, options.epochs, folder / kind, 0.05))
        print(json.dumps(rows[-1]), flush=True)
    return rows


def measure_rates(clips: list[Path], options: argparse.Namespace, folder: Path) -> list[dict]:
    near, shard = Index([row_of(path, path.stem) for path in clips]), folder / "s.tar"
    write_tar(shard, {f"{i}{video.path.suffix}": video.path.read_bytes() for i, video in enumerate(near)})
    files = {f"/{i}{v.path.suffix}": v.path for i, v in enumerate(near)} | {"/s.tar": shard}
    with in_a_process(_serve, files, options.latency) as url, in_a_process(_serve_s3) as s3:
        as_a_new_process()
        rows = rate_rows(rate_forms(near, shard, url, s3, folder), shard.stat().st_size, options.rounds)
    for row in rows:
        print(json.dumps(row), flush=True)
    return rows


if __name__ == "__main__":
    main()
