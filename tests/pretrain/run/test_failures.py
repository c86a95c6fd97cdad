"""A run that cannot start or continue reports the reason in one line, and leaves no partially written file."""

from __future__ import annotations

import dataclasses
import errno

import pytest
import torch
from support.small_runs import INDEX, run, settings
from support.stand_in_loader import RandomLoader

from cpr_fast import cli
from cpr_fast.data.index.index import Index
from cpr_fast.errors import FailedError, InputError
from cpr_fast.pretrain.run.log import NonFiniteError
from cpr_fast.pretrain.run.loop import pretrain
from cpr_fast.weights import checkpoint
from cpr_fast.weights.checkpoint import load_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("log_every", [1, 100])
@pytest.mark.parametrize("bad", [(0, 0), (1, 1), (3, 2)])
def test_nan_stops_the_run_and_names_step_and_videos(tmp_path, bad, log_every):
    class Spoiled(RandomLoader):
        spoil = bad

    with pytest.raises(NonFiniteError, match=rf"step {bad[0] * 3 + bad[1] + 1}: .*queries of 6 of 6 clips.*\. "
                       r"The step is saved in .*.pt\..* Videos of the batch: /v\d+.mp4, /v"):  # fmt: skip
        run(settings(tmp_path, run={"out": str(tmp_path), "log_every": log_every}), Spoiled)
    (dump,) = tmp_path.glob("nonfinite-step-*.pt")
    left = load_checkpoint(dump)
    assert left["step"] == bad[0] * 3 + bad[1] and left["paths"] == [str(INDEX[i].path) for i in left["video"]]
    assert left["queries"].shape == (1, 6, 8) and left["keys"].shape[1:] == (6, 8)
    assert left["queries"].isnan().any()
    for path in (tmp_path / "checkpoints").glob("*.pt"):  # no weights with NaN are written
        for state in load_checkpoint(path)["encoders"].values():
            assert all(torch.isfinite(tensor).all() for tensor in state.values())


def test_labels_are_needed_to_mine_by_them(tmp_path):
    unlabelled = Index([dataclasses.replace(video, label="") for video in INDEX])
    cycles = {"cycles": [{"view": "rgb", "epochs": 1, "mining": "label"}]}
    with pytest.raises(InputError, match=r"mining = 'label' expects every video of the index to have a label"):
        pretrain(settings(tmp_path, schedule=cycles), index=unlabelled, make_loader=RandomLoader, progress=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_missing_device_is_named(tmp_path):
    with pytest.raises(InputError, match=r"run.device: got 'cuda', but torch finds no CUDA device"):
        run(settings(tmp_path, run={"out": str(tmp_path), "device": "cuda"}))


@pytest.mark.parametrize("name", ["gpu", "mps", "cuda:x", "", "meta"])
def test_a_device_that_cannot_train_is_named_before_anything_is_written(tmp_path, name):
    with pytest.raises(InputError, match=f"run.device: expected 'auto', 'cpu', 'cuda' or 'cuda:N', got '{name}'"):
        run(settings(tmp_path, run={"out": str(tmp_path / "run"), "device": name}))
    assert not (tmp_path / "run").exists()


def test_fp16_needs_cuda(tmp_path):
    with pytest.raises(InputError, match=r"optim.precision: 'fp16' expects a CUDA device"):
        run(settings(tmp_path, optim={"precision": "fp16"}, run={"out": str(tmp_path), "device": "cpu"}))


def test_a_failure_is_one_line_on_the_command_line(monkeypatch, capsys):
    def fails(_arguments):
        raise NonFiniteError("step 3: features or loss are NaN or infinite")

    monkeypatch.setattr(cli, "_command", lambda *_: fails)
    assert cli.main(["pretrain", "c.toml"]) == 1
    assert capsys.readouterr().err == "cpr-fast: step 3: features or loss are NaN or infinite\n"


def test_nan_on_a_full_disk_is_still_named(tmp_path, monkeypatch):
    class Spoiled(RandomLoader):
        spoil = (0, 1)

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.raises(FailedError, match=r"step 2: features or loss are NaN .* could not be saved .*No space left"):
        run(settings(tmp_path), Spoiled)
    assert not list(tmp_path.glob("nonfinite*"))


@pytest.mark.parametrize("name", ["file/run", "/proc/1/run", "/sys/run"])
def test_a_run_folder_that_cannot_be_written_is_named(tmp_path, name):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        InputError, match=r"run.out: cannot write to '.*run': .*\. Choose another folder with --run.out"
    ):
        run(settings(tmp_path / name))


def test_fewer_videos_than_a_batch_are_named(tmp_path):
    few = Index(list(INDEX)[:5])
    with pytest.raises(InputError, match=r"data.batch_size: the index holds 5 training videos, fewer than one batch"):
        pretrain(settings(tmp_path / "run"), index=few, make_loader=RandomLoader, progress=False)
    assert not (tmp_path / "run").exists()


def test_bad_settings_of_a_later_cycle_are_named_before_the_first(tmp_path):
    unlabelled = Index([dataclasses.replace(video, label="") for video in INDEX])
    cycles = [{"view": "rgb", "epochs": 1, "mining": "none"}, {"view": "rgb", "epochs": 1, "mining": "label"}]
    with pytest.raises(InputError, match=r"mining = 'label' expects every video .*but 18 of 18 have none"):
        pretrain(settings(tmp_path / "run", schedule={"cycles": cycles}), index=unlabelled, make_loader=RandomLoader,
                 progress=False)  # fmt: skip
    cycles[1] |= {"mining": "none", "lr": 0.0}
    with pytest.raises(InputError, match=r"schedule.cycles\[1\].lr \(cycle 2\): expected a positive number, got 0"):
        run(settings(tmp_path / "run", schedule={"cycles": cycles}))
    assert not (tmp_path / "run").exists()
