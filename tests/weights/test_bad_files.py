"""Published files with missing, foreign, misshapen or broken tensors are refused, and the message names the tensor."""

from __future__ import annotations

import re

import pytest
import torch
from support.published.files import coclr_file, iic_file, milnce_file

from cpr_fast.cli import main
from cpr_fast.weights.importing import import_checkpoint
from cpr_fast.weights.reading import CheckpointError, DamagedCheckpointError

pytestmark = pytest.mark.usefixtures("one_thread")

# A tensor in the middle of each network; a tensor of another network of its family; its first convolution.
FAMILIES = {
    "infonce": ("encoder_q.0.Mixed_4d.branch1.1.conv2.weight", "encoder_q.0.Mixed_6a.conv.weight",
                "encoder_q.0.Conv_1a.conv1.weight"),
    "coclr": ("sampler.0.Mixed_3b.branch0.0.bn.running_var", "encoder_k.0.layer1.0.conv1.weight",
              "encoder_q.0.Conv_1a.conv1.weight"),
    "cpr": ("encoder_k.0.Conv_2b.conv.weight", "sampler.0.slow.weight", "encoder_q.0.Conv_1a.conv1.weight"),
    "r3d": ("conv4.block1.downsamplebn.bias", "conv3.blocks.0.conv1.temporal_spatial_conv.weight",
            "conv1.temporal_spatial_conv.weight"),
    "r21d": ("conv5.block1.conv2.spatial_conv.weight", "conv2.blocks.0.bn1.weight", "conv1.temporal_conv.weight"),
    "c3d": ("conv3b.bias", "conv6a.weight", "conv1.weight"),
    "milnce": ("mixed_5c.gating_b2.fc.weight", "mixed_6a.conv_b0.conv1.weight", "conv1.conv1.weight"),
}  # fmt: skip


@pytest.fixture(scope="module")
def files():
    torch.manual_seed(0)
    made = {kind: coclr_file(kind) for kind in ("infonce", "coclr", "cpr")}
    made |= {arch: iic_file(arch) for arch in ("r3d", "r21d", "c3d")}
    return made | {"milnce": milnce_file(8)}


def changed(files, family: str, **changes) -> dict:
    """The file of a family with other tensors; None removes one."""
    payload = dict(files[family])
    key = next((key for key in ("state_dict", "model") if key in payload), None)
    state = dict(payload[key] if key else payload)
    for name, value in changes.items():
        for alias in [name, *aliases(name, state)]:
            if value is None:
                del state[alias]
            else:
                state[alias] = value
    return payload | {key: state} if key else state


def aliases(name: str, state: dict) -> list[str]:
    """The other name of the same tensor in a file of CoCLR, found by its storage."""
    if name not in state:
        return []
    return [other for other in state if other != name and state[other].data_ptr() == state[name].data_ptr()]


def refused(tmp_path, payload, message: str) -> None:
    torch.save(payload, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=message) as error:
        import_checkpoint(tmp_path / "a.pt", tmp_path / "ours.pt")
    assert not isinstance(error.value, DamagedCheckpointError)
    assert not (tmp_path / "ours.pt").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_missing_tensor(tmp_path, files, family):
    name, _, stem = FAMILIES[family]
    lacks = rf"expected all tensors of '\w+', but \w+ lacks {re.escape(name)}$"
    refused(tmp_path, changed(files, family, **{name: None}), lacks)
    lacks = rf"expected the tensor {re.escape(stem)}, but the file holds "
    refused(tmp_path, changed(files, family, **{stem: None}), lacks)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (8, 3, 1, 1, 1)])
