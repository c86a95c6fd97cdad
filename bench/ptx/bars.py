"""Tables of gpu_predicted.md: predicted times beside their bars and those of before, and their growth over K."""

from __future__ import annotations

GROWTH = 2.2  # at most, of a time where K doubles

# Calls with the largest multiple of the floor that their predicted time may be.
BARS = [
    ("cascade_select", "fp32", 32, 2048, 3.0),
    ("cascade_select", "fp32", 32, 16384, 3.0),
    ("cascade_select", "fp32", 256, 65536, 2.0),
    ("cascade_select", "fp32", 1024, 1_000_000, 2.5),
    ("mil_nce", "bfloat16", 256, 65536, 2.0),
    ("mil_nce", "bfloat16", 4096, 1_000_000, 2.0),
    ("mil_nce", "float32", 256, 65536, 1.5),
    ("mil_nce", "float32", 4096, 1_000_000, 1.5),
]
HALVED = 0.5  # of its time in fp32, at most, that cascade_select takes in bf16 where its floor is at most that, too

# The first committed predictions, microseconds: those of BEFORE_COMMIT, which has no 4096 x 1000000.
BEFORE_COMMIT = "170f4c5"
BEFORE = {
    "NVIDIA A100-SXM4-80GB": {
        ("cascade_select", "fp32", 32, 2048): 17.04,
        ("cascade_select", "fp32", 32, 16384): 41.92,
        ("cascade_select", "fp32", 256, 65536): 1258.8,
        ("cascade_select", "fp32", 1024, 1_000_000): 150924.55,
        ("cascade_select", "bf16 of fp32", 256, 65536): 1162.13,
        ("cascade_select", "bf16 of fp32", 1024, 1_000_000): 259379.83,
        ("mil_nce", "bfloat16", 256, 65536): 76.05,
        ("mil_nce", "float32", 256, 65536): 543.59,
    },
    "NVIDIA H200": {
        ("cascade_select", "fp32", 32, 2048): 14.61,
        ("cascade_select", "fp32", 32, 16384): 31.97,
        ("cascade_select", "fp32", 256, 65536): 840.7,
        ("cascade_select", "fp32", 1024, 1_000_000): 132936.89,
        ("cascade_select", "bf16 of fp32", 256, 65536): 830.4,
        ("cascade_select", "bf16 of fp32", 1024, 1_000_000): 232516.57,
        ("mil_nce", "bfloat16", 256, 65536): 53.55,
        ("mil_nce", "float32", 256, 65536): 319.86,
    },
}


def by_call(rows: list[dict]) -> dict[tuple, dict]:
    """Returns predicted calls by device, operator, precision, B and K."""
    return {tuple(row[key] for key in ("device", "op", "precision", "B", "K")): row for row in rows}


def bar_rows(rows: list[dict]) -> list[dict]:
    """Returns for each device of BEFORE and each bar the predicted time before and now, and whether the bar is met.
    ratio: the time as a multiple of the floor, or of the time of fp32; bar: at most that."""
    calls, found = by_call(rows), []
    for device, before in BEFORE.items():
        compared = [(tuple(call), "the floor", calls[device, *call]["floor_us"], bar) for *call, bar in BARS]
        for (of_device, op, precision, *shape), exact in calls.items():
            if (of_device, op, precision) != (device, "cascade_select", "fp32"):
                continue
            call = ("cascade_select", "bf16", *shape)
            if calls[device, *call]["floor_us"] <= HALVED * exact["floor_us"]:
                compared.append((call, "fp32", exact["time_us"], HALVED))
        for call, of, of_us, bar in compared:
            now_us = calls[device, *call]["time_us"]
            row = {"device": device, "call": call, "before_us": before.get(call), "now_us": now_us}
            found.append(row | {"ratio": now_us / of_us, "of": of, "bar": bar, "met": now_us / of_us <= bar})
    return found


def bars_text(rows: list[dict]) -> list[str]:
    """Returns the lines of the table of bars. rows: all predicted calls."""
    lines = [
        f"The calls that have a bar. Before: the first committed prediction ({BEFORE_COMMIT}), by the same model; it",
        "has no 4096 x 1000000. An audit of the compiled code before any of this (6af6d42) estimated for an H200:",
        "cascade_select fp32 13 to 15, 27 to 30, 800 to 1,050 and 160,000 to 220,000 µs at the four shapes below,",
        "mil_nce at 256 x 65536 48 to 55 µs in bfloat16 and 265 to 290 in float32. Predictions up to 4ee6542 counted a",
        "block of the streamed route as if it had one tile of keys, where blocks have up to four, and were too short:",
        "cascade_select fp32 228 µs at 256 x 65536 and 8.4 ms at 1024 x 1000000 on A100, 163 µs and 6.5 ms on H200.",
        "",
        "| device | operator | B x K | before µs | now µs | now | bar | met |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in bar_rows(rows):
        op, precision, B, K = row["call"]
        before = f"{row['before_us']:.1f}" if row["before_us"] else "-"
        cells = [row["device"], f"{op} {precision}", f"{B} x {K}", before, f"{row['now_us']:.1f}"]
        cells += [f"{row['ratio']:.2f} x {row['of']}", f"{row['bar']}", "yes" if row["met"] else "no"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def steepest(times: dict[str, float]) -> list[tuple[float, int]]:
    """Returns the growth of a time at every doubling of K, with the smaller K, the largest first. times: by K."""
    by_K = {int(K): time for K, time in times.items()}
    return sorted(((by_K[2 * K] / by_K[K], K) for K in by_K if 2 * K in by_K), reverse=True)


def growth_text(growth: list[dict]) -> list[str]:
    """Returns the lines of the table of growth. growth: the times of a call by K, in microseconds."""
    Ks = sorted(map(int, growth[0]["time_us"]))
    lines = [
        f"How times grow over K, from {Ks[0]:,} to {Ks[-1]:,} in powers of two: the two steepest doublings. The bar is",
        f"{GROWTH}.",
        "",
        "| device | operator | B | steepest | from K to 2 K | next | from K to 2 K |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in growth:
        cells = [f"{ratio:.2f} | {K} to {2 * K}" for ratio, K in steepest(row["time_us"])[:2]]
        lines.append(f"| {row['device']} | {row['op']} {row['precision']} | {row['B']} | {' | '.join(cells)} |")
    return [
        *lines,
        "",
        "The steepest doublings of cascade_select fp32 are where what a stage compares leaves shared memory, which",
        "holds it up to 262,144 entries. With the kernels of 6aeaa12 and the same model all times were longer: 32",
        "queries and 262,144 entries took 369 µs on A100 and 299 on H200, which are 222 and 164 now; 524,288 took 598",
        "and 467, now 455 and 344; 256 queries and 262,144 entries 1,058 and 742, now 851 and 582. Then only few",
        "queries had their lists in shared memory, and whole lists, not what a stage compares.",
    ]
