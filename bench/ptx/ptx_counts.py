"""Counts what the compiled CUDA kernels do, without a GPU: executes their PTX in the interpreter of tests/support/ptx.

    python bench/ptx/ptx_counts.py [--out bench/results] [--routes "on chip" streamed ... | --operators mil_nce]

writes ptx_counts.json and ptx_counts.md: instructions by class, active lanes, sectors of 32 bytes, wavefronts of shared
memory and the busiest source lines of interpreted calls; how far extrapolated counts are from interpreted ones; the
launches of every call of bench/predict_gpu.py with the counts of a block; and, over memories of 1,024 to 4,194,304
entries, the times alone that bench/predict_gpu.py derives from such counts. Needs nvcc and nvdisasm (see sass.py);
takes about nine minutes of one core.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

import predict_gpu
from measure import RESULTS, world, write_result
from ptx_cases import (
    DEVICES,
    FORMATS,
    ROUTES,
    Call,
    Disassembly,
    Kernel,
    architectures_of,
    extrapolate,
    interpret,
    plan,
)
from support.ptx.device import ARCHITECTURES, PtxDevice

SHAPES = [(16, 2048), (32, 2048), (32, 16384), (256, 16384), (256, 65536), (1024, 65536)]
SHAPES += [(1024, 1_000_000), (4096, 1_000_000)]
# The calls whose times are predicted over K, and the K.
GROWING = [("cascade_select", "fp32", 32), ("cascade_select", "fp32", 256)]
GROWING += [("mil_nce", "float32", 256), ("mil_nce", "bfloat16", 256)]
MEMORIES = [2**power for power in range(10, 23)]
PRECISIONS = {"cascade_select": tuple(FORMATS), "mil_nce": ("float32", "bfloat16")}
OPERATORS = (*PRECISIONS, "tvl1_flow")
# For each kernel two calls with different features, where it has one.
SAMPLES = [
    *(Call("cascade_select", "fp32", B, K, "on chip") for B, K in ((32, 2048), (32, 16384), (64, 2048))),
    Call("cascade_select", "fp32", 32, 2048, "on chip of an A100"),
    *(Call("cascade_select", precision, 32, 2048, "on chip") for precision in ("bf16", "bf16 of fp32")),
    *(Call("cascade_select", precision, 64, K, "streamed") for precision in FORMATS for K in (32768, 65536)),
    # Long samples.
    *(Call("cascade_select", precision, 64, 2**18, "streamed by 16 multiprocessors") for precision in FORMATS),
    # Blocks of several tiles; and at most 32 queries, which have smaller tiles and go through the stages on chip.
    *(Call("cascade_select", precision, 64, 32768, "streamed by 16 multiprocessors") for precision in FORMATS),
    # Lists of many queries in shared memory.
    *(
        Call("cascade_select", precision, 64, K, "shared by 16 multiprocessors")
        for precision in FORMATS
        for K in (49152, 65536)
    ),
    Call("cascade_select", "fp32", 32, 32768, "streamed by 16 multiprocessors"),
    *(Call("cascade_select", "fp32", 32, K, "streamed by an A100") for K in (24576, 32768)),
    *(Call("mil_nce", dtype, 32, K) for dtype in PRECISIONS["mil_nce"] for K in (2048, 16384, 65536)),
    *(Call("mil_nce", "bfloat16", 64, K) for K in (2048, 16384)),  # more than 32 queries have a kernel of their own
    *(Call("mil_nce", "float32", 64, K) for K in (16384, 65536)),  # and larger tiles
    # One warpgroup of a block, and two.
    *(Call("mil_nce", "bfloat16", B, K, architecture="90a") for B in (32, 128) for K in (2048, 16384)),
    Call("tvl1_flow", "fp32", 1, 340),  # one pair of 340x256
]
CHECKS = [
    Call("cascade_select", "fp32", 32, 8192, "on chip"),
    Call("cascade_select", "fp32", 64, 40000, "streamed"),
    Call("cascade_select", "fp32", 64, 49152, "streamed by 16 multiprocessors"),
    Call("cascade_select", "fp32", 32, 28672, "streamed by an A100"),
    Call("cascade_select", "fp32", 64, 57344, "shared by 16 multiprocessors"),
    Call("cascade_select", "fp32", 64, 2**18 + 2**14, "streamed by 16 multiprocessors"),
    Call("mil_nce", "float32", 64, 32768),
    Call("mil_nce", "bfloat16", 64, 131072),
    Call("mil_nce", "bfloat16", 128, 32768, architecture="90a"),
]
CHECKED = ("ptx fp32", "ptx load shared", "ptx load global", "ptx mma", "warpgroup products", "sectors", "wavefronts")


def sample_row(call: Call, kernel: Kernel) -> dict:
    row = {"op": call.op, "precision": call.precision, "route": call.route, "B": call.B, "K": call.K}
    row |= {"kernel": kernel.name, "blocks": kernel.blocks, "threads": kernel.threads, "launches": kernel.launches}
    row |= {"feature": kernel.feature, "architecture": call.architecture}
    row["counts"] = {key: round(value) for key, value in sorted(kernel.counts.items())}
    return row | {"lines": dict(kernel.lines.most_common(5))}


def check_rows(device: PtxDevice, samples: list[Kernel], call: Call) -> list[dict]:
    """Compares extrapolated counts of a call with interpreted ones."""
    rows = []
    for kernel in interpret(device, call):
        if architectures_of(kernel.entry)[0] != call.architecture:
            continue
        launch = next(launch for launch in device.launches_of(call.op) if launch.kernel == kernel.entry)
        made = extrapolate(samples, call, device.launches_of(call.op))
        found = next(row for row in made if row["kernel"] == kernel.name)
        total = sum(value for key, value in kernel.counts.items() if key.startswith("ptx"))
        expected = found["blocks"] * found["launches"] * sum(v for k, v in found["per_block"].items() if k[:3] == "ptx")
        row = {"op": call.op, "precision": call.precision, "route": call.route, "B": call.B, "K": call.K}
        row |= {"kernel": kernel.name, "instructions": total, "error": round(expected / total - 1, 4)}
        blocks = found["blocks"] * found["launches"]
        row["errors"] = {
            key: round(blocks * found["per_block"].get(key, 0) / kernel.counts[key] - 1, 4)
            for key in CHECKED
            if kernel.counts[key] > 0.01 * total
        }
        assert launch.threads == kernel.threads
        rows.append(row)
    return rows


def call_rows(device: PtxDevice, samples: list[Kernel], operators: tuple[str, ...]) -> list[dict]:
    """Returns the launches of every call of these operators on every device, with the counts of a block."""
    rows = []
    calls = [Call(op, precision, B, K) for op in PRECISIONS for precision in PRECISIONS[op] for B, K in SHAPES]
    calls += [Call("tvl1_flow", "fp32", pairs, 340) for pairs in (1, 32, 264)]
    calls = [call for call in calls if call.op in operators]
    for (name, (limits, capability)), call in itertools.product(DEVICES.items(), calls):
        launches = extrapolate(samples, call, plan(device, call, limits, capability))
        for launch in launches:
            launch["per_block"] = {key: round(value, 2) for key, value in sorted(launch["per_block"].items())}
        rows.append({"device": name, "op": call.op, "precision": call.precision, "B": call.B, "K": call.K})
        rows[-1]["launches"] = launches
    return rows


def growth_rows(device: PtxDevice, samples: list[Kernel], registers: dict, operators: tuple[str, ...]) -> list[dict]:
    """Returns the predicted times of GROWING on every GPU, by K."""
    rows = []
    for gpu, (op, precision, B) in itertools.product(predict_gpu.GPUS, GROWING):
        if op not in operators:
            continue
        times = {}
        for K in MEMORIES:
            call = {"op": op, "precision": precision, "B": B, "K": K}
            launches = plan(device, Call(**call), *DEVICES[gpu.plan])
            call["launches"] = extrapolate(samples, Call(**call), launches)
            times[str(K)] = predict_gpu.predict(gpu, call, registers)["time_us"]
        rows.append({"device": gpu.name, "op": op, "precision": precision, "B": B, "time_us": times})
    return rows


def registers_of(code: Disassembly, samples: list[Kernel], operators: dict[str, str]) -> dict[str, dict[str, int]]:
    found = {}
    for kernel in samples:
        files = architectures_of(kernel.entry)
        used = {arch: code.of(operators[kernel.entry], arch)[1][kernel.entry] for arch in files}
        found[kernel.name] = used
    return found


def page(report: dict) -> str:
    """Returns the tables of ptx_counts.md."""
    about = report["world"]
    lines = ["# What the compiled CUDA kernels do", "", f"`{about['command']}`, commit {about['commit']}.", ""]
    lines += [
        "The PTX of nvcc, executed by the interpreter of `tests/support/ptx`. Counts are of a whole call: instructions"
    ]
    lines += [
        "of PTX by warps; active lanes; sectors of 32 bytes per global request and as many times the least; wavefronts"
    ]
    lines += [
        "of shared memory as many times the least; estimated machine instructions for sm_80, or for",
        "sm_90a where only that has the kernel (bench/ptx/sass.py); mma: matrix products of 16 x 8 x 16.",
        "",
    ]
    header = ["call", "kernel", "blocks", "PTX", "machine", "lanes", "fp32 %", "int %", "mma", "sectors/request"]
    header += ["x least", "wavefronts x least", "busiest lines"]
    lines += ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in report["samples"]:
        count = row["counts"].get
        total = sum(value for key, value in row["counts"].items() if key.startswith("ptx"))
        machine = sum(value for key, value in row["counts"].items() if key.startswith(f"sm_{row['architecture']} "))
        integer = sum(count(f"ptx {kind}", 0) for kind in ("int", "int64", "predicate"))
        call = f"{row['op']} {row['precision']} {row['route']} {row['B']}x{row['K']}".replace("  ", " ")
        cells = [call, row["kernel"], row["blocks"], f"{total / 1e6:.2f}M", f"{machine / 1e6:.2f}M"]
        cells += [f"{count('lanes', 0) / max(1, total):.1f}", f"{100 * count('ptx fp32', 0) / total:.0f}"]
        cells += [f"{100 * integer / total:.0f}", count("ptx mma", 0) + count("warpgroup products", 0)]
        cells += [f"{count('sectors', 0) / max(1, count('global requests', 1)):.1f}"]
        cells += [f"{count('sectors', 0) / max(1, count('least sectors', 1)):.2f}"]
        cells += [f"{count('wavefronts', 0) / max(1, count('least wavefronts', 1)):.2f}"]
        cells += [", ".join(f"{line} {100 * share / total:.0f} %" for line, share in list(row["lines"].items())[:3])]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", "Extrapolated counts beside interpreted ones, of calls that are not among those above:", ""]
    lines += ["| call | kernel | PTX | error | largest error of a class |", "|---|---|---|---|---|"]
    for row in report["checks"]:
        worst = max(row["errors"].items(), key=lambda item: abs(item[1]), default=("", 0.0))
        call = f"{row['op']} {row['precision']} {row['route']} {row['B']}x{row['K']}".replace("  ", " ")
        lines.append(f"| {call} | {row['kernel']} | {row['instructions'] / 1e6:.2f}M | {100 * row['error']:.1f} % | "
                     f"{worst[0].removeprefix('ptx ')} {100 * worst[1]:.1f} % |")  # fmt: skip
    return "\n".join(lines) + "\n"


def saved_samples(rows: list[dict]) -> list[Kernel]:
    """Returns saved samples as kernels, from which calls can be extrapolated."""
    found = []
    for row in rows:
        found.append(
            Kernel(row["kernel"], "", row["blocks"], row["threads"], 0, row["launches"], row["feature"], row["K"])
        )
        found[-1].counts.update(row["counts"])
    return found


def sample(devices: dict[str, PtxDevice], calls: list[Call], report: dict) -> list[Kernel]:
    """Interprets calls and adds their rows and registers to a report. Of the PTX of sm_90a it takes the kernels that
    sm_80 does not have."""
    code, samples, operators = Disassembly(), [], {}
    for call in calls:
        devices[call.architecture].select()
        kernels = interpret(devices[call.architecture], call, code)
        kernels = [kernel for kernel in kernels if architectures_of(kernel.entry)[0] == call.architecture]
        samples += kernels
        operators |= {kernel.entry: call.op for kernel in kernels}
        report["samples"] += [sample_row(call, kernel) for kernel in kernels]
        print(f"{call}: interpreted", flush=True)
    report["registers"] |= registers_of(code, samples, operators)
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--routes", nargs="+", choices=ROUTES, metavar="ROUTE",
                      help=f"interpret only the calls of cascade_select on these routes: {', '.join(ROUTES)}; "
                      "the rest of the report stays as it is saved")  # fmt: skip
    only.add_argument("--operators", nargs="+", choices=OPERATORS, metavar="OPERATOR", default=OPERATORS,
                      help="the same for all calls of these operators")  # fmt: skip
    options = parser.parse_args()
    torch.set_num_threads(1)
    devices = {architecture: PtxDevice(architecture) for architecture in ARCHITECTURES}
    report = {"world": world("cpu"), "samples": [], "checks": [], "registers": {}, "calls": [], "growth": []}
    chosen = ("cascade_select",) if options.routes else tuple(options.operators)
    samples = []

    def again(op: str, route: str) -> bool:
        return op in chosen and (not options.routes or route in options.routes)

    if options.routes or set(chosen) != set(OPERATORS):
        kept = json.loads((options.out / "ptx_counts.json").read_text())
        for part in ("samples", "checks"):
            report[part] = [row for row in kept[part] if not again(row["op"], row["route"])]
        samples = saved_samples([row for row in report["samples"] if row["op"] in chosen])
        present = {row["kernel"] for row in report["samples"]}
        report["registers"] = {kernel: used for kernel, used in kept["registers"].items() if kernel in present}
        for part in ("calls", "growth"):
            report[part] = [row for row in kept[part] if row["op"] not in chosen]
    samples += sample(devices, [call for call in SAMPLES if again(call.op, call.route)], report)
    devices["80"].select()
    report["calls"] += call_rows(devices["80"], samples, chosen)
    report["growth"] += growth_rows(devices["80"], samples, report["registers"], chosen)
    for call in (call for call in CHECKS if again(call.op, call.route)):
        devices[call.architecture].select()
        report["checks"] += check_rows(devices[call.architecture], samples, call)
        print(f"{call}: checked", flush=True)
    for part in ("samples", "checks", "calls", "growth"):
        report[part].sort(key=lambda row: row["op"])
    write_result("ptx_counts.json", json.dumps(report, indent=1) + "\n", options.out)
    write_result("ptx_counts.md", page(report), options.out)


if __name__ == "__main__":
    main()
