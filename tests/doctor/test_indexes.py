"""`doctor` on every kind of index: it reports findings instead of raising, in the order of their effect, with
estimates.
"""

import dataclasses
import json
import os

import numpy as np
import pytest
import torch
from support.numbered_videos import write_video

pytest.importorskip("nvidia.dali")

from cpr_fast.cli import main
from cpr_fast.config import Config, DataConfig
from cpr_fast.data.clips.loader import TrainLoader
from cpr_fast.data.flow import estimate
from cpr_fast.data.flow.estimate import FlowEstimate
from cpr_fast.data.index.index import Index
from cpr_fast.doctor import checks, data, estimates
from cpr_fast.doctor.checks import doctor
from cpr_fast.doctor.findings import EFFECTS, LEVELS, Finding, ordered, show

CPU = torch.device("cpu")
HEADER = "path,label,source,split,num_frames,fps,width,height,flow_path"


@pytest.fixture(autouse=True)
def no_codecs(monkeypatch):
    """Skips the check of the codecs, which takes seconds and does not depend on the index."""
    monkeypatch.setattr(checks, "codecs", lambda device, findings: [])


MEASURE = estimate._measure


@pytest.fixture(autouse=True)
def no_flow(monkeypatch):
    """Takes a constant for the time of a pixel's flow: three seconds of measuring do not depend on the index either."""
    monkeypatch.setattr(estimate, "_measure", lambda *_: estimate._Cost(1e-4, 5e-5, 1.0))


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    pictures = np.random.default_rng(0).integers(0, 256, (80, 6, 8, 3)).astype(np.uint8).repeat(8, 1).repeat(8, 2)
    return write_video(tmp_path_factory.mktemp("video") / "v", pictures, "h264-bframes")


def write_rows(folder, video, names, label="c{}", source="s{}", split="train", frames=80):
    """Writes index.csv; each name is a link to `video`, and "{}" is the number of the row."""
    lines = [HEADER]
    for i, name in enumerate(names):
        os.link(video, os.path.join(os.fsencode(folder), os.fsencode(name)))
        lines.append(f'"{name}",{label.format(i % 2)},{source.format(i)},{split},{frames},25,64,48,')
    (folder / "index.csv").write_bytes(os.fsencode("\n".join(lines) + "\n"))
    return folder / "index.csv"


def run(index, **config) -> dict:
    result = doctor(index, Config.from_dict(config), device=CPU, seconds=0)
    json.dumps(result)
    show(result, tables=True)
    return result


@pytest.mark.parametrize("tables", [False, True])
def test_the_findings_are_what_a_terminal_shows_when_the_command_ends(tmp_path, video, capsys, tables):
    index = write_rows(tmp_path, video, ["a.mp4", "b.mp4"], source="one")
    with pytest.raises(SystemExit):
        main(["doctor", str(index), "--seconds", "0", *(["--tables"] if tables else [])])
    lines = capsys.readouterr().out.splitlines()
    first = lines.index("What to change, most important first")
    assert "Data: 2 videos, 2 classes, 1 source; splits: train 2" in lines[:first]
    assert "  1. error (a command fails): all videos come from one source" in lines[first + 1]
    assert len(lines[first:]) < 40 and lines[-1].startswith("next: ")
    assert first == 1 or tables
    assert ("Machine" in map(str.strip, lines[:first])) is tables


def texts(result: dict, level: str) -> str:
    return "\n".join(f"{f['text']} -> {f['advice']}" for f in result["findings"] if f["level"] == level)


def test_many_long_videos_are_sampled(tmp_path, video, monkeypatch):
    monkeypatch.setattr(data, "SAMPLE_S", 60.0)
    result = run(write_rows(tmp_path, video, [f"v{i}.mp4" for i in range(15)]))
    assert "15 sampled videos decode to the last frame" in texts(result, "ok")
    assert result["data"]["sampled"] == 15 and result["data"]["decodable"]


