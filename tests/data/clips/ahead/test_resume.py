"""Runs of one and of four processes (gloo) that read the same videos from a disk and from a server."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from support.data_sets.clips import ten_videos
from support.machine.http_server import serving
from support.processes.gloo import on_processes
from support.small_runs import assert_same, everything, rows, settings

pytest.importorskip("fsspec", reason="fsspec is an extra: pip install fsspec aiohttp")
pytest.importorskip("aiohttp", reason="aiohttp is an extra: pip install fsspec aiohttp")
pytest.importorskip("nvidia.dali", reason="the loaders need NVIDIA DALI")

from support.data_sets.served_clips import on_server

from cpr_fast.config import Config
from cpr_fast.data.index.index import Index
from cpr_fast.pretrain.ledger.chain import FILE, read_ledger
from cpr_fast.pretrain.run.loop import pretrain

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]


def config_of(out: Path, cache: Path | str, processes: int) -> Config:
    return settings(
        out,
        data={"batch_size": 8 // processes, "frames": 8, "size": 16, "disk_cache": str(cache), "disk_cache_gib": 2e-4},
        memory={"size": 8, "shuffle_bn_groups": 4},
        optim={"name": "sgd", "lr": 1e-3},
        schedule={"cycles": [{"view": "rgb", "epochs": 4, "mining": "none"}, {"view": "flow", "epochs": 4}]},
        run={"out": str(out), "device": "cpu", "checkpoint_every": 1, "keep_checkpoints": 8},
    )


def videos_in(folder: Path) -> Index:
    (folder / "videos").mkdir()
    return ten_videos(folder / "videos")


def train(rank: int, processes: int, index: Index, out: Path, cache: Path | str, resume: bool) -> None:
    pretrain(config_of(out, cache, processes), index=index, progress=False, resume=resume)


def copy_until(step: int, run: Path, out: Path) -> Path:
    shutil.copytree(run, out, ignore=shutil.ignore_patterns("*.pt"))
    shutil.copy(run / "checkpoints" / f"step-{step:08d}.pt", out / "checkpoints" / "last.pt")
    return out


def trained(processes: int, index: Index, out: Path, cache: Path | str = "", *, resume: bool = False) -> Path:
    """Runs `train` in so many processes, and returns the folder of the run."""
    if processes == 1:
        train(0, 1, index, out, cache, resume)
    else:
        store = out.with_name(f"{out.name}-store")
        store.mkdir()
        on_processes(train, processes, store, index, out, cache, resume)
    return out


@pytest.mark.parametrize("processes", [1, 4])
def test_a_run_goes_on_from_a_server_and_back_bit_for_bit(tmp_path, processes):
    near = videos_in(tmp_path)
    with serving({}) as served:
        far = on_server(near, served)
        straight = trained(processes, near, tmp_path / "straight")
        for step, index, cache in ((3, far, tmp_path / "cache"), (6, near, "")):
            out = trained(processes, index, copy_until(step, straight, tmp_path / f"from-{step}"), cache, resume=True)
            assert (out / FILE).read_bytes() == (straight / FILE).read_bytes()
            assert_same(everything(out), everything(straight))
            assert rows(out, "note")[-1]["text"] == f"resumed at step {step}"
        assert served.sent.total() > 0 and len(os.listdir(tmp_path / "cache")) == processes


def test_four_processes_and_one_see_the_same_clips(tmp_path):
    near = videos_in(tmp_path)
    with serving({}) as served:
        far = on_server(near, served)
        straight = trained(4, near, tmp_path / "four")
        out = trained(1, far, copy_until(3, straight, tmp_path / "one"), tmp_path / "cache", resume=True)
        again = trained(4, far, copy_until(6, out, tmp_path / "again"), tmp_path / "cache", resume=True)
    ledgers = [read_ledger(run) for run in (straight, out, again)]
    for name in ("step", "plan"):
        first, second, third = ([row.get(name) for row in ledger] for ledger in ledgers)
        assert first == second == third and any(first)
    # Sums over processes are rounded otherwise, which the cascade of the second cycle turns into other positives.
    losses = [[row["loss"] for row in rows(run, "step") if row["cycle"] == 0] for run in (straight, out, again)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and losses[2] == pytest.approx(losses[0], rel=1e-5)
