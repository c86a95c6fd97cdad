"""Folders for a hub: the same features bit for bit as retrieval computes, loaded with the package and with torch alone,
and a model card that says what the run recorded."""

from __future__ import annotations

import builtins
import dis
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import CodeType, ModuleType

import pytest
import torch
from support.own_networks import SOURCE
from support.small_runs import run, settings

import cpr_fast
from cpr_fast.cli import main
from cpr_fast.config import Config
from cpr_fast.errors import InputError
from cpr_fast.evaluate.features.pretrained import load_pretrained
from cpr_fast.evaluate.retrieval.summary import write_metrics
from cpr_fast.models import build_encoder
from cpr_fast.weights import hub
from cpr_fast.weights.checkpoint import save_checkpoint
from cpr_fast.weights.modeling import standalone_source
from cpr_fast.weights.standalone import read_tensors

pytestmark = pytest.mark.usefixtures("one_thread")

# Loads a folder where nothing but torch and NumPy can be imported; writes features and embedding of given clips.
ALONE = """
import importlib.abc, sys
class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in ('cpr_fast', 'safetensors', 'huggingface_hub', 'transformers'):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hidden())
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from modeling import from_pretrained
state = torch.random.get_rng_state()
held = torch.load(sys.argv[2], weights_only=True)
found = {}
for name, view in (("default", None), ("flow", "flow")):
    encoder = from_pretrained(sys.argv[1], view)
    with torch.no_grad():
        found[name] = {"features": encoder.features(held["clips"]), "embedding": encoder(held["clips"])}
assert not encoder.training and torch.equal(state, torch.random.get_rng_state())
found["prepared"] = encoder.prepare(held["frames"])
torch.save(found, sys.argv[3])
"""


def export(checkpoint, out, *options) -> int:
    return main(["export", str(checkpoint), "--to", "hub", "--out", str(out), *options])


def checkpoint(path: Path, views=("rgb", "flow"), size=32, frames=8, **model) -> Path:
    """Writes a checkpoint of untrained encoders whose BatchNorm statistics are not those of a new one."""
    config = Config.from_dict({"data": {"frames": frames, "size": size, "index": "/secret/place/train.csv"},
                               "model": {"width": 0.125, "feature_dim": 8} | model})  # fmt: skip
    encoders = {}
    for seed, view in enumerate(views):
        torch.manual_seed(seed)
        encoder = build_encoder(config.model, config.data)
        with torch.no_grad():
            encoder(torch.randn(3, 3, frames, size, size))
        encoders[view] = encoder.state_dict()
    return save_checkpoint(path, {"config": config.to_dict(), "encoders": encoders, "view": views[0]})


def undefined(code: CodeType, module: ModuleType) -> set[str]:
    """Returns the global names that the code of a module, with all of its functions, uses and the module lacks."""
    used = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    inner = (undefined(const, module) for const in code.co_consts if isinstance(const, CodeType))
    return {name for name in used if not hasattr(module, name) and not hasattr(builtins, name)}.union(*inner)


