"""Runs that start from imported encoders, and exports of trained encoders in the formats of other programs."""

from __future__ import annotations

import json

import pytest
import torch
from support.published.files import coclr_file, milnce_file
from support.published.networks import MODELS
from support.stand_in_loader import RandomLoader, make_index

from cpr_fast.cli import main
from cpr_fast.config import Config, ModelConfig
from cpr_fast.errors import InputError
from cpr_fast.models import build_encoder
from cpr_fast.pretrain.run.loop import pretrain
from cpr_fast.weights.checkpoint import load_checkpoint, load_encoders, save_checkpoint
from cpr_fast.weights.exporting import export
from cpr_fast.weights.importing import import_checkpoint
from cpr_fast.weights.reading import CheckpointError

pytestmark = pytest.mark.usefixtures("one_thread")


def settings(out, **model) -> Config:
    return Config.from_dict(
        {
            "data": {"batch_size": 6, "frames": 5, "size": 20},
            "model": {"width": 0.125, "feature_dim": 16} | model,
            "memory": {"size": 10},
            "mining": {"stages": 3, "top_k": 2},
            "schedule": {"cycles": [{"view": "rgb", "epochs": 1}]},
            "run": {"out": str(out)},
        }
    )


def train(config: Config, **kwargs):
    return pretrain(config, index=make_index(18), make_loader=RandomLoader, progress=False, **kwargs)


def test_a_run_starts_from_imported_encoders(tmp_path):
    for view in ("rgb", "flow"):
        torch.save(coclr_file("infonce"), tmp_path / f"{view}.pth.tar")
        import_checkpoint(tmp_path / f"{view}.pth.tar", tmp_path / f"{view}.pt", view=view)
    init = {view: str(tmp_path / f"{view}.pt") for view in ("rgb", "flow")}
    folder = train(settings(tmp_path / "run", init=init))
    trained = load_checkpoint(folder / "checkpoints" / "last.pt")["encoders"]
    start = {view: load_checkpoint(init[view])["encoders"][view] for view in init}
    assert all(torch.equal(trained["flow"][name], tensor) for name, tensor in start["flow"].items())  # frozen
    moved = trained["rgb"]["backbone.Conv_1a.conv1.weight"] - start["rgb"]["backbone.Conv_1a.conv1.weight"]
    assert 0 < moved.abs().max() < 0.01  # two steps of Adam away from the file, not from random weights
    (tmp_path / "flow.pt").unlink()
    train(settings(tmp_path / "run", init=init), resume=True)  # its checkpoints record the imported file


def test_a_start_that_does_not_fit_is_refused(tmp_path):
    torch.save(coclr_file("infonce"), tmp_path / "a.pth.tar")
    import_checkpoint(tmp_path / "a.pth.tar", tmp_path / "a.pt")
    with pytest.raises(
        CheckpointError,
        match=r"model.init.flow: expected .* the view 'flow', but .* the views rgb",
    ):
        train(settings(tmp_path / "run", init={"flow": str(tmp_path / "a.pt")}))
    with pytest.raises(CheckpointError, match=r"model.init.rgb: '.*a.pt' has model.feature_dim 16, got 8"):
        train(settings(tmp_path / "run", feature_dim=8, init={"rgb": str(tmp_path / "a.pt")}))
    with pytest.raises(CheckpointError, match=r"a.pth.tar' .*import-checkpoint` converts those"):
        train(settings(tmp_path / "run", init={"rgb": str(tmp_path / "a.pth.tar")}))


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory):
    return train(settings(tmp_path_factory.mktemp("run") / "run")) / "checkpoints" / "last.pt"


