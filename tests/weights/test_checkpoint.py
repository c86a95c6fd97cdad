"""Checkpoints with full disks, killed processes, and foreign or truncated files."""

from __future__ import annotations

import dataclasses
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.machine.full_disk import files_end_at

from cpr_fast.config import Config, InitConfig, ModelConfig
from cpr_fast.models import build_encoder
from cpr_fast.weights import checkpoint
from cpr_fast.weights.checkpoint import load_checkpoint, load_encoders, load_initial, save_checkpoint, save_step
from cpr_fast.weights.exporting import export
from cpr_fast.weights.reading import CheckpointError, DamagedCheckpointError

ROOT = Path(__file__).parents[2]
EXPECTED = r"expected a file written by `cpr-fast pretrain`, `finetune` or `import-checkpoint`, version 1"


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_round_trip(tmp_path):
    payload = {"step": 3, "tensors": {"a": torch.randn(3, 4), "b": torch.tensor([1, 2])}, "names": ["x", None, 0.5]}
    path = save_checkpoint(tmp_path / "deep" / "a.pt", payload)
    loaded = load_checkpoint(path)
    assert torch.equal(loaded["tensors"]["a"], payload["tensors"]["a"])
    assert torch.equal(loaded["tensors"]["b"], payload["tensors"]["b"])
    assert (loaded["step"], loaded["names"]) == (3, ["x", None, 0.5])
    assert files(path.parent) == ["a.pt"]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path, share):
    path = save_checkpoint(tmp_path / "a.pt", {"x": torch.randn(1000)})
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match=rf"a.pt' is (empty|truncated or damaged); {EXPECTED}"):
        load_checkpoint(path)


def test_a_foreign_file_is_refused(tmp_path):
    torch.save({"state_dict": {}, "epoch": 3}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=rf"another program \(it holds \['epoch', 'state_dict'\]\); {EXPECTED}"):
        load_checkpoint(tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match=r"another program \(it holds list\)"):
        load_checkpoint(tmp_path / "list.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(CheckpointError, match=r"text.pt' is not a checkpoint; "):
        load_checkpoint(tmp_path / "text.pt")
    torch.save({"format": checkpoint.FORMAT, "version": 99}, tmp_path / "new.pt")
    with pytest.raises(CheckpointError, match=r"has version 99; expected"):
        load_checkpoint(tmp_path / "new.pt")
    with pytest.raises(CheckpointError, match=r"does not exist"):
        load_checkpoint(tmp_path / "none.pt")


def test_loading_executes_nothing(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"format": checkpoint.FORMAT, "version": 1, "trap": Trap()}, tmp_path / "trap.pt")
    with pytest.raises(CheckpointError, match=rf"trap.pt' holds (posix|nt).mkdir, which is not among .*; {EXPECTED}"):
        load_checkpoint(tmp_path / "trap.pt")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("place", ["torch.save", "os.fsync", "os.replace"])
def test_a_full_disk_leaves_the_previous_file(tmp_path, monkeypatch, place):
    path = save_checkpoint(tmp_path / "a.pt", {"step": 1})

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"cpr_fast.weights.checkpoint.{place}", full)
    with pytest.raises(CheckpointError, match=r"a.pt': .*No space left on device; the previous file is untouched"):
        save_checkpoint(path, {"step": 2})
    monkeypatch.undo()
    assert load_checkpoint(path)["step"] == 1
    assert files(tmp_path) == ["a.pt"]


def test_a_write_that_fails_half_way(tmp_path):
    """Causes a real short write: files cannot grow beyond 64 KiB."""
    path = save_checkpoint(tmp_path / "a.pt", {"step": 1})
    with files_end_at(65536), pytest.raises(CheckpointError, match=r"could not write .*the previous file is untouched"):
        save_checkpoint(path, {"step": 2, "large": torch.zeros(1 << 20)})
    assert load_checkpoint(path)["step"] == 1
    assert files(tmp_path) == ["a.pt"]


