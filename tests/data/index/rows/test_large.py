"""A large index in CSV is read as columns; whatever is unusual in it is read, or refused, as in a small one."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from support.videos.odd_videos import place

from cpr_fast.data.index.index import Index, IndexFileError, Video
from cpr_fast.data.index.rows import large
from cpr_fast.data.index.rows.columns import Columns
from cpr_fast.data.index.rows.video import COLUMNS

pytest.importorskip("pyarrow", reason="pyarrow is an extra: pip install pyarrow")

ROWS = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the files of an index of odd names, and the index."""
    folder, draw, videos = tmp_path_factory.mktemp("large"), np.random.default_rng(0), []
    names = ['a, "b".mp4', "zwei\nZeilen.mp4", "ä ö.mp4", "semi;colon.mp4", "tab\there.mp4", " blank .mp4"]
    paths = [folder / name for name in names + [f"{i}.mp4" for i in range(ROWS - 8)]]
    for path in [*paths, folder / "more.mp4"]:
        place(Path(__file__), path)
    paths += [Path("https://host/a,b.mp4?x=1"), Path("s3://bucket/c.mp4")]
    for number, path in enumerate(paths):
        label, split = draw.choice(["", "run", "früh, spät", '"quoted"']), draw.choice(["train", "test", ""])
        source = "" if number % 5 else f"s {number % 3}"
        flow = paths[0] if number % 4 == 0 else None
        fps = float(draw.choice([25.0, 29.97, 1e-3]))
        videos.append(Video(path, str(label), source, str(split), int(draw.integers(1, 9999)), fps, 64, 48, flow))
    Index(videos).save(folder / "index.csv")
    return folder


def outcome(path: Path, monkeypatch, least: float) -> tuple[list, list[str], bool] | str:
    """Returns the videos, classes, and whether they are columns, of an index that is large from `least` bytes on; or
    the error."""
    monkeypatch.setattr(large, "LARGE", least)
    try:
        index = Index.load(path)
    except IndexFileError as error:
        return str(error)
    facts = [index.labels.tolist(), index.source_ids.tolist(), index.has_flow.tolist(), list(index)]
    return facts, index.classes, isinstance(index._videos, Columns)


def test_the_rows_are_those_of_the_reader_of_small_files(folder, monkeypatch):
    small, columns = (outcome(folder / "index.csv", monkeypatch, least) for least in (float("inf"), 0))
    assert not small[2] and columns[2] and small[:2] == columns[:2] and len(small[0][3]) == ROWS


def test_without_pyarrow_and_below_the_size_rows_are_read_as_before(folder, monkeypatch):
    size = (folder / "index.csv").stat().st_size
    assert [outcome(folder / "index.csv", monkeypatch, least)[2] for least in (size, size + 1)] == [True, False]
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert not outcome(folder / "index.csv", monkeypatch, 0)[2]


def last(field: str, value: str):
    """Returns a function that adds a row, of which this field is written as `value`."""
    usual = dict(zip(COLUMNS, ["more.mp4", "run", "", "train", "30", "25", "64", "48", ""], strict=True))
    return lambda text: f"{text}{','.join((usual | {field: value}).values())}\n"


UNUSUAL = {
    "a byte-order mark": lambda text: "\ufeff" + text,
    "semicolons": lambda text: "path;label;source;split;num_frames;fps;width;height;flow_path\na.mp4;;;;9;25;64;48;\n",
    "another case": lambda text: text.replace("num_frames", "Num_Frames", 1),
    "another order": lambda text: "label,path,source,split,num_frames,fps,width,height,flow_path\n,0.mp4,,,9,25,6,4,\n",
    "a column less": lambda text: text.replace(",flow_path", "", 1),
    "a column more": lambda text: text.replace(",flow_path", ",flow_path,notes", 1),
    "a row cut off": lambda text: text[:-9],
    "no last line break": lambda text: text[:-1],
    "a field more": lambda text: text[:-1] + ",x\n",
    "a repeated header": lambda text: text + text.partition("\n")[0] + "\n",
    "blank lines": lambda text: text + "\n \n,,,,,,,,\n",
    "only a header": lambda text: text.partition("\n")[0] + "\n",
    "lines of Windows": lambda text: text.replace("\n", "\r\n"),
    "a quotation mark too many": last("label", '"run'),
    "a repeated path": last("path", "0.mp4"),
    "a path in another form": last("path", "./0.mp4"),
    "no path": last("path", ""),
    "a blank before a URL": last("path", " https://host/z.mp4"),
    "a file that is missing": last("path", "gone.mp4"),
    "flow that is missing": last("flow_path", "gone.mp4"),
    "a split in capitals": last("split", " TRAIN "),
    "blanks around a class": last("label", " run "),
    "blanks around a source": last("source", " s 1 "),
    "a whole number with a point": last("num_frames", "30.0"),
    "no frames": last("num_frames", "0"),
    "no number": last("num_frames", "many"),
    "too many frames": last("num_frames", "2147483648"),
    "blanks around a number": last("num_frames", " 30 "),
    "an infinite rate": last("fps", "inf"),
    "a rate that is no number": last("fps", "nan"),
    "a negative width": last("width", "-1"),
    "nothing in place of a height": last("height", ""),
}


@pytest.mark.parametrize("what", UNUSUAL)
def test_what_is_unusual_is_read_or_refused_as_in_a_small_index(folder, monkeypatch, what):
    path = folder / "unusual.csv"
    text = UNUSUAL[what]((folder / "index.csv").read_text(encoding="utf-8"))
    path.write_bytes(text.encode())
    small, found = (outcome(path, monkeypatch, least) for least in (float("inf"), 0))
    if what == "a path in another form":  # found in small files only, as in Parquet
        assert "repeats line" in small and not isinstance(found, str)
        return
    assert small == found if isinstance(small, str) else small[:2] == found[:2]


@pytest.mark.parametrize("byte", [b"\xff", b"\0"])
def test_bytes_that_are_no_text_are_refused_as_in_a_small_index(folder, monkeypatch, byte):
    path = folder / "bytes.csv"
    path.write_bytes((folder / "index.csv").read_bytes().replace(b"run", b"r" + byte + b"n", 1))
    small, found = (outcome(path, monkeypatch, least) for least in (float("inf"), 0))
    assert isinstance(small, str) and small == found


def test_an_index_that_is_replaced_while_it_is_read_is_the_old_or_the_new_one(folder, monkeypatch):
    text = (folder / "index.csv").read_text(encoding="utf-8")
    path, whole = folder / "replaced.csv", large._Parsed._pass

    def replaced(parsed, names: list[str]) -> dict:
        found = whole(parsed, names)
        other = path.with_name("other.csv")
        other.write_text(last("label", "new")(text), encoding="utf-8")
        other.replace(path)
        return found

    path.write_text(text, encoding="utf-8")
    expected = outcome(path, monkeypatch, 0)
    monkeypatch.setattr(large._Parsed, "_pass", replaced)
    assert outcome(path, monkeypatch, 0) == expected and expected[2]
    assert path.read_text(encoding="utf-8") != text
