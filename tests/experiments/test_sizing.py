"""The recipes of `init`: the checks of `pretrain` find nothing in them that `init` could have chosen otherwise."""

import dataclasses
from pathlib import Path

import pytest

from cpr_fast.data.index.index import Index, Video
from cpr_fast.experiments.sizing import Facts, sized_recipe
from cpr_fast.pretrain.run.checks import check_run, plan_cycles

VIDEOS = (8, 9, 11, 12, 16, 23, 31, 47, 64, 127, 300)
EPOCHS = (None, 4, 5, 6, 8, 9, 11, 16, 27, 64, 200)


def make_index(videos: int, *, flow: bool = False, labels: bool = False, per_source: int = 1, frames=(60,)) -> Index:
    """Returns an index of videos that do not exist, of which neighbours are of one source, with frames in turn."""
    return Index(
        Video(
            path=Path(f"/{i}.mp4"),
            label=f"c{i % 3}" if labels else "",
            source=f"s{i // per_source}",
            split="",
            num_frames=frames[i % len(frames)],
            fps=25.0,
            width=64,
            height=48,
            flow_path=Path(f"/{i}.flow.mp4") if flow else None,
        )
        for i in range(videos)
    )


def warnings_of(index: Index, epochs: int | None = None, *, gpu: bool = False) -> list[str]:
    """Returns what `pretrain` warns of in the recipe that `init` writes for an index."""
    config = sized_recipe(Facts.of(index, cores=2, gpu=gpu), "index.csv", "runs/mine", epochs).config
    return check_run(config, index, plan_cycles(config, len(index), 1), stored_flow=config.data.flow == "stored")


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize(("flow", "labels"), [(False, False), (False, True), (True, False), (True, True)])
def test_pretrain_warns_of_no_recipe_of_init(flow, labels, gpu):
    for videos in VIDEOS:
        index = make_index(videos, flow=flow, labels=labels)
        for epochs in EPOCHS:
            assert not warnings_of(index, epochs, gpu=gpu), (videos, epochs)
    large = make_index(3000, flow=flow, labels=labels)
    assert not warnings_of(large, 4, gpu=gpu) and not warnings_of(large, gpu=gpu)


@pytest.mark.parametrize("per_source", [2, 3, 7])
def test_siblings_leave_enough_to_mine(per_source):
    for videos in (8, 9, 16, 31, 64):
        index = make_index(videos, per_source=per_source)
        for epochs in EPOCHS:
            found = warnings_of(index, epochs)
            if 2 * per_source <= videos:  # of a memory of two entries or more, one is of another source
                assert not found, (videos, epochs)
            assert all("Set mining.top_k lower" in text and "top_k = 1 " in text for text in found)


@pytest.mark.parametrize("frames", [(8,), (8, 9), (12, 7), (7, 16), (15, 16), (31, 32), (20, 40), (100, 5, 30)])
@pytest.mark.parametrize("gpu", [False, True])
def test_clips_fit_into_most_videos(frames, gpu):
    for videos in (8, 9, 100):
        index = make_index(videos, frames=frames)
        found = warnings_of(index, gpu=gpu)
        least = 5 if gpu else 8  # frames that S3D and R3D need
        half = 2 * sum(video.num_frames < least for video in index) >= len(index)
        assert all(f"reads no clips of fewer than {least} frames" in text for text in found) and bool(found) == half


def test_one_long_video_changes_nothing_of_a_recipe():
    index = make_index(20, frames=(10,))
    longer = Index([*list(index)[:-1], dataclasses.replace(index[19], num_frames=100_000)])
    first, second = (sized_recipe(Facts.of(i, cores=2, gpu=True), "i", "o").config for i in (index, longer))
    assert first == second and first.data.frames == 8