@pytest.mark.parametrize("form", ["coclr", "cpr"])
def test_our_run_in_their_form_comes_back(trained_run, tmp_path, capsys, form):
    # The frozen view has random weights here, so the run does not save it as trained, but
    # a checkpoint of two views needs both encoders.
    ours = load_checkpoint(trained_run)
    ours["encoders"]["flow"] = build_encoder(ModelConfig(width=0.125, feature_dim=16)).state_dict()
    torch.save(ours, tmp_path / "run.pt")
    assert main(["export", str(tmp_path / "run.pt"), "--to", form, "--out", str(tmp_path / "t.tar"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "CoCLR"
    arguments = [str(tmp_path / "t.tar"), "--out", str(tmp_path / "back.pt"), "--json"]
    assert main(["import-checkpoint", *arguments]) == 0
    assert json.loads(capsys.readouterr().out)["unused"] == []
    back = load_checkpoint(tmp_path / "back.pt")
    for view, state in ours["encoders"].items():
        assert all(torch.equal(back["encoders"][view][name], tensor) for name, tensor in state.items())
    for name, tensor in ours["cycle_state"]["key"].items():
        assert torch.equal(back["cycle_state"]["key"][name], tensor)
    for column in ("features", "source"):
        assert torch.equal(back["cycle_state"]["memory"][column], ours["cycle_state"]["memory"][column])


def test_safetensors_hold_every_view(trained_run, tmp_path):
    safetensors = pytest.importorskip("safetensors")
    export(trained_run, tmp_path / "a.safetensors", to="safetensors")
    payload = load_checkpoint(trained_run)
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert json.loads(file.metadata()["cpr_fast_config"]) == payload["config"]
        assert set(file.keys()) == {f"rgb.{name}" for name in payload["encoders"]["rgb"]}
        for name, tensor in payload["encoders"]["rgb"].items():
            assert torch.equal(file.get_tensor(f"rgb.{name}"), tensor)


@pytest.mark.parametrize("form", ["safetensors", "coclr"])
def test_an_export_of_the_same_checkpoint_has_the_same_bytes(trained_run, tmp_path, form):
    for number in range(4):
        export(trained_run, tmp_path / str(number) / "a", to=form)
    assert len({(tmp_path / str(number) / "a").read_bytes() for number in range(4)}) == 1


@pytest.mark.slow
def test_onnx_computes_the_same_for_any_batch(trained_run, tmp_path):
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name)
    onnxruntime = pytest.importorskip("onnxruntime")
    written = export(trained_run, tmp_path / "a.onnx", to="onnx")
    assert written["clips"] == ["batch", 3, 5, 20, 20]
    _, encoders = load_encoders(trained_run)
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        clips = torch.randn(batch, 3, 5, 20, 20)
        with torch.no_grad():
            features, embedding = encoders["rgb"].features(clips), encoders["rgb"](clips)
        got = session.run(None, {"clips": clips.numpy()})
        torch.testing.assert_close(torch.from_numpy(got[0]), features, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(torch.from_numpy(got[1]), embedding, rtol=1e-3, atol=1e-5)


def test_what_cannot_be_exported_is_named(trained_run, tmp_path):
    with pytest.raises(InputError, match=r"--view: expected one of the views of the checkpoint \(rgb\), got 'flow'"):
        export(trained_run, tmp_path / "a", to="coclr", view="flow")
    torch.save(milnce_file(8), tmp_path / "m.pth")
    import_checkpoint(tmp_path / "m.pth", tmp_path / "m.pt")
    with pytest.raises(InputError, match=r"--to coclr expects an S3D .*, got 's3d_milnce' with 'mlp'"):
        export(tmp_path / "m.pt", tmp_path / "a", to="coclr")
    assert not (tmp_path / "a").exists()


def saved_run(tmp_path, mining: str, views=("rgb",), memory=None, **payload):
    """A checkpoint of a cycle; `memory` are the columns of its queue."""
    config = settings(tmp_path).to_dict()
    config["schedule"]["cycles"] = [{"view": "rgb", "epochs": 3, "mining": mining}]
    torch.manual_seed(0)
    states = {view: build_encoder(ModelConfig(width=0.125, feature_dim=16)).state_dict() for view in views}
    payload = {"config": config, "encoders": states, "cycle": 0, "epoch": 2, "step": 40, "cycle_state": {}} | payload
    if memory is not None:
        payload["cycle_state"] = {"memory": memory}
    return save_checkpoint(tmp_path / "run.pt", payload)


def queue(views: int, slots: int = 10) -> dict:
    features = torch.nn.functional.normalize(torch.randn(views, slots, 16), dim=2)
    column = torch.tensor([4, 4, 7, *[-1] * (slots - 3)])  # three slots are written
    return {"features": features, "source": column, "label": torch.full((slots,), -1), "count": 3}


@pytest.mark.parametrize("form", ["coclr", "cpr"])
@pytest.mark.parametrize(
    ("mining", "views", "memory", "model"),
    [
        ("none", ("rgb",), queue(1), "infonce"),
        ("none", ("rgb",), None, "infonce"),
        ("label", ("rgb",), queue(1), "ubernce"),
        ("cascade", ("rgb", "flow"), queue(2), "two views"),
        ("cascade", ("rgb", "flow", "residual"), queue(2), "two views"),
        ("cascade", ("rgb",), queue(2), "infonce"),  # the frozen encoder was random, and is not saved
    ],
)
def test_a_file_loads_strictly_into_the_published_class(tmp_path, form, mining, views, memory, model):
    written = export(saved_run(tmp_path, mining, views, memory), tmp_path / "a.pth.tar", to=form)
    kind = model if model != "two views" else form
    assert written["model"] == {"infonce": "InfoNCE", "ubernce": "UberNCE"}.get(kind, "CoCLR")
    file = torch.load(tmp_path / "a.pth.tar", weights_only=True)
    assert (file["epoch"], file["iteration"]) == (1, 41)  # their epoch is the last one done: they resume at the next
    network = MODELS[kind](0.125, 16, 10)
    network.load_state_dict(file["state_dict"], strict=True)
    for name, buffer in network.named_buffers():
        assert buffer.dtype == file["state_dict"][name].dtype, name
    if model == "two views":
        assert network.queue_vname.tolist() == [4, 4, 7] + [-1] * 7
        assert network.queue_label.tolist() == [1, 1, 1] + [-1] * 7  # -1: an empty slot
        assert torch.equal(network.queue_second, memory["features"][1].T)
        if form == "cpr":
            assert torch.equal(network.memory_index_record, torch.arange(10))
    assert int(network.queue_ptr) == (0 if memory is None else 3)
    torch.testing.assert_close(network.queue.norm(dim=0), torch.ones(10))


def test_the_exported_network_computes_the_same(tmp_path):
    path = saved_run(tmp_path, "none")
    export(path, tmp_path / "a.pth.tar", to="cpr")
    theirs = MODELS["infonce"](0.125, 16, 10)
    theirs.load_state_dict(torch.load(tmp_path / "a.pth.tar", weights_only=True)["state_dict"])
    _, encoders = load_encoders(path)
    clips = torch.randn(2, 3, 8, 32, 32)
    with torch.no_grad():
        wanted = torch.nn.functional.normalize(theirs.double().eval().encoder_q(clips.double()).flatten(1), dim=1)
        torch.testing.assert_close(encoders["rgb"](clips).double(), wanted, rtol=1e-4, atol=1e-5)


def test_another_view_is_exported_with_a_new_queue(tmp_path):
    path = saved_run(tmp_path, "cascade", ("rgb", "flow"), queue(2))
    assert export(path, tmp_path / "a.pth.tar", to="cpr", view="flow")["model"] == "InfoNCE"
    network = MODELS["infonce"](0.125, 16, 10)
    network.load_state_dict(torch.load(tmp_path / "a.pth.tar", weights_only=True)["state_dict"], strict=True)
    torch.testing.assert_close(network.queue.norm(dim=0), torch.ones(10))


def test_a_network_without_their_head_is_refused(tmp_path):
    config = settings(tmp_path, head="unit", feature_dim=128).to_dict()
    state = build_encoder(ModelConfig(width=0.125, head="unit", feature_dim=128)).state_dict()
    path = saved_run(tmp_path, "none", config=config, encoders={"rgb": state})
    with pytest.raises(InputError, match=r"--to cpr expects an S3D .* with model.head 'mlp', got 's3d' with 'unit'"):
        export(path, tmp_path / "a", to="cpr")


def test_residual_is_exported(tmp_path):
    path = saved_run(tmp_path, "none", ("rgb", "residual"))
    assert main(["export", str(path), "--to", "coclr", "--view", "residual", "--out", str(tmp_path / "a.tar")]) == 0
    got = torch.load(tmp_path / "a.tar", weights_only=True)["state_dict"]["encoder_q.2.bias"]
    assert torch.equal(got, load_checkpoint(path)["encoders"]["residual"]["head.0.bias"])


@pytest.mark.parametrize(
    ("name", "to", "said"),
    [
        ("e.pth", None, "--to: expected coclr or cpr for the name "),
        ("e.onnx", "safetensors", "--out: expected a name that ends in .safetensors for the format safetensors, got "),
        ("e.safetensors", "onnx", "--out: expected a name that ends in .onnx for the format onnx, got "),
        ("e.safetensors", "cpr", "--out: expected a name that ends in .pth or .pt or .tar for the format cpr, got "),
        ("e.csv", None, "--out: expected a name that ends in .safetensors for the format safetensors, got "),
    ],
)
def test_a_name_of_another_format_is_refused(tmp_path, capsys, name, to, said):
    (tmp_path / "a.pt").touch()
    options = ["--to", to] if to else []
    assert main(["export", str(tmp_path / "a.pt"), "--out", str(tmp_path / name), *options]) == 2
    assert f"cpr-fast: {said}" in capsys.readouterr().err and not (tmp_path / name).exists()


def test_the_name_chooses_the_format(tmp_path):
    from cpr_fast.commands.training.export import _format

    names = {"a.onnx": "onnx", "a.safetensors": "safetensors", "a": "safetensors", "a.v2": "safetensors"}
    assert {name: _format(tmp_path / name, None) for name in names} == names
    assert _format(tmp_path / "a.pth", "coclr") == "coclr" and _format(tmp_path / "a.v2", "cpr") == "cpr"
