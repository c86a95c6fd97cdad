"""Bars as inline SVG: rates with intervals, groups side by side, the profile of many classes, and histograms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.ticker import MaxNLocator

from cpr_fast.report.figures.chart import Chart
from cpr_fast.report.figures.style import (
    HEIGHT_PX,
    INK,
    SERIES,
    STYLE,
    WIDTH_PX,
    Hover,
    canvas,
    label_axes,
    shown,
    to_svg,
)


@dataclass(frozen=True)
class Bar:
    """A rate, with its 95 % interval if it has one."""

    label: str
    value: float
    interval: tuple[float, float] | None
    series: int  # 0-based colour


def bar_figure(bars: Sequence[Bar], *, title: str) -> Chart:
    """Draws horizontal bars of rates (fractions) in percent, the first on top, with their intervals."""
    reach = max([0.01] + [max(bar.interval[1] if bar.interval else 0, bar.value) for bar in bars])
    hovers, table = [], []
    with matplotlib.rc_context(STYLE):
        figure, axes = canvas(WIDTH_PX, 46 + 27 * len(bars))
        rows = range(len(bars))[::-1]
        axes.barh(rows, [100 * bar.value for bar in bars], height=0.62, color=[SERIES[bar.series] for bar in bars])
        for row, bar in zip(rows, bars, strict=True):
            end, text = 100 * bar.value, f"{bar.label}: {shown(bar.value, True)}"
            if bar.interval:
                low, end = (100 * bound for bound in bar.interval)
                axes.plot([low, end], [row, row], color=INK, linewidth=1.2, solid_capstyle="butt")
                text += f", 95 % interval {low:.1f} to {end:.1f} %"
            axes.annotate(f"{100 * bar.value:.1f}", (max(end, 100 * bar.value), row), (5, 0), va="center",
                          textcoords="offset points", fontsize=12)  # fmt: skip
            hovers.append(Hover(text, 0, row - 0.45, 114 * reach, row + 0.45))
            table.append((bar.label, bar.value, *(bar.interval or (None, None))))
        axes.set_yticks(list(rows), [bar.label for bar in bars])
        axes.set_xlim(0, 114 * reach)  # room for the numbers
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        axes.set_title(title, loc="left", fontsize=12)
        svg = to_svg(figure, title, axes, hovers)
    return Chart(title, svg, ("name", "rate", "interval from", "interval to"), table)


def group_figure(groups: Mapping[str, Sequence[float]], *, x: str, title: str, colours: Sequence[int]) -> Chart:
    """Draws columns at 0, 1, 2, … of several groups side by side; rates (fractions) in percent.

    Args:
        groups: {name: a rate for each place}; all of the same length.
        colours: series of each group.
    """
    hovers, table = [], []
    with matplotlib.rc_context(STYLE):
        figure, axes = canvas(WIDTH_PX, HEIGHT_PX)
        width = 0.8 / len(groups)
        for number, ((name, rates), colour) in enumerate(zip(groups.items(), colours, strict=True)):
            places = [place + (number - (len(groups) - 1) / 2) * width for place in range(len(rates))]
            axes.bar(places, rates, width=0.92 * width, color=SERIES[colour % len(SERIES)], label=name)
            for count, (place, rate) in enumerate(zip(places, rates, strict=True)):
                text = f"{name}, {count} {x}: {shown(rate, True)}"
                hovers.append(Hover(text, place - width / 2, 0, place + width / 2, max(rate, 0.04)))
                table.append((name, count, rate))
        axes.set_xticks(range(max(map(len, groups.values()))))
        label_axes(axes, x=x, title=title, percent=True)
        figure.legend(loc="outside lower center", ncols=2, fontsize=11, handlelength=1.2, columnspacing=1.2)
        svg = to_svg(figure, title, axes, hovers)
    return Chart(title, svg, ("series", x, "share"), table)


def profile_figure(
    profiles: Mapping[str, Sequence[tuple[str, float]]], *, x: str, title: str, colours: Sequence[int]
) -> Chart:
    """Draws the rates (fractions) of many classes from best to worst: the first profile filled, the others as lines.

    Args:
        profiles: {name: (class, rate) of each class}.
        colours: series of each profile.
    """
    hovers, table = [], []
    with matplotlib.rc_context(STYLE):
        figure, axes = canvas(WIDTH_PX, HEIGHT_PX)
        for number, ((name, rates), colour) in enumerate(zip(profiles.items(), colours, strict=True)):
            ordered = sorted(rates, key=lambda item: -item[1])
            places, values = range(1, len(rates) + 1), [rate for _, rate in ordered]
            if number == 0:
                axes.bar(places, values, width=0.84, color=SERIES[colour % len(SERIES)], label=name)
            else:
                axes.step(places, values, where="mid", color=SERIES[colour % len(SERIES)], linewidth=2, label=name)
            for place, (label, rate) in zip(places, ordered, strict=True):
                table.append((name, place, label, rate))
                if number == 0:
                    text = f"{label}: {shown(rate, True)}"
                    hovers.append(Hover(text, place - 0.5, 0, place + 0.5, max(rate, 0.04)))
        axes.set_ylim(0, 1.02)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        label_axes(axes, x=x, title=title, percent=True)
        if len(profiles) > 1:
            figure.legend(loc="outside lower center", ncols=2, fontsize=11, handlelength=1.2, columnspacing=1.2)
        svg = to_svg(figure, title, axes, hovers)
    return Chart(title, svg, ("series", "rank", "class", "rate"), table)


def histogram_figure(values: Sequence[float], *, x: str, title: str, bins: int = 20) -> Chart:
    """Draws how many of the values lie in each of `bins` intervals of equal width."""
    counts, edges = np.histogram(np.asarray(values, float), bins=bins)
    hovers, table = [], []
    with matplotlib.rc_context(STYLE):
        figure, axes = canvas(WIDTH_PX, HEIGHT_PX)
        axes.bar(edges[:-1], counts, width=0.92 * np.diff(edges), align="edge", color=SERIES[0])
        for count, low, high in zip(counts.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            hovers.append(Hover(f"{low:.3f} to {high:.3f}: {count}", low, 0, high, max(count, 0.05 * counts.max())))
            table.append((low, high, count))
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        label_axes(axes, x=x, title=title, percent=False)
        svg = to_svg(figure, title, axes, hovers)
    return Chart(title, svg, ("from", "to", "count"), table)
