"""Curves as inline SVG whose colours are the page's CSS variables; what `bars` draws shares the style."""

from __future__ import annotations

import hashlib
import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

WIDTH_PX, HEIGHT_PX = 390, 260  # a figure's own size; one column of a phone, three of a desktop page
# Matplotlib draws in colours that nothing else uses; `to_svg` replaces them by the variables of the page.
INK, INK_SOFT, GRID, BAND = "#010202", "#010203", "#010204", "#010205"
SERIES = ("#020301", "#020302", "#020303", "#020304", "#020305", "#020306")
_VARIABLES = {INK: "--ink", INK_SOFT: "--ink-soft", GRID: "--line", BAND: "--band"} | {
    c: f"--s{i + 1}" for i, c in enumerate(SERIES)
}
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "font.size": 12,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK_SOFT,
    "text.color": INK_SOFT,
    "xtick.color": INK_SOFT,
    "ytick.color": INK_SOFT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Line:
    """A curve; None in `y` leaves a gap. "" or "_" as label keeps it out of the legend."""

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    series: int  # 0-based colour
    dashed: bool = False
    faint: bool = False
    marker: bool = True


@dataclass(frozen=True)
class Band:
    """A cycle's span of epochs, named at the top of the plot."""

    start: float
    end: float
    label: str


def line_figure(
    lines: Sequence[Line], *, x: str, y: str, percent: bool = False, zero: bool = True, bands: Sequence[Band] = ()
) -> str:
    """Curves over epochs or steps as SVG. Rates (fractions) are shown in percent with `percent`."""
    with matplotlib.rc_context(STYLE):
        figure, axes = canvas(WIDTH_PX, HEIGHT_PX)
        for line in lines:
            values = [float("nan") if value is None else value for value in line.y]
            few = line.marker and len(line.x) <= 40
            axes.plot(
                line.x,
                values,
                color=SERIES[line.series % len(SERIES)],
                linewidth=1 if line.faint else 2,
                alpha=0.35 if line.faint else 1,
                linestyle=(0, (4, 3)) if line.dashed else "-",
                marker="o" if few and not line.dashed else None,
                markersize=3.5,
                label=line.label or None,
            )
        if zero:
            axes.set_ylim(bottom=0)
        top = axes.get_ylim()[1]
        axes.set_ylim(top=top + (0.2 if bands else 0.05) * (top - axes.get_ylim()[0]))  # room for the bands' names
        _draw_bands(axes, bands)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        label_axes(axes, x=x, title=y, percent=percent)
        if any(line.label.strip("_") for line in lines):
            figure.legend(loc="outside lower center", ncols=3, fontsize=11, handlelength=1.6, columnspacing=1.2)
        return to_svg(figure, y)


def label_axes(axes: Axes, *, x: str, title: str, percent: bool) -> None:
    """Few ticks upwards with grid lines behind the data, and the names of both axes."""
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    if percent:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g} %"))
    axes.set_xlabel(x)
    axes.set_title(title, loc="left", fontsize=12)


def canvas(width_px: float, height_px: float) -> tuple[Figure, Axes]:
    """An empty transparent figure of that size, to be drawn in STYLE."""
    figure = Figure(figsize=(width_px / 72, height_px / 72), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    return figure, axes


def _draw_bands(axes: Axes, bands: Sequence[Band]) -> None:
    """Every other cycle shaded; each wide enough for its name has it on top."""
    for number, band in enumerate(bands):
        if number % 2:
            axes.axvspan(band.start, band.end, color=BAND, linewidth=0, zorder=0)
        if band.end - band.start < 0.1 * (bands[-1].end - bands[0].start):
            continue
        axes.annotate(
            band.label.replace(" ", "\n", 1),
            ((band.start + band.end) / 2, 1),
            (0, -4),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=10,
        )
    if bands:
        axes.set_xlim(bands[0].start, bands[-1].end)


def to_svg(figure: Figure, title: str) -> str:
    """The <svg> element alone, with the page's variables for colours and ids that no other figure has."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    prefix = "f" + hashlib.sha256(svg.encode()).hexdigest()[:8]
    svg = re.sub(r'(id="|href="#|url\(#)', lambda match: match.group(1) + prefix, svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    tag, rest = svg.split(">", 1)
    tag = re.sub(r' (width|height)="[^"]*"', "", tag)  # the page sets the size; viewBox keeps the shape
    return f'{tag} role="img" aria-label="{html.escape(title)}">{rest}'
