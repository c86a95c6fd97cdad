"""Compares the same-video rates with brute force in NumPy float64; a stand-in for the loader returns known clips."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cpr_fast.config import DataConfig
from cpr_fast.data.index.index import Index, Video
from cpr_fast.evaluate.features.embedding import Embedding
from cpr_fast.evaluate.retrieval import same_video
from cpr_fast.evaluate.retrieval.ranking import TOGETHER
from cpr_fast.evaluate.retrieval.same_video import TwoClips, same_video_rates, videos_with_two_clips

NOISE = {"trained": 0.6, "untrained": 2.0}  # added to the point of a video: the trained network is nearer to it


def video(number: int, frames: int = 40, source: str = "") -> Video:
    return Video(Path(f"{number}.mp4"), "", source or f"s{number}", "", frames, 25.0, 64, 48, None)


def features(number: int, end: int, model: str, view: str) -> np.ndarray:
    rng = np.random.default_rng([number, ["rgb", "residual"].index(view)])
    noise = np.random.default_rng([number, end, len(model), len(view)]).normal(size=9)
    return rng.normal(size=9) + 0.5 + NOISE[model] * noise


class Pairs:
    """Gives two clips of each video, whose "pixels" are the number of the video and of the clip; of the videos in
    `broken` only the first."""

    skipped = ()

    def __init__(self, index: Index, broken: tuple[int, ...] = ()) -> None:
        numbers = [(place, int(entry.path.stem)) for place, entry in enumerate(index)]
        self.clips = [(p, n, end) for p, n in numbers for end in (0, 1) if not (end and n in broken)]

    def __len__(self):
        return -(-len(self.clips) // 3)

    def __iter__(self):
        for start in range(0, len(self.clips), 3):  # a video's clips may be in two batches
            part = self.clips[start : start + 3]
            shown = torch.tensor([[n, end] for _, n, end in part], dtype=torch.float32)
            yield SimpleNamespace(clips={"rgb": shown, "residual": shown}, video=torch.tensor([p for p, *_ in part]))

    def close(self):
        pass


def embedding(model: str, view: str) -> Embedding:
    def function(shown):
        rows = [features(int(n), int(end), model, view) for n, end in shown.tolist()]
        return torch.tensor(np.stack(rows), dtype=torch.float32)

    return Embedding(view, function)


EMBEDDINGS = {f"{model}/{view}": embedding(model, view) for model in NOISE for view in ("rgb", "residual")}


def brute_force(index: list[Video], model: str, views: list[str]) -> np.ndarray:
    """Returns whether each video's last clip is the nearest of those of its own and of other sources."""
    total = np.zeros((len(index), len(index)))
    for view in views:
        sides = []
        for end in (0, 1):
            rows = np.stack([features(int(entry.path.stem), end, model, view) for entry in index])
            rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
            rows = rows - rows.mean(0)
            sides.append(rows / np.linalg.norm(rows, axis=1, keepdims=True))
        total += sides[0] @ sides[1].T
    for i, a in enumerate(index):
        for j, b in enumerate(index):
            if i != j and a.source == b.source:
                total[i, j] = -np.inf
    return total.argmax(1) == np.arange(len(index))


@pytest.mark.parametrize(("count", "broken"), [(37, (4, 20)), (2, ()), (5, (0, 1))])
def test_rates_equal_brute_force(count, broken):
    index = Index([video(i, source=f"s{i // 2}" if i < 12 and count > 12 else "") for i in range(count)])
    rows = same_video_rates(TwoClips(index, 0), EMBEDDINGS, lambda part: Pairs(part, broken))
    order = [(row["name"], row["view"] in TOGETHER) for row in rows]
    assert order == sorted(order)  # of each network single views come first, then two of them together
    read = [entry for entry in index if int(entry.path.stem) not in broken]
    views = ("rgb", "residual", "merged")
    assert {(row["name"], row["view"]) for row in rows} == {(model, view) for model in NOISE for view in views}
    found = {}
    for row in rows:
        streams = ["rgb", "residual"] if row["view"] == "merged" else [row["view"]]
        hits = found[row["name"], row["view"]] = brute_force(read, row["name"], streams)
        assert row["r@1"] == pytest.approx(hits.mean()) and row["videos"] == len(read)
        allowed = [1 + sum(other.source != entry.source for other in read) for entry in read]
        assert row["chance_r@1"] == pytest.approx(np.mean([1 / n for n in allowed]))
    for view in views:
        row = next(row for row in rows if (row["name"], row["view"]) == ("trained", view))
        difference = found["trained", view].mean() - found["untrained", view].mean()
        assert row["difference"] == pytest.approx(difference)
        low, high = row["difference_ci95"]
        assert low <= difference <= high
    assert all("difference" not in row for row in rows if row["name"] == "untrained")


@pytest.mark.parametrize("index", [Index([video(0), video(1)]), Index([video(i, source="one") for i in range(4)])])
def test_fewer_than_two_sources_give_no_rates(index):
    broken = (1,) if len(index) == 2 else ()
    assert same_video_rates(TwoClips(index, 0), EMBEDDINGS, lambda part: Pairs(part, broken)) == []
    everything = tuple(range(4))
    assert same_video_rates(TwoClips(index, 0), EMBEDDINGS, lambda part: Pairs(Index([]), everything)) == []


def test_only_videos_whose_two_clips_share_no_frame_are_compared(monkeypatch):
    data = DataConfig(frames=8, stride=2)  # a clip covers 16 frames
    index = Index([video(i, frames) for i, frames in enumerate((31, 32, 33, 16, 500))])
    assert [int(entry.path.stem) for entry in videos_with_two_clips(index, data).videos] == [1, 2, 4]
    monkeypatch.setattr(same_video, "MOST_VIDEOS", 3)
    many = Index([video(i, 40) for i in range(10)])
    assert [int(entry.path.stem) for entry in videos_with_two_clips(many, data).videos] == [0, 4, 8]


def test_an_exact_copy_is_the_same_video(tmp_path):
    """The rates are those without the copies: with them, each copy would take half of the hits of the other."""
    contents = [f"content {number}".encode() for number in range(12)]
    contents[7], contents[11], contents[9] = contents[2], contents[2], contents[8]
    for number, content in enumerate(contents):
        (tmp_path / f"{number}.mp4").write_bytes(content)
    index = Index([dataclasses.replace(video(i), path=tmp_path / f"{i}.mp4") for i in range(12)])
    distinct = [entry for i, entry in enumerate(index) if contents.index(contents[i]) == i]
    rows = same_video_rates(
        videos_with_two_clips(index, DataConfig(frames=8, stride=2)), EMBEDDINGS, lambda part: Pairs(part, ())
    )
    assert rows == [row | {"copies": 3} for row in same_video_rates(TwoClips(Index(distinct), 0), EMBEDDINGS, Pairs)]
    assert {row["videos"] for row in rows} == {9} and rows[0]["chance_r@1"] == pytest.approx(1 / 9)
