"""The pages in a browser: no element is wider than the screen, nothing is downloaded, and pictures load."""

from __future__ import annotations

import io
import shutil

import pytest
from PIL import Image
from support.report.run_folders import (
    classification_rows,
    health_rows,
    retrieval_rows,
    start_row,
    training_rows,
    write_run,
)

from cpr_fast.report.page import write_report


def chromium() -> str:
    """Returns an installed browser, or skips the test with the names that were searched for."""
    for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"):
        if path := shutil.which(name):
            return path
    pytest.skip("no chromium or google-chrome on the PATH to open the page in")


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("runs", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_browser_shows_the_page(tmp_path, index, runs, width):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    rows = [start_row(index), *training_rows(), *retrieval_rows(index), *classification_rows(), *health_rows()]
    folders = [write_run(tmp_path / f"a_run_of_a_rather_long_name_{i}", rows) for i in range(runs)]
    page = write_report(folders, tmp_path / "r.html")
    said, asked = [], []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium(), args=["--no-sandbox", "--disable-gpu"])
        tab = browser.new_page(viewport={"width": width, "height": 900})
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(page.as_uri())
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        loaded = """() => Promise.all([...document.querySelectorAll(".film:not(.gone)")].map(async film => {
            const image = new Image();
            image.src = getComputedStyle(film).backgroundImage.slice(5, -2);
            await image.decode();
            return image.naturalWidth;
        }))"""
        widths = tab.evaluate(loaded)
        plots = tab.evaluate("[...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect().height)")
        picture = Image.open(io.BytesIO(tab.screenshot(full_page=True)))
        browser.close()
    assert len(widths) == 6 * runs and set(widths) == {8 * 128}  # 3 clips mined, 3 retrieved
    assert len(plots) >= 12 * runs and min(plots) > 50
    assert said == [] and [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert picture.width == width and len(picture.convert("L").getcolors()) > 50
