"""`doctor` on a machine without data, on a good data set and on a broken one."""

import dataclasses
import json
import re
import shlex
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.numbered_videos import shared_data, write_video

pytest.importorskip("nvidia.dali")

from cpr_fast.cli import main
from cpr_fast.config import Config, DataConfig, ModelConfig
from cpr_fast.data.index.build import IndexOptions, write_index
from cpr_fast.data.index.index import Index
from cpr_fast.doctor import bottleneck
from cpr_fast.doctor.checks import doctor
from cpr_fast.doctor.data import decoded_from_start
from cpr_fast.doctor.parity import CODECS

CPU = torch.device("cpu")
SMALL = Config(data=DataConfig(frames=5, size=32, batch_size=4), model=ModelConfig(width=0.125))


def texts(result: dict, level: str) -> str:
    return "\n".join(f"{f['text']} -> {f['advice']}" for f in result["findings"] if f["level"] == level)


@pytest.fixture
def good(tmp_path):
    """Ten videos in two splits, two of them siblings, some of them short."""
    rng = np.random.default_rng(0)
    for i in range(10):
        folder = tmp_path / "set" / ("test" if i > 7 else "train") / ("b" if i % 2 else "a")
        folder.mkdir(parents=True, exist_ok=True)
        pictures = rng.integers(0, 256, (12 if i == 3 else 30, 6, 8, 3)).astype(np.uint8).repeat(8, 1).repeat(8, 2)
        write_video(folder / (f"s_c0{i}" if i in (0, 2) else f"v{i}"), pictures, "h264-bframes")
    write_index(tmp_path / "set", tmp_path / "index.csv", IndexOptions())
    return tmp_path / "index.csv"


@pytest.fixture(scope="module")
def machine():
    return doctor(None, Config(), device=CPU, seconds=60)


def test_without_data_the_machine_alone(machine):
    assert machine["data"] is machine["breakdown"] is None and not texts(machine, "error")
    assert [row["codec"] for row in machine["codecs"]] == list(CODECS)
    assert all(row["pyav"] == "exact" or row["pyav"].startswith("not tried") for row in machine["codecs"])
    dali = {row["codec"]: row["dali"] for row in machine["codecs"]}
    assert dali["vp9"] == dali["h264"] == "not used on a CPU, PyAV decodes there"
    assert machine["kernels"]["cpu_variant"] in ("avx512", "avx2", "portable")
    assert machine["environment"]["packages"]["av"] and machine["machine"]["cores"] >= 1
    json.dumps(machine)


def test_a_good_data_set(good):
    result = doctor(good, SMALL, device=CPU, seconds=3)
    assert not texts(result, "error")
    data = result["data"]
    assert (data["videos"], data["classes"], data["without_flow"], data["short"]) == (10, 2, 10, 1)
    assert data["splits"] == {"train": 8, "test": 2} and data["videos_with_siblings"] == 2
    assert data["sampled"] == 10 and not data["damaged"]
    assert "10 of 10 videos have no flow" in texts(result, "warning") and "1 short" in texts(result, "warning")
    row = result["breakdown"]
    assert row["views"] == ["rgb"] and row["batch_size"] == 4 and row["bottleneck"] in row["stage_s_per_step"]
    assert all(value > 0 for stage, value in row["stage_s_per_step"].items() if stage != "copy")
    assert row["loader_s_per_step"] > 0 and 0 <= row["data_wait_fraction"] <= 1


def test_a_step_is_measured_on_the_whole_batch_where_the_time_allows_it():
    """Scaled up from two clips, what a step costs whatever its batch would count twelve times."""
    config = dataclasses.replace(SMALL, data=dataclasses.replace(SMALL.data, batch_size=24))
    assert bottleneck._step(config, 2, 24, CPU, 12.0)[1] == 24
    assert bottleneck._step(config, 2, 24, CPU, 0.0)[1] == 2


