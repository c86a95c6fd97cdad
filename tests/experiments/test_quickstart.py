"""The quick start end to end on a small data set: every part uses the output of the previous one."""

import dataclasses
import functools
import json
import pkgutil
import re

import pytest
import torch

pytest.importorskip("nvidia.dali", reason="the data pipeline needs NVIDIA DALI")

from cpr_fast.cli import main
from cpr_fast.config import Cycle, ScheduleConfig
from cpr_fast.data.synthetic import videos as synthetic
from cpr_fast.experiments import quickstart as module
from cpr_fast.experiments.quickstart import quickstart_config
from cpr_fast.runtime.metrics import read_metrics


@pytest.fixture
def small(monkeypatch):
    """Uses 16 sources instead of 288, batches of 4, two epochs per cycle, and a memory too small for seven stages."""
    write = functools.partial(synthetic.write_synthetic, classes=4, videos=4)
    monkeypatch.setattr(synthetic, "write_synthetic", lambda out, progress, **videos: write(out, **videos))

    def config(index, out, seed):
        full = quickstart_config(index, out, seed)
        cycles = tuple(Cycle(cycle.view, 2, cycle.mining) for cycle in full.schedule.cycles)
        return dataclasses.replace(
            full,
            data=dataclasses.replace(full.data, batch_size=4),
            memory=dataclasses.replace(full.memory, size=12, shuffle_bn_groups=2),
            mining=dataclasses.replace(full.mining, stages=2),
            schedule=ScheduleConfig(cycles),
        )

    monkeypatch.setattr(module, "quickstart_config", config)


def test_main_job_from_nothing_to_a_report_and_again(small, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["quickstart", "--out", str(out), "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["view"] == "two_stream" and 0 <= first["r@1"] <= 1
    assert {row["name"] for row in first["results"]} == {
        "trained",
        "untrained",
        "single_frame",
        "mean_colour",
        "mean_flow",
    }
    rows = read_metrics(out)
    cycles = sorted({(row["cycle"], row["view"], row["mining"]) for row in rows if row["kind"] == "epoch"})
    assert [view for _, view, _ in cycles] == ["rgb", "flow"] * 3
    assert [mining for _, _, mining in cycles] == ["none"] * 2 + ["cascade"] * 4
    mining = [row for row in rows if row["kind"] == "epoch" and row["mining"] == "cascade"]
    assert all(0 <= row["pmr"] <= 1 for row in mining)
    for kind in ("time_s", "cpu_s"):
        parts = [first[f"{part}_{kind}"] for part in ("synth", "flow", "pretrain", "retrieve", "report")]
        assert min(parts) > 0 and first[f"total_{kind}"] == pytest.approx(sum(parts))
    page = (out / "report.html").read_text()
    assert f"{100 * first['r@1']:.1f}" in page

    assert main(["quickstart", "--out", str(out), "--json"]) == 0  # already finished: nothing is computed again
    second = json.loads(capsys.readouterr().out)
    assert {key: second[key] for key in first if key.startswith("r@")} == {
        key: first[key] for key in first if key.startswith("r@")
    }
    assert sum(row["kind"] == "epoch" for row in read_metrics(out)) == sum(row["kind"] == "epoch" for row in rows)

    assert main(["quickstart", "--out", str(out)]) == 0  # for people: tables, no Python code
    printed = capsys.readouterr().out
    assert "{" not in printed and "[" not in printed
    lines = printed.splitlines()
    trained = next(line for line in lines if line.startswith("Trained · RGB + flow"))
    assert f"{100 * first['map']:.1f}" in trained and f"{100 * first['r@1']:.1f}" in trained
    for part in ("videos", "optical flow", "pretraining", "retrieval", "report", "in all"):
        assert any(re.fullmatch(rf"{part} +\d+ (s|min.*) +\d+ (s|min.*)", line) for line in lines), part
    assert lines[-1] == f"next: open {out / 'report.html'} in a browser"


def test_settings_are_the_shipped_ones(tmp_path):
    config = quickstart_config(tmp_path / "index.csv", tmp_path / "run", seed=3)
    assert (config.data.index, config.run.out, config.run.seed) == (
        str(tmp_path / "index.csv"),
        str(tmp_path / "run"),
        3,
    )
    assert [cycle.mining for cycle in config.schedule.cycles] == ["none"] * 2 + ["cascade"] * 4


def test_two_clips_of_a_video_can_differ_in_time(tmp_path):
    """InfoNCE compares two clips of a video. If the video were as short as a clip, they would show the same frames."""
    data = quickstart_config(tmp_path / "index.csv", tmp_path / "run", seed=0).data
    assert module.VIDEOS["frames"] >= 2 * ((data.frames - 1) * data.stride + 1)


def test_the_result_does_not_depend_on_the_number_of_cores(small, tmp_path, monkeypatch):
    """Training and retrieval compute with one thread; the number of threads is as before afterwards."""
    seen = []
    for name in ("cpr_fast.pretrain.run.loop.pretrain", "cpr_fast.evaluate.retrieval.retrieve.retrieve"):
        original = pkgutil.resolve_name(name)

        def counted(*args, original=original, **options):
            seen.append(torch.get_num_threads())
            return original(*args, **options)

        monkeypatch.setattr(name, counted)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        module.quickstart(tmp_path / "run")
        assert seen == [1, 1] and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_another_seed_needs_another_folder(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"run": {"seed": 2}}))
    assert main(["quickstart", "--out", str(tmp_path), "--seed", "1"]) == 2
    said = capsys.readouterr().err
    assert f"--seed: the quick start in {str(tmp_path)!r} has seed 2, got 1; choose another --out" in said
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
