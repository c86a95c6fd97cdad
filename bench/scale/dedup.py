"""Measures `cpr-fast dedup`: the speed of its graph of neighbours, and what it finds where the answer is known.

    python bench/scale/dedup.py speed [--entries 1000000] [--rows 8192] [--threads 2 1] [--rounds 3] [--whole]
    python bench/scale/dedup.py found NAME=INDEX:CHECKPOINT ... [--plant NAME] [--every 18]

`speed` compares `KnnGraph` with FAISS Flat (IndexFlatIP of faiss-cpu) on unit features of 128 dimensions, k = 10, in
one process and in turn. FAISS searches for `--rows` queries among all entries; the graph compares its first `--rows`
rows with all entries after them, for both sides. The time of the whole is scaled from that by the number of pairs.
`--whole` computes the whole graph, too.

`found` states precision and recall of the groups in pairs of videos of one source, by the sources of each index. In the
index NAME of `--plant` it plants three re-encodings of every `--every`-th video: scaled to two thirds, compressed with
x264 at crf 38, and without its first third. The checkpoints are copied with the features that `retrieve`
stored beside them, and nothing is written there.

Both write their part of bench/results/dedup.json, and dedup.md.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from measure import RESULTS, world, write_result
from page import markdown_table

from cpr_fast.evaluate.duplicates.find import THRESHOLDS, Compared, of_checkpoint
from cpr_fast.evaluate.duplicates.graph import stored_graph
from cpr_fast.evaluate.duplicates.groups import agreement, at_thresholds, grouped, pairs_of
from cpr_fast.evaluate.features.results import home
from cpr_fast.evaluate.retrieval.names import percent
from cpr_fast.ops import KnnGraph

WIDTH, NEIGHBOURS = 128, 10
KINDS = ("scaled", "compressed", "cut")  # re-encodings that are planted


def timed(call: Any) -> tuple[float, float]:
    """Returns elapsed and CPU seconds of a call."""
    began, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - began, time.process_time() - cpu


def speed(options: argparse.Namespace) -> dict[str, Any]:
    import faiss

    draw = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(options.entries, WIDTH, generator=draw), dim=1)
    flat = faiss.IndexFlatIP(WIDTH)
    flat.add(features.numpy())
    queries = features[: options.rows].numpy()
    found: dict[str, Any] = {}

    def ours() -> None:
        graph = KnnGraph(features, NEIGHBOURS)
        while graph.done < options.rows:
            graph.step()
        found["ours"] = graph

    def theirs() -> None:
        found["faiss"] = flat.search(queries, NEIGHBOURS + 1)

    rows = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        faiss.omp_set_num_threads(threads)
        times = {"ours": [], "faiss": []}
        for _ in range(options.rounds):
            times["faiss"].append(timed(theirs))
            times["ours"].append(timed(ours))
        rows.append(speed_row(threads, times, found["ours"].share, options))
    result = {**world("cpu"), "faiss": faiss.__version__, "entries": options.entries, "rows": options.rows,
              "rounds": options.rounds, "width": WIDTH, "k": NEIGHBOURS, "results": rows}  # fmt: skip
    result["load"] = round(os.getloadavg()[0], 1)
    return result | ({"whole": whole(features, found["faiss"], options)} if options.whole else {})


def speed_row(threads: int, times: dict, share: float, options: argparse.Namespace) -> dict[str, Any]:
    """Returns the medians of the measured parts, and the times of the whole that follow from them, in seconds."""
    row: dict[str, Any] = {"threads": threads}
    for name, part in (("ours", share), ("faiss", options.rows / options.entries)):
        elapsed, cpu = (statistics.median(column) for column in zip(*times[name], strict=True))
        row |= {f"{name}_s": round(elapsed, 2), f"{name}_cpu_s": round(cpu, 2),
                f"{name}_whole_s": round(elapsed / part, 1), f"{name}_whole_cpu_s": round(cpu / part, 1)}  # fmt: skip
    for clock in ("whole_s", "whole_cpu_s"):
        row[f"ratio_{clock}"] = round(row[f"faiss_{clock}"] / row[f"ours_{clock}"], 2)
    return row


def whole(features: torch.Tensor, theirs: tuple, options: argparse.Namespace) -> dict[str, Any]:
    """Computes the whole graph with the first number of threads, and compares the first rows with those of FAISS."""
    torch.set_num_threads(options.threads[0])
    graph = KnnGraph(features, NEIGHBOURS)

    def run() -> None:
        while graph.done < len(features):
            graph.step()

    before_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    elapsed, cpu = timed(run)
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    indices, scores = graph.result()
    same = (indices[: options.rows].numpy() == theirs[1][:, 1:]).mean()
    difference = np.abs(scores[: options.rows].numpy() - theirs[0][:, 1:]).max()
    return {"threads": options.threads[0], "s": round(elapsed, 1), "cpu_s": round(cpu, 1),
            "peak_beyond_features_mib": round(max(0.0, peak_mib - before_mib)),
            "same_as_faiss": round(float(same), 6), "largest_difference": float(difference)}  # fmt: skip


def found(options: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {**world("cpu"), "k": NEIGHBOURS, "sources": {}}
    for text in options.sets:
        name, _, rest = text.partition("=")
        index, _, checkpoint = rest.rpartition(":")
        with tempfile.TemporaryDirectory() as folder:
            own = Path(folder) / "checkpoints" / "last.pt"
            own.parent.mkdir()
            shutil.copyfile(checkpoint, own)
            if (stored := home(checkpoint) / "features").is_dir():
                shutil.copytree(stored, Path(folder) / "features")
            result["sources"][name] = known_sources(of_checkpoint(Path(index), str(own), progress=True), Path(folder))
            if name == options.plant:
                result["planted"] = {"name": name, "every": options.every,
                                     **planted(Path(index), own, Path(folder), options.every)}  # fmt: skip
    result["command"] = "python bench/scale/dedup.py found " + " ".join(
        [*(f"{text.partition('=')[0]}=INDEX:CHECKPOINT" for text in options.sets), f"--plant {options.plant}"]
    )
    return result


def known_sources(compared: Compared, folder: Path) -> dict[str, Any]:
    known = compared.index.source_ids[compared.positions]
    indices, scores = stored_graph(compared.features, NEIGHBOURS, folder / "graph.safetensors")
    pairs = pairs_of(indices, scores, THRESHOLDS[-1])
    nearest = float((known[indices[:, 0].numpy()] == known).mean())
    return {
        "videos": len(known), "sources": int(known.max()) + 1, "views": compared.views, "nearest_of_source": nearest,
        "table": at_thresholds(compared.features, pairs, THRESHOLDS, known),
    }  # fmt: skip


def planted(index_csv: Path, checkpoint: Path, folder: Path, every: int) -> dict[str, Any]:
    """Finds re-encodings of known videos among all videos of an index."""
    from cpr_fast.data.flow.write import write_flow
    from cpr_fast.data.index.index import Index

    originals = Index.load(index_csv)
    copies = [copy for video in list(originals)[::every] for copy in re_encoded(video, folder)]
    Index(copies).save(folder / "copies.csv")
    write_flow(folder / "copies.csv", folder / "flow")
    Index([*originals, *Index.load(folder / "copies.csv")]).save(folder / "all.csv")
    compared = of_checkpoint(folder / "all.csv", str(checkpoint), progress=True)
    assert len(compared.positions) == len(originals) + len(copies)
    of = np.concatenate([np.arange(len(originals)), np.repeat(np.arange(len(originals))[::every], len(KINDS))])
    sources = originals.source_ids[of]
    indices, scores = stored_graph(compared.features, NEIGHBOURS, folder / "graph.safetensors")
    pairs, rows = pairs_of(indices, scores, THRESHOLDS[-1]), []
    for threshold in THRESHOLDS:
        numbers = grouped(compared.features, pairs, threshold)
        copied, related = agreement(numbers, of), agreement(numbers, sources)
        row = {"threshold": threshold, "pairs": copied["pairs"], "copies": copied["precision"]}
        row["of_source"] = related["precision"]
        for place, kind in enumerate(KINDS):
            mine = np.arange(len(originals) + place, len(of), len(KINDS))
            row[kind] = float((numbers[mine] == numbers[of[mine]]).mean())
        rows.append(row)
    return {"copies": len(copies), "videos": len(of), "table": rows}


def re_encoded(video: Any, folder: Path) -> list[Any]:
    """Writes the re-encodings of a video; returns their rows, in the order of KINDS."""
    from PIL import Image

    from cpr_fast.data.storage.media import read_frames

    frames = read_frames(video.path, np.arange(video.num_frames), "rgb", video.num_frames)
    size = (video.width * 2 // 3 // 2 * 2, video.height * 2 // 3 // 2 * 2)
    small = np.stack([np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC)) for frame in frames])
    rows = []
    for kind, pixels, crf in (
        ("scaled", small, 23),
        ("compressed", frames, 38),
        ("cut", frames[len(frames) // 3 :], 23),
    ):
        path = folder / "copies" / f"{video.label}-{Path(video.path).stem}-{kind}.mp4"
        path.parent.mkdir(exist_ok=True)
        write_video(path, pixels, crf, round(video.fps))
        rows.append(replace(video, path=path, source=path.stem, num_frames=len(pixels), width=pixels.shape[2],
                            height=pixels.shape[1], flow_path=None))  # fmt: skip
    return rows


def write_video(path: Path, frames: np.ndarray, crf: int, fps: int) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": str(crf)})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())


def page(result: dict[str, Any]) -> str:
    lines = ["# Near-duplicates and siblings", ""]
    if "speed" in result:
        lines += speed_page(result["speed"])
    if "found" in result:
        lines += found_page(result["found"])
    return "\n".join(lines) + "\n"


def made_by(part: dict[str, Any]) -> str:
    return f"`{part['command']}`, {part['device']}, torch {part['torch']}, commit {part['commit']}."


def speed_page(part: dict[str, Any]) -> list[str]:
    header = ["threads", "ours s", "FAISS s", "ours CPU s", "FAISS CPU s", "ours whole s", "FAISS whole s",
              "FAISS / ours", "in CPU time"]  # fmt: skip
    names = ("threads", "ours_s", "faiss_s", "ours_cpu_s", "faiss_cpu_s", "ours_whole_s", "faiss_whole_s",
             "ratio_whole_s", "ratio_whole_cpu_s")  # fmt: skip
    rows = [[str(row[name]) for name in names] for row in part["results"]]
    lines = [
        "## The graph of neighbours", "",
        f"{part['entries']:,} unit features of {part['width']} dimensions, k = {part['k']}: `KnnGraph` and FAISS Flat "
        f"(faiss-cpu {part['faiss']}), in turn in one process; medians of {part['rounds']} rounds. FAISS searches for "
        f"{part['rows']:,} queries; the graph compares its first {part['rows']:,} rows with all entries after them, "
        "for both sides. *Whole* is scaled from these parts by the number of pairs. The first rows of the graph fill "
        "the lists of all entries, which later ones do not. Load average of the machine at the end: "
        f"{part['load']}; CPU time changes "
        "little with other load.", "", made_by(part), "", markdown_table(header, rows),
    ]  # fmt: skip
    if (times := (1_000_000 / part["entries"]) ** 2) > 1:
        row = part["results"][-1]
        ours, theirs = (round(row[f"{name}_whole_cpu_s"] * times) for name in ("ours", "faiss"))
        lines += [
            f"Not measured: scaled by the number of pairs, 1,000,000 entries would take {ours:,} s of CPU time, and "
            f"FAISS Flat {theirs:,} s.", "",
        ]  # fmt: skip
    if whole := part.get("whole"):
        lines += [
            f"The whole graph, computed with {whole['threads']} threads: {whole['s']:,} s ({whole['cpu_s']:,} s of CPU "
            f"time), {whole['peak_beyond_features_mib']:,} MiB beyond the features and the index of FAISS. Of its "
            f"first {part['rows']:,} rows {100 * whole['same_as_faiss']:.4f} % of the neighbours are those of FAISS in "
            f"the same place; the largest difference of the scores is {whole['largest_difference']:.1e}.", "",
        ]  # fmt: skip
    return lines


def found_page(part: dict[str, Any]) -> list[str]:
    lines = ["## What is found", "", made_by(part), ""]
    for name, known in part["sources"].items():
        rows = [[f"{row['threshold']:g}", *(str(row[size]) for size in ("groups", "clips", "largest")),
                 *(percent(row[rate], "") for rate in ("precision", "recall"))] for row in known["table"]]  # fmt: skip
        lines += [
            f"### Siblings: {name}", "",
            f"{known['videos']:,} videos of {known['sources']:,} sources; features of {' and '.join(known['views'])} "
            f"of a small network trained on them. For {percent(known['nearest_of_source'])} of all videos the "
            "nearest is of their source. Precision and recall are of pairs of one source, in groups whose mean "
            "similarity is at least that of the row.", "",
            markdown_table(["similarity", "groups", "videos", "largest", "precision %", "recall %"], rows),
        ]  # fmt: skip
    if planted := part.get("planted"):
        header = ["similarity", "pairs", "copies %", "of one source %", *(f"{kind} %" for kind in KINDS)]
        rows = [[f"{row['threshold']:g}", str(row["pairs"]),
                 *(percent(row[rate], "") for rate in ("copies", "of_source", *KINDS))]
                for row in planted["table"]]  # fmt: skip
        lines += [
            f"### Near-duplicates: re-encodings planted in {planted['name']}", "",
            f"{planted['copies']:,} re-encodings, three of every {planted['every']}th video, among "
            f"{planted['videos']:,} videos. *Copies* is the share of the pairs in groups that are versions of one "
            "video; *of one source* also counts versions of clips of one source, which in this data set often show the "
            "same scene. The last columns are the recall: the share of the re-encodings that are in the group of their "
            "original.", "",
            markdown_table(header, rows),
        ]  # fmt: skip
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    one = parts.add_parser("speed")
    one.add_argument("--entries", type=int, default=1_000_000)
    one.add_argument("--rows", type=int, default=8192)
    one.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    one.add_argument("--rounds", type=int, default=3)
    one.add_argument("--whole", action="store_true")
    two = parts.add_parser("found")
    two.add_argument("sets", nargs="+")
    two.add_argument("--plant", default="")
    two.add_argument("--every", type=int, default=18)
    for each in (one, two):
        each.add_argument("--folder", type=Path, default=RESULTS)
    options = parser.parse_args()
    path = options.folder / "dedup.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    result[options.part] = speed(options) if options.part == "speed" else found(options)
    write_result("dedup.json", json.dumps(result, indent=1) + "\n", options.folder)
    write_result("dedup.md", page(result), options.folder)
    print(page(result))


if __name__ == "__main__":
    main()