def test_a_call_that_other_programs_delay_does_not_count(monkeypatch):
    """Of a few calls on a busy machine one takes many times as long as a step of the training."""
    delays, work = iter([0.0, 100.0] * 100), bottleneck.build_encoder
    late = [0.0]
    clock = bottleneck.time.perf_counter

    def slow_encoder(*arguments):
        encoder = work(*arguments)
        encoder.register_forward_hook(lambda *_: late.__setitem__(0, late[0] + next(delays)))
        return encoder

    monkeypatch.setattr(bottleneck, "build_encoder", slow_encoder)
    monkeypatch.setattr(bottleneck.time, "perf_counter", lambda: clock() + late[0])
    assert bottleneck._step(SMALL, 0, 2, CPU, 0.0)[0] < 100


def test_a_step_that_was_measured_on_some_of_its_clips_says_so():
    measured = {"batch_size": 24, "step_measured_on_clips": 2, "loader_s_per_step": 1.0}
    assert bottleneck.step_time(measured | {"stage_s_per_step": {"step": 3.0}}) == (3.0, " on 2 of its 24 clips")
    assert bottleneck.step_time(measured | {"stage_s_per_step": {"step": 0.5}}) == (1.0, "")  # the loader's batches
    whole = measured | {"step_measured_on_clips": 24, "stage_s_per_step": {"step": 3.0}}
    assert bottleneck.step_time(whole) == (3.0, "")


def test_a_broken_data_set(good, capsys):
    root = good.parent / "set"
    (root / "train" / "a" / "v4.mp4").write_text("no video any more " * 50)
    (root / "train" / "b" / "v5.mp4").unlink()
    lines = good.read_text().splitlines()
    good.write_text("\n".join([*lines, lines[1].replace("30", "many", 1)]) + "\n")
    result = doctor(good, SMALL, device=CPU, seconds=0)
    errors = texts(result, "error")
    assert "2 rows of the index are bad" in errors and "v5.mp4' does not exist" in errors and "got 'many'" in errors
    warnings = texts(result, "warning")  # commands report a damaged video and go on
    assert "1 of 9 sampled videos is damaged" in warnings and "v4.mp4" in warnings and "cpr-fast index" in warnings
    assert result["data"]["videos"] == 9 and result["breakdown"] is None
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", str(good), "--seconds", "0", "--json"])
    assert stopped.value.code == 1
    assert json.loads(capsys.readouterr().out)["data"]["damaged"][0]["path"].endswith("v4.mp4")


def commands_in(result: dict) -> list[list[str]]:
    """The commands that the findings name, as a shell would split them."""
    found = [line for f in result["findings"] for line in re.findall(r"cpr-fast \w[^;`]*", f["advice"])]
    return [shlex.split(command.split("   (")[0]) for command in found if "--" in command]


@pytest.mark.parametrize("recorded", [True, False])
def test_the_commands_of_the_advice_can_be_pasted(good, monkeypatch, recorded):
    """They name the folder and the index, with or without the report in which `index` recorded them."""
    monkeypatch.chdir(good.parent)
    root = good.parent / "set"
    if recorded:
        write_index(root, good, IndexOptions(min_frames=3, verify=False))
    else:
        good.with_suffix(".report.json").unlink()
    (root / "train" / "a" / "v4.mp4").write_text("no video any more " * 50)
    good.write_text(good.read_text().replace("v7.mp4,b,v7,train,30", "v7.mp4,b,v7,train,31"))
    found = commands_in(doctor(Path("index.csv"), SMALL, device=CPU, seconds=0))
    index = [words for words in found if words[1] == "index"]
    assert {"--verify", "--min-frames"} <= {word for words in index for word in words}
    for words in index:
        assert words[2:5] == ["set", "--out", "index.csv"] and not {word for word in words if word.isupper()}
        assert ("--no-verify" in words) == (recorded and "--verify" not in words)
        assert words[words.index("--min-frames") + 1] in ("3", "18") if "--min-frames" in words else not recorded
        assert main([*words[1:4], "again.csv", *words[5:]]) == 0