@pytest.mark.parametrize("kind", ["flat", "one video", "no split", "odd names", "one frame"])
def test_unusual_indexes_give_findings(tmp_path, video, kind):
    names = {"one video": ["v.mp4"], "odd names": ["a [bold]b[red] é.mp4", "-x.mp4", "two, words.mp4"]}
    more = {"flat": {"label": "", "source": "", "split": ""}, "no split": {"split": ""}, "one frame": {"frames": 1}}
    result = run(write_rows(tmp_path, video, names.get(kind, ["a.mp4", "b.mp4", "c.mp4"]), **more.get(kind, {})))
    assert result["data"]["videos"] == len(names.get(kind, "abc")) and result["data"]["decodable"]
    if kind == "flat":
        assert "no video has a label" in texts(result, "ok") and result["data"]["classes"] == 0
        assert "the index has no train and no test split: training uses all videos" in texts(result, "ok")
    assert "too few videos for pretraining: expected at least 8 training videos" in texts(result, "warning")
    if kind == "one video":
        assert "1 sampled video decodes" in texts(result, "ok") and "one source" in texts(result, "error")


def test_names_that_are_not_utf8_are_printed(tmp_path, video, capsys):
    index = write_rows(tmp_path, video, ["good.mp4", b"caf\xe9.mp4".decode("utf-8", "surrogateescape")])
    result = run(index)
    assert result["data"] is not None or "index.csv" in texts(result, "error")
    assert capsys.readouterr().out


@pytest.mark.parametrize(
    "content", [None, "", HEADER + "\n", "nonsense\n1\n", HEADER + "\ngone.mp4,a,s,train,9,25,8,8,\n"]
)
def test_an_index_without_videos_is_an_error(tmp_path, content):
    index = tmp_path / "index.csv"
    if content is not None:
        index.write_text(content)
    result = run(index)
    assert result["data"] is result["estimates"] is result["breakdown"] is None
    assert "index.csv" in texts(result, "error") and "cpr-fast index" in texts(result, "error")


def test_a_folder_in_place_of_an_index(tmp_path):
    assert str(tmp_path) in texts(run(tmp_path), "error")


def test_records_of_a_file_that_is_no_lmdb(tmp_path):
    (tmp_path / "rgb.lmdb").write_bytes(b"not an LMDB file" * 1000)
    index = tmp_path / "index.csv"
    index.write_text(f"{HEADER}\nrgb.lmdb#a/v,a,s0,train,30,25,64,48,\nrgb.lmdb#a/w,a,s1,train,30,25,64,48,\n")
    result = run(index)
    assert "2 of 2 sampled videos are damaged" in texts(result, "error") and not result["data"]["decodable"]


def effects(result: dict) -> dict:
    return {f["text"]: f["effect"] for f in result["findings"] if f["level"] != "ok"}


def test_damage_that_commands_skip_is_a_warning_and_loading_goes_on(tmp_path, video):
    """The level is what the commands do: a clip of another video takes the place of one that does not decode."""
    index = write_rows(tmp_path, video, [f"v{i}.mp4" for i in range(8)])
    (tmp_path / "v1.mp4").unlink()
    (tmp_path / "v1.mp4").write_bytes(video.read_bytes()[:900])
    result = run(index, data={"batch_size": 2, "frames": 8, "size": 20}, memory={"size": 8})
    (text,) = [text for text in effects(result) if "damaged" in text]
    assert text.startswith("1 of 8 sampled videos is damaged: training replaces these videos by others, and evaluation")
    assert effects(result)[text] == "results" and not texts(result, "error")
    loaded = TrainLoader(Index.load(index), DataConfig(batch_size=2, frames=8, size=20, workers=1), ["rgb"], seed=0)
    try:
        assert len(list(loaded.epoch(0))) == 4 and {path.name for path, _ in loaded.skipped} == {"v1.mp4"}
    finally:
        loaded.close()


@pytest.mark.parametrize(
    ("listed", "said"),
    [({"frames": 100}, "80 frames, the index says 100"), ({"frames": 50}, "80 frames, the index says 50")],
)
def test_a_row_that_no_longer_fits_its_file_is_named_with_what_happens(tmp_path, video, listed, said):
    result = run(write_rows(tmp_path, video, [f"{name}.mp4" for name in "abcdefgh"], **listed))
    warning = texts(result, "warning")
    assert "8 of 8 sampled videos differ from the index" in warning and f".mp4: {said}" in warning
    assert "they never read frames that it does not count" in warning and "-> index them again: cpr-fast" in warning
    assert "decode to the last frame" not in texts(result, "ok") and not texts(result, "error")


