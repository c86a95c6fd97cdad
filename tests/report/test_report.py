"""The report page of run folders written by hand, from complete to almost empty."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from fractions import Fraction
from html.parser import HTMLParser
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from cpr_fast.config import Config
from cpr_fast.errors import InputError
from cpr_fast.report.figures.bars import Bar, bar_figure
from cpr_fast.report.figures.curves import Band, Line, line_figure
from cpr_fast.report.figures.film_strip import STRIP_FRAMES, film_strip
from cpr_fast.report.page import write_report
from cpr_fast.report.sections.runs import Run

VIDEOS, FRAMES = 6, 24
LABELS = ["push<up>", "push<up>", "jump", "jump", "jump", "spin"]
SOURCES = ["s0", "s1", "s2", "s2", "s3", "s4"]


def write_video(path: Path, number: int) -> None:
    """Frame f of video n is filled with grey level 8 f + 10 n; odd size on purpose."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(25))
        stream.width, stream.height, stream.pix_fmt, stream.options = 98, 54, "yuv420p", {"crf": "10"}
        for f in range(FRAMES):
            frame = av.VideoFrame.from_ndarray(np.full((54, 98, 3), 8 * f + 10 * number, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rows = ["path,label,source,split,num_frames,fps,width,height,flow_path"]
    for i, (label, source) in enumerate(zip(LABELS, SOURCES, strict=True)):
        write_video(folder / f"{i}.mp4", i)
        rows.append(f"{i}.mp4,{label},{source},train,{FRAMES},25.0,98,54,")
    (folder / "index.csv").write_text("\n".join(rows) + "\n")
    return folder / "index.csv"


def start_row(index: Path, stages: int = 3) -> dict:
    config = {"data": {"index": str(index), "frames": 8}, "mining": {"stages": stages}}
    config = Config.from_dict(config).to_dict()
    return {
        "kind": "run",
        "versions": {"torch": "2.13.0"},
        "device": "cpu (test)",
        "commit": "abc123",
        "config": config,
    }


def training_rows() -> list[dict]:
    rows, step = [], 0
    for epoch, (cycle, view, mining) in enumerate([(0, "rgb", "none"), (1, "rgb", "cascade"), (1, "rgb", "cascade")]):
        common = {"epoch": epoch, "cycle": cycle, "view": view, "mining": mining}
        mined = mining == "cascade"
        for _ in range(3):
            times = {"step_time_s": 0.3, "data_wait_s": 0.1, "clips_per_s": 40.0}
            rows.append({"kind": "step", "step": step, "loss": 4.0 - step / 10, "pmr": None, **common, **times})
            step += 1
        quality = {"pmr": 0.4 + epoch / 10, "mining_r1": 0.5, "cmr_median": 0.75, "cmr_per_class": [1.0, 0.5, None]}
        quality |= {"right_counts": [1, 2, epoch], "right_per_class": [2 + 2 * epoch, 0, 0], "pmr_chance": 0.2}
        quality |= {"survivor_precision_1": 0.3, "survivor_recall_1": 0.9, "view_agreement": 0.8, "hubness": 1.5}
        quality |= {"survivor_precision_2": 0.4, "survivor_recall_2": 0.5, "mutual_neighbours": 0.1}
        rows.append({"kind": "epoch", "loss": 4.0 - epoch, "epoch_time_s": 61.0, "skipped": epoch, **common})
        rows[-1] |= quality if mined else dict.fromkeys(quality)
        if mined:
            found = [{"video": 1, "start": 2, "correct": True}, {"video": 4, "start": 20, "correct": False}]
            rows.append({"kind": "mined", "query": {"video": 0, "start": 0}, "mined": found, **common})
    return rows


def retrieval_rows(index: Path) -> list[dict]:
    rows = []
    for name, view, r1 in [
        ("trained", "rgb", 0.4), ("trained", "flow", 0.5), ("trained", "two_stream", 0.625),
        ("untrained", "rgb", 0.2), ("single_frame", "rgb", 0.25), ("mean_flow", "flow", 0.3),
    ]:  # fmt: skip
        rates = {
            "r@1": r1,
            "r@5": r1 + 0.1,
            "r@10": r1 + 0.2,
            "r@20": 1.0,
            "r@50": None,
            "r@1_ci95": [r1 - 0.1, r1 + 0.1],
        }
        rows.append({"kind": "retrieval", "protocol": "train_test", "name": name, "view": view, **rates})
        rows[-1] |= {"gallery": 30, "queries": 16, "chance_r@1": 0.0625}
    show = [
        {"path": str(index.parent / f"{i}.mp4"), "label": LABELS[i], "source": SOURCES[i], "num_frames": FRAMES}
        for i in range(VIDEOS)
    ]
    rows.append({"kind": "retrieved", "view": "two_stream", "query": show[2], "nearest": [show[4], show[5]]})
    return rows


def classification_rows() -> list[dict]:
    common = {"kind": "classification", "recipe": "paper", "index": "a.csv", "split": 1, "crops": 10, "videos": 16}
    scores = {"accuracy_ci95": [0.5, 0.9], "mean_class_accuracy": 0.6, "best_epoch": 3}
    return [
        common | scores | {"task": task, "view": view, "seed": seed, "accuracy": accuracy}
        for task, view, seed, accuracy in [
            ("probe", "rgb", 0, 0.5), ("probe", "two_stream", 0, 0.75),
            ("finetune", "rgb", 0, 0.8), ("finetune", "rgb", 1, 0.9),
        ]
    ]  # fmt: skip


def health_rows() -> list[dict]:
    rows = [
        {
            "kind": "health",
            "epoch": epoch,
            "step": 3 * epoch,
            "feature_std": {"rgb": 0.9},
            "effective_rank": {"rgb": 5.0},
        }
        for epoch in range(3)
    ]
    rows.append({"kind": "online", "epoch": 2, "step": 6, "view": "rgb", "r@1": 0.5})
    return [*rows, {"kind": "alarm", "epoch": 2, "step": 6, "text": "the rgb features may have collapsed"}]


def write_run(folder: Path, rows: list[dict], tail: str = "") -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return folder


@pytest.fixture
def run(tmp_path, index) -> Path:
    return write_run(tmp_path / "run", [start_row(index), *training_rows(), *retrieval_rows(index)])


class Text(HTMLParser):
    """The visible text of a page, tags checked to nest."""

    VOID = {"meta", "br", "wbr", "img", "hr"}

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open, self.text, self.ids = [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.ids += [value for name, value in attributes if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)


def text_of(page: Path) -> str:
    return re.sub(r"\s+", " ", " ".join(Text(page.read_text(encoding="utf-8")).text))


def test_a_complete_run_shows_its_numbers(run):
    page = write_report([run], run / "report.html")
    text = text_of(page)
    for piece in (
        "R@1, RGB + flow 62.5 %",
        "best of the others 30.0 % (mean flow)",
        "PMR, RGB, last epoch 60.0 %",
        "first mining epoch 50.0 %",
        "Trained RGB + flow 62.5 72.5 82.5 100.0 –",
        "16 queries, 30 gallery videos",
        "Chance R@1 is 6.2 %",
        "25.0 % of a step waits for data",
        "1 of 2 classes at 100 %",
        "2. RGB CPR 2 3 2 50.0 % 60.0 % 50.0 % 2:02 min",
        "Videos skipped as unreadable: 2",
        "IIC + CPR 46.9 63.3 71.5 – 73.1",
        "abc123",
    ):
        assert piece in text


def test_the_page_is_whole_and_alone(run):
    page = write_report([run, run], run / "report.html").read_text(encoding="utf-8")
    assert not re.search(
        r"""(src|href)\s*=\s*["']?(https?:|//)|@import|url\(\s*["']?(https?:|//)|<script|<link""", page
    )
    ids = Text(page).ids
    assert len(ids) > 20
    referenced = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', page))
    assert {a or b for a, b in referenced} <= set(ids)
    assert not list(run.glob("*.tmp"))


def test_names_are_escaped(run):
    page = write_report([run], run / "report.html").read_text(encoding="utf-8")
    assert "push&lt;up&gt;" in page and "push<up>" not in page


def test_wrong_positives_are_marked_by_more_than_colour(run):
    page = write_report([run], run / "report.html").read_text(encoding="utf-8")
    mined = page[page.index(">Mined positives</h2>") :]
    assert mined.count('class="clip query"') == 1
    assert mined.count('class="clip right"') == mined.count('<span class="mark">✓</span>') == 1
    assert mined.count('class="clip wrong"') == mined.count('<span class="mark">✗</span>') == 1


def test_a_film_strip_holds_the_clips_frames_in_order(index):
    uri = film_strip(index.parent / "1.mp4", FRAMES, start=4, length=8)
    strip = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("L"), dtype=float)
    levels = [part.mean() for part in np.split(strip, STRIP_FRAMES, axis=1)]
    assert levels == pytest.approx([8 * f + 10 for f in range(4, 12)], abs=4)


def test_a_clip_beyond_the_end_repeats_the_last_frame(index):
    uri = film_strip(index.parent / "0.mp4", FRAMES, start=20, length=16)
    strip = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("L"), dtype=float)
    assert strip[:, -100:].mean() == pytest.approx(8 * (FRAMES - 1), abs=4)


def test_missing_pieces_become_sentences(tmp_path, index):
    only_start = write_run(tmp_path / "a", [start_row(index)])
    text = text_of(write_report([only_start], tmp_path / "a.html"))
    for sentence in ("No retrieval yet", "No epoch of this run has mined positives yet", "No step has been logged yet"):
        assert sentence in text
    bare = write_run(tmp_path / "b", [{"kind": "note", "text": "imported elsewhere"}])
    assert "imported elsewhere" in text_of(write_report([bare], tmp_path / "b.html"))


def test_the_first_values_of_a_cycle_are_those_after_the_memory_is_full(tmp_path, index):
    rows = training_rows()
    filling = next(row for row in rows if row["kind"] == "epoch" and row["mining"] == "cascade")
    filling |= {"loss": None, "pmr": None, "mining_r1": None}
    run = write_run(tmp_path / "run", [start_row(index), *rows])
    assert "2. RGB CPR 2 2 2 60.0 % 60.0 %" in text_of(write_report([run], tmp_path / "r.html"))


def test_a_torn_last_line_and_a_half_epoch_are_survived(tmp_path, index):
    torn = write_run(tmp_path / "run", [start_row(index), *training_rows()[:2]], tail='{"kind": "st')
    assert "25.0 % of a step waits" in text_of(write_report([torn], tmp_path / "r.html"))


def test_moved_videos_leave_labels_without_pictures(tmp_path, index):
    data = shutil.copytree(index.parent, tmp_path / "data")
    run = write_run(
        tmp_path / "run", [start_row(data / "index.csv"), *training_rows(), *retrieval_rows(data / "index.csv")]
    )
    for video in data.glob("*.mp4"):
        video.write_bytes(b"gone")
    text = text_of(write_report([run], tmp_path / "r.html"))
    assert "not readable" in text and "jump" in text
    shutil.rmtree(data)
    assert "no longer where they were" in text_of(write_report([run], tmp_path / "r.html"))


def test_an_index_that_changed_shape_is_not_shown_as_the_old_one(tmp_path, index):
    rows = training_rows()
    for row in rows:
        if row["kind"] == "mined":
            row["mined"][0]["video"] = 99
    run = write_run(tmp_path / "run", [start_row(index), *rows])
    assert "RGB queries" in text_of(write_report([run], tmp_path / "r.html"))


def test_a_repeated_evaluation_replaces_the_earlier_one(tmp_path, index):
    first, again = retrieval_rows(index), retrieval_rows(index)
    again[2]["r@1"] = 0.75
    run = write_run(tmp_path / "run", [start_row(index), *first, *again])
    text = text_of(write_report([run], tmp_path / "r.html"))
    assert "R@1, RGB + flow 75.0 %" in text and "62.5" not in text


def test_several_runs_stand_beside_each_other(tmp_path, index):
    cpr = write_run(tmp_path / "cpr", [start_row(index), *training_rows(), *retrieval_rows(index)])
    coclr = write_run(tmp_path / "coclr", [start_row(index, stages=1), *training_rows()])
    text = text_of(write_report([cpr, coclr], tmp_path / "r.html"))
    assert "2 runs" in text and "cpr 62.5 72.5 82.5 100.0 –" in text and "coclr – – – – –" in text
    assert "2. RGB CoCLR" in text and "2. RGB CPR" in text


def test_a_run_of_residual_frames_is_shown_as_any_other(tmp_path, index):
    rows = [*training_rows(), *retrieval_rows(index)]
    rows = [row | {"view": "residual"} for row in rows if row.get("view") not in ("flow", "two_stream")]
    run = write_run(tmp_path / "run", [start_row(index), *rows])
    text = text_of(write_report([run], tmp_path / "r.html"))
    assert "R@1, Residual 40.0 %" in text and "2. Residual CPR" in text and "Residual queries" in text


def test_chance_pmr_is_what_random_mining_gives(tmp_path, index):
    run = Run(write_run(tmp_path / "run", [start_row(index)]))
    rates = []
    for label, source in zip(LABELS, SOURCES, strict=True):
        others = [other for other, s in zip(LABELS, SOURCES, strict=True) if s != source]
        rates.append(sum(other == label for other in others) / len(others))
    assert run.chance_pmr == pytest.approx(np.mean(rates))


@pytest.mark.parametrize("content", [None, ""])
def test_a_folder_without_metrics_is_named(tmp_path, content):
    folder = tmp_path / "not_a_run"
    folder.mkdir()
    if content is not None:
        (folder / "metrics.jsonl").write_text(content)
    with pytest.raises(InputError, match="not_a_run"):
        write_report([folder], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_figures_leave_their_colours_to_the_page():
    svg = line_figure(
        [Line("a & b", range(3), [0.1, None, 0.3], 0), Line("c", range(3), [0.2] * 3, 5, dashed=True)],
        x="epoch", y="rate <1>", percent=True, bands=[Band(-0.5, 1.5, "RGB CPR"), Band(1.5, 2.5, "Flow CPR")],
    )  # fmt: skip
    svg += bar_figure([Bar("x", 0.5, (0.4, 0.6), 0), Bar("y", 0.0, None, 5)], title="R@1")
    Text(svg)
    assert "var(--s1)" in svg and "var(--s6)" in svg and "var(--ink-soft)" in svg
    assert not re.search(r"#0[12]0[0-9]0[0-9]", svg)


def test_both_protocols_and_all_tasks_have_their_tables(tmp_path, index):
    paper, iic = retrieval_rows(index), [row | {"recipe": "iic"} for row in retrieval_rows(index)]
    run = write_run(tmp_path / "run", [start_row(index), *iic, *paper, *classification_rows(), *health_rows()])
    text = text_of(write_report([run], tmp_path / "r.html"))
    assert text.index("Recipe paper.") < text.index("Recipe iic.")
    assert "Linear probe, RGB + flow 75.0 %" in text and "Finetuned, RGB 85.0 %" in text
    assert "Linear probe RGB + flow 75.0 50.0 – 90.0 60.0 paper 10 1 1 16" in text
    assert "Finetune RGB 85.0 – 60.0 paper 10 1 2 16" in text
    assert "epoch 2: the rgb features may have collapsed" in text


def test_ours_stands_beside_the_published_row(run, tmp_path):
    text = text_of(write_report([run], tmp_path / "r.html"))
    stages = text[text.index("How many stages") : text.index("How much each stage keeps")]
    assert "run, RGB + flow, other data 62.5 72.5 82.5 – –" in stages and "CPR on CoCLR, n = 7 47.8" in stages
    mining = text[text.index("Mining quality") : text.index("CPR on two methods")]
    assert "run, RGB, other data 60.0 75.0" in mining and "38.9 83.3" in mining
    long = text[text.index("Retrieval on UCF101") : text.index("Retrieval on HMDB51")]
    assert "run, Flow, other data 50.0 60.0 70.0 100.0" in long and "56.7 75.5 82.2 88.2" in long
    assert "run," not in text[text.index("Retrieval on HMDB51") :]


def test_runs_are_compared_class_by_class(tmp_path, index):
    better, worse = training_rows(), training_rows()
    for row in worse:
        if row.get("cmr_per_class"):
            row["cmr_per_class"] = [0.5, 0.5, None]
    runs = [write_run(tmp_path / name, [start_row(index), *rows]) for name, rows in (("a", better), ("b", worse))]
    text = text_of(write_report(runs, tmp_path / "r.html"))
    assert "CMR of a is higher in 1 and lower in 0 of 2 classes than that of b" in text


def chromium() -> str:
    """A browser that is installed, or a skip that says what was looked for."""
    for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"):
        if path := shutil.which(name):
            return path
    pytest.skip("no chromium or google-chrome on the PATH to open the page in")


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("runs", [1, 2])
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
