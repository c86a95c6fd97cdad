"""Networks of the user's own, which `model.arch` names: what they may return, and errors that name what is wrong."""

from __future__ import annotations

import copy
import dataclasses
import re
import sys

import pytest
import torch
from support import own_networks

from cpr_fast.config import Config, ConfigError, DataConfig, ModelConfig, load
from cpr_fast.config.pixels import IMAGENET_MEAN, IMAGENET_STD
from cpr_fast.errors import InputError
from cpr_fast.models import build_encoder

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = DataConfig(frames=8, size=16)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return own_networks.write(tmp_path_factory.mktemp("own"))


@pytest.fixture
def build(file):
    def build(name, data=DATA, **settings):
        return build_encoder(ModelConfig(f"{file}:{name}", feature_dim=5, **settings), data)

    return build


def clips(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, 8, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("output", ["features", "tokens", "maps"])
def test_features_tokens_and_maps_are_pooled_by_their_shape(build, output):
    encoder = build("Tokens", args={"output": output}).eval()
    found = encoder.backbone(clips())
    pooled = found if output == "features" else found.mean(1) if output == "tokens" else found.mean((2, 3, 4))
    torch.testing.assert_close(encoder.features(clips()), pooled)
    assert encoder.width == 8 and encoder(clips()).shape == (3, 5)
    torch.testing.assert_close(encoder(clips()).norm(dim=1), torch.ones(3))


def test_the_class_token_is_the_first_token(build):
    encoder = build("Tokens", pool="class_token").eval()
    assert torch.equal(encoder.features(clips()), encoder.backbone(clips())[:, 0])
    with pytest.raises(InputError, match=r"model.pool: 'class_token' expects tokens \[N, L, D\], got \[1, 8\]"):
        build("Tokens", pool="class_token", args={"output": "features"})
    with pytest.raises(InputError, match=r"model.pool: 'mean' expects tokens .* or maps .*, got \[1, 8\]"):
        build("Tokens", pool="mean", args={"output": "features"})


def test_half_precision_features_and_lazy_layers_are_accepted(build):
    assert build("returns", args={"what": "half"}).features(clips()).dtype == torch.float32
    assert build("lazy").width == 6


def test_features_are_computed_under_autocast(build):
    encoder = build("Tokens").eval()
    with torch.autocast("cpu", torch.bfloat16):
        features = encoder.features(clips())
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, encoder.features(clips()), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("what", "got"),
    [
        ("number", "an object of the type float"),
        ("pair", "an object of the type tuple of 2"),
        ("whole", r"a tensor \[1, 4\] of int64"),
        ("image", r"a tensor \[1, 4, 1, 1\] of float32"),
        ("vector", r"a tensor \[4\] of float32"),
        ("rows", r"N is the number of clips, got 2 rows for clips \[1, 3, 8, 16, 16\]"),
        ("nothing", "got no feature"),
    ],
)
def test_other_outputs_are_refused_with_what_came_and_what_was_expected(build, what, got):
    with pytest.raises(InputError, match=rf"model.arch '.*net.py:returns': expected features \[N, D\], tokens .*{got}"):
        build("returns", args={"what": what})


@pytest.mark.parametrize(("what", "got"), [("fewer", [2, 3]), ("tokens", [2, 1, 4])])
def test_an_output_that_changes_its_shape_is_refused(build, what, got):
    encoder = build("returns", args={"what": what})
    with pytest.raises(
        InputError, match=rf"expected 4 features in an output of 2 dimensions, .*, got {re.escape(str(got))}"
    ):
        encoder.features(clips(2))


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("Token", {}, r"model.arch '.*net.py:Token': expected a class or function 'Token' .*did you mean 'Tokens'\?"),
        ("SCALE", {}, "expected 'SCALE' to be a class or function, got Tensor"),
        ("no_network", {}, "expected the factory to return an nn.Module, got int"),
        ("leaves", {}, r"the factory raised SystemExit: 3 \(.*net.py, line \d+\)"),
        ("fails", {}, r"the factory raised RuntimeError: no luck \(.*net.py, line \d+\)"),
        (
            "refuses",
            {},
            r"does not take clips \[1, 3, 8, 16, 16\] \(data.frames, data.size\): ValueError: T must be 16",
        ),
        ("tokens", {}, "model.args.depth: expected a value, which the factory .* requires, got none"),
        ("Tokens", {"dept": 1}, "model.args.dept: no argument .*; did you mean 'depth'\\? its arguments: width, depth"),
        ("Tokens", {"width": "x"}, r"the factory raised TypeError: .*; model.args is {'width': 'x'}"),
        ("half", {}, "expected tensors of float32 on the CPU, .* got token of torch.bfloat16 on cpu"),
        ("meta", {}, "expected tensors of float32 on the CPU, .* got token of torch.float32 on meta"),
        ("system", {"command": "touch system"}, "expected a class of nn.Module or a function that is annotated"),
    ],
)
def test_wrong_factories_are_named_with_what_is_wrong(build, name, args, message):
    with pytest.raises(InputError, match=message):
        build(name, args=args)