def test_no_index_and_no_video_left(tmp_path, good):
    result = doctor(tmp_path / "none.csv", SMALL, device=CPU, seconds=5)
    assert "none.csv' does not exist" in texts(result, "error") and result["data"] is None
    shutil.rmtree(good.parent / "set")
    result = doctor(good, SMALL, device=CPU, seconds=5)
    assert "10 rows of the index are bad" in texts(result, "error") and result["breakdown"] is None


@pytest.mark.parametrize("stage", ["decode", "augment", "step"])
def test_the_slow_stage_is_named(good, monkeypatch, stage):
    """A stage for which the clock jumps becomes the bottleneck, however busy the machine is; the advice is about it."""
    jumped_s = [0.0]
    clock = SimpleNamespace(perf_counter=lambda: time.perf_counter() + jumped_s[0], process_time=time.process_time)
    monkeypatch.setattr(bottleneck, "time", clock)
    target = {"decode": (bottleneck, "needed_parts"), "augment": (bottleneck.ClipGraph, "run"),
              "step": (bottleneck, "build_encoder")}[stage]  # fmt: skip
    real = getattr(*target)

    def jump() -> None:
        jumped_s[0] += 100

    def slow(*args, **options):
        if stage == "step":
            encoder = real(*args, **options)
            encoder.register_forward_hook(lambda *_: jump())
            return encoder
        jump()
        return real(*args, **options)

    monkeypatch.setattr(*target, slow)
    index = Index.load(good).select("train")
    row = bottleneck.breakdown(index, SMALL, ("rgb",), device=CPU, seconds=1)
    seconds = row["stage_s_per_step"]
    assert all(value < seconds[stage] / 5 for name, value in seconds.items() if name != stage)  # each jump counts once
    assert row["bottleneck"] == stage and bottleneck.ADVICE[stage] in row["advice"]


def test_the_step_is_the_slowest_stage_only_if_the_loader_keeps_up(good, monkeypatch):
    monkeypatch.setattr(bottleneck, "_loader", lambda *_: 1e6)
    row = bottleneck.breakdown(Index.load(good).select("train"), SMALL, ("rgb",), device=CPU, seconds=1)
    assert row["bottleneck"] != "step" and "keep up" not in row["advice"] and row["data_wait_fraction"] > 0.9


def test_reading_is_measured_for_differences_of_frames(good):
    """The view residual is computed from RGB, so no file of it is read."""
    index = Index.load(good).select("train")
    row = bottleneck.breakdown(index, SMALL, ("rgb", "residual"), device=CPU, seconds=1)
    assert row["videos_measured"] > 0 and row["views"] == ["rgb", "residual"]
    assert all(row["stage_s_per_step"][stage] > 0 for stage in ("read", "decode", "augment"))


def test_real_xvid_clips_ask_to_be_transcoded(tmp_path):
    clips = sorted(shared_data("ucf101_100").glob("*/*.avi"))[:3]
    for clip in clips:
        (tmp_path / "set" / clip.parent.name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / clip.parent.name / clip.name).symlink_to(clip)
    write_index(tmp_path / "set", tmp_path / "index.csv", IndexOptions(verify=False))
    result = doctor(tmp_path / "index.csv", SMALL, device=CPU, seconds=0)
    assert "3 of 3 sampled videos are decoded from the start" in texts(result, "warning")
    assert "split" not in texts(result, "error")  # an index without splits is trained on whole


@pytest.mark.parametrize(("slowest", "level"), [(None, "warning"), ("decode", "warning"), ("step", "ok")])
def test_transcoding_is_not_advised_where_the_data_keep_up(good, slowest, level):
    row = None if slowest is None else {"bottleneck": slowest}
    (finding,) = decoded_from_start(good, Index.load(good), {"from_start": 3, "sampled": 5}, row)
    assert finding.level == level and ("--transcode" in finding.advice) == (level == "warning")
    assert decoded_from_start(good, Index.load(good), {"from_start": 0, "sampled": 5}, row) == []
