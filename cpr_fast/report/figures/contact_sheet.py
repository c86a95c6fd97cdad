"""The contact sheet of a search: the query and the videos found, each as a film strip under a line of text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from cpr_fast.data.index.index import Video
from cpr_fast.report.figures.film_strip import STRIP_FRAMES, THUMB_HEIGHT, THUMB_WIDTH, strip_image
from cpr_fast.runtime.files import replacing

MARGIN, LINE, GAP = 12, 24, 10  # pixels: around the sheet, height of a line of text, below a strip
WIDTH = STRIP_FRAMES * THUMB_WIDTH + 2 * MARGIN


def write_contact_sheet(out: Path, query: Video, found: Sequence[dict[str, Any]]) -> Path:
    """Writes a JPEG of `WIDTH` x `sheet_height(len(found))` pixels: the query, then `found` in order.

    Args:
        found: rows of `cpr_fast.evaluate.retrieval.search.search`; the strip of a video that does not decode is grey.
    """
    sheet = Image.new("RGB", (WIDTH, sheet_height(len(found))), "white")
    draw = ImageDraw.Draw(sheet)
    lines = [(f"Query   {query.source}", query.path, query.num_frames)]
    for row in found:
        text = f"{row['rank']}   {row['similarity']:.3f}   {row['label'] or 'no label'}   {row['path']}"
        lines.append((text, Path(row["path"]), row["num_frames"]))
    top = MARGIN
    for number, (text, path, frames) in enumerate(lines):
        draw.text((MARGIN, top), _fitting(draw, text), fill="black" if number else "#1749b3", font=_font())
        strip = strip_image(path, frames, 0, frames)
        place = (MARGIN, top + LINE)
        if strip is None:
            draw.rectangle((*place, WIDTH - MARGIN - 1, top + LINE + THUMB_HEIGHT - 1), fill="#c8c8c8")
        else:
            sheet.paste(strip, place)
        top += LINE + THUMB_HEIGHT + GAP
    with replacing(out) as temporary:
        sheet.save(temporary, "JPEG", quality=88)
    return out


def sheet_height(found: int) -> int:
    """Returns the height in pixels of a sheet with this number of results."""
    return 2 * MARGIN + (1 + found) * (LINE + THUMB_HEIGHT + GAP) - GAP


def _fitting(draw: ImageDraw.ImageDraw, text: str) -> str:
    """Returns the text; if it is wider than the sheet, its middle is cut out."""
    room = WIDTH - 2 * MARGIN
    if draw.textlength(text, font=_font()) <= room:
        return text
    kept = len(text)
    while kept > 2 and draw.textlength(short := _shortened(text, kept), font=_font()) > room:
        kept -= 1
    return short


def _shortened(text: str, kept: int) -> str:
    return f"{text[: kept // 2]} … {text[len(text) - (kept - kept // 2) :]}"


def _font() -> ImageFont.FreeTypeFont:
    """Returns the font that Matplotlib ships, which is the same on every machine."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), 14)