@pytest.mark.parametrize("arch", ["os:system", "subprocess:run", "subprocess:Popen", "torch.hub:load", "builtins:eval"])
def test_a_checkpoint_cannot_name_any_function_of_the_installation(arch):
    with pytest.raises(InputError, match=f"model.arch '{arch}': expected a class of nn.Module or a function"):
        build_encoder(ModelConfig(arch), DATA)
    with pytest.raises(InputError, match="expected a class of nn.Module or a function"):
        build_encoder(ModelConfig(f"{sys.modules['subprocess'].__file__}:getoutput", args={"cmd": "true"}), DATA)


def test_modules_are_found_in_the_working_directory_and_missing_ones_are_named(tmp_path, monkeypatch):
    own_networks.write(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_nets").mkdir()
    (tmp_path / "my_nets" / "nets.py").write_text("from net import Tokens\nimport no_such_package\n")
    assert build_encoder(ModelConfig("net:Tokens"), DATA).width == 8
    sys.modules.pop("net")
    for arch, message in {
        "no_such.module:f": "there is no module 'no_such'; install it, run the command in the folder .* PYTHONPATH",
        "my_nets.other:f": "there is no module 'my_nets.other'",
        "my_nets.nets:f": "importing 'my_nets.nets' raised ModuleNotFoundError: No module named 'no_such_package'",
        "gone/net2.py:f": "expected the Python file 'gone/net2.py', which does not exist; run the command in a folder",
    }.items():
        with pytest.raises(InputError, match=f"model.arch '{arch}': {message}"):
            build_encoder(ModelConfig(arch), DATA)
    assert build_encoder(ModelConfig("gone/net.py:Tokens"), DATA).width == 8  # the file was moved
    (tmp_path / "bad.py").write_text("def f(:\n")
    with pytest.raises(InputError, match=r"importing 'bad.py' raised SyntaxError: .*line 1"):
        build_encoder(ModelConfig("bad.py:f"), DATA)
    sys.modules.pop("net", None)


def test_a_file_may_import_its_neighbours_and_hold_a_partial_class(tmp_path):
    neighbour = "from torch import nn\ndef net(width):\n    return nn.Sequential(nn.Flatten(), nn.LazyLinear(width))\n"
    (tmp_path / "neighbour_of_net.py").write_text(neighbour)
    source = "import functools\nfrom neighbour_of_net import net\nmake = functools.partial(net, width=4)\n"
    place = own_networks.write(tmp_path, source)
    assert build_encoder(ModelConfig(f"{place}:make"), DATA).width == 4
    assert build_encoder(ModelConfig(f"{place}:make", args={"width": 6}), DATA).width == 6
    assert str(tmp_path) not in sys.path


def test_a_declared_normalisation_replaces_that_of_the_clips(build):
    plain = build("Normed").eval()
    declared = build("declares", args={"clip_mean": [0.5, 0.4, 0.3], "clip_std": [0.2, 0.25, 0.5]}).eval()
    declared.load_state_dict(plain.state_dict())
    pixels = torch.rand(2, 3, 8, 16, 16)
    given = (pixels - torch.tensor(IMAGENET_MEAN).view(3, 1, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1, 1)
    wanted = (pixels - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1, 1)) / torch.tensor([0.2, 0.25, 0.5]).view(3, 1, 1, 1)
    torch.testing.assert_close(declared.features(given), plain.backbone(wanted).mean((2, 3, 4)))
    configured = build("Normed", mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.5)).eval()
    configured.load_state_dict(plain.state_dict())
    assert torch.equal(configured.features(given), declared.features(given))
    assert copy.deepcopy(declared).state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize(
    ("declared", "settings", "message"),
    [
        ({"clip_frames": 16}, {}, r"data.frames: expected 16, which model.arch .* declares \(clip_frames\), got 8"),
        ({"clip_size": 112}, {}, r"data.size: expected 112, which model.arch .* declares \(clip_size\), got 16"),
        (
            {"clip_mean": [0, 0, 0], "clip_std": [1, 1, 1]},
            {"mean": (0.5, 0.5, 0.5), "std": (1.0, 1.0, 1.0)},
            r"model.mean: expected \[0.0, 0.0, 0.0\], which model.arch .* declares .*, got \[0.5, 0.5, 0.5\]",
        ),
        ({"clip_mean": [0, 0, 0]}, {}, "expected both clip_mean and clip_std or neither"),
        ({"clip_mean": "red", "clip_std": [1, 1, 1]}, {}, "expected clip_mean of three numbers, got 'red'"),
        ({"clip_mean": [0, 0, 0], "clip_std": [1, 0, 1]}, {}, r"expected clip_std of three numbers, got \[1, 0, 1\]"),
    ],
)
def test_a_contradiction_between_the_network_and_the_config_names_both(build, declared, settings, message):
    with pytest.raises(InputError, match=message):
        build("declares", args=declared, **settings)