def test_a_killed_process_leaves_the_previous_file(tmp_path):
    """kill -9 while the second checkpoint is half written; the next save cleans up."""
    program = f"""
import os, signal, torch
from cpr_fast.weights import checkpoint
checkpoint.save_step({str(tmp_path)!r}, 1, {{"step": 1}}, keep=2)
def half(payload, file):
    file.write(b"x" * 100_000); file.flush(); os.kill(os.getpid(), signal.SIGKILL)
torch.save = half
checkpoint.save_step({str(tmp_path)!r}, 2, {{"step": 2}}, keep=2)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 1
    assert "step-00000002.pt" not in files(tmp_path)
    save_step(tmp_path, 2, {"step": 2}, keep=2)
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 2
    assert files(tmp_path) == ["last.pt", "step-00000001.pt", "step-00000002.pt"]


@pytest.mark.parametrize("hard_links", [True, False])
def test_the_newest_are_kept(tmp_path, monkeypatch, hard_links):
    if not hard_links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no links here")))
    for step in (5, 10, 15, 20):
        save_step(tmp_path, step, {"step": step}, keep=2)
        assert load_checkpoint(tmp_path / "last.pt")["step"] == step
    assert files(tmp_path) == ["last.pt", "step-00000015.pt", "step-00000020.pt"]


def test_encoders_come_back_in_eval_mode(tmp_path):
    config = Config(model=ModelConfig(width=0.125, feature_dim=8))
    encoders = {view: build_encoder(config.model) for view in ("rgb", "flow")}
    states = {view: encoder.state_dict() for view, encoder in encoders.items()}
    path = save_checkpoint(tmp_path / "a.pt", {"config": config.to_dict(), "encoders": states})
    loaded_config, loaded = load_encoders(path)
    assert loaded_config == config
    assert list(loaded) == ["rgb", "flow"]
    clips = torch.randn(2, 3, 8, 32, 32)
    for view, encoder in loaded.items():
        assert not encoder.training
        with torch.no_grad():
            assert torch.equal(encoder(clips), encoders[view].eval()(clips))


def without(name):
    return lambda payload: {key: value for key, value in payload.items() if key != name}


def with_weights(change):
    """Returns a function that changes the encoder of a payload."""
    return lambda payload: payload | {"encoders": {"rgb": change(dict(payload["encoders"]["rgb"]))}}


NAME = "backbone.Conv_1a.conv1.weight"  # of the first convolution of S3D
FAULTS = {
    "no encoders": (without("encoders"), "has no encoders: .* got NoneType with config, format"),
    "no config": (without("config"), "has no config"),
    "no view": (lambda payload: payload | {"encoders": {}}, "has no encoders"),
    "another view": (
        lambda payload: payload | {"encoders": {"audio": payload["encoders"]["rgb"]}},
        "expected encoders of rgb, flow, residual, got 'audio'",
    ),
    "config of another version": (
        lambda payload: payload | {"config": {"colour": 1}}, "its config is not valid: unknown key 'colour'",
    ),
    "another architecture": (
        lambda payload: payload | {"config": Config(model=ModelConfig(arch="r3d", width=0.125)).to_dict()},
        r"encoder of view 'rgb' lacks \d+ tensors: .*, \.\.\.",
    ),
    "a list": (with_weights(list), "is not a dict of tensors, got list"),
    "a tensor is missing": (
        with_weights(lambda state: {k: v for k, v in state.items() if k != NAME}), f"lacks 1 tensor: {NAME}",
    ),
    "a tensor more": (with_weights(lambda state: state | {"more": torch.zeros(1)}), "which has no 1 tensor: more"),
    "another shape": (with_weights(lambda state: state | {NAME: torch.zeros(3)}), rf"{NAME} has shape \[3\], not \["),
    "NaN": (
        with_weights(lambda state: state | {NAME: state[NAME].clone().fill_(torch.nan)}),
        f"holds NaN or infinite values in {NAME}",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_encoders_that_cannot_be_used_are_named_wherever_they_are_read(tmp_path, fault):
    change, message = FAULTS[fault]
    config = Config(model=ModelConfig(width=0.125, feature_dim=8))
    payload = {"config": config.to_dict(), "encoders": {"rgb": build_encoder(config.model).state_dict()}, "view": "rgb"}
    before = torch.get_rng_state()
    path = save_checkpoint(tmp_path / "a.pt", change(payload))
    with pytest.raises(CheckpointError, match=f"checkpoint .*a.pt.*{message}"):
        load_encoders(path)
    with pytest.raises(CheckpointError, match=f"^model.init.rgb: checkpoint .*a.pt.*{message}"):
        load_initial(dataclasses.replace(config.model, init=InitConfig(rgb=str(path))))
    assert torch.equal(torch.get_rng_state(), before)  # a run that starts from a file draws the same numbers
    for form in ("safetensors", "coclr"):
        with pytest.raises(CheckpointError, match=message):
            export(path, tmp_path / "out", to=form)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", [16, 4096, 20_000])
def test_a_full_disk_is_named_and_not_a_position_in_the_file(tmp_path, size):
    with (
        files_end_at(size),
        pytest.raises(CheckpointError, match=r"last.pt': File too large; nothing was left behind$"),
    ):
        save_checkpoint(tmp_path / "last.pt", {"tensor": torch.zeros(10_000)})
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_byte_anywhere_is_damage(tmp_path):
    """torch reads the values of a tensor without comparing the archive's checksums."""
    torch.manual_seed(0)
    payload = {"encoders": {"rgb": {"weight": torch.randn(3000)}}, "step": 1}
    path = save_checkpoint(tmp_path / "a.pt", payload)
    whole = path.read_bytes()
    value = whole.index(payload["encoders"]["rgb"]["weight"].numpy().tobytes())
    for at in (value, value + 6001, value + 11_999, whole.index(b"encoders") + 1):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(DamagedCheckpointError, match=r"a.pt' is (damaged|truncated or damaged)"):
            load_checkpoint(path)
    path.write_bytes(whole)
    assert torch.equal(load_checkpoint(path)["encoders"]["rgb"]["weight"], payload["encoders"]["rgb"]["weight"])