def test_a_row_of_another_frame_size_or_rate_is_named(tmp_path, video):
    index = write_rows(tmp_path, video, ["a.mp4", "b.mp4"])
    index.write_text(index.read_text().replace("25,64,48", "25,320,240"))
    assert "64x48 pixels, the index says 320x240" in texts(run(index), "warning")
    index.write_text(index.read_text().replace("25,320,240", "50,64,48"))
    assert "25 frames per second, the index says 50" in texts(run(index), "warning")


def test_settings_with_which_pretrain_fails_are_said_to_be_settings(tmp_path, video):
    """The default settings fail on a small index, but `init` and its recipe do not."""
    index = write_rows(tmp_path, video, [f"v{i}.mp4" for i in range(9)])
    found = effects(run(index))
    (text,) = [text for text in found if "data.batch_size = 16 is larger than the number of training videos, 9" in text]
    assert found[text] == "settings" and "fails" not in found.values()
    assert main(["doctor", str(index), "--seconds", "0", "--json"]) == 0
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[data]\nindex = "index.csv"\nbatch_size = 16\n')
    with pytest.raises(SystemExit) as stopped:  # now somebody has chosen them
        main(["doctor", str(index), "--seconds", "0", "--json"])
    assert stopped.value.code == 1


def test_any_failure_while_decoding_is_a_finding(tmp_path, video, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError("unexpected")

    monkeypatch.setattr(data, "slice_packets", fail)
    result = run(write_rows(tmp_path, video, ["a.mp4"]))
    assert "1 of 1 sampled video is damaged" in texts(result, "error") and "ZeroDivisionError" in texts(result, "error")


def test_sources_in_both_splits_and_one_source(tmp_path, video):
    index = write_rows(tmp_path, video, ["a.mp4", "b.mp4", "c.mp4"])
    text = index.read_text()
    index.write_text(text.replace("s1,train", "s0,test"))
    found = texts(run(index), "warning")
    assert "1 source (" in found and ") has videos in both the train and the test split: s0" in found
    index.write_text(text.replace(",s1,", ",s0,").replace(",s2,", ",s0,"))
    assert "all videos come from one source" in texts(run(index), "error")


def test_a_memory_that_never_fills_is_named(tmp_path, video):
    index = write_rows(tmp_path, video, [f"v{i}.mp4" for i in range(8)])
    cycles = {"cycles": [{"view": "rgb", "epochs": 2, "mining": "none"}]}
    result = run(index, data={"batch_size": 4}, memory={"size": 64}, schedule=cycles, mining={"top_k": 2})
    assert "cycle 1 (rgb, mining none) never fills its queue of memory.size = 64 entries" in texts(result, "warning")
    assert "still the random vectors that a queue starts with" in texts(result, "warning")  # but it does learn
    assert "learn nothing" not in texts(result, "warning").lower()
    assert "-> set memory.size to 16 or less" in texts(result, "warning")
    cycles = {"cycles": [{"view": "rgb", "epochs": 2, "mining": "cascade"}]}
    result = run(index, data={"batch_size": 4}, memory={"size": 64}, schedule=cycles, mining={"top_k": 2})
    assert "cycle 1 (rgb, mining cascade) NEVER LEARNS: training starts once the queue" in texts(result, "warning")
    cycles = {"cycles": [{"view": "rgb", "epochs": 2, "mining": "none", "milestones": [5]}]}
    result = run(index, data={"batch_size": 4}, memory={"size": 15}, schedule=cycles, mining={"top_k": 2})
    assert "never fills" not in texts(result, "warning") and "memory.size = 15 is larger" in texts(result, "warning")


def test_the_flow_estimate_is_reported(tmp_path, video, monkeypatch):
    monkeypatch.setattr(estimate, "_measure", MEASURE)
    index = write_rows(tmp_path, video, [f"v{i}.mp4" for i in range(8)])
    result = run(index)
    found = result["estimates"]
    assert found["flow_videos"] == 8 and found["flow_frame_pairs"] == 8 * 79
    assert 0 <= found["flow_disk_gib"] < 1 and found["flow_core_hours"] >= 0
    assert "632 frame pairs" in texts(result, "ok") and "cpr-fast flow" in texts(result, "ok")
    on_the_fly = run(index, data={"flow": "on_the_fly"})["estimates"]
    assert "flow_videos" not in on_the_fly


def test_long_flow_is_to_be_sharded(tmp_path, video, monkeypatch):
    expected = FlowEstimate(videos=4, pairs=316, disk_bytes=2**31, core_s=720_000.0, wall_s=360_000.0)
    monkeypatch.setattr(estimates, "estimate_flow", lambda videos: expected)
    index = write_rows(tmp_path, video, [f"v{i}.mp4" for i in range(8)])
    result = run(index)
    assert "about 2.0 GiB of disk, about 8 d of one core, and about 4 d on this machine" in texts(result, "warning")
    alone = dataclasses.replace(expected, threads=1, wall_s=720_000.0)
    monkeypatch.setattr(estimates, "estimate_flow", lambda videos: alone)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    assert (
        "about 8 d of one core, and about 8 d with 1 thread on 2 cores (OMP_NUM_THREADS=2 uses all) on this machine"
        in texts(run(index), "warning")
    )
    assert "--shard 0/4" in texts(result, "warning") and "--shard 3/4" in texts(result, "warning")
    found = result["estimates"]
    assert (found["flow_core_hours"], found["flow_hours_here"], found["flow_disk_gib"]) == (200, 100, 2)


def test_errors_come_first_then_the_largest_effect():
    mixed = [Finding(level, effect, "", effect) for level in ("ok", "warning", "error") for effect in reversed(EFFECTS)]
    got = [(finding.level, finding.effect) for finding in ordered(mixed)]
    assert got == [(level, effect) for level in LEVELS for effect in EFFECTS]


def test_a_missing_part_is_named_with_its_command(tmp_path, monkeypatch):
    from cpr_fast.doctor import machine

    real = machine.is_installed
    monkeypatch.setattr(machine, "is_installed", lambda name: name not in ("tensorboard", "nvidia.dali") and real(name))
    result = doctor(None, Config(), device=CPU, seconds=0)
    rows = {row["part"]: row for row in result["optional"]}
    assert not rows["TensorBoard"]["installed"] and rows["TensorBoard"]["install"] == "pip install tensorboard"
    assert "NVIDIA DALI is not installed" in texts(result, "error") and "pip install nvidia-dali" in texts(
        result, "error"
    )
    assert "TensorBoard" in texts(result, "ok")


@pytest.mark.parametrize("options", [["--device", "tpu"], ["--device", "nonsense"], ["--seconds", "-1"]])
def test_bad_options_are_refused(options, capsys):
    assert main(["doctor", *options]) == 2
    assert options[0] in capsys.readouterr().err


def test_labels_of_one_class_are_said_to_show_nothing(tmp_path, video):
    index = write_rows(tmp_path, video, [f"v{i}.mp4" for i in range(4)], label="jump")
    assert "all labels are of one class" in texts(run(index), "warning")
    two = write_rows(tmp_path, video, [f"w{i}.mp4" for i in range(4)])
    assert "all labels are of one class" not in texts(run(two), "warning")


def test_no_flow_is_advised_for_videos_that_cannot_have_any(tmp_path, video):
    still = write_video(tmp_path / "still", np.zeros((1, 48, 64, 3), np.uint8), "h264-bframes")
    index = write_rows(tmp_path, still, [f"v{i}.mp4" for i in range(4)], frames=1)
    warnings = texts(run(index), "warning")
    assert "4 videos have a single frame" in warnings and "no flow, which" not in warnings
    (tmp_path / "damaged").write_bytes(b"no video")
    damaged = write_rows(tmp_path, tmp_path / "damaged", [f"w{i}.mp4" for i in range(4)])
    assert "no flow, which" not in texts(run(damaged), "warning")
