"""Predicts the times of the CUDA kernels on GPUs, before anything is measured there.

    python bench/predict_gpu.py [--out bench/results]            writes gpu_predicted.json and gpu_predicted.md
    python bench/predict_gpu.py compare [--out DIR]              prints predicted beside measured times, with the median
                                                                 error; reads gpu_time.json and gpu_flow.json there

Input: ptx_counts.json (bench/ptx/ptx_counts.py), which has for every launch of a call the instructions, sectors and
wavefronts of a block and its registers. A launch takes the longest of

    issue       machine instructions of the busiest multiprocessor, 4 per cycle
    fp32, alu, tensor, special, fp64, shared memory    cycles of that unit there
    latency     waves of blocks, one after the other: the instructions of a warp that waits for its own results, its
                loads from global memory, and its barriers
    L2, HBM     bytes of all sectors; bytes that a call must read and write at least, beyond what the L2 cache keeps

and a call takes the sum of its launches and the time to start each. A prediction is a model, not a measurement.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "ptx"))

from bars import bars_text, by_call, growth_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
KERNEL_GAP_S = 1.2e-6  # between kernels of a CUDA graph on one stream; assumed
LAUNCH_S = 2.5e-6  # of a graph with one kernel, by events; assumed, the figure of bench/measure.py
TORCH_KERNELS = {"mil_nce": 3}  # that torch adds when the gradient is asked for: mean, its gradient, scaling


@dataclass(frozen=True)
class Gpu:
    """Rates are per multiprocessor and cycle; see SOURCES."""

    name: str
    plan: str  # the device of ptx_counts.json with the same limits
    architecture: str
    processors: int
    clock_hz: float
    fp32: float  # warp instructions
    alu: float
    tensor: float  # m16n8k16 products of 16-bit features, by mma.sync
    warpgroup: float  # and by wgmma, counted as such products
    special: float
    fp64: float
    shared_bytes: int  # of a multiprocessor
    l2_bytes: int
    l2_bytes_per_s: float
    hbm_bytes_per_s: float
    l2_latency: float  # cycles
    hbm_latency: float
    floor: dict[str, float]  # operations per second of the floors: by precision


GPUS = [
    Gpu("NVIDIA A100-SXM4-80GB", "A100", "80", 108, 1.41e9, 1.8, 2, 0.5, 0, 0.5, 1, 164 << 10, 40 << 20, 4.5e12, 1.8e12,
        260, 560, {"fp32": 17.5e12, "bf16": 260e12}),
    Gpu("NVIDIA H100 80GB HBM3", "H100", "90a", 132, 1.755e9, 4, 2, 0.62, 0.95, 0.5, 2, 228 << 10, 50 << 20, 5.6e12,
        3.0e12, 270, 660, {"fp32": 60e12, "bf16": 790e12}),
    Gpu("NVIDIA H200", "H100", "90a", 132, 1.755e9, 4, 2, 0.62, 0.95, 0.5, 2, 228 << 10, 50 << 20, 5.6e12,
        4.3e12, 270, 660, {"fp32": 60e12, "bf16": 790e12}),
]  # fmt: skip
SOURCES = {
    "multiprocessors, shared memory, L2": "NVIDIA A100 and H100 architecture white papers; H200 data sheet",
    "clocks": "A100: 1410 MHz under load (chipsandcheese.com, Nvidia's H100: Funny L2). H100 and H200: 1.755 GHz "
    "assumed, between 1.98 GHz (glennklockwood.com/garden/processors/h100) and the 1.4 GHz of a power limit "
    "(chipsandcheese.com)",
    "fp32, alu, special, fp64": "CUDA C++ Programming Guide, throughput of native arithmetic instructions: 64, 64, 16 "
    "and 32 results per cycle and multiprocessor for 8.0; 128, 64, 16 and 64 for 9.0; a warp instruction is 32. Of the "
    "fp32 of A100, 1.8 of 2 warp instructions: the 17.5 of 19.5 TFLOP/s that its floor assumes",
    "tensor": "white papers: 1024 (A100) and 2048 (H100) dense 16-bit multiply-adds per cycle; mma.sync reaches about "
    "62 % of the latter, wgmma of 64 and more columns more than 95 %: 32 cycles for m64n64k16 and 64 for m64n128k16, "
    "with a factor in registers (arXiv 2402.13499 and 2501.12084, Hopper microbenchmarks)",
    "L2 rate": "assumed from measurements of about 4 to 5 TB/s (A100) and 5.5 to 6 TB/s (H100) published for reads",
    "HBM rate": "performance.md: 4.3 TB/s measured on an H200, 1.8 assumed for A100; 3.0 of 3.35 assumed for H100",
    "latencies": "arXiv 2501.12084 and 2402.13499, rounded: L2 about 260, HBM about 560 to 660 cycles",
    "floors": "performance.md: A100 17.5 fp32 and 260 bf16, H200 60 and 790 TFLOP/s",
}

ISSUE = 4.0  # warp instructions per cycle of a multiprocessor
DEPENDENT = 2.4  # cycles between instructions of one warp: latency 4, with some independent ones in between; assumed
INDEPENDENT = 1.2  # cycles between multiply-adds and products, which add to the many sums of a tile; assumed
AWAITED = 1 / 3  # of the products of a warpgroup, nothing runs beside these: the scores, but not the weighted sums
LOADS_AT_ONCE = 4.0  # loads from global memory that a warp waits for together; assumed
BARRIER = 30.0  # cycles; assumed
LONG_SAMPLE_FROM = 2**18  # entries of the memory: kMinLongSample in plan.cuh
TEAM_BARRIER_S = 1.2e-6  # between blocks through global memory; assumed
REGISTERS, WARPS, BLOCKS, RESERVED = 65536, 64, 32, 1024


def has_long_sample(K: int) -> bool:
    return K >= LONG_SAMPLE_FROM


def gathered_entries(K: int) -> float:
    """Returns how many entries the sieve of a query gathers about, by the stages of the benchmarks (K/2 to K/64, and 5)
    and the limits from its sample; see sample_ranks in plan.cuh."""
    sample, before, share = 32768 if has_long_sample(K) else 8192, 1.0, 0.0
    for keep in [*(2.0**-stage for stage in range(1, 7)), 5 / K]:
        expected = sample * keep
        reach = 4.25 * math.sqrt(expected * (1 - keep / before) * max(0.0, 1 - sample / K) + 1) + 4
        share += (min(expected, reach) + reach) / sample
        before = keep
    return share * K


def resident_blocks(gpu: Gpu, threads: int, registers: int, shared_bytes: int) -> int:
    """Returns how many blocks a multiprocessor holds."""
    warps = threads // 32
    by_registers = REGISTERS // (math.ceil(registers * 32 / 256) * 256 * warps)
    by_shared = gpu.shared_bytes // (shared_bytes + RESERVED)
    return max(1, min(BLOCKS, WARPS // warps, by_registers, by_shared))


def work(op: str, precision: str, B: int, K: int) -> tuple[float, float, str]:
    """Returns operations and bytes that a call needs at least, and the precision of its floor (the figures of
    bench/). precision: of the products and, unless it ends with "of fp32", of the features."""
    width = 2 if precision in ("bf16", "bfloat16") else 4
    if op == "cascade_select":
        return 2 * 2 * B * K * 128, width * 2 * (B + K) * 128, precision.split()[0]
    return 2 * 2 * B * K * 128, width * (K + 4 * B) * 128, "fp32" if width == 4 else "bf16"


def floor_s(gpu: Gpu, op: str, precision: str, B: int, K: int) -> float | None:
    """Returns the shortest possible time, with one launch; None for tvl1_flow, whose work depends on the frames."""
    if op == "tvl1_flow":
        return None
    operations, moved, kind = work(op, precision, B, K)
    return max(operations / gpu.floor[kind], moved / gpu.hbm_bytes_per_s) + LAUNCH_S


def warpgroup_cycles(gpu: Gpu, counts: dict[str, float]) -> float:
    """Returns the cycles that a multiprocessor takes for products by wgmma."""
    products = counts.get("warpgroup products", 0)
    return products / gpu.warpgroup if products else 0.0


def units(gpu: Gpu, launch: dict) -> dict[str, float]:
    """Returns the cycles that a block takes of each unit of a multiprocessor."""
    get = {
        key.removeprefix(f"sm_{gpu.architecture} "): value
        for key, value in launch["per_block"].items()
        if key.startswith(f"sm_{gpu.architecture} ")
    }
    memory = math.fsum(get.get(f"{space} {way}", 0) for space in ("shared", "global") for way in ("load", "store"))
    return {
        "issue": math.fsum(get.values()) / ISSUE,
        "fp32": (get.get("fp32", 0) + get.get("imad", 0)) / gpu.fp32,
        "alu": get.get("alu", 0) / gpu.alu,
        "tensor": get.get("tensor", 0) / gpu.tensor + warpgroup_cycles(gpu, launch["per_block"]),
        "special": get.get("special", 0) / gpu.special,
        "fp64": get.get("fp64", 0) / gpu.fp64,
        "shared memory": max(launch["per_block"].get("wavefronts", 0), memory + get.get("shuffle", 0)),
    }


def latency_cycles(gpu: Gpu, launch: dict, from_hbm: float) -> float:
    """Returns the cycles of a block whose warps never compete: each waits for its own results, products and loads."""
    warps = launch["threads"] / 32
    per_warp = {key: value / warps for key, value in launch["per_block"].items()}
    machine = math.fsum(value for key, value in per_warp.items() if key.startswith(f"sm_{gpu.architecture} "))
    sums = math.fsum(per_warp.get(f"sm_{gpu.architecture} {unit}", 0) for unit in ("fp32", "tensor"))
    loads = per_warp.get("global loads", 0) + per_warp.get("ptx copy async", 0) / 4
    latency = gpu.l2_latency + from_hbm * (gpu.hbm_latency - gpu.l2_latency)
    barriers = per_warp.get("ptx barrier", 0)
    products = AWAITED * 4 * warpgroup_cycles(gpu, per_warp)  # of the four warps of a warpgroup
    own = (machine - sums) * DEPENDENT + sums * INDEPENDENT + barriers * BARRIER
    return own + products + loads / LOADS_AT_ONCE * latency


def predict_launch(gpu: Gpu, launch: dict, registers: int, from_hbm: float) -> dict:
    """Returns the time of one launch, its limit, and the time of every resource."""
    blocks = launch["blocks"]
    resident = resident_blocks(gpu, launch["threads"], registers, launch["shared_bytes"])
    busiest = math.ceil(blocks / gpu.processors)
    waves = math.ceil(busiest / resident)
    times = {name: busiest * cycles / gpu.clock_hz for name, cycles in units(gpu, launch).items()}
    times["latency"] = waves * latency_cycles(gpu, launch, from_hbm) / gpu.clock_hz
    times["L2"] = blocks * launch["per_block"].get("sectors", 0) * 32 / gpu.l2_bytes_per_s
    limit = max(times, key=times.__getitem__)
    row = {"kernel": launch["kernel"], "launches": launch["launches"], "blocks": blocks, "resident": resident}
    row |= {"time_us": 1e6 * times[limit], "limit": limit}
    return row | {"resources_us": {name: round(1e6 * value, 2) for name, value in times.items()}}


def hbm_s(gpu: Gpu, call: dict) -> float:
    """Returns the time to read what does not stay in the L2 cache, once for each chunk of queries, and to write long
    lists of gathered entries and read them again."""
    if call["op"] == "tvl1_flow":
        return 0.0
    _, moved, _ = work(call["op"], call["precision"], call["B"], call["K"])
    passes = max(launch["launches"] for launch in call["launches"])
    total = moved * passes if moved > gpu.l2_bytes else 0.0
    for launch in call["launches"]:
        lists = gathered_entries(call["K"]) * 16 * launch["blocks"]  # a record for each entry
        if "streamed_stages" in launch["kernel"] and lists > gpu.l2_bytes:
            total += 2 * lists * launch["launches"]
    return total / gpu.hbm_bytes_per_s


def predict(gpu: Gpu, call: dict, registers: dict) -> dict:
    """Returns the time of a call with its launches; limit: the resource that bounds most of it."""
    moved = 0.0 if call["op"] == "tvl1_flow" else work(call["op"], call["precision"], call["B"], call["K"])[1]
    from_hbm = float(moved > gpu.l2_bytes)
    rows = [
        predict_launch(gpu, launch, registers[launch["kernel"]][gpu.architecture], from_hbm)
        for launch in call["launches"]
    ]
    shares: dict[str, float] = {}
    for row in rows:
        shares[row["limit"]] = shares.get(row["limit"], 0.0) + row["launches"] * row["time_us"] * 1e-6
    shares["launches"] = LAUNCH_S + KERNEL_GAP_S * (sum(row["launches"] for row in rows) - 1)
    shares["launches"] += KERNEL_GAP_S * TORCH_KERNELS.get(call["op"], 0)
    if call["op"] == "tvl1_flow":
        barriers = max(launch["per_block"].get("ptx atomic", 0) for launch in call["launches"])
        shares["barriers between blocks"] = TEAM_BARRIER_S * barriers
    total = math.fsum(shares.values())
    if (memory := hbm_s(gpu, call)) > total - shares["launches"]:
        shares["HBM"] = memory
        total = memory + shares["launches"]
    floor = floor_s(gpu, call["op"], call["precision"], call["B"], call["K"])
    row = {"device": gpu.name, "op": call["op"], "precision": call["precision"], "B": call["B"], "K": call["K"]}
    row |= {"time_us": round(1e6 * total, 2), "limit": max(shares, key=shares.__getitem__)}
    row |= {"floor_us": floor and round(1e6 * floor, 2), "over_floor": floor and round(total / floor, 2)}
    return row | {"kernels": rows}


def measured_rows(folder: Path) -> list[dict]:
    """Returns times by events of CUDA-graph replays, from the files of bench/gpu_probe.py time and flow."""
    rows = []
    if (path := folder / "gpu_time.json").exists():
        report = json.loads(path.read_text())
        rows += [row | {"device": report["device"]} for row in report["rows"]]
    if (path := folder / "gpu_flow.json").exists():
        report = json.loads(path.read_text())
        rows += [
            {"op": "tvl1_flow", "precision": "fp32", "B": row["pairs"], "K": 340, "device": report["device"]}
            | {"time_us": 1e3 * row["time_ms"]}
            for row in report["rows"]
        ]
    return rows


def compare(predicted: list[dict], measured: list[dict]) -> tuple[list[str], float | None]:
    """Returns lines that put predicted times beside measured ones, and the median of the relative errors."""
    calls = by_call(predicted)
    lines, errors = [], []
    for row in measured:
        found = calls.get(tuple(row[key] for key in ("device", "op", "precision", "B", "K")))
        if found is None:
            continue
        error = found["time_us"] / row["time_us"] - 1
        errors.append(abs(error))
        call = f"{row['op']} {row['precision']} {row['B']}x{row['K']}"
        lines.append(f"{call:40} predicted {found['time_us']:12.1f} us  measured {row['time_us']:12.1f} us  "
                     f"{100 * error:+7.1f} %  limit {found['limit']}")  # fmt: skip
    return lines, statistics.median(errors) if errors else None


def resource_us(row: dict, kernel: str) -> dict:
    """Returns the microseconds of every resource in the first launch of a kernel in a call."""
    return next(launch["resources_us"] for launch in row["kernels"] if launch["kernel"].startswith(kernel))


def limits_text(rows: list[dict]) -> list[str]:
    """Returns what the times of the calls that are furthest from their floors are spent on, with the counts."""
    a100, h200, shape = GPUS[0].name, GPUS[2], (256, 65536)
    calls = by_call(rows)
    bf16_call = calls[h200.name, "mil_nce", "bfloat16", *shape]
    bf16 = resource_us(bf16_call, "warpgroup_scan_kernel")
    fp32 = resource_us(calls[h200.name, "mil_nce", "float32", *shape], "wide_scan_kernel")
    score, select = (
        resource_us(calls[h200.name, "cascade_select", "fp32", 32, 16384], kernel)
        for kernel in ("score_kernel", "select_on_chip_kernel")
    )
    peak = 2 * 2048 * h200.processors * h200.clock_hz
    by_warps = 1.5 * h200.floor["bf16"] / (h200.tensor * peak)
    slower = bf16["tensor"] * h200.warpgroup * peak / h200.floor["bf16"]
    over_floor = (bf16_call["time_us"] - bf16_call["kernels"][0]["time_us"] + slower) / bf16_call["floor_us"]
    in_fp32, in_bf16 = (
        resource_us(calls[a100, "cascade_select", precision, *shape], "stream_kernel") for precision in ("fp32", "bf16")
    )
    ranked = resource_us(calls[a100, "cascade_select", "bf16", *shape], "streamed_stages_kernel")
    return [
        "What the calls furthest from their floors spend their time on, at 256 x 65536:",
        "",
        f"- mil_nce bfloat16 on H100 and H200: tensor cores, {bf16['tensor']:.1f} µs; the exponentials take "
        f"{bf16['special']:.1f} µs of their own unit, beside them. The scan multiplies three times, once for a score "
        "and once for each of the two terms of a weight (the rounding of a single term would dominate the gradient), "
        f"where the floor counts two products. With mma.sync, {h200.tensor * peak / 1e12:.0f} TFLOP/s, no call takes "
        f"less than {by_warps:.2f} times the floor, which assumes {h200.floor['bf16'] / 1e12:.0f}; before wgmma, the "
        "same model gave 34.4 µs (2.6 times the floor), 122.8 µs for 1024 x 65536 (2.7) and 1427.4 µs for 1024 x "
        f"1000000 (2.1). wgmma is taken to reach {h200.warpgroup * peak / 1e12:.0f} TFLOP/s at the assumed clock. If "
        f"power limits it to the {h200.floor['bf16'] / 1e12:.0f} of the floor, the products take {slower:.1f} µs and "
        f"the call {over_floor:.2f} times the floor. None of the three products can be saved with the same bound on "
        "the error: one term of a weight, as bfloat16, is off by up to 2^-9 of it, for all keys alike, and TF32, whose "
        "11 bits are not both terms either, has half the rate.",
        f"- mil_nce float32 on H100 and H200: instructions, {fp32['issue']:.0f} µs, about {fp32['fp32']:.0f} of which "
        f"for multiply-adds; shared memory takes {fp32['shared memory']:.0f} µs beside them. A thread computes 8 x 8 "
        "scores and reads 16 vectors for 256 multiply-adds: 64 cycles of shared memory and of arithmetic. The 4 x 4 "
        "scores of smaller calls read 8 for 64: 32 cycles of shared memory and 16 of arithmetic. Larger tiles of a "
        "thread do not fit: 128 of its 255 registers hold scores and sums. With 4 x 4 scores everywhere the same model "
        "gives 316 µs, and 25.4 ms for 1024 x 1000000; on A100 601 µs and 36.1 ms.",
        "- cascade_select bf16 is not twice as fast as fp32 everywhere, because tensor cores compute the scores of "
        f"fp32 as well: on A100 the pass over the memory takes {in_fp32['tensor']:.0f} µs of products for fp32 and "
        f"{in_bf16['tensor']:.0f} µs for bf16, {in_fp32['issue']:.0f} and {in_bf16['issue']:.0f} µs of instructions, "
        f"and {in_fp32['L2']:.0f} and {in_bf16['L2']:.0f} µs of traffic with the L2 cache: features of half the size, "
        "but as many gathered entries, each a slot and two scores in three places. To sample is the same work in both, "
        f"and to rank the gathered entries nearly so, {max(ranked.values()):.0f} µs for bf16.",
        f"- cascade_select fp32 on H100 and H200, at 32 x 16384: the scores take {score['shared memory']:.1f} µs, by "
        "shared memory, which a thread reads 12 vectors from for 4 x 8 scores and four features, and the selection "
        f"{select['issue']:.1f} µs of instructions of one multiprocessor for each query, 32 of 132. With 4 x 4 scores "
        "for every device and size, a conversion of each score to its bucket, and survivors that were visited bit by "
        "bit, they took 9.3 and 14.2 µs. A call then took 27.3 µs here and 11.5 µs at 32 x 2048, 3.9 and 3.8 times the "
        "floor, and on A100 35.8 and 13.2 µs.",
    ]


def page(report: dict) -> str:
    """Returns the predictions as a page."""
    lines = [
        "# Predicted times on GPUs",
        "",
        "Written by `python bench/predict_gpu.py` before anything was measured on these devices; the model and its",
        "assumptions are in the docstring and constants of that file, the counts in `ptx_counts.json`. The times of",
        "`bench/gpu_check.sh` stand beside these when it runs on one of the devices.",
        "",
        "| device | operator | B x K | time µs | floor µs | x floor | limit |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        floor = f"{row['floor_us']:.1f} | {row['over_floor']:.1f}" if row["floor_us"] else "- | -"
        lines.append(f"| {row['device']} | {row['op']} {row['precision']} | {row['B']} x {row['K']} | "
                     f"{row['time_us']:.1f} | {floor} | {row['limit']} |")  # fmt: skip
    lines += ["", "For tvl1_flow, B is the number of pairs of 340 x 256 frames. The floor of cascade_select fp32 is"]
    lines += ["that of float32 multiply-adds. Long memories take less: tensor cores compute their scores, and only"]
    lines += ["those near a threshold are computed again in float32. bf16: features and products of bfloat16, as its"]
    lines += ['floor assumes. bf16 of fp32: float32 features with `precision="bf16"`, rounded for the products.']
    lines += ["", *bars_text(report["rows"]), ""]
    lines += [*growth_text(report["growth"]), "", *limits_text(report["rows"])]
    lines += ["", "Figures of the devices:", ""]
    lines += [f"- {what}: {source}." for what, source in report["sources"].items()]
    return "\n".join(lines) + "\n"


def write(counts: Path, out: Path) -> None:
    """Predicts every counted call and writes gpu_predicted.json and gpu_predicted.md to `out`."""
    report = json.loads(counts.read_text())
    rows = [
        predict(gpu, call, report["registers"])
        for gpu in GPUS
        for call in report["calls"]
        if call["device"] == gpu.plan
    ]
    made = {"counts": report["world"]["commit"], "sources": SOURCES, "rows": rows, "growth": report["growth"]}
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu_predicted.json").write_text(json.dumps(made, indent=1) + "\n")
    (out / "gpu_predicted.md").write_text(page(made))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", nargs="?", choices=("write", "compare"), default="write")
    parser.add_argument("--counts", type=Path, default=RESULTS / "ptx_counts.json")
    parser.add_argument("--predicted", type=Path, default=RESULTS / "gpu_predicted.json")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.action == "write":
        write(options.counts, options.out)
        return
    measured = measured_rows(options.out)
    if not measured:
        sys.exit(f"{options.out}: neither gpu_time.json nor gpu_flow.json (python bench/gpu_probe.py time, flow)")
    lines, error = compare(json.loads(options.predicted.read_text())["rows"], measured)
    if error is None:
        print(f"no prediction for {measured[0]['device']}; there are some for {', '.join(gpu.name for gpu in GPUS)}")
        return
    print(*lines, sep="\n")
    print(f"median error of {len(lines)} predictions: {100 * error:.1f} %")


if __name__ == "__main__":
    main()
