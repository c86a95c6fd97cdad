"""Writes the comparison of the kernels as tables on the terminal, a Markdown page and a plot.

`python bench/page.py FILE.json` writes page and plot again from the JSON of a run.
"""

from __future__ import annotations

import json
import os
import sys
from itertools import groupby
from pathlib import Path

import matplotlib
from rich.console import Console
from rich.table import Table

matplotlib.use("Agg")
from matplotlib import pyplot
from measure import write_result

# (op, direction) -> form -> the least ratio of its time to that of cpr_fast: in general, at the smallest shape
BARS = {
    ("cascade_select", "forward"): {
        "best eager": (4, 4),
        "masked top-k": (10, 10),
        "two GEMMs alone": (1 / 1.4, 1 / 1.4),
    },
    ("mil_nce", "gradient"): {"lean eager": (2, 1.8), "SDPA with LSE": (1, 1)},
}
HEADER = ["form", "time ms", "warm ms", "x ours", "bar", "x floor", "error", "peak MiB"]
BARS_HEADER = ["op", "B", "K", "form", "at least", "x ours", "x ours, AVX2", "x ours, warm"]
GROWTH_HEADER = ["op", "K", "time ms", "x the half", "x floor", "peak MiB"]
THREADS_HEADER = ["form", "one ms", "two ms", "gain", "of the matrix product's gain"]


def cells(row: dict, smallest: bool) -> list[str]:
    if "skipped" in row:
        return [row["form"], "-", "-", row["skipped"], "", "", "", ""]
    bar = BARS.get((row["op"], row["direction"]), {}).get(row["form"])
    verdict = ""
    if bar:
        needed = bar[1] if smallest else bar[0]
        verdict = f"{'met' if row['over_cpr_fast'] >= needed else 'MISSED'} (>= {needed:.2g})"
    spread = f"{row['time_ms']:.3g} ({row['low_ms']:.3g} to {row['high_ms']:.3g})"
    warm = f"{row['warm_ms']:.3g}" if row["warm_ms"] else "-"
    error = "-" if row["error"] is None else f"{row['error']:.1e}" if row["error"] else "0"
    return [
        row["form"], spread, warm, f"{row['over_cpr_fast']:.2f}", verdict, f"{row['over_floor']:.2f}", error,
        f"{row['peak_mib']:.1f}",
    ]  # fmt: skip


def tables(report: dict) -> list[tuple[str, list[list[str]]]]:
    """Returns the title and the rows of each comparison."""
    found, smallest = [], min(row["B"] * row["K"] for row in report["rows"])
    for key, group in groupby(
        report["rows"], key=lambda row: (row["op"], row["direction"], row["dtype"], row["B"], row["K"])
    ):
        rows = list(group)
        op, direction, dtype, B, K = key
        title = f"{op}, {direction}, {dtype}, B = {B}, K = {K}; floor {rows[0]['floor_ms']:.3g} ms"
        found.append((title, [cells(row, smallest == B * K) for row in rows]))
    return found


def bars(report: dict) -> list[list[str]]:
    """Returns a row for every bar: the bar, the ratio with the best CPU variant (or on CUDA), and that with AVX2."""
    found, smallest = [], min(row["B"] * row["K"] for row in report["rows"])
    for key, group in groupby(
        report["rows"], key=lambda row: (row["op"], row["direction"], row["dtype"], row["B"], row["K"])
    ):
        op, direction, _, B, K = key
        rows = [row for row in group if "skipped" not in row]
        times, warm = ({row["form"]: row[field] for row in rows} for field in ("time_ms", "warm_ms"))
        for form, (elsewhere, at_smallest) in BARS.get((op, direction), {}).items():
            if form not in times:
                continue
            needed = at_smallest if smallest == B * K else elsewhere
            ratios = [times[form] / times[own] if own in times else None for own in ("cpr_fast", "cpr_fast avx2")]
            ratios.append(warm[form] / warm["cpr_fast"] if warm[form] else None)
            shown = ["-" if ratio is None else f"{ratio:.2f}{'' if ratio >= needed else ' MISSED'}" for ratio in ratios]
            found.append([op, str(B), str(K), form, f"{needed:.2g}", *shown])
    return found


