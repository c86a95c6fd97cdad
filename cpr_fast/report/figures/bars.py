"""Bars as inline SVG: rates with intervals, groups beside each other, and the profile of many classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.ticker import MaxNLocator

from cpr_fast.report.figures.curves import HEIGHT_PX, INK, SERIES, STYLE, WIDTH_PX, canvas, label_axes, to_svg


@dataclass(frozen=True)
class Bar:
    """A rate, with its 95 % interval where it has one."""

    label: str
    value: float
    interval: tuple[float, float] | None
    series: int  # 0-based colour


def bar_figure(bars: Sequence[Bar], *, title: str) -> str:
    """Horizontal bars of rates (fractions) in percent, the first on top, with their intervals."""
    reach = max([0.01] + [max(bar.interval[1] if bar.interval else 0, bar.value) for bar in bars])
    with matplotlib.rc_context(STYLE):
        figure, axes = canvas(WIDTH_PX, 46 + 27 * len(bars))
        rows = range(len(bars))[::-1]
        axes.barh(rows, [100 * bar.value for bar in bars], height=0.62, color=[SERIES[bar.series] for bar in bars])
        for row, bar in zip(rows, bars, strict=True):
            end = 100 * bar.value
            if bar.interval:
                low, end = (100 * bound for bound in bar.interval)
                axes.plot([low, end], [row, row], color=INK, linewidth=1.2, solid_capstyle="butt")
            axes.annotate(f"{100 * bar.value:.1f}", (max(end, 100 * bar.value), row), (5, 0), va="center",
                          textcoords="offset points", fontsize=12)  # fmt: skip
        axes.set_yticks(list(rows), [bar.label for bar in bars])
        axes.set_xlim(0, 114 * reach)  # room for the numbers
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        axes.set_title(title, loc="left", fontsize=12)
        return to_svg(figure, title)


def group_figure(groups: Mapping[str, Sequence[float]], *, x: str, title: str, colours: Sequence[int]) -> str:
    """Columns at 0, 1, 2, … of several groups beside each other; rates (fractions) in percent.

    Args:
        groups: {name: a rate at each place}; all of one length.
        colours: series of each group.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = canvas(WIDTH_PX, HEIGHT_PX)
        width = 0.8 / len(groups)
        for number, ((name, rates), colour) in enumerate(zip(groups.items(), colours, strict=True)):
            places = [place + (number - (len(groups) - 1) / 2) * width for place in range(len(rates))]
            axes.bar(places, rates, width=0.92 * width, color=SERIES[colour % len(SERIES)], label=name)
        axes.set_xticks(range(max(map(len, groups.values()))))
        label_axes(axes, x=x, title=title, percent=True)
        figure.legend(loc="outside lower center", ncols=2, fontsize=11, handlelength=1.2, columnspacing=1.2)
        return to_svg(figure, title)


def profile_figure(profiles: Mapping[str, Sequence[float]], *, x: str, title: str, colours: Sequence[int]) -> str:
    """Rates (fractions) of many things, each profile sorted from the best to the worst: a filled one, then lines."""
    with matplotlib.rc_context(STYLE):
        figure, axes = canvas(WIDTH_PX, HEIGHT_PX)
        for number, ((name, rates), colour) in enumerate(zip(profiles.items(), colours, strict=True)):
            ordered, places = sorted(rates, reverse=True), range(1, len(rates) + 1)
            if number == 0:
                axes.bar(places, ordered, width=0.84, color=SERIES[colour % len(SERIES)], label=name)
            else:
                axes.step(places, ordered, where="mid", color=SERIES[colour % len(SERIES)], linewidth=2, label=name)
        axes.set_ylim(0, 1.02)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        label_axes(axes, x=x, title=title, percent=True)
        if len(profiles) > 1:
            figure.legend(loc="outside lower center", ncols=2, fontsize=11, handlelength=1.2, columnspacing=1.2)
        return to_svg(figure, title)
