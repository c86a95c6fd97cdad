"""An index in Parquet: the same rows, selections and batches as the index in CSV, made only when they are asked for."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.data_sets.tar_files import write_tar
from support.videos.odd_videos import place, write_plain

from cpr_fast.config import DataConfig
from cpr_fast.data.clips.loader import TrainLoader
from cpr_fast.data.clips.sampling import Sources
from cpr_fast.data.index.build import IndexOptions, write_index
from cpr_fast.data.index.index import Index, IndexFileError, Video
from cpr_fast.data.index.rows.columns import spread
from cpr_fast.errors import InputError

pa = pytest.importorskip("pyarrow", reason="pyarrow is an extra: pip install pyarrow")
pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow is an extra: pip install pyarrow")


@pytest.fixture
def both(tmp_path) -> tuple[Index, Index]:
    """An index of videos that exist or are on a server, in CSV and in Parquet."""
    rng, videos = np.random.default_rng(0), []
    write_tar(tmp_path / "s.tar", {"a.mp4": b"x"})
    places = [*(tmp_path / "set" / f"{i}.mp4" for i in range(30)), Path(f"{tmp_path}/s.tar#512+1/a.mp4"),
              Path("s3://bucket/a b.mp4"), Path("https://host/a.mp4?x=1")]  # fmt: skip
    for number, path in enumerate(places):
        if number < 30:
            place(Path(__file__), path)
        label, split = rng.choice(["", "run", "walk", "früh"]), rng.choice(["train", "test", ""])
        flow = tmp_path / "set" / "0.mp4" if number % 3 == 0 else None
        frames = int(rng.integers(1, 60))
        videos.append(Video(path, str(label), f"s{number % 7}", str(split), frames, 25.5 + number, 64, 48, flow))
    for name in ("i.csv", "i.parquet"):
        Index(videos).save(tmp_path / name)
    return Index.load(tmp_path / "i.csv"), Index.load(tmp_path / "i.parquet")


DROP = DataConfig(frames=32, short_videos="drop")


def assert_equal(rows: Index, columns: Index) -> None:
    assert list(rows) == list(columns) and rows.classes == columns.classes and len(rows) == len(columns)
    for name in ("labels", "source_ids", "has_flow"):
        assert np.array_equal(getattr(rows, name), getattr(columns, name)), name
    assert rows.has_splits == columns.has_splits and rows.class_count == columns.class_count
    for data in (None, DataConfig(flow="on_the_fly"), DataConfig(), DataConfig(fps=7.0)):
        for field in ("num_frames", "height", "width"):
            assert np.array_equal(getattr(Sources.of(rows, data), field), getattr(Sources.of(columns, data), field))


def test_parquet_holds_the_rows_of_the_csv_file(both):
    rows, columns = both
    assert_equal(rows, columns)
    assert columns[-1].path == Path("https://host/a.mp4?x=1") and columns[-1] == columns[len(columns) - 1]
    with pytest.raises(IndexError):
        columns[len(columns)]
    for select in (lambda index: index.select("test"), lambda index: index.training()[1],
                   lambda index: index.chosen([3, 4, 20]), lambda index: index.long_enough(DROP),
                   lambda index: index.select("train").long_enough(DROP)):  # fmt: skip
        assert_equal(select(rows), select(columns))
    for index in both:
        with pytest.raises(IndexFileError, match="split 'val': the index has no such video; its splits are"):
            index.select("val")
        with pytest.raises(IndexFileError, match="data.short_videos: expected a video of more than"):
            index.long_enough(DataConfig(frames=2000, short_videos="drop"))


def test_index_writes_parquet_and_training_gives_the_same_batches(tmp_path):
    video = write_plain(tmp_path / "v.mp4", 20)
    place(video, *(tmp_path / "set" / label / f"{i}.mp4" for label in ("a", "b") for i in range(4)))
    batches = []
    for name in ("i.csv", "i.parquet"):
        report = write_index(tmp_path / "set", tmp_path / name, IndexOptions())
        assert report["videos"] == 8 and report["classes"] == 2
        loader = TrainLoader(Index.load(tmp_path / name), DataConfig(frames=8, size=32, batch_size=4), ["rgb"], seed=3)
        batches.append(list(loader.epoch(0)))
        loader.close()
    for one, other in zip(*batches, strict=True):
        for field in ("video", "source", "label", "start", "plan"):
            assert np.array_equal(getattr(one, field), getattr(other, field))
        assert np.array_equal(one.clips["rgb"], other.clips["rgb"])
    again = write_index(tmp_path / "set", tmp_path / "i.parquet", IndexOptions(classes=False))
    assert again["counts"]["replaced"] == 8 and (tmp_path / "i.old.parquet").exists()


GOOD = {"path": ["a.mp4", "b.mp4"], "label": ["", ""], "source": ["", "s"], "split": ["", ""], "num_frames": [5, 6],
        "fps": [25.0, 25.0], "width": [8, 8], "height": [8, 8], "flow_path": ["", ""]}  # fmt: skip
BAD = {
    "missing column 'fps'": {"fps": None},
    "row 2, column num_frames: expected a positive number, got 0": {"num_frames": [5, 0]},
    "row 1, column fps: expected a positive number, got nan": {"fps": [float("nan"), 1.0]},
    "row 2, column path: 'a.mp4' repeats row 1": {"path": ["a.mp4", "a.mp4"]},
    "row 1, column path: expected a file, got ''": {"path": ["", "a.mp4"]},
    "row 2, column path: expected a value, got none": {"path": ["a.mp4", None]},
    "row 1, column width: expected a value, got none": {"width": [None, 8]},
    "a column has another type": {"width": ["eight", "8"]},
    "row 2, column path: file .*none.mp4' does not exist; relative paths begin at": {"path": ["a.mp4", "none.mp4"]},
}


@pytest.mark.parametrize("reason", BAD)
def test_bad_values_are_named_with_their_row_and_column(tmp_path, reason):
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes(b"x")
    columns = {name: values for name, values in (GOOD | BAD[reason]).items() if values is not None}
    pq.write_table(pa.table(columns), tmp_path / "i.parquet")
    with pytest.raises(IndexFileError, match=f"i.parquet.*{reason}"):
        Index.load(tmp_path / "i.parquet")


def test_columns_as_other_programs_write_them_are_those_of_the_csv_file(tmp_path):
    """pandas and polars write null for what is missing, dictionaries for categories, and columns of their own."""
    folder = tmp_path / "split=x"  # the name of a folder is no column
    folder.mkdir()
    for name in ("a.mp4", "b.mp4"):
        (folder / name).write_bytes(b"x")
    odd = {"label": pa.array([None, " walk "]).dictionary_encode(), "source": pa.nulls(2), "split": ["Train", None],
           "num_frames": pa.array([5, 6], pa.int64()), "fps": pa.array([25, 30], pa.float32()),
           "flow_path": pa.nulls(2), "note": ["x", "y"]}  # fmt: skip
    pq.write_table(pa.table(GOOD | odd), folder / "i.parquet")
    header = "path,label,source,split,num_frames,fps,width,height,flow_path\n"
    (folder / "i.csv").write_text(f"{header}a.mp4,,,Train,5,25,8,8,\nb.mp4, walk ,,,6,30,8,8,\n")
    index = Index.load(folder / "i.parquet")
    assert_equal(Index.load(folder / "i.csv"), index)
    assert len(index.select("TRAIN")) == 1 and index.classes == ["walk"] and not index.has_flow.any()


def test_a_file_of_many_row_groups_is_read_in_order(tmp_path, monkeypatch):
    """Each group has dictionaries of its own, in which names have other numbers; strings are looked at in parts."""
    monkeypatch.setattr("cpr_fast.data.index.rows.columns.AT_ONCE", 5)
    rng, count = np.random.default_rng(1), 47
    (tmp_path / "a").mkdir()
    rows = {name: values[:1] * count for name, values in GOOD.items()}
    rows |= {"path": [f"a/{i}.mp4" for i in range(count)], "label": [f"c{i} " for i in rng.integers(0, 9, count)],
             "split": [("train", "Train", "test", "", None)[i] for i in rng.integers(0, 5, count)],
             "fps": (25 + rng.integers(0, 3, count) / 7).tolist(), "num_frames": rng.integers(1, 90, count).tolist(),
             "source": [f"s{i}" * (i > 3) for i in range(count)]}  # fmt: skip
    for path in rows["path"]:
        (tmp_path / path).write_bytes(b"x")
    pq.write_table(pa.table(rows), tmp_path / "i.parquet", row_group_size=7)
    order = ("path", "label", "source", "split", "num_frames", "fps", "width", "height", "flow_path")
    lines = [",".join("" if rows[name][i] is None else str(rows[name][i]) for name in order) for i in range(count)]
    (tmp_path / "i.csv").write_text("\n".join([",".join(order), *lines]) + "\n")
    rows_index, columns = Index.load(tmp_path / "i.csv"), Index.load(tmp_path / "i.parquet")
    assert_equal(rows_index, columns)
    some = rng.permutation(count)[:20]
    assert_equal(rows_index.chosen(some), columns.chosen(some))
    assert list(columns.chosen(range(count))) == list(columns)
    pq.write_table(pa.table(rows | {"path": [*rows["path"][:-1], "a/30.mp4"]}), tmp_path / "i.parquet")
    with pytest.raises(IndexFileError, match="row 47, column path: 'a/30.mp4' repeats row 31"):
        Index.load(tmp_path / "i.parquet")


def test_rows_without_a_source_are_sources_of_their_own_beside_those_that_have_one(tmp_path):
    names = [f"{i}.mp4" for i in range(5)]
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    rows = {name: values[:1] * 5 for name, values in GOOD.items()} | {"path": names, "source": ["", "s", "", "s", ""]}
    pq.write_table(pa.table(rows), tmp_path / "i.parquet")
    index = Index.load(tmp_path / "i.parquet")
    assert index.source_ids.tolist() == [0, 1, 2, 1, 3] and [video.source for video in index][:2] == ["0.mp4", "s"]


def test_index_names_the_missing_package_before_it_looks_at_any_video(tmp_path, monkeypatch):
    place(Path(__file__), tmp_path / "set" / "a.mp4")
    monkeypatch.setattr("cpr_fast.data.index.build.list_videos", lambda *_, **__: pytest.fail("looks for videos"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"^--out: .*pip install pyarrow"):
        write_index(tmp_path / "set", tmp_path / "i.parquet", IndexOptions())


def test_a_file_that_is_no_parquet_or_was_cut_off_is_named(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"x")
    (tmp_path / "b.mp4").write_bytes(b"x")
    pq.write_table(pa.table(GOOD), tmp_path / "i.parquet")
    index = Index.load(tmp_path / "i.parquet")
    assert [video.source for video in index] == ["a.mp4", "s"]  # without a source a video is its own
    whole = (tmp_path / "i.parquet").read_bytes()
    for data in (whole[:-20], b"path,label", b""):
        (tmp_path / "i.parquet").write_bytes(data)
        with pytest.raises(IndexFileError, match="expected an index in Parquet"):
            Index.load(tmp_path / "i.parquet")
    with pytest.raises(IndexFileError, match="expected an index, but .*does not exist"):
        Index.load(tmp_path / "none.parquet")
    with pytest.raises(InputError, match="UTF-8 only"):
        Index([replace(index[0], label="\udcff")]).save(tmp_path / "o.parquet")
    assert not (tmp_path / "o.parquet").exists()


def test_of_a_large_index_some_rows_are_looked_for_and_others_found_missing_when_read(tmp_path, monkeypatch):
    monkeypatch.setattr("cpr_fast.data.index.index.LOOKED_FOR", 4)
    for name in "0123":
        (tmp_path / f"{name}.mp4").write_bytes(b"x")
    rows = "".join(f"{name}.mp4,,,,5,25,8,8,\n" for name in "0123456")
    header = "path,label,source,split,num_frames,fps,width,height,flow_path\n"
    (tmp_path / "i.csv").write_text(header + rows)
    with pytest.raises(IndexFileError, match="4.mp4' does not exist"):  # rows 0, 2, 4 and 6 are looked for
        Index.load(tmp_path / "i.csv")
    for name in "46":
        (tmp_path / f"{name}.mp4").write_bytes(b"x")
    assert len(Index.load(tmp_path / "i.csv")) == 7


@pytest.mark.parametrize("count, most", [(0, 5), (1, 5), (5, 5), (6, 5), (11, 5), (1000, 7), (3, 1)])
def test_spread_positions(count, most):
    found = list(spread(count, most))
    assert len(found) <= most and len(found) > min(count, most) // 2 - 1 and (count == 0) == (not found)
    assert found == list(range(count)) if count <= most else all(0 <= place < count for place in found)