def modeling(folder: Path) -> ModuleType:
    """Returns the module of an exported folder."""
    spec = importlib.util.spec_from_file_location("modeling_of_a_folder", folder / "modeling.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "model",
    [
        {"arch": "s3d"},
        {"arch": "s3dg", "head": "pooled", "feature_dim": 128},
        {"arch": "s3d_milnce", "head": "unit", "feature_dim": 128},
        {"arch": "r3d"},
        {"arch": "r21d"},
        {"arch": "c3d", "head": "unit", "feature_dim": 64},
        {"arch": "vit", "width": 1.0, "args": {"tubelet": [2, 8, 8], "depth": 2, "width": 30, "heads": 5}},
    ],
    ids=lambda model: model["arch"],
)
def test_the_features_are_those_of_retrieval_with_torch_alone(tmp_path, model):
    file = checkpoint(tmp_path / "net.pt", **model)
    assert export(file, tmp_path / "net") == 0
    names = ["README.md", "config.json", "model.safetensors", "modeling.py"]
    assert sorted(path.name for path in (tmp_path / "net").iterdir()) == names
    clips, frames = torch.randn(3, 3, 8, 32, 32), torch.randint(256, (2, 8, 32, 32, 3), dtype=torch.uint8)
    torch.save({"clips": clips, "frames": frames}, tmp_path / "clips.pt")
    arguments = [str(tmp_path / name) for name in ("net", "clips.pt", "found.pt")]
    done = subprocess.run([sys.executable, "-c", ALONE, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    alone = torch.load(tmp_path / "found.pt", weights_only=True)
    for name, view in (("default", "rgb"), ("flow", "flow")):
        retrieval = load_pretrained(str(file)).encoders[view]
        loaded = cpr_fast.from_pretrained(tmp_path / "net", None if name == "default" else view)
        with torch.no_grad():
            features, embedding = retrieval.features(clips), retrieval(clips)
            assert torch.equal(loaded.features(clips), features) and torch.equal(loaded(clips), embedding)
        assert torch.equal(alone[name]["features"], features) and torch.equal(alone[name]["embedding"], embedding)
    assert not torch.equal(alone["default"]["features"], alone["flow"]["features"])
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(alone["prepared"], ((frames / 255 - mean) / std).permute(0, 4, 1, 2, 3))


@pytest.mark.parametrize(("module", "network"), sorted(set(hub.OWN.values())))
def test_the_code_of_a_folder_uses_no_name_that_it_lacks(tmp_path, module, network):
    (tmp_path / "modeling.py").write_text(standalone_source(module, network))
    code = compile((tmp_path / "modeling.py").read_text(), "modeling.py", "exec")
    local = {"__module__", "__qualname__", "__name__"}  # of class bodies
    assert undefined(code, modeling(tmp_path)) - local == set()


def test_the_folder_names_no_folder_of_the_machine(tmp_path):
    init = {"rgb": "/secret/place/theirs.pt"}
    assert export(checkpoint(tmp_path / "net.pt", arch="r3d", init=init), tmp_path / "net") == 0
    for path in (tmp_path / "net").iterdir():
        assert b"/secret" not in path.read_bytes() and str(tmp_path).encode() not in path.read_bytes()
    card = (tmp_path / "net" / "README.md").read_text()
    assert "Training videos: not recorded; index `train.csv`, split `train`." in card
    assert "It is set for clips of 8 frames of 32 x 32 pixels" in card  # no checkpoint of a run: it has no cycle


def test_the_view_of_the_command_is_the_default_of_the_folder(tmp_path):
    file = checkpoint(tmp_path / "net.pt", arch="r3d")
    assert export(file, tmp_path / "net", "--view", "flow") == 0
    expected = load_pretrained(str(file)).encoders["flow"].state_dict()
    found = cpr_fast.from_pretrained(tmp_path / "net").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_modeling_holds_the_code_of_one_network(tmp_path):
    assert export(checkpoint(tmp_path / "net.pt", arch="s3d"), tmp_path / "net") == 0
    code = (tmp_path / "net" / "modeling.py").read_text()
    imported = set(re.findall(r"^(?:from|import) (\w+)", code, re.MULTILINE))
    assert imported == {"__future__", "json", "pathlib", "torch", "typing"}
    assert "class S3D(" in code and "class R3D(" not in code and "pickle" not in code and "torch.load(" not in code


@pytest.fixture
def own_network(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "flat.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path / "elsewhere")
    return checkpoint(tmp_path / "net.pt", arch=f"{tmp_path}/elsewhere/flat.py:Tokens", width=1.0, head="mlp")


def test_a_network_of_the_user_is_loaded_by_its_name(tmp_path, own_network, capsys):
    assert export(own_network, tmp_path / "net") == 0
    assert "standalone: False" in capsys.readouterr().out
    assert not (tmp_path / "net" / "modeling.py").exists()
    assert "`flat.py:Tokens`, whose code this folder does not hold" in (tmp_path / "net" / "README.md").read_text()
    clips = torch.randn(2, 3, 8, 32, 32)
    expected = load_pretrained(str(own_network)).encoders["flow"]
    assert torch.equal(cpr_fast.from_pretrained(tmp_path / "net", "flow").features(clips), expected.features(clips))
    (tmp_path / "elsewhere" / "flat.py").unlink()
    with pytest.raises(InputError, match=r"expected the Python file 'flat.py', which does not exist"):
        cpr_fast.from_pretrained(tmp_path / "net")


def test_a_network_with_a_normalisation_of_its_own_is_loaded_by_the_package_alone(tmp_path):
    args = {"tubelet": [2, 8, 8], "depth": 1, "width": 30, "heads": 5}
    file = checkpoint(tmp_path / "net.pt", arch="vit", width=1.0, args=args, mean=[0.5] * 3, std=[0.25] * 3)
    assert export(file, tmp_path / "net") == 0
    assert not (tmp_path / "net" / "modeling.py").exists()
    clips, expected = torch.randn(2, 3, 8, 32, 32), load_pretrained(str(file)).encoders["rgb"]
    assert torch.equal(cpr_fast.from_pretrained(tmp_path / "net").features(clips), expected.features(clips))


def test_heads_on_stored_features_are_refused_by_name(tmp_path, capsys):
    config = Config.from_dict({"data": {"features": "store"}, "model": {"arch": "features", "args": {"width": 5}}})
    state = build_encoder(config.model, config.data).state_dict()
    file = save_checkpoint(tmp_path / "net.pt", {"config": config.to_dict(), "encoders": {"rgb": state}, "view": "rgb"})
    assert export(file, tmp_path / "net") == 2
    assert "trained on stored features, got 'hub'" in capsys.readouterr().err and not (tmp_path / "net").exists()


def test_a_network_that_is_built_from_a_folder_is_refused_by_name(tmp_path, monkeypatch):
    config = Config.from_dict({"model": {"arch": "nets:wrapped", "args": {"path": "/models/mine"}}})
    monkeypatch.setattr(hub, "load_trained", lambda path: (config, {"encoders": {"rgb": {}}}))
    with pytest.raises(InputError, match="model.args.path '/models/mine'.*or --to safetensors"):
        hub.export_folder("net.pt", tmp_path / "net", view=None, card=lambda about, payload: "")
    assert not (tmp_path / "net").exists()


VIDEOMAE = {"model_type": "videomae", "image_size": 32, "patch_size": 16, "num_frames": 8, "intermediate_size": 48,
            "hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2, "tubelet_size": 2}  # fmt: skip
VJEPA2 = {"model_type": "vjepa2", "crop_size": 32, "patch_size": 16, "frames_per_clip": 8, "hidden_size": 24,
          "num_attention_heads": 2, "num_hidden_layers": 2, "tubelet_size": 2, "pred_hidden_size": 24,
          "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1, "mlp_ratio": 3.0}  # fmt: skip


@pytest.mark.parametrize("settings", [VIDEOMAE, VJEPA2], ids=["videomae", "vjepa2"])
def test_a_model_of_transformers_from_a_folder_needs_that_folder_no_more(tmp_path, settings):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    folder = tmp_path / "model"
    model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(**settings))
    model.half().save_pretrained(folder)
    pixels = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.25, 0.2, 0.5]}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    args = {"path": str(folder)}
    file = checkpoint(tmp_path / "net.pt", arch="cpr_fast.models.huggingface:encoder", args=args, width=1.0)
    clips = torch.randn(2, 3, 8, 32, 32)
    with torch.no_grad():
        expected = load_pretrained(str(file)).encoders["rgb"].features(clips)
        assert export(file, tmp_path / "net") == 0
        shutil.rmtree(folder)
        assert torch.equal(cpr_fast.from_pretrained(tmp_path / "net").features(clips), expected)
    assert str(folder) not in "".join(path.read_text() for path in (tmp_path / "net").glob("*.[jm]*[dn]"))
    assert export(file, tmp_path / "again") == 2 and not (tmp_path / "again").exists()


def test_a_model_of_transformers_that_the_recipe_describes(tmp_path):
    pytest.importorskip("transformers", reason="needs transformers")
    args = {"config": VIDEOMAE}
    file = checkpoint(tmp_path / "net.pt", arch="cpr_fast.models.huggingface:encoder", args=args, width=1.0)
    assert export(file, tmp_path / "net") == 0
    clips = torch.randn(2, 3, 8, 32, 32)
    with torch.no_grad():
        expected = load_pretrained(str(file)).encoders["rgb"].features(clips)
        assert torch.equal(cpr_fast.from_pretrained(tmp_path / "net").features(clips), expected)


def test_bad_arguments_are_named(tmp_path, capsys):
    file = checkpoint(tmp_path / "net.pt", arch="r3d", views=("rgb",))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("mine")
    (tmp_path / "a").write_text("mine")
    for out, options, message in (
        ("other", (), "which holds 'thesis.tex'"),
        ("a", (), "is a file"),
        ("net.safetensors", (), "--out: expected the name of a folder"),
        ("new", ("--view", "flow"), "--view: expected one of the views of the checkpoint (rgb), got 'flow'"),
    ):
        assert export(file, tmp_path / out, *options) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists() and (tmp_path / "a").read_text() == "mine"
    assert export(file, tmp_path / "net") == 0
    with pytest.raises(InputError, match="view: expected one of rgb, got 'flow'"):
        cpr_fast.from_pretrained(tmp_path / "net", "flow")
    with pytest.raises(InputError, match=r"folder: expected a folder that .* does not exist"):
        cpr_fast.from_pretrained(tmp_path / "nothing")
    with pytest.raises(AttributeError, match="has no attribute 'from_pretraind'"):
        cpr_fast.from_pretraind  # noqa: B018


def test_a_folder_that_holds_files_is_not_written(tmp_path, capsys):
    file, folder = checkpoint(tmp_path / "net.pt", arch="r3d"), tmp_path / "net"
    assert export(file, folder) == 0
    (folder / "README.md").write_text("a card that was completed")
    assert export(file, folder) == 2
    assert f"--out: expected a new or an empty folder, got {str(folder)!r}, which holds" in capsys.readouterr().err
    assert (folder / "README.md").read_text() == "a card that was completed"


def test_the_card_names_the_folder_that_is_meant(tmp_path, monkeypatch, capsys):
    file, folder = checkpoint(tmp_path / "net.pt", arch="r3d"), tmp_path / "it's mine"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert export(file, ".") == 0
    assert "\n# it's mine\n" in (folder / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    assert export(file, "its own") == 0
    assert capsys.readouterr().out.endswith("hf upload USER/NAME 'its own'\n")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_torch_alone_encodes_in_other_dtypes(tmp_path, dtype):
    folder = tmp_path / "net"
    assert export(checkpoint(tmp_path / "net.pt", arch="r3d", views=("rgb",)), folder) == 0
    encoder, clips = modeling(folder).from_pretrained(folder), torch.randn(2, 3, 8, 32, 32)
    with torch.no_grad():
        expected = encoder(clips)
        found = encoder.to(dtype)(clips.to(dtype))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("config", ["{", "[]", '{"views": ["rgb"], "view": "rgb"}', "another"])
def test_torch_alone_names_a_config_that_is_not_its_own(tmp_path, config):
    folder = tmp_path / "net"
    assert export(checkpoint(tmp_path / "net.pt", arch="r3d", views=("rgb",)), folder) == 0
    about = (folder / "config.json").read_text().replace('"class": "R3D"', '"class": "S3D"')
    (folder / "config.json").write_text(about if config == "another" else config)
    with pytest.raises(ValueError, match=r"config.json': expected the file that was exported with this module"):
        modeling(folder).from_pretrained(folder)


@pytest.mark.parametrize("damage", ["short", "empty", "text", "another", "config"])
def test_a_damaged_folder_is_named(tmp_path, damage):
    assert export(checkpoint(tmp_path / "net.pt", arch="r3d"), tmp_path / "net") == 0
    file = tmp_path / "net" / "model.safetensors"
    data = file.read_bytes()
    if damage == "config":
        (tmp_path / "net" / "config.json").write_text("{}")
    elif damage == "another":
        assert export(checkpoint(tmp_path / "b.pt", arch="s3d"), tmp_path / "b") == 0
        file.write_bytes((tmp_path / "b" / "model.safetensors").read_bytes())
    else:
        file.write_bytes({"short": data[:-40], "empty": b"", "text": b"no tensors at all"}[damage])
    with pytest.raises(InputError, match=str(file if damage != "config" else "config.json")):
        cpr_fast.from_pretrained(tmp_path / "net")


def test_the_reader_of_tensors_equals_that_of_the_library(tmp_path):
    save = pytest.importorskip("safetensors.torch").save_file
    tensors = {
        "a": torch.randn(3, 5), "b": torch.tensor(7), "c": torch.empty(0, 4), "d": torch.randn(2, 3).bfloat16(),
        "e": torch.tensor([True, False]), "f": torch.randn(7).half(),
    }  # fmt: skip
    save(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    found = read_tensors(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[n], t) and found[n].dtype == t.dtype and found[n].shape == t.shape
               for n, t in tensors.items())  # fmt: skip


def test_the_card_says_what_the_run_recorded(tmp_path):
    folder = run(settings(tmp_path / "run"))
    last = folder / "checkpoints" / "last.pt"
    assert export(last, tmp_path / "before") == 0
    before = (tmp_path / "before" / "README.md").read_text()
    rates = {"r@1": 0.4567, "r@5": 0.5, "map": 0.125, "queries": 321, "gallery": 987}
    common = {"protocol": "clips", "recipe": "coclr", "view": "rgb", "indexes": ["/secret/test.csv"]}
    rows = [common | {"name": "trained"} | rates, common | {"name": "untrained", "r@1": 0.2, "r@5": None, "map": None}]
    write_metrics(folder, rows, [], [], None)
    assert export(last, tmp_path / "after") == 0
    after = (tmp_path / "after" / "README.md").read_text()
    matter = re.match(r"---\n(.*?)\n---\n", after, re.DOTALL)[1]
    assert re.findall(r"^(\w+):", matter, re.MULTILINE) == ["license", "library_name", "tags"]
    assert "license: unknown" in matter and "library_name: cpr_fast" in matter
    for text in (
        "trained with InfoNCE and CPR",
        "Training videos: 18; index: not recorded.",
        "It has seen clips of 8 frames of 16 x 16 pixels",
        "steps: 12, epochs: 4",
        '"ratio": 0.6',
    ):
        assert text in before and text in after, text
    outcome = next(row for row in map(json.loads, (folder / "metrics.jsonl").open()) if row["kind"] == "outcome")
    assert outcome["text"] in after and all(text in after for text in outcome["warnings"])
    assert "Results on labelled or unlabelled videos: not recorded." in before and "has not been measured" in before
    assert "| Trained | RGB | 45.7 % | 50.0 % | 12.5 % | 321 | 987 |" in after and "`test.csv`" in after
    assert "| Untrained network | RGB | 20.0 % | – | – | not recorded | not recorded |" in after
    assert "selects classifiers on the test split" in after and "selects classifiers" not in before
    assert "/secret" not in after and str(tmp_path) not in after
    assert export(folder / "checkpoints" / "step-00000009.pt", tmp_path / "earlier") == 0
    earlier, other_step = (tmp_path / "earlier" / "README.md").read_text(), "of an earlier or later step than"
    assert "steps: 9, epochs: 3" in earlier and other_step in earlier and other_step not in after
    recipe = json.loads(re.search(r"```json\n(.*?)```", after, re.DOTALL)[1])
    assert recipe["mining"] == {"stages": 3, "ratio": 0.6, "top_k": 2}  # nothing that has its default
    assert recipe["data"] == {"frames": 8, "size": 16, "batch_size": 6} and recipe["memory"] == {"size": 10}
    payload = torch.load(last, weights_only=True)
    payload["config"]["mining"]["stages"] = 1
    single = save_checkpoint(last.with_name("single.pt"), payload)
    assert export(single, tmp_path / "single") == 0
    assert "trained with InfoNCE and CoCLR" in (tmp_path / "single" / "README.md").read_text()