def test_the_identity_of_features_covers_the_code_and_the_settings(file, tmp_path):
    model = ModelConfig(f"{file}:Tokens")
    before = build_encoder(model, DATA).identity
    moved = own_networks.write(tmp_path)
    assert build_encoder(ModelConfig(f"{moved}:Tokens"), DATA).identity == before
    for change in ({"pool": "class_token"}, {"args": {"dropout": 0.2}}, {"mean": (0.0,) * 3, "std": (1.0,) * 3}):
        assert build_encoder(dataclasses.replace(model, **change), DATA).identity != before
    changed = own_networks.write(tmp_path, own_networks.SOURCE + "\n# changed\n")
    assert build_encoder(ModelConfig(f"{changed}:Tokens"), DATA).identity != before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("arch = 's3'", "model.arch: expected one of 's3d', .*, got 's3'; did you mean 's3d'"),
        ("arch = 'net.py'", "model.arch: expected one of .*'path/to/file.py:factory', got 'net.py'"),
        ("arch = 'net.py:a b'", "model.arch: expected one of .*got 'net.py:a b'"),
        ("arch = 'net:f'\nwidth = 0.5", "model.width: expected 1.0, because only s3d, .* model.args; got 0.5"),
        ("args = {depth = 3}", "model.args: expected none with model.arch 's3d', .* got {'depth': 3}"),
        ("mean = [0, 0, 0]", "model.mean: expected none with model.arch 's3d'"),
        ("pool = 'class_token'", "model.pool: 'class_token' expects tokens, which model.arch 's3d' does not have"),
        ("arch = 'net:f'\nargs = 3", "model.args: expected a table, got 3"),
        ("arch = 'net:f'\nargs = {x = nan}", "model.args.x: expected text, a finite number, .* got nan"),
        ("arch = 'net:f'\nargs = {x = [1, 2000-01-01]}", r"model.args.x\[1\]: expected text, .* got datetime.date"),
        (
            "arch = 'net:f'\nmean = [0, 0, 0]",
            r"model.mean, model.std: expected both or neither, got \(0.0, .* and \(\)",
        ),
        ("arch = 'net:f'\nmean = [0]\nstd = [1]", r"model.mean: expected three numbers .*, got \[0.0\]"),
        ("arch = 'net:f'\nmean = [0,0,0]\nstd = [1,1,0]", r"model.std: expected three positive numbers .*got \[1.0"),
    ],
)
def test_settings_that_do_not_fit_the_network_are_refused(tmp_path, text, message):
    (tmp_path / "own.toml").write_text(f"[model]\n{text}\n")
    with pytest.raises(ConfigError, match=message):
        load(tmp_path / "own.toml")


def test_files_in_a_config_are_relative_to_it(tmp_path, monkeypatch):
    own_networks.write(tmp_path)
    (tmp_path / "weights").mkdir()
    (tmp_path / "own.toml").write_text(
        "[model]\narch = 'net.py:Tokens'\n[model.args]\npath = 'weights'\ndeep = {a = [1, 2.5, 'x', true]}\n"
    )
    model = load(tmp_path / "own.toml").model
    assert model.arch == f"{tmp_path}/net.py:Tokens" and model.args["path"] == f"{tmp_path}/weights"
    config = Config(model=model)
    assert Config.from_dict(config.to_dict()) == config
    assert model.identity["arch"] == "net.py:Tokens"
