"""Compares the kernels with other implementations in one run: `make bench`, or

    python bench/kernels/compare.py [--device cpu|cuda] [--avx2] [--shapes 32x2048 ...] [--out bench/results]

It prints the comparison and writes kernels_DEVICE.json, .md (tables) and .png (time over K with the floor). With --avx2
all forms use the instructions of a processor without AVX-512, such as those beside A100s, and the name ends in _avx2.
On the CPU it measures the CPU time of one thread, with the forms in turn, the growth of time and memory with K, and the
gain of a second thread compared with that of torch's matrix product (wall clock, valid on an idle machine only). It
takes about six minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from itertools import product
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cascade_forms
import loss_forms
from forms import ALL_SHAPES, CPU_SHAPES, Unavailable
from measure import AVX2, RESULTS, Rates, measure_rates, peak_mib, samples_s, summary, world, write_result
from page import write_page

OPS = (cascade_forms, loss_forms)
SWEEP_B = 32
SWEEP_FORMS = {"cascade_select": ("cpr_fast", "best eager"), "mil_nce": ("cpr_fast", "lean eager", "SDPA with LSE")}
LOSS_SWEEP = "gradient"
WARM = 32 * 16384  # B x K up to which the state of the caches matters


def prepare(op, names, B: int, K: int, device: str, direction: str, dtype: torch.dtype) -> tuple[dict, dict, object]:
    """Returns the calls of the forms that run, the reasons of those that do not, and the inputs."""
    inputs, calls, absent = op.make_inputs(B, K, device, direction, dtype), {}, {}
    for name in names:
        try:
            calls[name] = op.FORMS[name](inputs)
            calls[name]()
        except (Unavailable, torch.cuda.OutOfMemoryError) as reason:
            absent[name] = str(reason).splitlines()[0]
            calls.pop(name, None)
    return calls, absent, inputs


def compare(op, names, shape: tuple[int, int], direction: str, dtype: torch.dtype, rates: Rates, budget_s: float):
    """Returns a row for each form at one shape: its times, and their ratio to cpr_fast."""
    (B, K), device = shape, rates.device
    calls, absent, inputs = prepare(op, names, B, K, device, direction, dtype)
    times = samples_s(calls, device, budget_s)
    warm = samples_s(calls, device, budget_s / 2, warm=True) if B * K <= WARM else {}
    base = {"op": op.OP, "direction": direction, "B": B, "K": K, "D": op.D, "dtype": str(dtype).removeprefix("torch.")}
    base["floor_ms"] = 1e3 * rates.floor_s(*op.work(B, K, direction), dtype)
    ours = summary(times["cpr_fast"])["time_ms"]
    rows = []
    for name in names:
        row = base | {"form": name}
        if name in calls:
            row |= summary(times[name])
            row |= {"over_cpr_fast": row["time_ms"] / ours, "over_floor": row["time_ms"] / row["floor_ms"]}
            row["warm_ms"] = summary(warm[name])["time_ms"] if warm else None
            row["peak_mib"] = peak_mib(calls[name], device)
            row["error"] = None if name in op.NO_ERROR else op.error(inputs, calls[name]())
        else:
            row["skipped"] = absent[name]
        rows.append(row)
    return rows


def sweep(op, largest: int, rates: Rates, budget_s: float) -> list[dict]:
    """Returns time and extra memory for each doubling of K."""
    direction, device, dtype = LOSS_SWEEP if op is loss_forms else "forward", rates.device, torch.float32
    rows, K = [], 512
    while (K := 2 * K) <= largest:
        calls, _, _ = prepare(op, SWEEP_FORMS[op.OP], SWEEP_B, K, device, direction, dtype)
        times = samples_s(calls, device, budget_s)
        for name, call in calls.items():
            row = {"op": op.OP, "direction": direction, "form": name, "B": SWEEP_B, "K": K} | summary(times[name])
            floor_ms = 1e3 * rates.floor_s(*op.work(SWEEP_B, K, direction), dtype)
            rows.append(row | {"floor_ms": floor_ms, "peak_mib": peak_mib(call, device)})
    return rows


def threads(shape: tuple[int, int], budget_s: float) -> list[dict]:
    """Returns the gain of a second thread for the operators and torch's matrix product, by wall clock, all in turn."""
    B, K = shape
    selection = cascade_forms.make_inputs(B, K, "cpu", "forward", torch.float32)
    loss = loss_forms.make_inputs(B, K, "cpu", LOSS_SWEEP, torch.float32)
    calls = {
        "cascade_select": cascade_forms.FORMS["cpr_fast"](selection),
        "mil_nce": loss_forms.FORMS["cpr_fast"](loss),
        "matrix product": cascade_forms.FORMS["two GEMMs alone"](selection),
    }

    def on(count: int, call):
        def run():
            torch.set_num_threads(count)
            call()

        return run

    both = {f"{name}/{count}": on(count, call) for name, call in calls.items() for count in (1, 2)}
    times = samples_s(both, "cpu", budget_s, clock=time.perf_counter)
    torch.set_num_threads(1)
    rows = []
    for name in calls:
        one, two = (summary(times[f"{name}/{count}"])["time_ms"] for count in (1, 2))
        rows.append({"form": name, "B": B, "K": K, "one_ms": one, "two_ms": two, "gain": one / two})
    for row in rows:
        row["of_matrix_product"] = row["gain"] / rows[-1]["gain"]
    return rows


