"""The style that all SVG figures share: size, colours as CSS variables of the page, axes, and values on hovering."""

from __future__ import annotations

import hashlib
import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

WIDTH_PX, HEIGHT_PX = 390, 260  # size of a figure: one column on a phone, three on a desktop page
POINT_PX = 7  # radius around a point in which its value is shown
# Matplotlib draws in placeholder colours that nothing else uses; `to_svg` replaces them by the CSS variables of the
# page.
INK, INK_SOFT, GRID, BAND = "#010202", "#010203", "#010204", "#010205"
SERIES = ("#020301", "#020302", "#020303", "#020304", "#020305", "#020306")
_VARIABLES = {INK: "--ink", INK_SOFT: "--ink-soft", GRID: "--line", BAND: "--band"} | {
    c: f"--s{i + 1}" for i, c in enumerate(SERIES)
}
STYLE = {
    "svg.fonttype": "none",  # text is written as text, not as outlines
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
class Hover:
    """Text that is shown while the pointer is near the point (x, y), or on the box from (x, y) to (right, top).

    Coordinates are those of the data.
    """

    text: str
    x: float
    y: float
    right: float | None = None
    top: float | None = None


def canvas(width_px: float, height_px: float) -> tuple[Figure, Axes]:
    """Returns an empty transparent figure of this size, to be drawn in STYLE; 72 dpi is the unit of SVG."""
    figure = Figure(figsize=(width_px / 72, height_px / 72), dpi=72, layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    return figure, axes


def label_axes(axes: Axes, *, x: str, title: str, percent: bool) -> None:
    """Sets a small number of vertical ticks, grid lines behind the data, the name of the x axis, and the title."""
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    if percent:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g} %"))
    axes.set_xlabel(x)
    axes.set_title(title, loc="left", fontsize=12)


def shown(value: float, percent: bool) -> str:
    """Returns a value as text: a rate (fraction) in percent, anything else with four digits."""
    return f"{100 * value:.1f} %" if percent else f"{value:.4g}"


def to_svg(figure: Figure, title: str, axes: Axes, hovers: Sequence[Hover] = ()) -> str:
    """Returns the <svg> element with the page's variables as colours, ids that no other figure has, and hover texts."""
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
    marks = "".join(_mark(hover, axes, figure.bbox.height) for hover in hovers)
    body, end, after = rest.rpartition("</svg>")
    return f'{tag} role="img" aria-label="{html.escape(title)}">{body}<g class="hover">{marks}</g>{end}{after}'


def _mark(hover: Hover, axes: Axes, height: float) -> str:
    """Returns an invisible shape with a <title>. Call it after the figure was saved, because saving computes the
    layout."""
    x, y = axes.transData.transform((hover.x, hover.y))
    title = f"<title>{html.escape(hover.text)}</title>"
    if hover.right is None or hover.top is None:
        return f'<circle cx="{x:.1f}" cy="{height - y:.1f}" r="{POINT_PX}">{title}</circle>'
    right, top = axes.transData.transform((hover.right, hover.top))
    box = f'x="{min(x, right):.1f}" y="{height - max(y, top):.1f}"'
    size = f'width="{abs(right - x):.1f}" height="{abs(top - y):.1f}"'
    return f"<rect {box} {size}>{title}</rect>"
