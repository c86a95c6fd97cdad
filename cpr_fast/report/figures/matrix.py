"""A confusion matrix as inline SVG."""

from __future__ import annotations

import html
from collections.abc import Sequence

from cpr_fast.report.figures.chart import Chart

NAMED = 24  # number of classes up to which rows and columns are labelled with names
LABEL_PX, MARGIN_PX, SIDE_PX = 120, 26, 400


def confusion_figure(confusion: Sequence[Sequence[int]], classes: Sequence[str], *, title: str) -> Chart:
    """Draws a matrix of counts: a row per true class, a column per predicted class.

    A cell is as dark as its share of the row, and shows its count on hovering. Empty cells are not drawn, so that the
    file stays small for 101 classes.
    """
    count = len(classes)
    named = count <= NAMED
    left, cell = (LABEL_PX if named else MARGIN_PX), SIDE_PX / max(count, 1)
    width, height = left + SIDE_PX + 4, SIDE_PX + (LABEL_PX if named else MARGIN_PX) + 4
    parts = [f'<rect class="frame" x="{left}" y="2" width="{SIDE_PX}" height="{SIDE_PX}"/>']
    for row, numbers in enumerate(confusion):
        total = sum(numbers)
        for column, number in enumerate(numbers):
            if number:
                parts.append(_cell(left + column * cell, 2 + row * cell, cell, number, total, row == column,
                                   classes[row], classes[column]))  # fmt: skip
    parts += _names(classes, left, cell) if named else []
    parts.append(f'<text x="{left + SIDE_PX / 2:.0f}" y="{height - 4}" text-anchor="middle">predicted class</text>')
    parts.append(
        f'<text transform="translate(12 {SIDE_PX / 2:.0f}) rotate(-90)" text-anchor="middle">true class</text>'
    )
    label = html.escape(title)
    svg = f'<svg class="matrix" viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    rows = [(name, *numbers) for name, numbers in zip(classes, confusion, strict=True)]
    return Chart(title, svg, ("true class / predicted", *classes), rows)


def _cell(x: float, y: float, side: float, number: int, total: int, right: bool, true: str, predicted: str) -> str:
    share = number / total
    name = "right" if right else "wrong"
    said = f"{true}, predicted as {predicted}: {number} of {total} ({100 * share:.0f} %)"
    box = f'x="{x:.2f}" y="{y:.2f}" width="{side:.2f}" height="{side:.2f}" fill-opacity="{0.15 + 0.85 * share:.2f}"'
    cell = f'<rect class="{name}" {box}><title>{html.escape(said)}</title></rect>'
    if side >= 22:
        ink = "light" if share > 0.55 else "dark"
        middle = f'x="{x + side / 2:.1f}" y="{y + side / 2 + 4:.1f}"'
        cell += f'<text class="{ink}" {middle} text-anchor="middle">{number}</text>'
    return cell


def _names(classes: Sequence[str], left: float, cell: float) -> list[str]:
    """Draws the names of the rows at the left and, rotated, of the columns below; long names are truncated."""
    parts = []
    for place, name in enumerate(classes):
        text = html.escape(name if len(name) <= 15 else f"{name[:14]}…")
        middle = 2 + (place + 0.5) * cell
        parts.append(f'<text x="{left - 6}" y="{middle + 4:.1f}" text-anchor="end">{text}</text>')
        turned = f"translate({left + (place + 0.5) * cell + 4:.1f} {SIDE_PX + 10}) rotate(-90)"
        parts.append(f'<text transform="{turned}" text-anchor="end">{text}</text>')
    return parts