def run(options: argparse.Namespace, shapes: list[tuple[int, int]], largest: int) -> dict:
    device, without, budget_s = options.device, options.without, options.seconds
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = False
    rates = measure_rates(device)
    report = {"world": world(device), "gb_per_s": rates.bytes_per_s / 1e9}
    report["gflops"] = {str(dtype).removeprefix("torch."): flops / 1e9 for dtype, flops in rates.flops.items()}
    report["rows"] = []
    for op in OPS:
        names = [name for name in op.FORMS if name not in without]
        for direction, dtype, shape in product(op.DIRECTIONS, rates.flops, shapes):
            report["rows"] += compare(op, names, shape, direction, dtype, rates, budget_s)
            print(f"{op.OP}, {direction}, {dtype}, B = {shape[0]}, K = {shape[1]}: done", flush=True)
            if device == "cuda":
                torch.cuda.empty_cache()
    report["sweep"] = [row for op in OPS for row in sweep(op, largest, rates, budget_s / 6)]
    report["threads"] = threads(options.threads, 2 * budget_s) if device == "cpu" and (os.cpu_count() or 1) > 1 else []
    return report


def shape_of(text: str) -> tuple[int, int]:
    B, _, K = text.partition("x")
    return int(B), int(K)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--avx2", action="store_true", help="the instructions of a processor without AVX-512")
    parser.add_argument(
        "--shapes", type=shape_of, nargs="+", help="BxK; default: those of the recorded results on the CPU, all on CUDA"
    )
    parser.add_argument("--without", nargs="+", default=[], metavar="FORM", help="forms to leave out")
    parser.add_argument("--largest", type=int, help="last K of the sweep; default 131072 on the CPU, 1048576 on CUDA")
    parser.add_argument(
        "--threads", type=shape_of, default=(256, 65536), metavar="BxK", help="shape for the gain of a second thread"
    )
    parser.add_argument("--seconds", type=float, default=6, help="total time of all forms of a shape")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.avx2 and any(os.environ.get(name) != value for name, value in AVX2.items()):
        # the variables are read when torch is loaded
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | AVX2)
    shapes = options.shapes or (CPU_SHAPES if options.device == "cpu" else ALL_SHAPES)
    largest = options.largest or (2**17 if options.device == "cpu" else 2**20)
    report = run(options, shapes, largest)
    name = f"kernels_{options.device}{'_avx2' if options.avx2 else ''}"
    write_result(f"{name}.json", json.dumps(report, indent=1) + "\n", options.out)
    write_page(report, options.out / f"{name}.md")


if __name__ == "__main__":
    main()
