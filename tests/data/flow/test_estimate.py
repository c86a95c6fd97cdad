"""`flow` prints an estimate before it starts: the amount of work, the time and the disk space."""

import dataclasses
import logging
from types import SimpleNamespace

import pytest
import torch
from support.data_sets.flow import smooth_flow

from cpr_fast.cli import main
from cpr_fast.data.flow import estimate as module
from cpr_fast.data.flow.estimate import describe, estimate_flow, size
from cpr_fast.data.flow.levels import FlowSolver
from cpr_fast.data.flow.write import write_flow
from cpr_fast.data.index.index import Index

SOLVER = FlowSolver(torch.device("cpu"), smooth_flow)


def test_counts_and_disk_are_those_of_the_videos_without_flow(data_set, tmp_path):
    index = Index.load(data_set)
    expected = estimate_flow(index, solver=SOLVER)
    pixels = sum((v.num_frames - 1) * v.width * v.height for v in index)
    assert expected.videos == 5 and expected.pairs == sum(v.num_frames - 1 for v in index)
    assert expected.disk_bytes == pytest.approx(9500 / (320 * 240) * pixels, rel=0.01)
    assert expected.core_s > 0 and expected.wall_s > 0
    lmdb = estimate_flow(index, [0], storage="lmdb", solver=SOLVER)
    pairs = index[0].num_frames - 1
    assert (lmdb.videos, lmdb.pairs, lmdb.disk_bytes) == (1, pairs, int(0.309 * pairs * 48 * 32))
    write_flow(data_set, tmp_path / "flow", compute=smooth_flow)
    assert estimate_flow(Index.load(data_set), solver=SOLVER) == module.FlowEstimate(0, 0, 0, None, None)


def test_twice_the_frames_take_twice_the_time(data_set, monkeypatch):
    monkeypatch.setattr(module, "_measure", lambda *arguments: module._Cost(2e-6, 1e-6, 1.0))
    videos = list(Index.load(data_set))[:1]
    double = [dataclasses.replace(videos[0], num_frames=2 * videos[0].num_frames - 1)]
    once, twice = estimate_flow(Index(videos)), estimate_flow(Index(double))
    assert (twice.core_s, twice.wall_s, twice.pairs) == (2 * once.core_s, 2 * once.wall_s, 2 * once.pairs)


def test_videos_that_cannot_be_read_have_no_time(data_set):
    videos = list(Index.load(data_set))
    for video in videos:
        video.path.write_bytes(b"not a video")
    assert estimate_flow(Index(videos), solver=SOLVER).wall_s is None


def test_a_large_set_as_people_read_it(tmp_path, monkeypatch):
    """240,000 clips of 300 frames of 320x240, at 40 ms a pair on one core."""
    pairs = 240_000 * 299
    whole = module.FlowEstimate(240_000, pairs, int(pairs * 9500), pairs * 0.04, pairs * 0.02)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: SimpleNamespace(free=5e11))
    lines = "\n".join(describe(whole, tmp_path / "not" / "there"))
    assert "797 core-hours" in lines and "expected time: about 17 d on an otherwise idle" in lines
    assert "682 GB" in lines and "500 GB are free" in lines
    assert "the disk will be full" in lines
    assert [size(value) for value in (9500, 3.2e6, 4.7e10, 1.25e12)] == ["10 kB", "3 MB", "47 GB", "1.2 TB"]


def test_the_load_of_the_machine_is_told(tmp_path):
    busy = module.FlowEstimate(10, 300, 1000, core_s=200.0, wall_s=100.0, load=2.5)
    assert describe(busy, tmp_path)[0] == (
        "  expected time: about 4 min 10 s at the present load of this machine, about 1 min 40 s on an otherwise idle "
        "machine (0.056 core-hours)"
    )
    assert "present load" not in describe(dataclasses.replace(busy, load=1.1), tmp_path)[0]


@pytest.mark.parametrize("storage", ["video", "lmdb"])
def test_every_part_of_the_work_is_measured(data_set, tmp_path, monkeypatch, storage):
    """Reading, solving and storing each take 20 ms of CPU more per call: the estimate grows by each of them."""
    index = Index(video for video in Index.load(data_set) if video.num_frames > 5)

    def slower(name):
        real = getattr(module, name)

        def work(*arguments, **options):
            end = module.time.thread_time() + 0.02
            while module.time.thread_time() < end:
                pass
            return real(*arguments, **options)

        return work

    monkeypatch.setattr(module, "smooth", smooth_flow, raising=False)

    def core_s(solver=SOLVER):
        return estimate_flow(index, storage=storage, solver=solver, out=tmp_path / "flow").core_s

    core_s()  # loads the encoders
    before = core_s()
    pairs, videos = sum(video.num_frames - 1 for video in index), len(index)
    for name, least in (("read_frames", 0.02 * videos), ("_store", 0.02 * videos)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, slower(name))
            assert core_s() > before + 0.5 * least
    assert core_s(FlowSolver(SOLVER.device, slower("smooth"))) > before + 0.5 * 0.02 * pairs
    assert not list(tmp_path.glob(".cpr-fast-*")) and not list(tmp_path.glob("flow*"))


@pytest.mark.parametrize("shard", [(0, 1), (1, 2)])
def test_the_estimate_comes_before_the_work(data_set, tmp_path, caplog, shard):
    seen = []

    def compute(pairs):
        seen.append(len(caplog.records))
        return smooth_flow(pairs)

    with caplog.at_level(logging.INFO):
        write_flow(data_set, tmp_path / "flow", compute=compute, shard=shard, progress=True)
        write_flow(data_set, tmp_path / "flow", compute=compute, shard=shard, progress=True)
    text = [record.getMessage() for record in caplog.records]
    number = 5 if shard[1] == 1 else 2
    assert f"{number} of {number} videos" in text[0] and "done already: 0" in text[0]
    assert "core-hours" in text[1] and "expected disk" in text[2]
    assert ("--shard" in " ".join(text[3:5])) == (shard[1] == 1)
    assert f"0 of {number} videos" in text[-1] and f"done already: {number}" in text[-1]
    assert max(seen) >= 3  # lines before the first batch of the run itself


def test_the_command_says_what_was_done_and_what_comes_next(data_set, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("cpr_fast.data.flow.levels.tvl1_flow", lambda pairs: smooth_flow(pairs)[:, None])
    videos = list(Index.load(data_set))
    videos[0].path.write_bytes(b"not a video")
    assert main(["flow", str(data_set), "--out", str(tmp_path / "flow"), "--shard", "1/2"]) == 0
    out = capsys.readouterr().out
    assert "2 videos computed, 0 kept" in out and "3 other videos" in out
    flow = f"cpr-fast flow {data_set} --out {tmp_path}/flow"
    assert out.endswith(f"\nnext: {flow} --shard 0/2\n      cpr-fast init {data_set}\n")
    assert main(["flow", str(data_set), "--out", str(tmp_path / "flow")]) == 0
    out = capsys.readouterr().out
    assert "2 videos computed, 2 kept from earlier runs, 1 failed" in out
    reason = "Invalid data found when processing input: it is a text that begins with 'not a video'"
    assert f"no flow for 1 file: {reason}: {videos[0].path}" in out
    assert out.endswith(f"\nnext: cpr-fast init {data_set}\n")
