"""A memory that is divided among processes: what a step exchanges and holds, planned and measured.

    python bench/kernels/sharded_memory.py [--size 1048576] [--processes 2] [--batch 16] [--rounds 5]

The plan counts the bytes that one process sends in a step, from the sizes of the tensors that
cpr_fast/ops/partial/sharded.py exchanges and the cost of a ring [Thakur et al. 2005]: (R - 1) x size for all-gather,
2 (R - 1) / R x size for all-reduce, and (R - 1) / R x size for all-to-all. The measured run selects and computes the
loss and its gradient with gloo processes of this machine, one thread each; the queries of all of them are then computed
by one process with the whole memory, and the results are compared bit for bit. A time is the CPU time of one process,
without waiting for the others.

Writes sharded_memory.json and .md to bench/results, or to the folder $OUT.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measure import RESULTS, world, write_result

from cpr_fast.mining.stages import stage_keep, stage_views
from cpr_fast.ops import Shard, cascade_select, mil_nce, sharded_cascade_select, sharded_mil_nce

WIDTH, VIEWS, POSITIVES = 128, 2, 5
# Assumptions of the predicted times: one 400 Gbit/s port per process, and the time that a collective takes at least.
BYTES_PER_S, COLLECTIVE_S = 50e9, 50e-6
# Bytes per second from memory, and float32 operations per second outside tensor cores, of an H100 SXM [NVIDIA].
MEMORY_BYTES_PER_S, FLOPS = 3.35e12, 67e12
COLUMNS = 5 * 8  # bytes of the ids of a slot, which every process holds


def plan(size: int, processes: int, batch: int, stages: int, itemsize: int) -> dict[str, Any]:
    """Returns bytes and times per step and process."""
    shard, R, N = Shard(size, 0, processes), processes, processes * batch
    held = shard.largest
    parts = max(len(shard.parts_of(rank)) for rank in range(R))
    sent = {
        "queries, ids": (R - 1) * batch * ((VIEWS + 1) * WIDTH * itemsize + 8 * (2 + POSITIVES)),
        "counts of stages": (stages - 1) * (2 * (R - 1) / R * 4 * 256 * 4 * N + (R - 1) * 4 * N),
        "best entries": (R - 1) * N * POSITIVES * 8,
        "sums of the loss": (R - 1) / R * parts * N * 2 * (2 + WIDTH) * 4,
    }
    # anchors, ids; per stage four all-reduces and the ties; best; query, ids, positives, sums
    collectives = 2 + 5 * (stages - 1) + 1 + 4
    first = stage_keep(stages, size, 0.5, POSITIVES)[0]
    features = VIEWS * held * WIDTH * itemsize
    operations = 2 * N * held * WIDTH * (VIEWS + 2)  # scores of both views, scores and weighted sums of the loss
    return {
        "size": size,
        "processes": R,
        "batch": batch,
        "stages": stages,
        "sent_bytes": {name: round(value) for name, value in sent.items()},
        "sent_mb": sum(sent.values()) / 1e6,
        "candidates_of_first_stage_mb": (R - 1) * N * min(first, held) * 8 / 1e6,
        "features_gib": features / 2**30,
        "whole_features_gib": VIEWS * size * WIDTH * itemsize / 2**30,
        "ids_gib": size * COLUMNS / 2**30,
        "collectives": collectives,
        "wire_ms": 1e3 * (sum(sent.values()) / BYTES_PER_S + collectives * COLLECTIVE_S),
        "computing_ms": 1e3 * max(operations / FLOPS, 2 * features / MEMORY_BYTES_PER_S),
    }


def features_of(size: int, slots: range) -> torch.Tensor:
    """Returns the features [V, slots, D] of a range of the memory; the same numbers for every division."""
    block, features = 2**13, torch.empty(VIEWS, len(slots), WIDTH)
    for first in range(slots.start // block * block, slots.stop, block):
        draw = torch.Generator().manual_seed(first)
        drawn = torch.randn(VIEWS, min(block, size - first), WIDTH, generator=draw)
        begin, end = max(first, slots.start), min(first + block, slots.stop)
        units = torch.nn.functional.normalize(drawn[:, begin - first : end - first], dim=2)
        features[:, begin - slots.start : end - slots.start] = units
    return features


def ids_of(size: int, slots: range) -> torch.Tensor:
    return torch.arange(slots.start, slots.stop) % (size // 20)


def queries_of(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(2**40)
    return torch.nn.functional.normalize(torch.randn(VIEWS, count, WIDTH, generator=draw), dim=2), torch.arange(count)


def one_process(rank: int, size: int, processes: int, batch: int, stages: int, rounds: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), processes)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=processes)
    shard = Shard(size, rank, processes)
    memory, memory_ids = features_of(size, shard.slots_of(rank)), ids_of(size, shard.slots_of(rank))
    queries, ids = queries_of(processes * batch)
    rows = slice(rank * batch, (rank + 1) * batch)
    times: dict[str, list[float]] = {"selection": [], "loss and gradient": [], "both, wall": []}
    for _ in range(rounds):
        dist.barrier()
        began, wall = time.process_time(), time.perf_counter()
        indices, _ = sharded_cascade_select(
            queries, memory, stage_views(stages), stage_keep(stages, size, 0.5, POSITIVES), shard, query_ids=ids,
            memory_ids=memory_ids,
        )  # fmt: skip
        selected = time.process_time()
        query = queries[0, rows].clone().requires_grad_()
        loss = sharded_mil_nce(query, queries[1, rows], memory[0], indices[rows], shard, query_ids=ids[rows],
                               memory_ids=memory_ids, same_id="negative", reduction="none")  # fmt: skip
        loss.mean().backward()
        times["selection"].append(selected - began)
        times["loss and gradient"].append(time.process_time() - selected)
        times["both, wall"].append(time.perf_counter() - wall)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    result = {"times": times, "peak_gib": peak, "indices": indices, "loss": loss.detach(), "gradient": query.grad}
    torch.save(result, folder / f"{rank}.pt")
    dist.destroy_process_group()


def alone(size: int, batch: int, stages: int, parts: list[dict[str, Any]], folder: Path) -> None:
    """Computes the same with the whole memory, and compares the bits."""
    torch.set_num_threads(1)
    memory, memory_ids = features_of(size, range(size)), ids_of(size, range(size))
    queries, ids = queries_of(len(parts) * batch)
    began = time.process_time()
    indices, _ = cascade_select(queries, memory, stage_views(stages), stage_keep(stages, size, 0.5, POSITIVES),
                                query_ids=ids, memory_ids=memory_ids)  # fmt: skip
    selected = time.process_time()
    query = queries[0].clone().requires_grad_()
    loss = mil_nce(query, queries[1], memory[0], indices, query_ids=ids, memory_ids=memory_ids, same_id="negative",
                   reduction="none")  # fmt: skip
    loss.unflatten(0, (len(parts), batch)).mean(1).sum().backward()
    times = {"selection": [selected - began], "loss and gradient": [time.process_time() - selected]}
    same = {
        "slots": all(torch.equal(part["indices"], indices) for part in parts),
        "loss": torch.equal(torch.cat([part["loss"] for part in parts]), loss.detach()),
        "gradient": torch.equal(torch.cat([part["gradient"] for part in parts]), query.grad),
    }
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    torch.save({"times": times, "peak_gib": peak, "same": same}, folder / "alone.pt")


def measure(size: int, processes: int, batch: int, stages: int, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arguments = (size, processes, batch, stages, rounds, folder)
        multiprocessing.spawn(one_process, arguments, nprocs=processes)
        parts = [torch.load(folder / f"{rank}.pt") for rank in range(processes)]
        whole = multiprocessing.get_context("spawn").Process(target=alone, args=(size, batch, stages, parts, folder))
        whole.start()
        whole.join()
        one = torch.load(folder / "alone.pt")
    times = {name: statistics.median(max(p["times"][name][i] for p in parts) for i in range(rounds))
             for name in parts[0]["times"]}  # fmt: skip
    return {
        **{"size": size, "processes": processes, "batch": batch, "stages": stages, "rounds": rounds},
        "collectives": plan(size, processes, batch, stages, 4)["collectives"],
        "load_average": os.getloadavg()[0],
        "seconds": times,
        "peak_gib": max(part["peak_gib"] for part in parts),
        "alone_seconds": {name: values[0] for name, values in one["times"].items()},
        "alone_peak_gib": one["peak_gib"],
        "same_bits": one["same"],
    }


def page(report: dict[str, Any]) -> str:
    plans = "\n".join(
        f"| {p['size'] / 2**20:.0f} M | {p['processes']} | {p['stages']} | {p['whole_features_gib']:.1f} | "
        f"{p['features_gib']:.2f} | {p['ids_gib']:.2f} | {p['sent_mb']:.1f} | "
        f"{p['candidates_of_first_stage_mb']:,.0f} | "
        f"{p['wire_ms']:.1f} | {p['computing_ms']:.1f} |"
        for p in report["plans"]
    )
    largest = max(report["plans"], key=lambda p: p["sent_mb"])
    shares = ", ".join(f"{name} {value / 1e6:.1f} MB" for name, value in largest["sent_bytes"].items())
    m = report["measured"]
    assumed = f"{BYTES_PER_S / 1e9:.0f} GB/s and {COLLECTIVE_S * 1e6:.0f} us per collective"
    load = f"busy (load average {m['load_average']:.0f} on {os.cpu_count()} cores)" if m["load_average"] > 3 else "idle"
    same = ", ".join(f"{name}: {'same bits' if equal else 'DIFFERENT'}" for name, equal in m["same_bits"].items())
    rows = "\n".join(
        f"| {name} | {value:.2f} | {m['alone_seconds'].get(name, float('nan')):.2f} |".replace("nan", "-")
        for name, value in m["seconds"].items()
    )
    return f"""# A memory divided among processes

