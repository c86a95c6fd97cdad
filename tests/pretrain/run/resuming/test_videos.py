"""The videos of a run: chosen by split, and recognised when the run is resumed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from support.small_runs import INDEX, assert_same, run, settings, stopped, trained
from support.stand_in_loader import RandomLoader

from cpr_fast.config import DataConfig
from cpr_fast.data.index.index import Index
from cpr_fast.errors import InputError
from cpr_fast.pretrain.run.loop import pretrain
from cpr_fast.pretrain.run.videos import digest, training_videos
from cpr_fast.weights.checkpoint import load_checkpoint, save_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


def write_index(folder: Path, splits: list[str]) -> str:
    videos = []
    for i, split in enumerate(splits):
        path = folder / f"v{i}.mp4"
        path.touch()
        videos.append(dataclasses.replace(INDEX[i], path=path, split=split))
    Index(videos).save(folder / "index.csv")
    return str(folder / "index.csv")


def test_videos_are_chosen_by_split(tmp_path, caplog):
    index = write_index(tmp_path, ["test", *["train"] * 8, "val"])
    assert [video.path.name for video in training_videos(DataConfig(index=index))] == [f"v{i}.mp4" for i in range(1, 9)]
    assert "expected" not in caplog.text
    assert len(training_videos(DataConfig(index=index, split="val"))) == 1
    few = "expected at least 8 training videos of at least 2 sources, got 1 video of 1 source in split 'val'; a run on"
    assert f"data.index: {few}" in caplog.text


@pytest.mark.parametrize("split", ["train", "", "anything"])
def test_without_splits_all_videos_are_taken(tmp_path, split, caplog):
    caplog.set_level("INFO")
    index = write_index(tmp_path, [""] * 9)
    assert len(training_videos(DataConfig(index=index, split=split))) == 9
    assert ("the index has no splits" in caplog.text) == (split != "")


def test_a_split_that_is_not_there_is_named_with_those_that_are(tmp_path):
    index = write_index(tmp_path, ["test", "test", "", "val"])
    message = r"data.split: split 'train': .* 'test', '', 'val'. Choose one with --data.split"
    with pytest.raises(InputError, match=message):
        training_videos(DataConfig(index=index))


def test_no_index_is_named():
    with pytest.raises(InputError, match=r"data.index: expected the path of an index"):
        training_videos(DataConfig())


def changed(how: str) -> Index:
    videos = list(INDEX)
    if how == "fewer":
        return Index(videos[:13], INDEX.classes)
    if how == "order":
        return Index([videos[1], videos[0], *videos[2:]], INDEX.classes)
    if how == "label":
        return Index([dataclasses.replace(videos[0], label="class3"), *videos[1:]], INDEX.classes)
    if how == "source":
        return Index([dataclasses.replace(videos[0], source="source8"), *videos[1:]], INDEX.classes)
    if how == "classes":
        return Index(videos, INDEX.classes[::-1])
    return Index([dataclasses.replace(videos[0], path=Path("/other.mp4")), *videos[1:]], INDEX.classes)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("fewer", "13 videos"),
        ("order", "the same videos in another order"),
        ("classes", "the classes in another order"),
        ("label", "the same videos with other labels or sources"),
        ("source", "the same videos with other labels or sources"),
        ("name", "other videos"),
    ],
)
def test_a_resume_with_other_videos_is_refused(tmp_path, how, message):
    out = stopped(tmp_path / "run")
    log = (out / "metrics.jsonl").read_text()
    for resume in (True, "auto"):
        with pytest.raises(
            InputError, match=rf"data.index: the run in '.*run' was trained on 18 videos, got .*{message}"
        ):
            pretrain(settings(out), index=changed(how), make_loader=RandomLoader, progress=False, resume=resume)
    assert (out / "metrics.jsonl").read_text() == log


def test_a_data_set_may_move_and_its_files_may_be_touched(finished, tmp_path):
    out = stopped(tmp_path / "run")
    moved = Index([dataclasses.replace(v, path=Path("/disk2/set") / v.path.name) for v in INDEX], INDEX.classes)
    assert digest(moved) == digest(INDEX)
    pretrain(settings(out), index=moved, make_loader=RandomLoader, progress=False, resume=True)
    assert_same(trained(finished), trained(out))


def test_a_checkpoint_without_a_digest_continues_with_a_notice(finished, tmp_path, caplog):
    out = stopped(tmp_path / "run")
    last = out / "checkpoints" / "last.pt"
    payload = load_checkpoint(last)
    del payload["videos"]
    for key in ("weight_norms", "health", "best"):  # videos that were added later, too
        del payload["cycle_state"][key]
    save_checkpoint(last, payload)
    run(settings(out), resume=True)
    assert "did not record the training videos" in caplog.text
    assert_same(trained(finished)["encoders"], trained(out)["encoders"])


def test_names_that_only_differ_in_where_they_are_split_are_other_videos():
    def two(first, second):
        videos = [dataclasses.replace(INDEX[0], path=Path(f"/{n}"), label=n) for n in (first, second)]
        return digest(Index(videos, ["x"]))["rows"]

    assert two("ab", "c") != two("a", "bc")
