"""The tables and the figure of bench/results/study.md, made from the rows."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.lines import Line2D

from cpr_fast.evaluate.features.intervals import seed_interval

from .claims import CLAIMS, judge
from .rows import WORLD, marked
from .settings import ALL, SEEDS, SETTINGS
from .videos import TITLES

BEGIN, END = "<!-- written by {} --table -->", "<!-- end -->"
NAMES = {
    "start": "start (InfoNCE)", "untrained": "untrained", "infonce": "InfoNCE, continued", "coclr": "CoCLR (n = 1)",
    "cpr_n3": "CPR n = 3", "cpr_n5": "CPR n = 5", "cpr_n7": "CPR n = 7", "ubernce": "UberNCE (labels)",
    "cpr_n3_r.3": "CPR n = 3, r = .3", "cpr_n3_r.8": "CPR n = 3, r = .8", "cpr_n7_r.8": "CPR n = 7, r = .8",
    "cpr_n7_query_anchor": "CPR n = 7, anchor f_q", "cpr_n7_coclr_protocol": "CPR n = 7, protocol of the code",
    "infonce_memory_x2": "InfoNCE, K = 1,024", "coclr_memory_x2": "CoCLR, K = 1,024",
    "cpr_n7_memory_x2": "CPR n = 7, K = 1,024", "iic_start": "start (IIC)", "iic": "IIC, continued",
    **{f"{name}_again": f"{title}, again" for name, title in (("infonce", "InfoNCE"), ("coclr", "CoCLR (n = 1)"),
                                                              ("cpr_n3", "CPR n = 3"), ("cpr_n7", "CPR n = 7"))},
    "coclr_only_right": "CoCLR, wrong positives left out", "coclr_warm_start": "CoCLR, warm start",
    "iic_cpr_one_cycle": "IIC + CPR, top-5, one cycle",
    "iic_cpr_only_right": "IIC + CPR, one cycle, wrong positives left out",
    "iic_cpr_fixed": "IIC + CPR n = 5, top-5", "iic_cpr_progressive": "IIC + CPR n = 5, top-1 to top-5",
}  # fmt: skip
COLUMNS = ("map", "r@1", "r@5", "r@10", "probe")

Row = dict[str, Any]


def together(row: Row) -> str:
    """Returns the view of a row that stands for both of its views."""
    return list(row["views"])[-1]


def setting_table(rows: Sequence[Row]) -> str:
    """Returns mean and standard error over seeds of every setting of a set, as Markdown."""
    odd = marked(list(rows))
    titles = ["setting", "seeds", "mAP", "R@1", "R@5", "R@10", "probe", "mAP RGB", "mAP flow", "PMR RGB", "PMR flow",
              "CMR RGB", "CMR flow", "CPU s"]  # fmt: skip
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for setting in ALL:
        mine = sorted((row for row in rows if row["setting"] == setting), key=lambda row: row["seed"])
        if not mine:
            continue
        seeds = " ".join(f"{row['seed']}{'†' if row in odd else ''}" for row in mine)
        cells = [_mean([row["views"][together(row)].get(key) for row in mine]) for key in COLUMNS]
        cells += [_mean([row["views"].get(view, {}).get("map") for row in mine]) for view in ("rgb", "flow")]
        for key in ("pmr", "cmr_median"):
            cells += [_mean([_last(row, view, key) for row in mine]) for view in ("rgb", "flow")]
        cpu = statistics.mean(row["training"]["cpu_s"] for row in mine) if setting != "untrained" else None
        cells.append("" if cpu is None else f"{cpu:.0f}")
        lines.append(f"| {NAMES.get(setting, setting)} | {seeds} | " + " | ".join(cells) + " |")
    if odd:
        said = "; ".join(f"{row['setting']}, seed {row['seed']}: " + ", ".join(str(row[key]) for key in WORLD)
                         for row in odd)  # fmt: skip
        lines += ["", f"† measured with another commit, processor, torch or number of threads than the others: {said}."]
    pixels = next((row["pixels"] for row in rows if "pixels" in row), None)
    if pixels:
        said = ", ".join(
            f"{name.replace('_', ' ')} {_short(value)} and {_short(pixels['r@1'][name])}"
            for name, value in pixels["map"].items()
        )
        lines += ["", f"Pixel baselines, mAP and R@1: {said}."]
    return "\n".join(lines)


def _last(row: Row, view: str, key: str) -> float | None:
    return row["mining"][view][key][-1] if view in row.get("mining", {}) else None


def _short(value: float) -> str:
    return f"{value:.3f}".replace("0.", ".", 1)


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    if len(known) == 1:
        return _short(known[0])
    return f"{_short(statistics.mean(known))} ± {_short(statistics.stdev(known) / len(known) ** 0.5)}"


def claim_table(rows: Sequence[Row], folder: Path, name: str) -> str:
    """Returns every claim with its differences, intervals, effect size and verdict, as Markdown."""
    by_key = {(row["setting"], row["seed"]): row for row in rows}
    lines = ["| claim | by seed | mean | 95 % over seeds | 95 % over sources | d_z | verdict |", "|" + "---|" * 7]
    for claim in CLAIMS:
        found = judge(claim, by_key, folder, name)
        if found is None:
            continue
        seeds, sources = found["seeds"], found["sources"]
        effect = "" if seeds["d_z"] is None else f"{seeds['d_z']:.1f}"
        by_seed = ", ".join(map(_signed, seeds["differences"]))
        cells = [
            claim.text, by_seed, _signed(seeds["difference"]), _interval(seeds["ci95"]),
            "" if sources is None else _interval(sources["ci95"]), effect,
            found["verdict"] + (" (two-sided)" if claim.two_sided else ""),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("0.", ".", 1)


def _interval(bounds: Sequence[float] | None) -> str:
    return "" if bounds is None else f"{_signed(bounds[0])} to {_signed(bounds[1])}"


def trial_table(rows: Sequence[Row]) -> str:
    """Returns one line for each trial, in the order in which they ran, as Markdown."""
    titles = ["set", "base", "setting", "seed", "mAP", "R@1", "R@5", "mAP RGB", "mAP flow", "probe", "CPU s"]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for row in rows:
        both = row["views"][together(row)]
        base = ", ".join(f"{key} {'+'.join(map(str, value)) if isinstance(value, list) else value}"
                         for key, value in row["base"].items() if key != "iic")  # fmt: skip
        cells = [row["set"], base, NAMES.get(row["setting"], row["setting"]), str(row["seed"])]
        cells += [_short(both[key]) for key in ("map", "r@1", "r@5")]
        cells += [_mean([row["views"].get(view, {}).get("map")]) for view in ("rgb", "flow")]
        cells += [_short(both["probe"]), f"{row['training']['cpu_s']:.0f}" if row["setting"] != "untrained" else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draws PMR over the epochs of the cycles that mine, means over seeds, and two-stream mAP of every seed."""
    figure, (quality, precision) = plt.subplots(1, 2, figsize=(11, 3.6), constrained_layout=True)
    settings = [setting for setting in ALL if any(row["setting"] == setting for row in rows)]
    for position, setting in enumerate(settings):
        mine = [row for row in rows if row["setting"] == setting]
        for view, style in (("rgb", "-"), ("flow", "--")):
            curves = [row["mining"][view]["pmr"] for row in mine if view in row.get("mining", {})]
            if curves:
                # "siblings agree" mined nothing in an epoch of one seed, so that its curve is shorter.
                means = [statistics.mean(values) for values in zip(*curves, strict=False)]
                quality.plot(range(1, len(means) + 1), means, style, color=f"C{position}", label=f"{setting}, {view}")
        values = [row["views"][together(row)]["map"] for row in mine]
        precision.plot([position] * len(values), values, "o", color=f"C{position}", alpha=0.6)
        precision.plot([position - 0.25, position + 0.25], [statistics.mean(values)] * 2, color=f"C{position}")
    quality.set(xlabel="epoch of the cycle", ylabel="PMR, mean over seeds", ylim=(0, None))
    if quality.get_legend_handles_labels()[0]:
        quality.legend(fontsize=7, ncols=2)
    precision.set(ylabel="mAP of both views", ylim=(0, None), xticks=range(len(settings)), xticklabels=settings)
    precision.tick_params(axis="x", rotation=30)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_overview(by_set: dict[str, Sequence[Row]], path: Path) -> None:
    """Draws two-stream mAP and the PMR of the last epoch of the main table's settings, a column for each set: every
    seed, the mean, and the 95 % interval over seeds (Student's t)."""
    figure, axes = plt.subplots(2, len(by_set), figsize=(4.2 * len(by_set), 6), squeeze=False, sharex=True,
                                constrained_layout=True)  # fmt: skip
    labels = [NAMES[setting].split(" (")[0].split(",")[0] for setting in SETTINGS]
    for column, (name, rows) in enumerate(by_set.items()):
        for position, setting in enumerate(SETTINGS):
            mine = [row for row in rows if row["setting"] == setting]
            quality = [[100 * row["mining"][view]["pmr"][-1] for row in mine if "mining" in row]
                       for view in ("rgb", "flow")]  # fmt: skip
            _with_interval(axes[0, column], position, [100 * row["views"][together(row)]["map"] for row in mine], "C0")
            for values, shift, colour in zip(quality, (-0.15, 0.15), ("C1", "C2"), strict=True):
                _with_interval(axes[1, column], position + shift, values, colour)
        seeds = len({row["seed"] for row in rows})
        axes[0, column].set(title=f"{TITLES[name]}, {seeds} seeds", ylim=(0, None))
        axes[1, column].set(ylim=(0, None))
        for axis in axes[:, column]:
            axis.set_xticks(range(len(SETTINGS)), labels, rotation=60, fontsize=9)
            axis.grid(axis="y", alpha=0.3)
            axis.set_xlim(-0.6, len(SETTINGS) - 0.4)
    axes[0, 0].set_ylabel("two-stream mAP, %")
    axes[1, 0].set_ylabel("PMR of the last epoch, %")
    axes[1, 0].legend(handles=[Line2D([], [], color=colour, label=label)
                               for colour, label in (("C1", "RGB queries"), ("C2", "flow queries"))],
                      loc="upper left", fontsize=9)  # fmt: skip
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _with_interval(axis: plt.Axes, position: float, values: Sequence[float], colour: str) -> None:
    if values:
        axis.plot([position] * len(values), values, ".", color=colour, alpha=0.5)
        bounds = seed_interval(list(values)) or (values[0], values[0])
        axis.plot([position, position], bounds, color=colour)
        axis.plot([position], [statistics.mean(values)], "_", color=colour, markersize=12)


def progress(rows: Sequence[Row], sets: Sequence[str], settings: Sequence[str]) -> str:
    """Returns how many of the registered rows are there, one line for each set."""
    wanted = len(settings) * len(SEEDS)
    done = {name: sum(row["set"] == name and row["setting"] in settings for row in rows) for name in sets}
    return "; ".join(f"{name}: {number} of {wanted} rows" for name, number in done.items())


def replace_results(page: str, text: str, script: str) -> str:
    """Returns the page of a script with the text between its two marks replaced. Raises ValueError if it lacks a
    mark."""
    begin = BEGIN.format(script)
    if page.count(begin) != 1 or page.count(END) != 1:
        raise ValueError(
            f"page of {script}: expected one {begin!r} and one {END!r}, got {page.count(begin)}, {page.count(END)}"
        )
    head, tail = page.split(begin)[0], page.split(END)[1]
    return f"{head}{begin}\n\n{text.strip()}\n\n{END}{tail}"