def test_a_wrong_shape(tmp_path, files, family, shape):
    name, _, stem = FAMILIES[family]
    wrong = re.escape(str(list(shape)))
    refused(tmp_path, changed(files, family, **{name: torch.zeros(shape)}),
            rf"{re.escape(name)}: expected shape \[.+, got {wrong}$")  # fmt: skip
    refused(tmp_path, changed(files, family, **{stem: torch.zeros(shape)}),
            rf"{re.escape(stem)}: expected shape \[64 x width, .+, got {wrong}$")  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_values_that_are_no_weights(tmp_path, files, family):
    name = FAMILIES[family][0]
    state = next((files[family][key] for key in ("state_dict", "model") if key in files[family]), files[family])
    broken = state[name].clone()
    broken.view(-1)[1] = float("nan")
    broken.view(-1)[-1] = -float("inf")
    refused(tmp_path, changed(files, family, **{name: broken}),
            rf"{re.escape(name)}: expected finite numbers, but 2 of {broken.numel()} are NaN or infinite$")  # fmt: skip
    refused(tmp_path, changed(files, family, **{name: state[name].long()}),
            rf"{re.escape(name)}: expected torch.float32, got torch.int64$")  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_of_another_network(tmp_path, files, family):
    foreign = FAMILIES[family][1]
    message = rf"of '\w+' \(model.arch\), but the file also holds {re.escape(foreign)}: it is another network$"
    refused(tmp_path, changed(files, family, **{foreign: torch.zeros(3)}), message)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("legacy", [False, True])
def test_a_cut_file(tmp_path, files, family, legacy):
    torch.save(files[family], tmp_path / "whole.pt", _use_new_zipfile_serialization=not legacy)
    content = (tmp_path / "whole.pt").read_bytes()
    for share in (0, 0.3, 0.999):
        (tmp_path / "a.pt").write_bytes(content[: int(share * len(content))])
        with pytest.raises(
            DamagedCheckpointError, match=r"a.pt' is (empty|truncated or damaged); expected a checkpoint"
        ):
            import_checkpoint(tmp_path / "a.pt", tmp_path / "ours.pt")


@pytest.mark.parametrize(
    "payload",
    [{}, {"state_dict": {}}, {"model": {}}, {"state_dict": None}, {"state_dict": {1: 2}}, {"state_dict": {"a": "b"}}],
)
def test_a_file_without_tensors(tmp_path, payload):
    refused(tmp_path, payload, r"holds no tensor; expected a checkpoint of CoCLR or CPR \(encoder_q\.\*\), IIC .*")


@pytest.mark.parametrize("payload", [None, 3, "text", [1], torch.zeros(3)])
def test_a_file_that_is_no_dict(tmp_path, payload):
    refused(tmp_path, payload, rf"holds a {type(payload).__name__}; expected")


@pytest.mark.parametrize("prefix", ["resnet.layer1.0.conv1", "encoder.blocks.0.attn.qkv", "module.base.conv1"])
def test_a_network_that_is_not_known(tmp_path, prefix):
    refused(tmp_path, {"state_dict": {f"{prefix}.weight": torch.zeros(3)}},
            rf"holds {prefix.removeprefix('module.')}.weight; expected a checkpoint of CoCLR")  # fmt: skip


@pytest.mark.parametrize(
    ("name", "shape", "wanted"),
    [("queue", (16,), "[16, 16]"), ("queue", (8, 32), "[16, 32]"), ("queue_second", (16, 31), "[16, 32]"),
     ("queue_ptr", (), "[1]"), ("queue_label", (31,), "[32]"), ("queue_vname", (32, 1), "[32]"),
     ("memory_index_record", (0,), "[32]")],
)  # fmt: skip
def test_a_queue_of_another_shape(tmp_path, files, name, shape, wanted):
    message = rf"{name}: expected shape {re.escape(wanted)}, got {re.escape(str(list(shape)))}$"
    refused(tmp_path, changed(files, "cpr", **{name: torch.zeros(shape)}), message)


def test_half_precision_and_old_files_without_counters_are_read(tmp_path, files):
    state = {name: value.half() if value.is_floating_point() else value for name, value in files["milnce"].items()}
    state = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "a.pt")
    report = import_checkpoint(tmp_path / "a.pt", tmp_path / "ours.pt")
    assert all("head" in name or "num_batches" in name for name in report["encoders"]["encoder_q"]["missing"])


def test_the_view_of_a_file_with_two_encoders(tmp_path, files, capsys):
    torch.save(files["coclr"], tmp_path / "a.pt")
    assert (
        main(["import-checkpoint", str(tmp_path / "a.pt"), "--out", str(tmp_path / "o.pt"), "--view", "residual"]) == 2
    )
    assert "--view: expected rgb or flow for a file with two encoders, got 'residual'" in capsys.readouterr().err
