"""The stored measures of every query, and which evaluations may be compared."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import torch

from cpr_fast.data.index.index import Video
from cpr_fast.errors import InputError
from cpr_fast.evaluate.retrieval.queries import QueryScores, have_copies, hits_at_1, joined, matched, query_scores
from cpr_fast.evaluate.retrieval.ranking import NO_HIT, Ranking

STRANGE = os.fsdecode(b"caf\xe9.mp4")  # a file name that is not UTF-8


def video(path: str, label: str = "a", source: str = "s") -> Video:
    return Video(Path(path), label, source, "test", 40, 25.0, 64, 48)


def scores(folder: str, names: list[str], order: list[int] | None = None, gallery: list[str] | None = None):
    """Scores whose average precision and first hit tell the video: .1, 10 for the first name, .2, 20 for the second."""
    order = order if order is not None else list(range(len(names)))
    videos = [video(f"{folder}/{names[i]}", "ab"[i % 2], f"s{i // 2}") for i in order]
    values = torch.tensor([i + 1.0 for i in order], dtype=torch.float64)
    ranking = Ranking(10 * values.long(), values / 10, values, values)
    found = [video(f"{folder}/{name}") for name in gallery or ["train/g.mp4", "train/h.mp4"]]
    return query_scores(videos, found, torch.ones(len(videos), dtype=torch.bool), {"trained/rgb": ranking})


def test_a_file_gives_back_what_was_written(tmp_path):
    one = scores("/data", ["x/1.mp4", STRANGE, "3.mp4"])
    one.average_precision["trained/rgb"][1] = torch.nan
    one.first_hit["trained/rgb"][1] = NO_HIT
    both = joined([one, scores("/data", ["only.mp4"])])
    both.save(tmp_path / "evaluations" / "a.npz")
    again = QueryScores.load(tmp_path / "evaluations" / "a.npz")
    for field in ("paths", "labels", "sources", "galleries"):
        assert getattr(again, field) == getattr(both, field)
    assert again.splits.tolist() == [1, 1, 1, 2]
    for field in ("average_precision", "first_hit"):
        for name, values in getattr(both, field).items():
            assert torch.equal(getattr(again, field)[name].nan_to_num(-1), values.nan_to_num(-1))
    assert again.source_ids().tolist() == [0, 0, 1, 0]
    assert [file.name for file in (tmp_path / "evaluations").iterdir()] == ["a.npz"]


def test_videos_of_a_server_are_named_by_their_urls_in_any_folder(tmp_path, monkeypatch):
    urls = ["https://host/x/a.mp4?key=1", "s3://bucket/b.mp4"]
    found = []
    for folder in (tmp_path, Path("/")):
        monkeypatch.chdir(folder)
        ranking = Ranking(*(torch.arange(3.0) for _ in range(4)))
        videos = [*map(video, urls), video("/data/c.mp4")]
        found.append(query_scores(videos, videos[:2], torch.ones(3, dtype=torch.bool), {"trained/rgb": ranking}))
    assert found[0].paths == found[1].paths == [*urls, "/data/c.mp4"] and found[0].galleries == found[1].galleries
    assert matched(*found).paths == found[0].paths


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 torn", b"no zip"])
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.npz' is damaged"):
        QueryScores.load(tmp_path / "a.npz")
    with pytest.raises(InputError, match=r"b\.npz' does not exist"):
        QueryScores.load(tmp_path / "b.npz")


@pytest.mark.parametrize("folder", ["/data", "/elsewhere/deeper"])
def test_queries_are_matched_by_path_in_any_order_and_folder(folder):
    names = ["x/1.mp4", "x/2.mp4", "y/1.mp4"]
    first, second = scores("/data", names), scores(folder, names, [2, 0, 1])
    moved = matched(first, second)
    assert moved.average_precision["trained/rgb"].tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert moved.first_hit["trained/rgb"].tolist() == [10, 20, 30]
    assert moved.labels == first.labels and moved.sources == first.sources


def test_the_same_video_in_two_splits_is_two_queries():
    first = joined([scores("/data", ["1.mp4", "2.mp4"]), scores("/data", ["1.mp4", "2.mp4"], [1, 0])])
    second = joined([scores("/data", ["1.mp4", "2.mp4"], [1, 0]), scores("/data", ["1.mp4", "2.mp4"])])
    assert matched(first, second).average_precision["trained/rgb"].tolist() == pytest.approx([0.1, 0.2, 0.2, 0.1])


def test_what_differs_is_said():
    names = ["x/1.mp4", "x/2.mp4", "y/3.mp4"]
    first = scores("/data", names)
    with pytest.raises(
        InputError,
        match=r"the same queries, got 3 and 4: 1 only in the first \(/data/y/3.mp4\), 2 only in the second "
        r"\(/data/y/4.mp4, /data/y/5.mp4\)",
    ):
        matched(first, scores("/data", [*names[:2], "y/4.mp4", "y/5.mp4"]))
    relabelled = dataclasses.replace(first, labels=["a", "a", "a"])
    with pytest.raises(InputError, match=r"same labels .* got 1 that differ, the first of /data/x/2.mp4: 'b' and 'a'"):
        matched(first, relabelled)
    with pytest.raises(InputError, match="same sources"):
        matched(first, dataclasses.replace(first, sources=["s0", "s1", "s1"]))
    with pytest.raises(InputError, match="same gallery"):
        matched(first, scores("/data", names, gallery=["train/g.mp4"]))


def test_hits_at_1():
    assert hits_at_1(torch.tensor([0, 1, NO_HIT, 0])).tolist() == [1, 0, 0, 1]


def test_a_video_is_no_copy_of_itself_nor_with_other_sources_of_a_sibling(tmp_path):
    for name, content in (("a", "1"), ("b", "1"), ("c", "1"), ("d", "2")):
        (tmp_path / name).write_text(content)
    a, b, c, d = (video(str(tmp_path / name), source=source) for name, source in zip("abcd", "stsu", strict=True))
    assert have_copies([a, b, c, d], [a, b, c, d], True) == [True, True, True, False]
    assert have_copies([a, c, d], [a, c, d], True) == [False] * 3
    assert have_copies([a, c, d], [a, c, d], False) == [True, True, False]
    assert have_copies([a, d], [b], False) == [True, False] and have_copies([a], [a], False) == [False]