def growth(report: dict) -> list[list[str]]:
    """Returns time and memory of cpr_fast over K, and the factor in time for each doubling of K."""
    rows, last = [], {}
    for row in report["sweep"]:
        if row["form"] != "cpr_fast":
            continue
        step = f"{row['time_ms'] / last[row['op']]:.2f}" if row["op"] in last else "-"
        last[row["op"]] = row["time_ms"]
        rows.append([row["op"], str(row["K"]), f"{row['time_ms']:.3g}", step, f"{row['time_ms'] / row['floor_ms']:.2f}",
                     f"{row['peak_mib']:.2f}"])  # fmt: skip
    return rows


def threads(report: dict) -> list[list[str]]:
    return [
        [row["form"], f"{row['one_ms']:.3g}", f"{row['two_ms']:.3g}", f"{row['gain']:.2f}",
         f"{row['of_matrix_product']:.2f}"]
        for row in report["threads"]
    ]  # fmt: skip


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def show(console: Console, title: str, header: list[str], rows: list[list[str]]) -> None:
    table = Table(*header, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def plot(report: dict, path: Path) -> None:
    """Plots time over K with the floor; both axes are logarithmic."""
    ops = list(dict.fromkeys(row["op"] for row in report["sweep"]))
    figure, axes = pyplot.subplots(1, len(ops), figsize=(5.5 * len(ops), 4), constrained_layout=True)
    for axis, op in zip(axes, ops, strict=True):
        rows = [row for row in report["sweep"] if row["op"] == op]
        for form in dict.fromkeys(row["form"] for row in rows):
            line = [(row["K"], row["time_ms"]) for row in rows if row["form"] == form]
            axis.plot(*zip(*line, strict=True), marker="o", markersize=3, label=form)
        floor = [(row["K"], row["floor_ms"]) for row in rows if row["form"] == "cpr_fast"]
        axis.plot(*zip(*floor, strict=True), "k--", linewidth=1, label="floor")
        axis.set(xscale="log", yscale="log", xlabel="memory entries K", ylabel="time, ms")
        axis.set_title(f"{op}, {rows[0]['direction']}, B = {rows[0]['B']}")
        axis.legend()
    partial = path.with_suffix(".partial.png")
    figure.savefig(partial, dpi=110)
    os.replace(partial, path)


def write_page(report: dict, path: Path) -> None:
    console = Console(width=150)
    world = report["world"]
    rates = ", ".join(f"{gflops:.0f} GFLOP/s in {dtype}" for dtype, gflops in report["gflops"].items())
    text = [
        "# The kernels and other implementations\n",
        f"`{world['command']}` at {world['commit']}, torch {world['torch']}, on {world['device']}.\n",
        "Times are medians (quartiles) of calls taken in turn with all other forms in one process; on the CPU process "
        "CPU time of one thread. `x ours`: how many times as long as `cpr_fast` the form takes; `cpr_fast again` is "
        "the same call once more and shows the spread. Warm: of small shapes, the time of a call right after itself; "
        "otherwise a form finds the caches as the one before it left them. Floor: the operations no form can avoid at "
        f"{rates}, or their bytes at {report['gb_per_s']:.0f} GB/s, both measured in the same "
        "process. Error: of a selection, the share of entries that float64 does not select; of a loss, the largest "
        "deviation from float64 of loss or gradient over the largest true value. Peak: memory beyond the inputs.\n",
    ]
    text += ["## Bars\n", markdown_table(BARS_HEADER, bars(report))]
    for title, rows in tables(report):
        show(console, title, HEADER, rows)
        text += [f"## {title}\n", markdown_table(HEADER, rows)]
    text += [f"## K doubled, B = {report['sweep'][0]['B']}\n", markdown_table(GROWTH_HEADER, growth(report))]
    text += [f"![time over K]({path.with_suffix('.png').name})\n"]
    if report["threads"]:
        title = "## From one thread to two, B = {B}, K = {K}; wall clock\n".format(**report["threads"][0])
        text += [title, markdown_table(THREADS_HEADER, threads(report))]
        show(console, title.strip("#\n "), THREADS_HEADER, threads(report))
    show(console, "K doubled", GROWTH_HEADER, growth(report))
    show(console, "Bars", BARS_HEADER, bars(report))
    plot(report, path.with_suffix(".png"))
    write_result(path.name, "\n".join(text), path.parent)
    console.print(f"written: {path}, its .json and .png", highlight=False)


if __name__ == "__main__":
    source = Path(sys.argv[1])
    write_page(json.loads(source.read_text()), source.with_suffix(".md"))
