"""Curves over epochs or steps as inline SVG."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from cpr_fast.report.figures.chart import Chart
from cpr_fast.report.figures.style import (
    BAND,
    HEIGHT_PX,
    SERIES,
    STYLE,
    WIDTH_PX,
    Hover,
    canvas,
    label_axes,
    shown,
    to_svg,
)

MARKED = 40  # number of points up to which a curve has markers
HOVERED = 60  # number of points of a curve that show their value on hovering; of longer curves, every n-th point does


@dataclass(frozen=True)
class Line:
    """A curve; None in `y` leaves a gap. A label that begins with "_" is left out of the legend."""

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    series: int  # 0-based colour
    dashed: bool = False
    faint: bool = False
    marker: bool = True

    @property
    def name(self) -> str:
        """The label without the mark that hides it from the legend."""
        return self.label.lstrip("_")


@dataclass(frozen=True)
class Band:
    """A cycle's span of epochs, named at the top of the plot."""

    start: float
    end: float
    label: str


def line_figure(
    lines: Sequence[Line], *, x: str, y: str, percent: bool = False, zero: bool = True, bands: Sequence[Band] = ()
) -> Chart:
    """Draws curves. `y` is the title; rates (fractions) are shown in percent with `percent`; `zero` starts at 0."""
    with matplotlib.rc_context(STYLE):
        figure, axes = canvas(WIDTH_PX, HEIGHT_PX)
        for line in lines:
            values = [float("nan") if value is None else value for value in line.y]
            few = line.marker and len(line.x) <= MARKED
            axes.plot(
                line.x,
                values,
                color=SERIES[line.series % len(SERIES)],
                linewidth=1 if line.faint else 2,
                alpha=0.35 if line.faint else 1,
                linestyle=(0, (4, 3)) if line.dashed else "-",
                marker="o" if few and not line.dashed else None,
                markersize=3.5,
                label=line.label or "_",
            )
        if zero:
            axes.set_ylim(bottom=0)
        top = axes.get_ylim()[1]
        axes.set_ylim(top=top + (0.2 if bands else 0.05) * (top - axes.get_ylim()[0]))  # room for the bands' names
        _draw_bands(axes, bands)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        label_axes(axes, x=x, title=y, percent=percent)
        if any(line.label and not line.label.startswith("_") for line in lines):
            figure.legend(loc="outside lower center", ncols=3, fontsize=11, handlelength=1.6, columnspacing=1.2)
        svg = to_svg(figure, y, axes, list(_hovers(lines, x, percent)))
    rows = [(line.name, place, value) for line in lines for place, value in zip(line.x, line.y, strict=True)]
    return Chart(y, svg, ("series", x, y), rows)


def _hovers(lines: Sequence[Line], x: str, percent: bool) -> Iterator[Hover]:
    for line in lines:
        if line.faint:
            continue
        known = [(place, value) for place, value in zip(line.x, line.y, strict=True) if value is not None]
        for place, value in known[:: max(1, -(-len(known) // HOVERED))]:
            name = f"{line.name}, " if line.name else ""
            yield Hover(f"{name}{x} {place:g}: {shown(value, percent)}", place, value)


def _draw_bands(axes: Axes, bands: Sequence[Band]) -> None:
    """Shades every other cycle, and names each that is wide enough for its name."""
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