Command: `{report["command"]}`, commit {report["commit"]}, torch {report["torch"]}, {report["device"]}.

## Planned, per process and step

{VIEWS} views of {WIDTH} dimensions in float16, {report["plans"][0]["batch"]} queries per process, r = .5, {POSITIVES}
positives. "Candidates" is what the first stage alone would send if processes exchanged scores and slots instead of
counts. The times are predicted, not measured. That of the wire assumes {assumed}.
That of computing is the larger of the float32 operations at {FLOPS / 1e12:.0f} TFLOP/s and two readings of the features
at {MEMORY_BYTES_PER_S / 1e12:.2f} TB/s (H100 SXM), a lower bound: on CUDA the partial operators are computed in plain
PyTorch, which takes longer. The trainer holds features in float32: twice the GiB of the features.

| K | processes | stages | whole, GiB | features, GiB | ids, GiB | sent, MB | candidates, MB | wire, ms | compute, ms |
|---|---|---|---|---|---|---|---|---|---|
{plans}

Of the {largest["sent_mb"]:.0f} MB of {largest["processes"]} processes and {largest["stages"]} stages: {shares}.
The scores of the entries take at most 1 GiB in addition; more queries are compared in parts.

## Measured

K = {m["size"]:,} x {WIDTH} in float32, {VIEWS} views, {m["stages"]} stages, {m["processes"]} gloo processes of
{m["batch"]} queries each on this machine, one thread each; median of {m["rounds"]} rounds of the slower process. One
process computes all {m["processes"] * m["batch"]} queries once. CPU seconds, except for the wall time; the machine was
{load} during the run, and the processes wait for each other {m["collectives"]} times in a step.

| | {m["processes"]} processes | one |
|---|---|---|
{rows}
| peak memory, GiB | {m["peak_gib"]:.2f} | {m["alone_peak_gib"]:.2f} |

Compared with one process: {same}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=2**20, help="K of the measured run")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16, help="queries per process of the measured run")
    parser.add_argument("--stages", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    plans = [plan(2**24, processes, 32, stages, 2) for processes in (8, 64) for stages in (3, 7)]
    measured = measure(options.size, options.processes, options.batch, options.stages, options.rounds)
    report = world("cpu") | {"plans": plans, "measured": measured}
    out = Path(os.environ.get("OUT", RESULTS))
    write_result("sharded_memory.json", json.dumps(report, indent=2) + "\n", out)
    write_result("sharded_memory.md", page(report), out)
    print(page(report))
    if not all(measured["same_bits"].values()):
        sys.exit("the results differ from those of one process")


if __name__ == "__main__":
    main()
